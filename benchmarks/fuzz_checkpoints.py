"""Opens mutated PyTorch files for as long as you like, and says what came of it: read, refused, or a defect of ours.

    python benchmarks/fuzz_torch_files.py --files 200000 --seed 1 --processes 2 --seconds-limit 3600

Every file must be read or refused by InputError, within MAX_SECONDS, without opening, importing or starting anything;
and one whose checksums were left as they were, if it is read, must give the values of the file that it was made from.
A defect is printed with the seed that makes its file again: `--seed N --first I --files 1`. Needs PyTorch, for what is
mutated: small files that torch wrote.
"""

import argparse
import collections
import concurrent.futures
import io
import itertools
import json
import pickletools
import random
import resource
import sys
import time
import traceback
import zipfile

import numpy as np

from neox_jax.convert.torch_files import LazyTensor, open_torch_file
from neox_jax.errors import InputError

MAX_SECONDS = 5.0
CHECKED_KINDS = ("anywhere", "cut", "splice", "directory")  # of which the checksums tell
KINDS = (*CHECKED_KINDS, "pickle", "opcodes")
EDGES = (0, 1, 0x7F, 0x80, 0xFF)
FORBIDDEN = ("open", "import", "exec", "compile", "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pickle.")
# What an attacker or a broken disk would put into a pickle, to be spliced in between opcodes.
PIECES = [
    *(bytes([code]) for code in b"()0123NRbtusae}].\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94\x95Qq\x00h\x01"),
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"X\x04\x00\x00\x00true\x85R",
    b"j\xff\xff\xff\x7f",
    b"r\xff\xff\xff\x7f",
    b"\x8d" + b"\xff" * 8,
    b"\x8b\xff\xff\xff\x7f",
    b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
    b"J\xff\xff\xff\xff",
    b"](" * 70,
    b"ccollections\nOrderedDict\n)R",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nDoubleStorage\n",
]

_watching, _seen = False, []


def _watch(event: str, args) -> None:
    if _watching and event.startswith(FORBIDDEN):
        _seen.append(event)


def make_seeds() -> list[bytes]:
    """Small files of torch.save's: state dicts, tied and strided tensors, checkpoints like NeoX's."""
    import torch

    torch.manual_seed(0)

    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tied = torch.ones(3, 2, dtype=torch.bfloat16)
    state = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)).state_dict()
    trees = [
        state,
        {"a": base, "t": base.t(), "s": base[1:, ::2], "e": base[:1].expand(3, 6), "one": tied, "two": tied},
        {"x": [1, 2**40, 1.5, None, True, "text", (1, (2, 3))], "p": torch.nn.Parameter(tied), "n": torch.tensor(3)},
        {
            "module": state,
            "args": argparse.Namespace(lr=0.1),
            "rng": np.random.RandomState(0).get_state(),
            "d": torch.float16,
        },
        {f"layers.{i}.weight": torch.full((2, 2), i, dtype=torch.int8) for i in range(12)},
    ]
    files = []
    for i, tree in enumerate(trees):
        for protocol in (2, 4 + i % 2):
            buffer = io.BytesIO()
            torch.save(tree, buffer, pickle_protocol=protocol)
            files.append(buffer.getvalue())
    return files


def mutate(seeds: list[bytes], rng: random.Random) -> tuple[str, bytes, bytes]:
    """(how, one of the seeds, a file that is a little different from it)."""
    kind = rng.choice(KINDS)
    seed = rng.choice(seeds)
    data = bytearray(seed)
    if kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "anywhere":
        _hit(data, 0, rng)
    elif kind == "splice":
        other = rng.choice(seeds)
        start, size = rng.randrange(len(other)), rng.choice((1, 4, 16, 64, 512))
        at = rng.randrange(len(data))
        data[at : at + rng.choice((0, size))] = other[start : start + size]
    elif kind == "directory":
        _hit(data, max(0, data.rfind(b"PK\x05\x06") - 900), rng)
    else:
        data = _with_pickle(seed, lambda pickle: _change_pickle(pickle, kind, rng))
    return kind, seed, bytes(data)


