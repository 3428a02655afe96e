"""Megatron's .bin/.idx files of tokens, read by memory map and written whole or not at all.

PREFIX.bin holds the raw tokens. PREFIX.idx, little-endian and without padding: 9 bytes of magic; u64 version 1; u8
dtype code; u64 N documents; u64 length of doc_idx; int32 [N] sizes in tokens; int64 [N] byte offsets into the .bin;
int64 doc_idx.   Source: EleutherAI/gpt-neox, megatron/data/indexed_dataset.py (MMapIndexedDataset).
"""

import array
import contextlib
import os
import struct
from pathlib import Path

import numpy as np

from neox_jax.errors import InputError

MAGIC, VERSION = b"MMIDIDX\0\0", 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float32, 7: np.float64, 8: np.uint16}
DTYPE_CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
CHECK_BLOCK = 1 << 20  # documents whose pointers are checked at a time: bounds the memory


def best_dtype(vocab_size: int) -> np.dtype:
    """What gpt-neox stores tokens of such a vocabulary in: u16 below 65500, else i32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedDataset:
    """Documents of tokens in PREFIX.bin and PREFIX.idx; nothing is read until it is asked for.

    sizes: int32 [N], tokens in each document. pointers: int64 [N], byte offsets. doc_idx: as stored. tokens: the whole
    .bin as one flat array; documents lie in it end to end, in order.
    Raises: InputError for files that are missing, truncated, not of this format, or not of each other.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = str(prefix)
        bin_path, idx_path = _paths(self.prefix)
        for path in (idx_path, bin_path):
            if not path.is_file():
                raise InputError(f"no file {path}; a dataset is named by its prefix: PREFIX.bin and PREFIX.idx")
        self.dtype, num_documents, len_doc_idx = _read_header(idx_path)
        index = np.asarray(np.memmap(idx_path, np.uint8, mode="r"))
        start = HEADER.size
        self.sizes = index[start : start + 4 * num_documents].view("<i4")
        start += 4 * num_documents
        self.pointers = index[start : start + 8 * num_documents].view("<i8")
        start += 8 * num_documents
        self.doc_idx = index[start : start + 8 * len_doc_idx].view("<i8")
        num_bytes = self._check_pointers(idx_path)
        if bin_path.stat().st_size != num_bytes:
            raise InputError(
                f"{bin_path} has {bin_path.stat().st_size} bytes; {idx_path.name} describes {num_bytes}: the file is "
                "truncated, or the two are not of one dataset"
            )
        self._bin_path, self._num_bytes = bin_path, num_bytes
        # an empty file cannot be mapped
        self.tokens = np.asarray(np.memmap(bin_path, self.dtype, mode="r") if num_bytes else np.empty(0, self.dtype))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> np.ndarray:
        """The tokens of document i, in the dtype of the file."""
        i = range(len(self))[i]  # negative indices, and IndexError
        start = self.pointers[i] // self.dtype.itemsize
        return self.tokens[start : start + self.sizes[i]]

    def check_whole(self) -> None:
        """To be called before a read: beyond the end of a mapped file the system kills the process.

        Raises: InputError where the .bin has become shorter since it was opened.
        """
        with contextlib.suppress(OSError):  # one that was removed or renamed is still mapped
            num_bytes = os.stat(self._bin_path).st_size
            if num_bytes < self._num_bytes:
                raise InputError(
                    f"{self._bin_path} has {num_bytes} bytes; {self._num_bytes} when it was opened: it was truncated "
                    "while it was read; copy it again"
                )

    def _check_pointers(self, idx_path: Path) -> int:
        """Checks that documents lie end to end; returns the bytes they take."""
        expected = 0
        for start in range(0, len(self), CHECK_BLOCK):
            nbytes = self.sizes[start : start + CHECK_BLOCK].astype(np.int64) * self.dtype.itemsize
            ends = expected + np.cumsum(nbytes)
            wrong = (nbytes < 0) | (self.pointers[start : start + CHECK_BLOCK] != ends - nbytes)
            if wrong.any():
                i = int(np.argmax(wrong))
                raise InputError(
                    f"{idx_path}: document {start + i} has {self.sizes[start + i]} tokens at byte "
                    f"{self.pointers[start + i]}; wanted byte {ends[i] - nbytes[i]}, the end of the one before: the "
                    "index is damaged; make it again"
                )
            expected = int(ends[-1])
        return expected


