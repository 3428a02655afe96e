"""safetensors files: headers checked by the library, tensors read and written a part at a time.

The library's own writer wants all of a file's tensors in memory, and its reader maps the file, whose pages add up.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from neox_jax.convert.byte_reader import FileReader
from neox_jax.convert.byte_writer import LargeFiles
from neox_jax.convert.files import one_line, parse_json
from neox_jax.convert.lazy_tensor import LazyTensor, is_representable
from neox_jax.convert.stored import Digests, StoredTensor, num_bytes, write_tensor
from neox_jax.errors import InputError

MAX_HEADER_BYTES = 16 << 20  # the library's limit is 100 MB, which take 14 times that when they are parsed

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """What a safetensors file holds, by name and in order; no tensor is read yet.

    Raises: InputError where it is missing or damaged, or has tensors of a type that is not known here.
    """
    if not path.is_file():
        raise InputError(f"{path} is not there; download it again")
    try:
        reader = FileReader(path)
        header_bytes = int.from_bytes(reader.read(0, min(8, reader.num_bytes)), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"header too large: {header_bytes} bytes")
        with safe_open(path, framework="numpy"):  # the library checks everything but keys said twice
            pass
        header = parse_json(bytes(reader.read(8, header_bytes)))
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged or no safetensors file ({one_line(error)}); download it again") from error
    header.pop("__metadata__", None)
    if not all(is_representable(spec["shape"], np.dtype(np.float64)) for spec in header.values()):
        raise InputError(f"{path} has a tensor of more dims or elements than there can be; download it again")
    unknown = sorted({spec["dtype"] for spec in header.values()} - DTYPES.keys())
    if unknown:
        raise InputError(f"{path} has tensors of type {', '.join(unknown)}; wanted F32, BF16 or F16")
    return {
        name: LazyTensor(
            reader, 8 + header_bytes + spec["data_offsets"][0], tuple(spec["shape"]), None, DTYPES[spec["dtype"]]
        )
        for name, spec in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    }


def write_safetensors(path: Path, tensors: Mapping[str, StoredTensor], digests: Digests | None = None) -> None:
    """Writes a safetensors file, a block of a tensor at a time. digests: gets the tensors' too."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + num_bytes(tensor)
        spec = {"dtype": codes[np.dtype(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name] = spec
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    with LargeFiles() as files, files.create(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            write_tensor(file, name, tensor, digests)
