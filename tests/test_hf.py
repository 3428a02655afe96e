"""Hugging Face folders: the same logits and gradients as transformers, bit-equal round trips, every refusal."""

import dataclasses
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from variants import VARIANTS, random_model, random_reference

from neox_jax.config import ModelConfig
from neox_jax.convert import hf, names, stored
from neox_jax.convert.hf import is_hf_folder, load_hf, save_hf
from neox_jax.convert.hub import fetch_snapshot, looks_like_repo_id
from neox_jax.errors import InputError
from neox_jax.model import abstract_model
from neox_jax.sharding import make_mesh
from neox_jax.tokenizer import Tokenizer, train_tokenizer
from neox_jax.tree import named_leaves

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
AutoTokenizer, GPTNeoXForCausalLM = transformers.AutoTokenizer, transformers.GPTNeoXForCausalLM

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
TOKENS = np.random.default_rng(1).integers(0, 97, (2, 12))
QKV = "gpt_neox.layers.0.attention.query_key_value.weight"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """reference(name): (a folder that transformers wrote, its model)."""
    made = {}

    def get(name: str):
        if name not in made:
            folder, model = tmp_path_factory.mktemp(name), random_reference(VARIANTS[name])
            model.save_pretrained(folder)
            made[name] = folder, model
        return made[name]

    return get


@pytest.fixture
def small(tmp_path):
    """A folder of ours to do damage to."""
    folder = tmp_path / "small"
    save_hf(random_model(VARIANTS["pythia"]), folder)
    return folder


def loss(model, tokens):
    """The mean next-token cross-entropy."""
    log_probs = jax.nn.log_softmax(model(tokens)[:, :-1], axis=-1)
    return -jnp.mean(jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1))


def reference_logits(model, tokens=TOKENS) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.float().numpy()


def reference_gradients(model, tokens=TOKENS) -> dict[str, np.ndarray]:
    """The gradients of the same loss, by the name each has on disk."""
    tokens = torch.from_numpy(tokens)
    model.zero_grad()
    logits = model(tokens).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return {name.replace("lm_head", "embed_out"): p.grad.numpy() for name, p in model.named_parameters()}