class IndexedDatasetWriter:
    """Writes PREFIX.bin and PREFIX.idx, which appear under their names only when the `with` block ends well.

    Raises: InputError for an empty dataset, or tokens that do not fit the dtype.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype):
        self.dtype = np.dtype(dtype)
        self._paths = _paths(str(prefix))
        self._temporary = [path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in self._paths]
        self._sizes = array.array("i")

    def __enter__(self) -> "IndexedDatasetWriter":
        self._paths[0].parent.mkdir(parents=True, exist_ok=True)
        self._bin = open(self._temporary[0], "wb")
        return self

    def add_document(self, tokens) -> None:
        """Appends one document: a sequence of ids."""
        tokens = np.asarray(tokens if len(tokens) else np.empty(0, self.dtype))
        if tokens.dtype != self.dtype:
            limits = np.iinfo(self.dtype)
            if tokens.min() < limits.min or tokens.max() > limits.max:
                raise InputError(
                    f"document {len(self._sizes)} has tokens from {tokens.min()} to {tokens.max()}, which do not fit "
                    f"{self.dtype}; choose the dtype by best_dtype(vocab_size)"
                )
        self._bin.write(tokens.astype(self.dtype, copy=False).tobytes())
        self._sizes.append(len(tokens))

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self._bin.close()
            if kind is None:
                self._finish()
        finally:
            for path in self._temporary:
                path.unlink(missing_ok=True)

    def _finish(self) -> None:
        if not self._sizes:
            raise InputError(f"no documents for {self._paths[0]}; an empty dataset is not written")
        sizes = np.array(self._sizes, np.int32)
        ends = np.cumsum(sizes, dtype=np.int64) * self.dtype.itemsize
        with open(self._temporary[1], "wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, DTYPE_CODES[self.dtype], len(sizes), len(sizes) + 1))
            sizes.tofile(file)
            (ends - sizes.astype(np.int64) * self.dtype.itemsize).tofile(file)
            np.arange(len(sizes) + 1, dtype=np.int64).tofile(file)
        for temporary, path in zip(self._temporary, self._paths, strict=True):
            os.replace(temporary, path)


def _paths(prefix: str) -> tuple[Path, Path]:
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def _read_header(path: Path) -> tuple[np.dtype, int, int]:
    """(dtype, N, length of doc_idx) of an .idx file of exactly the length that they ask for."""
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
    if header[: len(MAGIC)] != MAGIC:
        raise InputError(
            f"{path} starts with {header[: len(MAGIC)]!r}; wanted {MAGIC!r}: it is no Megatron (mmap) index; tokenise "
            "the text with `neox-jax tokenize`"
        )
    if len(header) < HEADER.size:
        raise InputError(f"{path} has {len(header)} bytes; wanted a header of {HEADER.size}: it is truncated")
    _, version, code, num_documents, len_doc_idx = HEADER.unpack(header)
    if version != VERSION:
        raise InputError(f"{path} is of version {version}; wanted version {VERSION}, which is the one there is")
    if code not in DTYPES:
        raise InputError(f"{path} has dtype code {code}; wanted one of {', '.join(map(str, DTYPES))}")
    got, wanted = path.stat().st_size, HEADER.size + 12 * num_documents + 8 * len_doc_idx
    if got != wanted:
        raise InputError(
            f"{path} has {got} bytes; {num_documents} documents want {wanted}: it is truncated or damaged; copy or "
            "make it again"
        )
    return np.dtype(DTYPES[code]), num_documents, len_doc_idx
