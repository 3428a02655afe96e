"""Tokens in one raw file, or in the numbered shards that such a file was cut into, read as one array."""

import bisect
import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from neox_jax.errors import InputError

SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.bin")


class TokenFiles:
    """Tokens end to end over `paths`, by memory map; nothing is read until it is asked for."""

    def __init__(self, paths: list[Path], dtype: np.dtype):
        self.paths, self.dtype = paths, dtype
        self._num_bytes = [path.stat().st_size for path in paths]
        # An empty file cannot be mapped.
        self._maps = [
            np.asarray(np.memmap(path, dtype, mode="r") if num_bytes else np.empty(0, dtype))
            for path, num_bytes in zip(paths, self._num_bytes, strict=True)
        ]
        self._ends = np.cumsum(self._num_bytes, dtype=np.int64) // dtype.itemsize
        self._bounds = self._ends.tolist()  # plain numbers are quicker to search

    def __len__(self) -> int:
        return self._bounds[-1]

    def read(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The tokens of runs [m] one after the other: int64 starts and lengths [m] -> [lengths.sum()].

        Raises: InputError where a file has become shorter since it was opened.
        """
        self._check_whole()  # beyond the end of a mapped file the system kills the process
        if len(self._maps) == 1:
            tokens = self._maps[0]
            views = [
                tokens[start:stop] for start, stop in zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
            ]
        else:
            stops = (starts + lengths).tolist()
            views = [view for run in zip(starts.tolist(), stops, strict=True) for view in self._views(*run)]
        return np.concatenate(views) if views else np.empty(0, self.dtype)

    def place(self, token: int) -> str:
        """The file that holds this token."""
        return str(self.paths[bisect.bisect_right(self._bounds, token)])

    def _views(self, start: int, stop: int) -> Iterator[np.ndarray]:
        while start < stop:
            k = bisect.bisect_right(self._bounds, start)
            begin, end = (self._bounds[k - 1] if k else 0), min(stop, self._bounds[k])
            yield self._maps[k][start - begin : end - begin]
            start = end

    def _check_whole(self) -> None:
        for path, wanted in zip(self.paths, self._num_bytes, strict=True):
            with contextlib.suppress(OSError):  # one that was removed or renamed is still mapped
                num_bytes = os.stat(path).st_size
                if num_bytes < wanted:
                    raise InputError(
                        f"{path} has {num_bytes} bytes; {wanted} when it was opened: it was truncated while it was "
                        "read; copy it again"
                    )


def find_token_files(prefix: str, num_bytes: int, itemsize: int) -> list[Path]:
    """PREFIX.bin, or else its shards PREFIX-00000-of-00020.bin and so on, which have num_bytes together.

    Raises: InputError naming the file that is missing, or whose size does not fit.
    """
    whole = Path(f"{prefix}.bin")
    paths = [whole] if whole.is_file() else _find_shards(prefix)
    sizes = [path.stat().st_size for path in paths]
    if sum(sizes) != num_bytes:
        which = whole if len(paths) == 1 else f"{paths[0]} to {paths[-1].name}"
        raise InputError(
            f"{which} has {sum(sizes)} bytes; {Path(prefix).name}.idx describes {num_bytes}: the file is truncated, or "
            f"the two are not of one dataset{_describe_shards(paths, sizes)}"
        )
    for path, size in zip(paths, sizes, strict=True):
        if size % itemsize:
            raise InputError(f"{path} has {size} bytes, no whole number of tokens of {itemsize}; copy it again")
    return paths


def _find_shards(prefix: str) -> list[Path]:
    """Those there are. The number behind "of" is that of the last shard, as Pythia has it, or how many there are."""
    name = Path(prefix).name
    shards, last = {}, set()
    for path in Path(prefix).parent.glob("*.bin"):
        match = SHARD.fullmatch(path.name.removeprefix(name)) if path.name.startswith(name) else None
        if match:
            shards[int(match[1])] = path
            last.add(int(match[2]))
    if not shards:
        raise InputError(f"no file {prefix}.bin; a dataset is named by its prefix: PREFIX.bin and PREFIX.idx")
    if len(last) > 1:
        raise InputError(f"{prefix} has shards of several sets, of {sorted(last)}; remove those that do not belong")
    missing = [k for k in range(max(last)) if k not in shards]
    if missing:
        path = f"{prefix}-{missing[0]:05}-of-{max(last):05}.bin"
        raise InputError(f"no file {path}, one of {len(missing)} missing shards; download it")
    return [shards[k] for k in sorted(shards)]


def _describe_shards(paths: list[Path], sizes: list[int]) -> str:
    """What to look at where shards are too short together: the one that is unlike the others, or the last."""
    if len(paths) == 1:
        return ""
    usual = max(sizes[:-1], key=sizes[:-1].count)
    odd = [f"{path.name} has {size}" for path, size in zip(paths[:-1], sizes[:-1], strict=True) if size != usual]
    count = int(SHARD.search(paths[0].name)[2])
    if not odd and len(paths) == count:
        return f"; perhaps {paths[0].name.replace('-00000-of', f'-{count:05}-of')} is missing"
    return f" (shards have {usual}; {', '.join(odd) or 'the last may be shorter'})"
