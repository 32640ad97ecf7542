"""The header of a safetensors file, read and checked before any tensor is allocated."""

import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from preft_core.format.config import AdapterError, parse_json

HEADER_START_BYTES = 8
MAX_HEADER_BYTES = 64 << 20
MAX_FILE_BYTES = 16 << 30
MAX_TENSORS = 1 << 17
MAX_FAULTS = 20
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a safetensors file; begin and end are byte offsets after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """Returns dtype, shape and offsets of the tensors of a safetensors file, by name. Reads the header only.

    Args:
        path: of the file
    Raises:
        AdapterError: a file that is truncated or above 16 GiB, a header that is above 64 MiB or not JSON, a dtype that
            is not F32, F16 or BF16, or tensors that overlap, leave gaps or do not have the size of their shape.
    Source: the safetensors format: 8 bytes little-endian header length, the header as JSON, the tensors' bytes.
    """
    with open_weights(path) as (header, _):
        return header


@contextmanager
def open_weights(path: str | Path) -> Iterator[tuple[dict[str, TensorInfo], BufferedReader]]:
    """Opens a safetensors file once. Yields its header and a reader that stands at the first tensor's bytes.

    Raises:
        AdapterError: as in read_header.
    """
    file = Path(path)
    try:
        with file.open("rb") as reader:
            size = os.fstat(reader.fileno()).st_size
            length = header_length(reader.read(HEADER_START_BYTES), size, str(file))
            yield parse_header(reader.read(length), size, str(file)), reader
    except OSError as error:
        raise AdapterError(
            f"{file} cannot be read: {error.strerror}; give the directory of a saved adapter"
        ) from error


def read_tensors(header: Mapping[str, TensorInfo], reader: BufferedReader) -> dict[str, Tensor]:
    """Returns the tensors of a file opened by `open_weights`, by name.

    The bytes are read without the interpreter lock. `safetensors.torch.load` copies them under it: other threads, such
    as a server's event loop, waited 0.5 s for an adapter of 290 MB.

    Raises:
        AdapterError: the file became shorter while it was read.
    """
    tensors = {}
    for name, info in sorted(header.items(), key=lambda item: (item[1].begin, item[1].end)):
        tensors[name] = torch.empty(info.shape, dtype=info.dtype)
        num_bytes = reader.readinto(tensors[name].flatten().view(torch.uint8).numpy().data)
        if num_bytes != info.end - info.begin:
            raise AdapterError(f"{reader.name} cannot be read: it became shorter meanwhile; load it again")
    return tensors


def header_length(start: bytes, size: int, name: str) -> int:
    """Returns the header's length in bytes, checked against the file's size.

    Args:
        start: the first 8 bytes of the file
        size: of the file, bytes
        name: of the file, for the error
    Raises:
        AdapterError: the file is too large, truncated, or not a safetensors file.
    """
    length = struct.unpack("<Q", start)[0] if len(start) == HEADER_START_BYTES else -1
    if size > MAX_FILE_BYTES:
        raise AdapterError(f"{name} has {size} bytes: the maximum is {MAX_FILE_BYTES}")
    if not 0 < length <= min(MAX_HEADER_BYTES, size - HEADER_START_BYTES):
        raise AdapterError(
            f"{name} has {size} bytes and gives {length} as the length of its header (at most {MAX_HEADER_BYTES}): it "
            "is truncated, or not a safetensors file; download it again"
        )
    return length


def parse_header(text: bytes, size: int, name: str) -> dict[str, TensorInfo]:
    """Returns the tensors of a header, as `read_header` does.

    Args:
        text: the header, without the 8 bytes before it
        size: of the whole file, bytes
        name: of the file, for the error
    Raises:
        AdapterError: as in `read_header`.
    """
    header = parse_json(text, f"the header of {name}")
    if not isinstance(header, dict):
        raise AdapterError(f"the header of {name} is not a JSON object")
    if len(header) > MAX_TENSORS:
        raise AdapterError(f"{name} has {len(header)} tensors: the maximum is {MAX_TENSORS}")
    faults: list[str] = []
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        faults.append("__metadata__ is not a map of strings")
    found = {tensor: _info(tensor, value, faults) for tensor, value in header.items() if tensor != "__metadata__"}
    tensors = {tensor: info for tensor, info in found.items() if info is not None}
    if not faults:
        _check_layout(tensors, size - HEADER_START_BYTES - len(text), faults)
    raise_faults(name, faults)
    return tensors


def _info(name: str, value: object, faults: list[str]) -> TensorInfo | None:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        faults.append(f"{name[:200]} does not have exactly dtype, shape and data_offsets")
        return None
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        faults.append(f"{name[:200]} has dtype {str(dtype)[:20]}: allowed: {', '.join(DTYPES)}")
        return None
    if not _is_counts(shape, most=8) or not _is_counts(offsets, most=2) or len(offsets) != 2:
        faults.append(f"{name[:200]} has a shape or offsets that are not lists of non-negative integers")
        return None
    info = TensorInfo(DTYPES[dtype], tuple(shape), offsets[0], offsets[1])
    if info.end - info.begin != prod(info.shape) * info.dtype.itemsize:
        faults.append(f"{name[:200]} has {info.end - info.begin} bytes, not the size of {dtype} {shape}")
    return info


def _is_counts(value: object, most: int) -> bool:
    if not isinstance(value, list) or len(value) > most:
        return False
    return all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 48 for v in value)


def _check_layout(tensors: dict[str, TensorInfo], num_bytes: int, faults: list[str]) -> None:
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            faults.append(f"{name[:200]} begins at byte {info.begin} and the previous tensor ends at {position}")
        position = info.end
    if position != num_bytes:
        faults.append(f"the tensors have {position} bytes and the file {num_bytes}: it is truncated or padded")


def raise_faults(subject: str, faults: list[str]) -> None:
    """Raises an AdapterError with the first 20 faults and the number of the others. A no-op without faults."""
    if faults:
        more = f"; and {len(faults) - MAX_FAULTS} more" if len(faults) > MAX_FAULTS else ""
        raise AdapterError(f"{subject}: " + "; ".join(faults[:MAX_FAULTS]) + more)
