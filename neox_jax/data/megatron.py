"""Megatron's .bin/.idx files of tokens, read by memory map and written whole or not at all.

PREFIX.bin holds the raw tokens, or its shards do (`token_files`). PREFIX.idx, little-endian and without padding: 9
bytes of magic; u64 version 1; u8 dtype code; u64 N documents; u64 length of doc_idx; int32 [N] sizes in tokens; int64
[N] byte offsets into the .bin; int64 doc_idx.   Source: EleutherAI/gpt-neox, megatron/data/indexed_dataset.py
(MMapIndexedDataset).
"""

import array
import bisect
import hashlib
import os
import struct
from pathlib import Path

import numpy as np

from neox_jax.data.token_files import TokenFiles, find_token_files
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
    """Documents of tokens in PREFIX.bin, or its shards, and PREFIX.idx; nothing is read until it is asked for.

    sizes: int32 [N], tokens in each document. pointers: int64 [N], byte offsets. doc_idx: as stored. tokens: of the
    whole .bin; documents lie in it end to end, in order.
    Raises: InputError for files that are missing, truncated, not of this format, or not of each other.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = str(prefix)
        idx_path = _paths(self.prefix)[1]
        if not idx_path.is_file():
            raise InputError(f"no file {idx_path}; a dataset is named by its prefix: PREFIX.bin and PREFIX.idx")
        self.dtype, num_documents, len_doc_idx = _read_header(idx_path)
        index = np.asarray(np.memmap(idx_path, np.uint8, mode="r"))
        start = HEADER.size
        self.sizes = index[start : start + 4 * num_documents].view("<i4")
        start += 4 * num_documents
        self.pointers = index[start : start + 8 * num_documents].view("<i8")
        start += 8 * num_documents
        self.doc_idx = index[start : start + 8 * len_doc_idx].view("<i8")
        num_bytes = self._check_pointers(idx_path)
        paths = find_token_files(self.prefix, num_bytes, self.dtype.itemsize)
        self.tokens = TokenFiles(paths, self.dtype)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> np.ndarray:
        """The tokens of document i, in the dtype of the file."""
        i = range(len(self))[i]  # negative indices, and IndexError
        return self.tokens.read(self.pointers[i : i + 1] // self.dtype.itemsize, self.sizes[i : i + 1])

    def locate(self, start: int, length: int) -> list[tuple[int, int, int]]:
        """Whose tokens [start, start + length) of the .bin are: pieces (document, offset in it, length), in order."""
        pieces, itemsize = [], self.dtype.itemsize
        document = bisect.bisect_right(self.pointers, start * itemsize) - 1  # searchsorted would copy what is unaligned
        while length > 0:
            offset = start - int(self.pointers[document]) // itemsize
            num_tokens = min(length, int(self.sizes[document]) - offset)
            if num_tokens > 0:
                pieces.append((document, offset, num_tokens))
            start, length, document = start + num_tokens, length - num_tokens, document + 1
        return pieces

    def digest_sizes(self) -> str:
        """SHA-256, in hex, of the sizes of the documents: what an order of them depends on."""
        return hashlib.sha256(self.sizes).hexdigest()

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
