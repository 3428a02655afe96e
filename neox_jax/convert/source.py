"""One way in and one way out: a SOURCE is recognised by its content, whatever kind it is."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from neox_jax.checkpoint.manager import STEPS_FOLDER, list_steps, read_meta, read_tree, save_params
from neox_jax.config import DTYPES, check_choice
from neox_jax.convert import hf, hub, neox
from neox_jax.errors import InputError
from neox_jax.model import NeoX, abstract_model
from neox_jax.sharding import AXES
from neox_jax.tokenizer import Tokenizer
from neox_jax.train_state import pure_params

TOKENIZER_FILE = "tokenizer.json"
FORMATS = ("hf", "orbax", "neox")


def load_model(source: str | Path, *, mesh=None, dtype=None, revision: str | None = None) -> NeoX:
    """Loads a model from a SOURCE: a Hugging Face folder or hub id, a NeoX checkpoint (pipeline or sequential layout,
    any tensor parallelism), a run folder (its latest step, or `folder@step`), or a folder of one of its steps.

    mesh: ours, or any whose axis names are among ours. dtype: parameters are cast to it once; None keeps what is
    stored. revision: of a hub id.
    Raises: InputError if nothing recognisable is there, or what is there is incomplete; never a random model.
    """
    if mesh is not None and not set(mesh.axis_names) <= set(AXES):
        raise InputError(f"mesh axes {mesh.axis_names}: each must be one of {', '.join(AXES)}")
    if dtype is not None:
        name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
        check_choice("dtype", name, DTYPES)
        dtype = jnp.dtype(name)
    kind, folder = locate(source, revision=revision)
    load = {"hf": hf.load_hf, "neox": neox.load_neox, "orbax": _load_step}[kind]
    return load(folder, mesh=mesh, dtype=dtype)


def load_tokenizer(source: str | Path, *, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a SOURCE, or of a tokenizer.json file. Raises: InputError if there is none."""
    if Path(source).is_file():
        return Tokenizer.from_file(source)
    kind, folder = locate(source, revision=revision)
    if kind == "orbax":
        folder = folder.parent.parent  # a run's tokenizer is beside its checkpoints
    elif kind == "neox" and not (folder / TOKENIZER_FILE).is_file():
        folder = neox.locate_step(folder).parent
    if not (folder / TOKENIZER_FILE).is_file():
        raise InputError(f"{folder} has no {TOKENIZER_FILE}; name a tokenizer file, or copy the model's beside it")
    return Tokenizer.from_file(folder / TOKENIZER_FILE, eos_token_id=_stated_eos(folder))


def save_model(
    model: NeoX,
    path: str | Path,
    *,
    format: str = "hf",
    tokenizer: Tokenizer | None = None,
    tensor_parallel: int = 1,
) -> None:
    """Writes a model in its own dtype, with its configuration and, where given, its tokenizer.

    format: hf (a folder that transformers loads), orbax (a run folder with the parameters as step 0) or neox (NeoX's
    pipeline layout, cut for tensor_parallel ranks). Takes any pytree of the model's structure: gradients, for one.
    Nothing half-written is left behind.
    Raises: InputError for another format, or a folder that is there already and not empty.
    """
    check_choice("format", format, FORMATS)
    path = Path(path)
    tokenizer_json = None if tokenizer is None else tokenizer.to_json()
    if tensor_parallel != 1 and format != "neox":
        raise InputError(f"tensor_parallel {tensor_parallel} is of NeoX's layout only; {format} has one part")
    if format == "hf":
        hf.save_hf(model, path, tokenizer_json=tokenizer_json)
        return
    if format == "neox":
        neox.save_neox(model, path, tensor_parallel=tensor_parallel, tokenizer_json=tokenizer_json)
        return
    hf.require_new(path)
    path.mkdir(parents=True, exist_ok=True)
    if tokenizer_json is not None:
        (path / TOKENIZER_FILE).write_text(tokenizer_json, encoding="utf-8")
    save_params(pure_params(model), path, model.config)


def compare_models(one: NeoX, other: NeoX) -> list[str]:
    """What differs between two models' tensors, bit for bit, under Hugging Face's names; empty where nothing does.

    Rows that only pad a vocabulary for a mesh do not count. A layer of a parameter is on the host at a time.
    """
    ours, theirs = ({tensor.name: tensor for tensor in hf.stored_tensors(model)} for model in (one, other))
    found = [f"{name} is in the first only" for name in ours if name not in theirs]
    found += [f"{name} is in the second only" for name in theirs if name not in ours]
    for name in [name for name in ours if name in theirs]:
        kinds = [f"{tensor.dtype.name}{list(tensor.shape)}" for tensor in (ours[name], theirs[name])]
        if kinds[0] != kinds[1]:
            found.append(f"{name} is {kinds[0]} and {kinds[1]}")
            continue
        a, b = ours[name].fetch(), theirs[name].fetch()
        if a.tobytes() != b.tobytes():
            gap = np.abs(a.astype(np.float64) - b.astype(np.float64)).max()
            found.append(f"{name} differs, by at most {gap:.3g}")
    return found


def locate(source: str | Path, *, revision: str | None = None) -> tuple[str, Path]:
    """Recognises a SOURCE by its content: (kind, folder), for orbax the folder of the chosen step."""
    text, _, step = str(source).rpartition("@")
    if text and step.isdigit() and Path(text).is_dir():
        return "orbax", _run(Path(text), int(step))
    path = Path(source)
    if path.is_dir():
        if (path / STEPS_FOLDER).is_dir():
            return "orbax", _run(path, None)
        if path.name.isdigit() and (path / "params").is_dir():
            return "orbax", path
        if neox.is_neox_folder(path):
            return "neox", path
        if hf.is_hf_folder(path):
            return "hf", path
        raise InputError(
            f"{path} is no model: wanted a Hugging Face folder (config.json and *.safetensors), a run folder "
            f"({STEPS_FOLDER}/STEP) or a NeoX checkpoint (latest and global_stepN)"
        )
    if not path.exists() and hub.looks_like_repo_id(str(source)):
        return "hf", hub.fetch_snapshot(str(source), revision=revision)
    raise InputError(f"no model at {source}: no such folder, and not the id of a model on the hub (ORGANISATION/NAME)")


def _run(folder: Path, step: int | None) -> Path:
    steps = list_steps(folder / STEPS_FOLDER)
    if not steps:
        raise InputError(f"{folder / STEPS_FOLDER} holds no complete checkpoint yet")
    if step is not None and step not in steps:
        raise InputError(f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    return folder / STEPS_FOLDER / str(steps[-1] if step is None else step)


def _load_step(step_folder: Path, *, mesh, dtype) -> NeoX:
    config, stored_dtype = read_meta(step_folder)
    target = abstract_model(config, dtype=stored_dtype, mesh=mesh)
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), target)
    graphdef, _ = nnx.split(target)
    model = nnx.merge(graphdef, read_tree(step_folder / "params", pure_params(target)))
    return model if dtype is None else jax.tree.map(lambda x: x.astype(dtype), model)


def _stated_eos(folder: Path) -> int | None:
    """The eos id that a Hugging Face folder's config.json states, for tokenizers that do not say which it is."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return eos if isinstance(eos, int) else None