def assert_same_bits(folder: Path, other: Path) -> None:
    ours, theirs = _all_tensors(folder), _all_tensors(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert ours[name].shape == theirs[name].shape
        assert ours[name].tobytes() == theirs[name].tobytes(), name


def _all_tensors(folder: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


# ---- parity


@pytest.mark.parametrize("name", VARIANTS)
def test_same_logits_and_gradients_as_transformers(name, reference):
    folder, theirs = reference(name)
    ours = load_hf(folder)

    wanted = reference_logits(theirs)
    error = np.abs(np.asarray(ours(TOKENS)) - wanted).max()
    assert np.abs(wanted).max() > 1, "the random weights prove nothing"
    assert error <= 2e-5  # measured over the variants: 8e-6

    gradients = reference_gradients(theirs)
    found = stored.from_model(jax.grad(loss)(ours, TOKENS)).tensors
    got = {name: stored.whole(tensor) for name, tensor in found.items()}
    assert got.keys() == gradients.keys()
    for key, g in gradients.items():
        assert np.abs(got[key] - g).max() <= 2e-5 * np.abs(g).max() + 1e-7, key  # measured: 7e-6 of the largest


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip_is_bit_equal_and_transformers_loads_it(name, reference, tmp_path):
    folder, theirs = reference(name)
    save_hf(load_hf(folder), tmp_path / "out")
    assert_same_bits(folder, tmp_path / "out")

    back, info = GPTNeoXForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    np.testing.assert_array_equal(reference_logits(back), reference_logits(theirs))


def test_every_parameter_is_in_the_table():
    for config in VARIANTS.values():
        model = abstract_model(ModelConfig.from_hf(config))
        assert named_leaves(model).keys() <= names.BY_NAME.keys()
    assert {row.name for row in names.ROWS} == set().union(
        *(named_leaves(abstract_model(ModelConfig.from_hf(config))) for config in VARIANTS.values())
    )


def test_gradients_are_saved_like_a_model(reference, tmp_path):
    folder, theirs = reference("tied")
    save_hf(jax.grad(loss)(load_hf(folder), TOKENS), tmp_path / "gradients")
    wanted, got = reference_gradients(theirs), _all_tensors(tmp_path / "gradients")
    assert got.keys() == wanted.keys()
    for key, g in wanted.items():
        np.testing.assert_allclose(got[key], g, atol=1e-4 * np.abs(g).max() + 1e-6, rtol=0)


def test_packed_segments_equal_segments_alone(reference):
    model = load_hf(reference("redpajama")[0])
    first, second = TOKENS[:1, :5], TOKENS[1:, :7]
    packed = np.concatenate([first, second], axis=1)
    segment_ids = np.array([[3] * 5 + [1] * 7])
    positions = np.array([[*range(5), *range(7)]])
    logits = np.asarray(model(packed, segment_ids=segment_ids, positions=positions))
    np.testing.assert_allclose(logits[:, :5], model(first), atol=2e-5)
    np.testing.assert_allclose(logits[:, 5:], model(second), atol=2e-5)
    assert np.abs(logits[:, 5:] - np.asarray(model(packed))[:, 5:]).max() > 0.1


def test_positions_mean_what_position_ids_mean(reference):
    folder, theirs = reference("polyglot")
    positions = np.array([[0, 1, 2, 3, 9, 10, 11, 20, 21, 30, 31, 40]])
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(TOKENS[:1]), position_ids=torch.from_numpy(positions)).logits.numpy()
    got = np.asarray(load_hf(folder)(TOKENS[:1], positions=positions))
    np.testing.assert_allclose(got, wanted, atol=2e-5)
    assert np.abs(wanted - reference_logits(theirs, TOKENS[:1])).max() > 0.1


# ---- what a folder may look like


def test_old_and_new_spelling_of_the_rotary_fields(reference, tmp_path):
    folder, theirs = reference("tied")  # transformers 5 wrote it: rope_parameters alone
    new = json.loads((folder / "config.json").read_text())
    assert "rotary_pct" not in new
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old |= {"rotary_pct": 0.5, "rotary_emb_base": 500}
    shutil.copytree(folder, tmp_path / "old")
    (tmp_path / "old" / "config.json").write_text(json.dumps(old))
    config = load_hf(folder).config
    assert (config.rotary_pct, config.rotary_emb_base) == (0.5, 500)
    np.testing.assert_array_equal(load_hf(tmp_path / "old")(TOKENS), load_hf(folder)(TOKENS))
    np.testing.assert_allclose(load_hf(tmp_path / "old")(TOKENS), reference_logits(theirs), atol=2e-5)


def test_written_config_has_both_spellings(small):
    config = json.loads((small / "config.json").read_text())
    assert config["rotary_pct"] == config["rope_parameters"]["partial_rotary_factor"] == 0.25
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert json.loads((small / "generation_config.json").read_text()) == {"bos_token_id": 0, "eos_token_id": 0}
    assert load_hf(small).config == ModelConfig.from_hf(VARIANTS["pythia"])


def test_shards_of_theirs_and_of_ours(reference, tmp_path):
    folder, theirs = reference("pythia")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=20_000)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 3
    model = load_hf(tmp_path / "theirs")
    save_hf(model, tmp_path / "ours", max_shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 3
    assert_same_bits(folder, tmp_path / "ours")
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * model.config.num_parameters
    assert max(path.stat().st_size for path in (tmp_path / "ours").glob("*.safetensors")) < 24_000
    save_hf(load_hf(tmp_path / "ours"), tmp_path / "again")
    assert_same_bits(folder, tmp_path / "again")
    back, info = GPTNeoXForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(back.lm_head.weight, theirs.lm_head.weight)


def test_base_model_export_and_old_buffers(reference, tmp_path):
    """A tied base model has all that is needed; exports before 2023 also hold masks and rotary frequencies."""
    folder, theirs = reference("tied")
    theirs.gpt_neox.save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    assert "embed_in.weight" in tensors
    for prefix in ("layers.0.attention.", "layers.1.attention."):
        tensors[prefix + "bias"] = np.tril(np.ones((1, 1, 64, 64), bool))
        tensors[prefix + "masked_bias"] = np.array(-1e9, np.float32)
        tensors[prefix + "rotary_emb.inv_freq"] = np.ones(2, np.float16)
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    np.testing.assert_array_equal(load_hf(tmp_path / "base")(TOKENS), load_hf(folder)(TOKENS))


def test_tied_model_with_a_stored_head(small, tmp_path):
    save_hf(random_model(VARIANTS["tied"]), tmp_path / "tied")
    path = tmp_path / "tied" / "model.safetensors"
    tensors = load_file(path)
    tensors["embed_out.weight"] = tensors["gpt_neox.embed_in.weight"].copy()
    save_file(tensors, path)
    assert load_hf(tmp_path / "tied").embed_out is None
    tensors["embed_out.weight"][-1, -1] += 1
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"tie_word_embeddings is true, but embed_out\.weight differs"):
        load_hf(tmp_path / "tied")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, reference, tmp_path):
    _, theirs = reference("pythia")
    exact = reference_logits(theirs)
    half = random_reference(VARIANTS["pythia"]).to(getattr(torch, dtype))
    half.save_pretrained(tmp_path / "half")
    ours = load_hf(tmp_path / "half")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(ours)} == {dtype}
    got, wanted = np.asarray(ours(TOKENS)), reference_logits(half)
    # As near to the float32 logits as transformers is in this dtype, rounding for rounding.
    error, their_error = np.abs(got - exact).max(), np.abs(wanted - exact).max()
    assert error <= 1.5 * their_error
    assert np.abs(got - wanted).max() <= 2 * their_error

    save_hf(ours, tmp_path / "out")
    assert_same_bits(tmp_path / "half", tmp_path / "out")
    assert str(GPTNeoXForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype) == f"torch.{dtype}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cast_once_as_torch_casts(dtype, reference, tmp_path):
    folder, _ = reference("pythia")
    random_reference(VARIANTS["pythia"]).to(getattr(torch, dtype)).save_pretrained(tmp_path / "half")
    save_hf(load_hf(folder, dtype=dtype), tmp_path / "cast")
    assert_same_bits(tmp_path / "half", tmp_path / "cast")
    wide = load_hf(tmp_path / "half", dtype=jnp.float32)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(wide)} == {"float32"}


