"""Every attention backend against one plain formula: values, gradients, segments, meshes, vmap over stages, remat.

Splash runs interpreted here and cuDNN is only lowered for CUDA; what TPUs and GPUs make of them is not seen here.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neox_jax import attention, splash
from neox_jax.attention import causal_attention, default_backend, make_attend, save_attention
from neox_jax.errors import InputError
from neox_jax.sharding import make_mesh

BATCH, LENGTH, HEADS, HEAD_DIM = 4, 256, 4, 16
MESHES = (
    {"data": 2, "model": 4},
    {"seq": 2},
    {"seq": 4, "model": 2},
    {"seq": 2, "data": 2, "fsdp": 2},
    {"fsdp": 2, "seq": 2, "model": 2},
)


def mesh_of(**sizes):
    return make_mesh(**sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])


def name_of(sizes) -> str:
    return " ".join(f"{axis}={size}" for axis, size in sizes.items())


def inputs_of(batch=BATCH, length=LENGTH, heads=HEADS, head_dim=HEAD_DIM, dtype="float32", segments=False):
    """(q, k, v, the output's cotangent, segment ids or None)."""
    keys = jax.random.split(jax.random.key(0), 5)
    arrays = [jax.random.normal(key, (batch, length, heads, head_dim)).astype(dtype) for key in keys[:4]]
    ids = jnp.sort(jax.random.randint(keys[4], (batch, length), 0, 5), axis=1) if segments else None
    return *arrays, ids


def run(attend, q, k, v, cotangent, ids):
    """(output, gradients of q, k, v), jitted."""

    @jax.jit
    def both(q, k, v, cotangent, ids):
        out, pull_back = jax.vjp(lambda q, k, v: attend(q, k, v, segment_ids_BT=ids), q, k, v)
        return out, *pull_back(cotangent)

    return both(q, k, v, cotangent, ids)


def plain(q, k, v, cotangent, ids):
    """The formula and its derivative in numpy's float64."""
    q, k, v, cotangent = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v, cotangent))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    mask = np.tril(np.ones(scores.shape[-2:], bool))[None, None]
    if ids is not None:
        mask = mask & (np.asarray(ids)[:, None, :, None] == np.asarray(ids)[:, None, None, :])
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    weights_gradient = np.einsum("btnh,bsnh->bnts", cotangent, v)
    inner = (weights_gradient * weights).sum(-1, keepdims=True)
    scores_gradient = weights * (weights_gradient - inner) / np.sqrt(q.shape[-1])
    return (
        np.einsum("bnts,bsnh->btnh", weights, v),
        np.einsum("bnts,bsnh->btnh", scores_gradient, k),
        np.einsum("bnts,btnh->bsnh", scores_gradient, q),
        np.einsum("bnts,btnh->bsnh", weights, cotangent),
    )


def assert_close(found, wanted, *, out, gradients):
    """Largest differences relative to each array's largest element."""
    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    for name, a, b, tolerance in zip(names, found, wanted, (out, *3 * (gradients,)), strict=True):
        a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max() + 1e-8, name


@functools.cache
def on_one_device(backend: str, segments: bool):
    return run(make_attend(backend), *inputs_of(segments=segments))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks, whole and partly masked ones, for sequences of this size."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 64)
    monkeypatch.setattr(splash, "BLOCKS", (128,))


@pytest.mark.parametrize("segments", [False, True], ids=["", "segments"])
@pytest.mark.parametrize("backend", ["xla", "splash"])
def test_equals_the_formula(backend, segments):
    wanted = plain(*inputs_of(segments=segments))
    assert_close(on_one_device(backend, segments), wanted, out=1e-6, gradients=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("backend", ["xla", "splash"])
def test_sixteen_bits_stay_near_the_formula(backend, dtype):
    if (backend, dtype) == ("splash", "float16"):
        pytest.skip("splash has no float16")
    inputs = inputs_of(batch=2, dtype=dtype, segments=True)
    found = run(make_attend(backend), *inputs)
    assert {x.dtype for x in found} == {jnp.dtype(dtype)}
    rounding = float(jnp.finfo(dtype).eps)
    assert_close(found, plain(*inputs), out=2 * rounding, gradients=3 * rounding)


@pytest.mark.parametrize("length", [1, 65, 200])
def test_any_length_is_the_same_in_blocks(length, monkeypatch):
    inputs = inputs_of(batch=2, length=length, heads=2, segments=True)
    in_blocks = run(causal_attention, *inputs)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 1024)
    assert_close(in_blocks, run(causal_attention, *inputs), out=1e-6, gradients=1e-6)


