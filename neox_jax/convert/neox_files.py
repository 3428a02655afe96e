"""The files of a NeoX checkpoint: of which layer and which rank each is, and what it holds.

Pipeline layout: `global_stepN/layer_XX-model_YY-model_states.pt`. Sequential layout: all layers of a rank in
`mp_rank_YY_model_states.pt`. In both the layers are numbered alike: 0 is the embedding, 2 to L+1 are the transformer's,
L+3 is the final norm and L+4 the output head (absent where it is tied).
Source: EleutherAI/gpt-neox, megatron/checkpointing.py.
"""

import dataclasses
import re
from pathlib import Path

from neox_jax.convert.byte_reader import FileReader
from neox_jax.convert.torch_files import read_torch_file
from neox_jax.errors import InputError

LATEST = "latest"
# At most four digits: what is not there is counted up to the highest number. One spelling of each number: two files
# could be of one layer.
LAYER_FILE = re.compile(r"layer_([0-9]{2}|[1-9][0-9]{2,3})-model_([0-9]{2}|[1-9][0-9]{2})-model_states\.pt")
RANK_FILE = re.compile(r"mp_rank_([0-9]{2}|[1-9][0-9]{2})_model_states\.pt")
STEP_FOLDER = re.compile(r"global_step[0-9]{1,20}")
MLP_NAMES = {"dense": {}, "linear": {"dense_h_to_4h": "linear1", "dense_4h_to_h": "linear2"}}

_BUFFER = re.compile(r".*rotary_emb\.inv_freq|.*_extra_state")


def is_neox_folder(path: str | Path) -> bool:
    """Whether this is a NeoX checkpoint folder: of several steps, of one, or of bare model files."""
    path = Path(path)
    if not path.is_dir():
        return False
    if model_files(path) or any(STEP_FOLDER.fullmatch(child.name) for child in path.iterdir() if child.is_dir()):
        return True
    return (path / LATEST).is_file() and STEP_FOLDER.fullmatch(_read_latest(path / LATEST)) is not None