# ---- meshes

MESHES = [{"data": 8}, {"fsdp": 8}, {"model": 4, "fsdp": 2}, {"data": 2, "fsdp": 2, "model": 2}]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_mesh_loads_the_same_model(sizes, reference, tmp_path, monkeypatch):
    folder, _ = reference("pythia")
    mesh = make_mesh(**sizes)
    source = hf.read_hf(folder)
    parts = []

    class Recorded:
        def __init__(self, name, tensor):
            self.name, self.tensor, self.shape, self.dtype = name, tensor, tensor.shape, tensor.dtype

        def read(self, slices):
            part = self.tensor.read(slices)
            parts.append((self.name, part.size))
            return part

    recorded = {name: Recorded(name, tensor) for name, tensor in source.tensors.items()}
    model = stored.to_model(dataclasses.replace(source, tensors=recorded), mesh=mesh)

    kernel = model.layers.attention.query_key_value.kernel[...]
    num_parts = sizes.get("fsdp", 1) * sizes.get("model", 1)
    assert kernel.addressable_shards[0].data.size == kernel.size // num_parts
    # Each device's part was read alone, and parts that replicas share once.
    wanted = [(QKV, 32 * 96 // num_parts)] * num_parts
    assert [part for part in parts if part[0] == QKV] == wanted

    tokens = np.tile(TOKENS, (4, 1))
    alone = np.asarray(load_hf(folder)(tokens))
    logits = np.asarray(model(tokens))
    np.testing.assert_allclose(logits[..., :97], alone, atol=2e-5)
    num_rows = -(-97 // sizes.get("model", 1)) * sizes.get("model", 1)
    assert model.config.padded_vocab_size == logits.shape[-1] == num_rows
    assert np.all(logits[..., 97:] == np.float32(-1e30))
    assert not np.asarray(model.embed_in.embedding[...])[97:].any()

    save_hf(model, tmp_path / "out")
    assert_same_bits(folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 97


def test_padding_over_more_devices_than_rows(tmp_path):
    """Some devices then hold rows of padding only."""
    config = {**VARIANTS["pythia"], "vocab_size": 3, "num_attention_heads": 8, "hidden_size": 64}
    model = random_model(config)
    save_hf(model, tmp_path / "a")
    loaded = load_hf(tmp_path / "a", mesh=make_mesh(model=8))
    assert loaded.embed_in.embedding.shape == (8, 64)
    np.testing.assert_array_equal(np.asarray(loaded.embed_in.embedding[...])[:3], model.embed_in.embedding[...])
    save_hf(loaded, tmp_path / "b")
    assert_same_bits(tmp_path / "a", tmp_path / "b")


def test_mesh_that_does_not_divide(small):
    with pytest.raises(InputError, match=r"heads 4 does not divide over model=8; try 8"):
        load_hf(small, mesh=make_mesh(model=8))


# ---- refusals


def edit(folder: Path, change) -> None:
    """Rewrites model.safetensors with change(tensors) applied."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(folder: Path, **options) -> str:
    with pytest.raises(InputError) as caught:
        load_hf(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_all_problems_at_once(small):
    def change(tensors):
        del tensors["embed_out.weight"], tensors["gpt_neox.final_layer_norm.bias"]
        tensors["gpt_neox.layers.1.mlp.extra\n.weight"] = np.ones(3, np.float32)
        tensors[QKV] = np.ascontiguousarray(tensors[QKV].T)
        tensors["gpt_neox.embed_in.weight"] = tensors["gpt_neox.embed_in.weight"].astype(np.int32)

    edit(small, change)
    message = refusal(small)
    for part in (
        "embed_out.weight [97, 32] is missing",
        "gpt_neox.final_layer_norm.bias [32] is missing",
        r"'gpt_neox.layers.1.mlp.extra\n.weight' is no parameter of this config",
        f"{QKV} is [32, 96], wanted [96, 32]",
        "gpt_neox.embed_in.weight is int32, wanted one of float32, bfloat16, float16",
    ):
        assert part in message


def test_many_problems_are_all_listed(small):
    edit(small, lambda tensors: [tensors.pop(key) for key in list(tensors) if ".layers.1." in key])
    message = refusal(small)
    assert message.count("is missing") == 12


def test_of_very_many_problems_the_first_are_listed(small):
    edit(small, lambda tensors: tensors.update({f"x{i:03d}": np.zeros(1, np.float32) for i in range(200)}))
    message = refusal(small)
    assert message.count("is no parameter") == 50
    assert message.endswith("'x049' is no parameter of this config; and 150 more")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000, but there are 40 tensors in all"),
        ("num_hidden_layers", 40, "gpt_neox.layers.3.input_layernorm.weight [32] is missing"),
        ("hidden_size", 2**31 - 32, "gpt_neox.embed_in.weight is [97, 32], wanted [97, 2147483616]"),
        ("vocab_size", 2**31 - 1, "gpt_neox.embed_in.weight is [97, 32], wanted [2147483647, 32]"),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_made_of_them(field, value, message, small):
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, field: value}))
    tracemalloc.start()
    try:
        assert message in refusal(small)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_a_vocabulary_of_another_size(small):
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 96}))
    message = refusal(small)
    assert "gpt_neox.embed_in.weight is [97, 32], wanted [96, 32]" in message
    assert "embed_out.weight is [97, 32], wanted [96, 32]" in message


def test_one_tensor_under_two_names(small):
    edit(small, lambda tensors: tensors.update({"embed_in.weight": tensors["gpt_neox.embed_in.weight"].copy()}))
    assert re.search(r"both '.*embed_in.weight' and '.*embed_in.weight' are there; remove one", refusal(small))


def test_mixed_dtypes(small):
    edit(small, lambda tensors: tensors.update({QKV: tensors[QKV].astype(np.float16)}))
    assert refusal(small).endswith("stores parameters as float16 and float32; pass a dtype to cast them all to")
    assert load_hf(small, dtype="float32").layers.attention.query_key_value.kernel.dtype == np.float32


@pytest.mark.parametrize("dtype", ["int8", "flaot32", np.int8])
def test_unknown_dtype(small, dtype):
    assert re.search(r"dtype is '(int8|flaot32)', which is not known", refusal(small, dtype=dtype))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no config.json; give a Hugging Face model folder"),
        ("{", "cannot be read as JSON"),
        ("[]", "holds a list; wanted a JSON object"),
        ('{"model_type": "gpt_neox", "model_type": "gpt_neox"}', "key 'model_type' is there twice"),
        ('{"model_type": "llama"}', "model_type is 'llama'; only 'gpt_neox' is read here"),
        ('{"a": ' + "9" * 5000 + "}", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        (" " * (16 << 20) + "{}", "larger than 16777216 bytes"),
        ('{"model_type": "\\ud800\\u001b[2J\\n"}', r"model_type is '\ud800\x1b[2J\n'; only"),
        ('{"model_type": "gpt_neox", "hidden_act": "silu"}', "hidden_act is 'silu'"),
        ('{"model_type": "gpt_neox", "rope_parameters": "default"}', "value of the wrong type"),
        ('{"model_type": "gpt_neox", "rotary_pct": "a quarter"}', "rotary_pct is 'a quarter'; it must be a number"),
    ],
)
def test_bad_config(small, text, message):
    (small / "config.json").unlink()
    assert not is_hf_folder(small)
    if text is not None:
        (small / "config.json").write_text(text)
    assert message in refusal(small)


def test_no_weights(small):
    (small / "model.safetensors").rename(small / "model-00001-of-00002.safetensors")
    assert "neither model.safetensors nor model.safetensors.index.json; download the index too" in refusal(small)
    (small / "model-00001-of-00002.safetensors").unlink()
    assert "neither model.safetensors nor pytorch_model.bin" in refusal(small)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_torch_bin(reference, tmp_path, shards, dtype):
    """Old exports: pytorch_model.bin with the buffers of old code in it, in one file or in shards."""
    folder, model = reference("pythia")
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    state = {name.replace("lm_head", "embed_out"): tensor for name, tensor in state.items()}
    state["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    state["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    state["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(4)
    shutil.copy(folder / "config.json", tmp_path)
    if shards == 1:
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        files = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
        weight_map = {name: files[i % shards] for i, name in enumerate(state)}
        for file in files:
            torch.save({name: state[name] for name in state if weight_map[name] == file}, tmp_path / file)
        index = {"metadata": {}, "weight_map": weight_map}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    ours = load_hf(tmp_path)
    wanted = named_leaves(load_hf(folder, dtype=str(dtype).removeprefix("torch.")))
    for name, leaf in named_leaves(ours).items():
        assert leaf.dtype == wanted[name].dtype
        np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)
    sharded = load_hf(tmp_path, mesh=make_mesh(fsdp=4, model=2))
    for name, leaf in named_leaves(sharded).items():
        np.testing.assert_array_equal(leaf[: wanted[name].shape[0]], wanted[name], err_msg=name)


def test_hostile_torch_bin(small, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (small / "model.safetensors").unlink()
    torch.save({QKV: Bomb()}, small / "pytorch_model.bin")
    message = refusal(small)
    assert "pytorch_model.bin" in message
    assert "system" in message
    assert not (tmp_path / "ran").exists()
    torch.save([torch.ones(2)], small / "pytorch_model.bin")
    assert "holds a list; wanted a dict of tensors" in refusal(small)
    torch.save({"epoch": 3}, small / "pytorch_model.bin")
    assert "'epoch' is no tensor" in refusal(small)


def header_edited(data: bytes, old: bytes, new: bytes) -> bytes:
    """The file with its header changed, its length adjusted."""
    (size,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + size].replace(old, new, 1)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "incomplete metadata"),
        (lambda data: data[:100], "invalid header length"),
        (lambda data: b"", "header too small"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "header too large"),
        (lambda data: header_edited(data, b'"dtype":"F32"', b'"dtype":"F31"'), "F31"),
        (lambda data: header_edited(data, b'"dtype":"F32"', b'"dtype":"F32","dtype":"F32"'), "duplicate field"),
        (
            lambda data: header_edited(data, b'"embed_out', b'"embed_out.weight":' + spec_of(data) + b',"embed_out'),
            "key 'embed_out.weight' is there twice",
        ),
    ],
    ids=["short by a byte", "header only", "empty", "git lfs pointer", "bad dtype", "field twice", "key twice"],
)
def test_damaged_weights(small, damage, message):
    path = small / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refused = refusal(small)
    assert f"{path} is damaged or no safetensors file" in refused
    assert message in refused


def test_what_a_file_says_does_not_reach_the_terminal_as_it_is(small):
    path = small / "model.safetensors"
    path.write_bytes(header_edited(path.read_bytes(), b'"F32"', b'"' + b"\\u001b[2J" + b"x" * 5000 + b'"'))
    message = refusal(small)
    assert message.isprintable()
    assert r"unknown variant `\x1b[2Jxxx" in message
    assert len(message) < 1000


@pytest.mark.parametrize("shape", [(0, 1 << 62), (1,) * 100], ids=["too large and empty", "100 dims"])
def test_shapes_that_no_array_has(shape, small):
    path = small / "model.safetensors"
    size = 4 * math.prod(shape)
    spec = json.dumps({"dtype": "F32", "shape": shape, "data_offsets": [0, size]})
    header = f'{{"a":{spec}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * size)
    assert "more dims or elements than there can be" in refusal(small)


@pytest.mark.parametrize("shape", [(), (3,), (1 << 40, 0)])
def test_a_tied_head_of_no_such_shape(shape, small):
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    value = np.ones(shape, np.float32)
    edit(small, lambda tensors: tensors.update({"gpt_neox.embed_in.weight": value, "embed_out.weight": value}))
    assert f"gpt_neox.embed_in.weight is {list(shape)}, wanted [97, 32]" in refusal(small)


def test_more_shards_than_a_process_may_open(tmp_path):
    save_hf(random_model({**VARIANTS["pythia"], "num_hidden_layers": 6}), tmp_path / "x", max_shard_bytes=1)
    assert len(list((tmp_path / "x").glob("*.safetensors"))) > 60
    program = """if True:
        import resource, sys
        from neox_jax.convert import hf, stored
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        model = hf.read_hf(sys.argv[1])
        assert all(stored.whole(tensor).shape == tensor.shape for tensor in model.tensors.values())
        """
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "x")], check=True, timeout=120)


def spec_of(data: bytes) -> bytes:
    return re.search(rb'"embed_out\.weight":(\{[^}]*\})', data)[1]


# ---- refusals of an index


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "sharded"
    save_hf(random_model(VARIANTS["pythia"]), folder, max_shard_bytes=60_000)
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


def edit_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    [
        *("../sharded/model-00001-of-00003.safetensors", "/etc/passwd", "a\\b", "..", "", 3, None, ["a"]),
        *("a\0", "a\n", "\ud800", "\x1b[2J", "\u202ea", "a" * 256, "ü" * 128),
    ],
)
def test_index_entry_that_is_no_bare_name(sharded, name):
    edit_index(sharded, lambda weight_map: weight_map.update({QKV: name}))
    assert f"{QKV!r} is in {name!r:.100}, which is no bare file name" in refusal(sharded)


def test_missing_and_damaged_shards(sharded):
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    message = refusal(sharded)
    assert f"{first} is not there; download it again; {second} is damaged" in message
    assert "is missing" not in message


def test_index_that_disagrees_with_the_shards(sharded):
    last = sorted(sharded.glob("*.safetensors"))[-1].name
    edit_index(sharded, lambda weight_map: weight_map.update({QKV: last, "gpt_neox.new": last}))
    edit_index(sharded, lambda weight_map: weight_map.pop("gpt_neox.embed_in.weight"))
    message = refusal(sharded)
    assert f"holds {QKV!r}, which model.safetensors.index.json does not say" in message
    assert f"says that {QKV!r} is in {last}, but it is not" in message
    assert f"says that 'gpt_neox.new' is in {last}, but it is not" in message
    assert "holds 'gpt_neox.embed_in.weight', which model.safetensors.index.json does not say" in message


def test_key_in_two_shards(sharded):
    first, *_, last = sorted(sharded.glob("*.safetensors"))
    save_file({**load_file(last), QKV: load_file(first)[QKV]}, last)
    assert f"{QKV!r} is in two shards, {first.name} and {last.name}" in refusal(sharded)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": "b", "a": "b"}}', "key 'a' is there twice"),
    ],
)
def test_bad_index(sharded, text, message):
    (sharded / "model.safetensors.index.json").write_text(text)
    assert message in refusal(sharded)


# ---- writing


def test_destination_with_something_in_it(small, tmp_path):
    model = random_model(VARIANTS["pythia"])
    for taken in (small, small / "config.json"):
        with pytest.raises(InputError, match="already has something in it; give a new or an empty folder"):
            save_hf(model, taken)
    (tmp_path / "empty").mkdir()
    save_hf(model, tmp_path / "empty")
    assert_same_bits(small, tmp_path / "empty")


def test_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    written = []

    write = hf.write_safetensors

    def interrupted(path, *args):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *args)
        assert not is_hf_folder(path.parent), "a folder half written must not look finished"

    monkeypatch.setattr(hf, "write_safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_hf(random_model(VARIANTS["pythia"]), tmp_path / "out", max_shard_bytes=20_000)
    assert written
    assert not list(tmp_path.iterdir())


def test_one_program_fetches_every_layer(small):
    model = load_hf(small)
    stored._take_on_device.clear_cache()
    for name, tensor in stored.from_model(model).tensors.items():
        if ".layers." in name:
            stored.whole(tensor)
    shapes = {leaf.shape for name, leaf in named_leaves(model).items() if name.startswith("layers.")}
    assert stored._take_on_device._cache_size() == len(shapes)


TEXTS = [
    "Hello world, hello",
    "def f():\n    return 1\n",
    " " * 32,
    "<|endoftext|>hi<|padding|>",
    "naïve café ✨ \t\tx",
]


def test_tokenizer_gives_the_same_ids_in_transformers(tmp_path):
    tokenizer = train_tokenizer(TEXTS * 3, vocab_size=290)
    model = random_model({**VARIANTS["pythia"], "vocab_size": 290})
    save_hf(model, tmp_path / "out", tokenizer_json=tokenizer.to_json())
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        encoded = theirs(text)
        assert encoded["input_ids"] == tokenizer.encode(text)
        assert encoded.keys() == {"input_ids", "attention_mask"}
        assert theirs.decode(encoded["input_ids"]) == tokenizer.decode(encoded["input_ids"])
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id, theirs.pad_token_id) == (0, 0, 0, 1)
    assert len(theirs) == tokenizer.vocab_size
    generated = GPTNeoXForCausalLM.from_pretrained(tmp_path / "out").generate(
        **theirs("Hello", return_tensors="pt"), max_new_tokens=2, do_sample=False
    )
    assert generated.shape[-1] >= 2


def test_tokenizer_of_another_kind_keeps_its_ids(tmp_path):
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"])
    backend.train_from_iterator(TEXTS, trainer)
    save_hf(random_model(VARIANTS["pythia"]), tmp_path / "out", tokenizer_json=backend.to_str())
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        assert theirs(text)["input_ids"] == backend.encode(text, add_special_tokens=False).ids
    assert theirs.eos_token_id == 2
    assert len(theirs) == backend.get_vocab_size()


def test_the_20b_tokenizer(tmp_path, shared_data):
    text = (shared_data / "20B_tokenizer.json").read_text()
    config = {**VARIANTS["pythia"], "vocab_size": 50304, "num_hidden_layers": 1}
    save_hf(random_model(config), tmp_path / "out", tokenizer_json=text)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), Tokenizer.from_json(text)
    prose = (shared_data / "wikitext2_valid.txt").read_text()[:20000]
    for sample in [*TEXTS, prose]:
        assert theirs(sample, verbose=False)["input_ids"] == ours.encode(sample)
    assert theirs("def f():\n    return 1\n")["input_ids"] == [1545, 269, 14850, 187, 50274, 2309, 337, 187]
    assert len(theirs) == 50277


def test_tokenizer_with_more_ids_than_the_model(tmp_path):
    tokenizer = train_tokenizer(TEXTS * 3, vocab_size=290)
    with pytest.raises(InputError, match=r"the tokenizer has ids up to 289, but the model's vocab_size is 97"):
        save_hf(random_model(VARIANTS["pythia"]), tmp_path / "out", tokenizer_json=tokenizer.to_json())
    assert not list(tmp_path.iterdir())


# ---- the hub


@pytest.mark.parametrize(
    ("source", "answer"),
    [
        ("EleutherAI/pythia-70m", True),
        ("EleutherAI/gpt-neox-20b", True),
        ("./folder/model", False),
        ("/some/model", False),
        ("model", False),
        ("a/b/c", False),
        ("a/", False),
        ("../b", False),
        ("runs/a@3", False),
    ],
)
def test_looks_like_repo_id(source, answer):
    assert looks_like_repo_id(source) is answer


def test_hub_cache_offline(small, tmp_path):
    """In a process of its own, since huggingface_hub reads its environment once."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "home" / "hub" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(small, repository / "snapshots" / commit)
    program = """
import sys
from neox_jax.convert.hub import fetch_snapshot
from neox_jax.errors import InputError
for repo_id, revision in [("org/name", None), ("org/name", sys.argv[1]), ("org/name", "step3"), ("org/none", None),
                          ("org//x", None)]:
    try:
        print(fetch_snapshot(repo_id, revision=revision))
    except InputError as error:
        print("refused:", error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "JAX_PLATFORMS": "cpu"}
    environment.pop("HF_HUB_CACHE", None)
    run = subprocess.run(
        [sys.executable, "-c", program, commit], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    main, by_commit, no_revision, no_repository, no_name = run.stdout.splitlines()
    assert Path(main) == Path(by_commit) == repository / "snapshots" / commit
    assert load_hf(main).config == ModelConfig.from_hf(VARIANTS["pythia"])
    unreachable = "is no folder here, nor in the hub's cache, and the hub cannot be reached"
    assert no_revision.startswith(f"refused: org/name at revision step3 {unreachable}")
    assert no_repository.startswith(f"refused: org/none {unreachable}")
    assert no_name == "refused: 'org//x' is neither a folder here nor a repository id (owner/name)"


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install neox_jax\[hub\]"):
        fetch_snapshot("org/name")
