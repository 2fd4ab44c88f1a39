"""The npz files of NumPy, read with nothing trusted: no pickles, and no more bytes than the header
and the memory allow.
"""

from __future__ import annotations

import math
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from assay.memory import require_memory

_MOST_AXES = 32


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an npz file by name.

    The sizes that the archive names are held against the memory before anything is unpacked, and
    each array's header against the bytes that follow it. Raises InputError for archives that are
    larger than the memory, ValueError and whatever zipfile and numpy raise for damaged ones."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        require_memory(
            2 * sum(member.file_size for member in members),
            f"unpacking {path} ({path.stat().st_size} bytes)",
        )
        return {
            member.filename.removesuffix(".npy"): _array(_unpack(archive, member), member.filename)
            for member in members
        }


def _unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    # Other compressions are unpacked without a limit, whatever size the archive names.
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename} is compressed in another way than NumPy does")
    with archive.open(member) as stream:
        return stream.read(member.file_size + 1)


def _array(data: bytes, name: str) -> np.ndarray:
    stream = BytesIO(data)
    version = npy.read_magic(stream)
    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"{name} is of npy version {version}, and 1.0 and 2.0 are read")
    shape, fortran, dtype = read_header[version](stream)
    body = data[stream.tell() :]
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which only a pickle could restore")
    if len(shape) > _MOST_AXES or math.prod(shape) * dtype.itemsize != len(body):
        raise ValueError(
            f"{name} says {' x '.join(map(str, shape))[:100]} entries of {dtype}, and"
            f" {len(body)} bytes follow"
        )
    if any(size > np.iinfo(np.intp).max for size in shape):
        raise ValueError(f"{name} has an axis of more entries than memory can address")
    array = np.frombuffer(body, dtype).reshape(shape, order="F" if fortran else "C")
    return np.array(array, dtype.newbyteorder("="), order="C", copy=True)