def locate_step(folder: Path) -> Path:
    """The folder of the model files: this one, the one that `latest` names, or the only step.

    Raises: InputError where there is none, or no telling which.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give that of a NeoX checkpoint")
    if model_files(folder):
        return folder
    steps = sorted(child.name for child in folder.iterdir() if child.is_dir() and STEP_FOLDER.fullmatch(child.name))
    if (folder / LATEST).is_file():
        name = _read_latest(folder / LATEST)
        if not STEP_FOLDER.fullmatch(name):
            raise InputError(f"{folder / LATEST} says {name[:80]!r}; wanted the name of a folder, global_stepN")
        if not (folder / name).is_dir():
            raise InputError(f"{folder / LATEST} says {name}, which is not there; it has {', '.join(steps) or 'none'}")
    elif len(steps) == 1:
        name = steps[0]
    elif steps:
        raise InputError(f"{folder} has {len(steps)} steps and no file `latest`; give one: {', '.join(steps)}")
    else:
        raise InputError(f"{folder} is no NeoX checkpoint: no global_stepN and no *_model_states.pt in it")
    if not model_files(folder / name):
        raise InputError(f"{folder / name} has neither layer_XX-model_YY- nor mp_rank_YY_model_states.pt files")
    return folder / name


def model_files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if LAYER_FILE.fullmatch(path.name) or RANK_FILE.fullmatch(path.name)]


def _read_latest(path: Path) -> str:
    reader = FileReader(path)
    return reader.read(0, min(256, reader.num_bytes)).decode("utf-8", errors="replace").strip()


@dataclasses.dataclass(frozen=True)
class NeoxFiles:
    """All tensors of a step. found: (layer's number, name in the layer) -> rank -> tensor, names in the older spelling.
    paths: of the files that hold them.

    absent: (layer's number, rank) of the files that are not there or not readable, already reported; every tensor of
    theirs is missing for that reason.
    """

    paths: list[Path]
    ranks: range
    found: dict[tuple[int, str], dict[int, object]]
    absent: set[tuple[int, int]]

    @classmethod
    def open(cls, folder: Path, problems: list[str]) -> "NeoxFiles":
        layer_files = {}
        for path in model_files(folder):
            if match := LAYER_FILE.fullmatch(path.name):
                layer_files[int(match[1]), int(match[2])] = path
        if layer_files:
            return cls._open_layers(layer_files, problems)
        rank_files = {int(RANK_FILE.fullmatch(path.name)[1]): path for path in model_files(folder)}
        return cls._open_ranks(rank_files, problems)

    @classmethod
    def _open_layers(cls, paths: dict[tuple[int, int], Path], problems: list[str]) -> "NeoxFiles":
        files = cls(sorted(paths.values()), range(max(rank for _, rank in paths) + 1), {}, set())
        numbers = sorted({number for number, _ in paths})
        if len(numbers) * len(files.ranks) > 100 * len(paths):
            raise InputError(
                f"{files.paths[0].parent} has layer files of rank {files.ranks[-1]}, but nearly all of those of lower "
                "ranks are missing; download all, or remove what does not belong there"
            )
        for number in numbers:
            for rank in files.ranks:
                name = f"layer_{number:02d}-model_{rank:02d}-model_states.pt"
                if (number, rank) not in paths:
                    problems.append(f"{name} is missing; download it")
                    files.absent.add((number, rank))
                    continue
                try:
                    tree = read_torch_file(paths[number, rank], allow_unknown=True)
                except InputError as error:
                    problems.append(str(error))
                    files.absent.add((number, rank))
                    continue
                files._add(name, number, rank, tree, problems)
        return files

    @classmethod
    def _open_ranks(cls, paths: dict[int, Path], problems: list[str]) -> "NeoxFiles":
        files = cls(sorted(paths.values()), range(max(paths) + 1), {}, set())
        for rank in files.ranks:
            name = f"mp_rank_{rank:02d}_model_states.pt"
            if rank not in paths:
                problems.append(f"{name} is missing; download it")
                files.absent.add((-1, rank))
                continue
            try:
                tree = read_torch_file(paths[rank], allow_unknown=True)
            except InputError as error:
                problems.append(str(error))
                files.absent.add((-1, rank))
                continue
            module = tree.get("module") if isinstance(tree, dict) else None
            if not isinstance(module, dict):
                problems.append(f"{name} has no weights under 'module', and there are no layer files; download those")
                files.absent.add((-1, rank))
                continue
            layers: dict[int, dict] = {}
            for key, value in module.items():
                match = re.fullmatch(r"sequential\.(0|[1-9][0-9]{0,3})\.(.+)", str(key), re.DOTALL)
                if match:
                    layers.setdefault(int(match[1]), {})[match[2]] = value
                else:
                    problems.append(f"{name}: {str(key)[:100]!r} is no parameter of a GPT-NeoX")
            for number, layer in sorted(layers.items()):
                files._add(name, number, rank, layer, problems)
        return files

    def _add(self, file: str, number: int, rank: int, tree, problems: list[str]) -> None:
        if not isinstance(tree, dict):
            problems.append(f"{file} holds a {type(tree).__name__}; wanted the tensors of a layer by name")
            self.absent.add((number, rank))
            return
        for key, tensor in tree.items():
            if _BUFFER.fullmatch(str(key)):
                continue
            name = str(key)
            for old, new in MLP_NAMES["linear"].items():
                name = re.sub(rf"^mlp\.{new}\.", f"mlp.{old}.", name)
            ranks = self.found.setdefault((number, name), {})
            if not hasattr(tensor, "read"):
                problems.append(f"{file}: {name[:100]!r} is no tensor; wanted nothing but tensors there")
            elif rank in ranks:
                problems.append(f"{file} holds {name:.100} under both its older and its newer name; remove one")
            ranks[rank] = tensor

    def missing(self, number: int, rank: int) -> bool:
        """Whether the file that would hold this layer is known to be missing."""
        return (number, rank) in self.absent or (-1, rank) in self.absent

    def shape(self, number: int, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor on the first rank that has it."""
        shapes = [tensor.shape for tensor in self.found.get((number, name), {}).values() if hasattr(tensor, "shape")]
        return tuple(shapes[0]) if shapes else None

    @property
    def num_layers(self) -> int | None:
        """By the number of the final norm, else by that of the last transformer layer."""
        norms = [number - 3 for number, name in self.found if name == "norm.weight"]
        layers = [number - 1 for number, name in self.found if name == "input_layernorm.weight"]
        return max(norms or layers, default=None)