def test_blocks_skip_the_keys_behind_them():
    """Of 16 blocks of scores, four rows of four, the xla reference computes ten."""
    inputs = inputs_of(batch=1, heads=1)
    program = str(jax.make_jaxpr(causal_attention)(*inputs[:3]))
    widths = [int(size) for size in re.findall(r"f32\[1,1,64,(\d+)\] = dot_general", program) if int(size) != HEAD_DIM]
    assert widths == [64, 128, 192, 256]


@pytest.mark.parametrize("length", [5, 130])
def test_splash_takes_any_length(length):
    inputs = inputs_of(batch=1, length=length, heads=2, segments=True)
    assert_close(run(make_attend("splash"), *inputs), plain(*inputs), out=1e-6, gradients=2e-6)


@pytest.mark.parametrize("head_dim", [32, 80, 96, 256])
def test_splash_takes_the_head_dims_of_the_family(head_dim):
    inputs = inputs_of(batch=1, length=128, heads=1, head_dim=head_dim)
    assert_close(run(make_attend("splash"), *inputs), plain(*inputs), out=1e-6, gradients=2e-6)


@pytest.mark.parametrize("backend", ["xla", "splash"])
@pytest.mark.parametrize("sizes", [{}, {"seq": 2}], ids=name_of)
def test_causality_by_gradients(backend, sizes):
    """Each token reaches its own output and those behind it in its segment, and no other."""
    attend = make_attend(backend, mesh_of(**sizes) if sizes else None)
    q, k, v, _, _ = inputs_of(batch=1, heads=1)
    ids = (jnp.arange(LENGTH) >= 140)[None].astype(jnp.int32)

    @jax.jit
    def reached(position):
        gradients = jax.grad(lambda *qkv: (attend(*qkv, ids)[0, position] ** 2).sum(), argnums=(0, 1, 2))(q, k, v)
        return [jnp.abs(x).sum((0, 2, 3)) > 0 for x in gradients]

    places = np.arange(LENGTH)
    for position in (1, 64, 139, 140, 200, 255):
        of_q, of_k, of_v = map(np.asarray, reached(position))
        seen = (places <= position) & ((places >= 140) == (position >= 140))
        np.testing.assert_array_equal(of_v, seen)
        if seen.sum() > 1:  # a token alone has weight 1 whatever its scores
            np.testing.assert_array_equal(of_k, seen)
            np.testing.assert_array_equal(of_q, places == position)


@pytest.mark.parametrize("segments", [False, True], ids=["", "segments"])
@pytest.mark.parametrize("sizes", MESHES, ids=name_of)
@pytest.mark.parametrize("backend", ["xla", "splash"])
def test_a_mesh_equals_one_device(backend, sizes, segments):
    found = run(make_attend(backend, mesh_of(**sizes)), *inputs_of(segments=segments))
    assert_close(found, on_one_device(backend, segments), out=1e-6, gradients=1e-5)


def test_results_stay_where_the_rules_put_them():
    mesh = mesh_of(fsdp=2, seq=2, model=2)
    for backend in ("xla", "splash"):
        for x in run(make_attend(backend, mesh), *inputs_of()):
            assert x.sharding.shard_shape(x.shape) == (BATCH // 2, LENGTH // 2, HEADS // 2, HEAD_DIM), backend


def run_stage(attend, q, k, v, ids):
    """Two layers of nothing but attention, checkpointed and scanned."""

    def layer(x, _):
        return attend(x, k, v, ids), None

    return jax.lax.scan(jax.checkpoint(layer, policy=save_attention), q, None, length=2)[0]


def on_stages(backend, mesh, q, k, v, segment_ids_BT):
    """As the pipeline has it: vmap over stages, a quarter of the rows for each of four or a half for each of two."""
    attend, stages = make_attend(backend, mesh), jax.NamedSharding(mesh, jax.P("pipe"))
    split = [x.reshape(mesh.shape["pipe"], -1, *x.shape[1:]) for x in (q, k, v, segment_ids_BT)]
    split = [jax.lax.with_sharding_constraint(x, stages) for x in split]
    out = jax.vmap(functools.partial(run_stage, attend), spmd_axis_name="pipe")(*split)
    return jax.lax.with_sharding_constraint(out, stages).reshape(q.shape)


@functools.cache
def in_turn():
    def attend(q, k, v, segment_ids_BT):
        return run_stage(make_attend("xla"), q, k, v, segment_ids_BT)

    return run(attend, *inputs_of(segments=True))


@pytest.mark.parametrize("backend", ["xla", "splash"])
@pytest.mark.parametrize("sizes", [{"pipe": 4}, {"pipe": 2, "fsdp": 2, "model": 2}], ids=name_of)
def test_under_vmap_over_stages(backend, sizes):
    attend = functools.partial(on_stages, backend, mesh_of(**sizes))
    assert_close(run(attend, *inputs_of(segments=True)), in_turn(), out=1e-6, gradients=1e-5)


@pytest.mark.parametrize("backend", ["xla", "splash"])
def test_stages_stay_apart(backend):
    """Rows, heads and stages are independent: there is nothing to send."""
    mesh = mesh_of(pipe=2, fsdp=2, model=2)
    place = jax.NamedSharding(mesh, jax.P("pipe", "fsdp", None, "model"))
    stages = [jax.ShapeDtypeStruct((2, 2, LENGTH, HEADS, HEAD_DIM), "float32", sharding=place)] * 3
    over_stages = jax.vmap(make_attend(backend, mesh), spmd_axis_name="pipe")
    text = jax.jit(over_stages, out_shardings=place).lower(*stages).compile().as_text()
    assert f"f32[1,1,{LENGTH},{HEADS // 2},{HEAD_DIM}]" in text  # a device's part
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", text)


def checkpointed(backend, mesh, policy):
    """Value and gradients of something behind attention that is recomputed as the policy says."""
    attend = make_attend(backend, mesh)

    def loss(q, k, v):
        return jnp.sin(attend(q, k, v).astype(jnp.float32)).sum()

    return jax.value_and_grad(jax.checkpoint(loss, policy=policy), argnums=(0, 1, 2))


@pytest.mark.parametrize("sizes", [{}, {"seq": 2, "model": 2}], ids=name_of)
def test_save_attention_keeps_what_splash_needs(sizes, capsys):
    """The output and the logsumexp are kept, once each; everything else comes from the arguments."""
    mesh = mesh_of(**sizes) if sizes else None
    q, k, v, _, _ = inputs_of()
    attend = make_attend("splash", mesh)
    jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(attend, policy=save_attention), q, k, v)
    kept = [line for line in capsys.readouterr().out.splitlines() if line.startswith("f32") and "argument" not in line]
    sizes = [np.prod([int(size) for size in re.match(r"f32\[(.*?)\]", line)[1].split(",")]) for line in kept]
    assert sorted(sizes) == [BATCH * HEADS * LENGTH, BATCH * HEADS * LENGTH * HEAD_DIM]