def _hit(data: bytearray, start: int, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        at = rng.randrange(start, len(data))
        data[at] = rng.choice((data[at] ^ (1 << rng.randrange(8)), rng.choice(EDGES), rng.randrange(256)))


def _change_pickle(pickle: bytes, kind: str, rng: random.Random) -> bytes:
    data = bytearray(pickle)
    if kind == "pickle":
        _hit(data, 0, rng)
        return bytes(data)
    # Whole opcodes taken out, put in or moved: what remains can mostly be parsed, and is run until it goes wrong.
    starts = [position for _, _, position in pickletools.genops(pickle)]
    opcodes = [pickle[start:end] for start, end in itertools.pairwise([*starts, len(pickle)])]
    for _ in range(rng.choice((1, 1, 2, 3))):
        first = rng.randrange(1, len(opcodes))
        piece = rng.choice(([rng.choice(PIECES)], opcodes[first : first + rng.choice((1, 2, 8, 40))]))
        at = rng.randrange(1, len(opcodes))
        opcodes[at : at + rng.choice((0, 0, 1, len(piece)))] = piece
    return b"".join(opcodes)


def _with_pickle(file: bytes, change) -> bytes:
    """The same file with another data.pkl and right checksums: a check of sums must not hide what comes after it."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(file)) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(zipfile.ZipInfo(name), change(data) if name.endswith("data.pkl") else data)
    return out.getvalue()


def try_file(data: bytes, *, allow_unknown: bool, original: bytes | None = None) -> str:
    """Opens a file and reads all that is in it: "read", "refused", or what is wrong with us.

    original: the file whose values it must have if it is read.
    """
    global _watching
    start = time.perf_counter()
    _seen.clear()
    _watching = True
    try:
        values = _read_all(data, allow_unknown)
        result = "read" if original is None or values == _read_all(original, allow_unknown) else "read wrong values"
    except InputError as error:
        result = "refused" if len(str(error)) < 2000 and "\n" not in str(error) else "a message that is not one line"
    except Exception as error:
        result = f"{type(error).__name__}: {error}; {traceback.extract_tb(error.__traceback__)[-1]}"
    finally:
        _watching = False
    if _seen:
        return f"did {_seen[0]}"
    seconds = time.perf_counter() - start
    return result if seconds < MAX_SECONDS else f"took {seconds:.1f} s"


def _read_all(data: bytes, allow_unknown: bool) -> list:
    """What is in a file, with the bits of each tensor, to be compared."""
    values = []
    with open_torch_file(data, allow_unknown=allow_unknown) as file:
        left = [file.tree]
        while left:
            node = left.pop()
            if isinstance(node, dict):
                values.append([*map(repr, node)])
                left += node.values()
            elif isinstance(node, (list, tuple)):
                values.append(len(node))
                left += node
            elif isinstance(node, LazyTensor):
                array = node.read()
                assert array.shape == node.shape
                assert array.nbytes <= len(data)
                values.append((array.shape, array.dtype.name, array.tobytes()))
            else:
                values.append(repr(node))
    return values


def fuzz(seeds: list[bytes], *, seed: int, first: int, stride: int, files: int, seconds_limit: float):
    """Tries files first, first+stride, ...: (Counter of (kind, result), list of (file, kind, defect), seconds)."""
    counts, defects, start = collections.Counter(), [], time.perf_counter()
    for index in range(first, files, stride):
        rng = random.Random(f"{seed}/{index}")
        kind, original, data = mutate(seeds, rng)
        checked = {"original": original} if kind in CHECKED_KINDS else {}
        result = try_file(data, allow_unknown=rng.random() < 0.5, **checked)
        known = result in ("read", "refused")
        counts[kind, result if known else "defect"] += 1
        if not known:
            defects.append((index, kind, result))
        if time.perf_counter() - start > seconds_limit:
            break
    return counts, defects, time.perf_counter() - start


sys.addaudithook(_watch)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=200_000, help="how many to make (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first file, to see one again")
    parser.add_argument("--seed", type=int, default=1, help="the same seed makes the same files (%(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="how many share the files (%(default)s)")
    parser.add_argument("--seconds-limit", type=float, default=600, help="to stop before the last (%(default)s)")
    args = parser.parse_args()
    if args.processes < 1:
        parser.error(f"--processes {args.processes}; wanted 1 or more")
    seeds = make_seeds()
    for data in seeds:  # also imports what is imported late
        assert try_file(data, allow_unknown=True) == "read"
    common = {"seed": args.seed, "files": args.first + args.files, "seconds_limit": args.seconds_limit}
    if args.processes == 1:
        results = [fuzz(seeds, first=args.first, stride=1, **common)]
    else:
        with concurrent.futures.ProcessPoolExecutor(args.processes) as pool:
            tasks = [
                pool.submit(fuzz, seeds, first=args.first + i, stride=args.processes, **common)
                for i in range(args.processes)
            ]
            results = [task.result() for task in tasks]
    counts = sum((result[0] for result in results), collections.Counter())
    seconds = max(result[2] for result in results)
    for index, kind, defect in (defect for result in results for defect in result[1]):
        print(f"DEFECT --seed {args.seed} --first {index} --files 1 ({kind}): {defect}")
    for (kind, result), count in sorted(counts.items()):
        print(f"{kind:10} {result:8} {count:9,}")
    total = sum(counts.values())
    num_defects = sum(len(result[1]) for result in results)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) // 1024
    summary = {"files": total, "seconds": round(seconds, 1), "files_per_second": round(total / seconds)}
    print(json.dumps({**summary, "defects": num_defects, "seed": args.seed, "peak_rss_mib": peak}))
    return 1 if num_defects else 0


if __name__ == "__main__":
    sys.exit(main())