@pytest.mark.parametrize("backend", ["xla", "splash"])
def test_remat_changes_no_gradient(backend):
    mesh = mesh_of(fsdp=2, model=2)
    q, k, v, _, _ = inputs_of()
    _, wanted = jax.jit(checkpointed(backend, mesh, jax.checkpoint_policies.everything_saveable))(q, k, v)
    for policy in (save_attention, jax.checkpoint_policies.nothing_saveable):
        _, found = jax.jit(checkpointed(backend, mesh, policy))(q, k, v)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6 * float(jnp.abs(b).max()))


@pytest.fixture
def on_gpus(monkeypatch):
    """As if the devices were GPUs with cuDNN, to see what is handed to them."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(attention, "platform", lambda mesh: "gpu")
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91300)


def lowered(platform, function, *args) -> str:
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def cudnn_calls(text: str) -> list[str]:
    return sorted(re.findall(r"__cudnn\$fmha(\w+)", text))


@pytest.mark.parametrize("segments", [False, True], ids=["", "segments"])
@pytest.mark.parametrize("sizes", [{}, {"data": 2, "model": 2}, {"seq": 2, "model": 2}], ids=name_of)
def test_cudnn_lowers_for_cuda(sizes, segments, on_gpus):
    """One kernel each way; a mask only where there are segments or slices of the queries."""
    q, k, v, cotangent, ids = inputs_of(dtype="bfloat16", segments=segments)
    attend = make_attend("cudnn", mesh_of(**sizes) if sizes else None)

    def both(q, k, v, cotangent, ids):
        out, pull_back = jax.vjp(lambda q, k, v: attend(q, k, v, ids), q, k, v)
        return out, *pull_back(cotangent)

    text = lowered("cuda", both, q, k, v, cotangent, ids)
    kind = "ScaleBiasSoftmax" if segments or "seq" in sizes else "Softmax"
    assert cudnn_calls(text) == [kind, f"{kind}Backward"]
    assert ("CAUSAL" in text) == ("seq" not in sizes)
    # No scores: of arrays of length x length there is the mask, which has no heads.
    assert not re.search(rf"tensor<{BATCH}x{HEADS}x{LENGTH}x{LENGTH}x", text)


def test_cudnn_under_vmap_over_stages(on_gpus):
    q, k, v, _, _ = inputs_of(dtype="bfloat16")
    attend = make_attend("cudnn", mesh_of(pipe=2, fsdp=2, model=2))
    stages = [x.reshape(2, -1, *x.shape[1:]) for x in (q, k, v)]
    text = lowered("cuda", jax.vmap(attend, spmd_axis_name="pipe"), *stages)
    assert cudnn_calls(text) == ["Softmax"]


def test_save_attention_runs_no_cudnn_kernel_twice(on_gpus):
    q, k, v, _, _ = inputs_of(dtype="bfloat16")
    mesh = mesh_of(data=2, model=2)
    again = lowered("cuda", checkpointed("cudnn", mesh, jax.checkpoint_policies.nothing_saveable), q, k, v)
    once = lowered("cuda", checkpointed("cudnn", mesh, save_attention), q, k, v)
    assert cudnn_calls(again) == ["Softmax", "Softmax", "SoftmaxBackward"]
    assert cudnn_calls(once) == ["Softmax", "SoftmaxBackward"]


@pytest.mark.parametrize("head_dim", [80, 128])
def test_splash_lowers_for_tpus(head_dim, monkeypatch):
    """Pallas makes its three kernels of it, and no scores are outside of them."""
    monkeypatch.setattr(attention, "platform", lambda mesh: "tpu")
    attend = make_attend("splash", mesh_of(seq=2, model=2))
    q, k, v, _, ids = inputs_of(length=512, head_dim=head_dim, dtype="bfloat16", segments=True)
    gradients = jax.grad(lambda *qkv, ids: attend(*qkv, ids).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    text = lowered("tpu", lambda q, k, v, ids: gradients(q, k, v, ids=ids), q, k, v, ids)
    assert text.count("@tpu_custom_call") == 3
    assert "x512x512x" not in text
    assert "x256x512x" not in text


def test_default_backends():
    assert default_backend("tpu", dtype=jnp.bfloat16, head_dim=96) == "splash"
    assert default_backend("tpu", dtype=jnp.float32, head_dim=96) == "splash"
    assert default_backend("tpu", dtype=jnp.float16, head_dim=96) == "xla"
    assert default_backend("gpu", dtype=jnp.bfloat16, head_dim=96) == "cudnn"
    assert default_backend("gpu", dtype=jnp.dtype("float16"), head_dim=64) == "cudnn"
    assert default_backend("gpu", dtype=jnp.float32, head_dim=96) == "xla"
    assert default_backend("gpu", dtype=jnp.bfloat16, head_dim=256) == "xla"
    assert default_backend("cpu", dtype=jnp.bfloat16, head_dim=96) == "xla"


def test_wrong_backends_are_one_line():
    for backend, wanted in {
        "flash": "attention 'flash': wanted one of xla, cudnn, splash",
        "auto": "attention 'auto': wanted one of xla, cudnn, splash",
        "cudnn": "attention cudnn is for GPUs, and these devices are cpu; use xla",
    }.items():
        with pytest.raises(InputError) as error:
            make_attend(backend)
        assert str(error.value) == wanted


def test_splash_is_not_for_gpus(on_gpus):
    with pytest.raises(InputError, match="attention splash is for TPUs, and these devices are gpu; use cudnn or xla"):
        make_attend("splash")


@pytest.mark.parametrize("backend", ["xla", "splash"])
@pytest.mark.parametrize(
    ("sizes", "shape", "wanted"),
    [
        ({"seq": 4}, {"length": 30}, "attention: sequence 30 does not divide over seq=4; try 32"),
        ({"model": 4}, {"heads": 6}, "attention: heads 6 does not divide over model=4; try 8"),
        ({"data": 2, "fsdp": 2}, {"batch": 6}, "attention: batch 6 does not divide over data=2 x fsdp=2; try 8"),
    ],
)
def test_what_does_not_divide_over_the_mesh(backend, sizes, shape, wanted):
    q, k, v, _, _ = inputs_of(**shape)
    with pytest.raises(InputError) as error:
        make_attend(backend, mesh_of(**sizes))(q, k, v)
    assert str(error.value) == wanted


def test_what_cudnn_does_not_take(on_gpus):
    attend = make_attend("cudnn")
    for shape, wanted in (
        ({"dtype": "float32"}, "attention cudnn: dtype float32, wanted bfloat16 or float16; or use xla"),
        ({"head_dim": 20}, "attention cudnn: head_dim 20, wanted a multiple of 8 up to 256; use xla"),
        ({"head_dim": 256}, "attention cudnn: The head dim must be <= 128"),  # by jax, of GPUs before Hopper
        ({"length": 15, "segments": True}, "attention cudnn: length 15 with a mask, wanted an even one; or use xla"),
    ):
        q, k, v, _, ids = inputs_of(**{"dtype": "bfloat16", **shape})
        with pytest.raises(InputError) as error:
            attend(q, k, v, ids)
        assert str(error.value).startswith(wanted)
        assert "\n" not in str(error.value)


def test_splash_has_no_float16():
    q, k, v, _, _ = inputs_of(dtype="float16")
    with pytest.raises(InputError, match="attention splash: dtype float16, wanted bfloat16 or float32; or use xla"):
        make_attend("splash")(q, k, v)
