"""Reads the file of gates: checks it, and caches the gates in memory until the file changes.

    path    -> device, inode, size, times       a known key returns the cached gates
    header  -> names, dtypes, shapes, offsets   checked before anything is allocated
    tensors -> copies in memory, finite         the file may be overwritten or truncated while they are used

File times have a coarse resolution, so a recently written file could change again without a new key. Such a file is not cached.
"""

from __future__ import annotations

import json
import math
import os
import stat
import threading
import time
from collections import OrderedDict
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ...config import shown
from ...errors import OptionError
from .json_checks import is_no_deeper, unique
from .seer_gates import FILE_NAME, FORMAT, REMEDY, TENSORS, Gates, LayerGate, check_layer, check_numbers

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MOST_HEADER_BYTES = 8 << 20
_MOST_LAYERS = 10_000
_MOST_DEPTH = 16
"""Nesting of the metadata about the model. Rope parameters have two levels."""
_SETTLED_NS = 2_000_000_000
"""Age from which a file is cached. The coarsest file systems have times of two seconds."""
_MOST_CACHED = 4

_cached: OrderedDict[tuple[int, ...], Gates] = OrderedDict()
_lock = threading.Lock()


class _OtherError(Exception):
    """Arguments: what was expected of a file, and what was found."""


def load_gates(path: str | os.PathLike[str]) -> Gates:
    """Gates from a file, or from `gates.safetensors` in a folder. Cached in memory until the file changes.

    Raises:
        OptionError: there is no such file, it cannot be read, or it is not a file of gates.
    """
    file = _find(path)
    try:
        with file.open("rb") as opened:
            state = os.fstat(opened.fileno())
            key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
            with _lock:
                if key in _cached:
                    _cached.move_to_end(key)
                    return _cached[key]
            settled = time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) > _SETTLED_NS
            gates = _read(opened, state.st_size)
    except OSError as error:
        raise _refusal(file, "a file that can be read", error.strerror or type(error).__name__) from error
    except _OtherError as error:
        raise _refusal(file, *error.args) from error
    if settled:
        with _lock:
            _cached[key] = gates
            while len(_cached) > _MOST_CACHED:
                _cached.popitem(last=False)
    return gates


def _refusal(path: Any, expected: str, got: str) -> OptionError:
    return OptionError(f"gates: expected {expected}, got {got} in {shown(str(path))}; {REMEDY}")


def _find(path: str | os.PathLike[str]) -> Path:
    """The regular file at `path`, or in the folder `path`."""
    given = os.fsdecode(path)
    none = OptionError(f"gates: expected a file of gates or a folder with {FILE_NAME}, got {shown(given)}; {REMEDY}")
    if not given:
        raise none
    try:
        file = Path(given).expanduser()
        file = file / FILE_NAME if stat.S_ISDIR(file.stat().st_mode) else file
        regular = stat.S_ISREG(file.stat().st_mode)  # opening a pipe would block until somebody writes
    except (OSError, ValueError, RuntimeError) as error:
        raise none from error
    if not regular:
        raise none
    return file


def _read(opened: BufferedReader, size: int) -> Gates:
    header, begin = _header(opened, size)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        found = metadata.get("format") if isinstance(metadata, dict) else metadata
        raise _OtherError(f"a file of format {FORMAT!r}", shown(found))
    about = _json(metadata.get("about"), "the metadata 'about'")
    page_size, interleaved = about.pop("page_size", None), about.pop("interleaved", None)
    if type(page_size) is not int or page_size < 1:
        raise _OtherError("a page_size of 1 or more", shown(page_size))
    numbers = _layers(interleaved)
    if not is_no_deeper(about, _MOST_DEPTH):
        raise _OtherError(f"metadata 'about' that is at most {_MOST_DEPTH} deep", "some that is deeper")
    wanted = {f"layers.{number}.{name}" for number in numbers for name in TENSORS}
    if wanted != header.keys():
        missing, more = sorted(wanted - header.keys()), sorted(header.keys() - wanted)
        raise _OtherError(
            f"tensors {', '.join(TENSORS)} of layers {shown([*numbers])}",
            f"none of {shown(missing)}" if missing else f"also {shown(more)}",
        )
    places = _places(header, size - begin)
    for number in numbers:
        check_layer({name: places[f"layers.{number}.{name}"][1] for name in TENSORS}, f"layer {number}", _OtherError)
    widths = {places[f"layers.{number}.key"][1][2] for number in numbers}
    if len(widths) > 1:
        raise _OtherError("gate keys of one size E in all layers", f"E of {sorted(widths)}")
    read = {name: _tensor(opened, begin + place[0], *place[1:], name) for name, place in places.items()}
    for name, tensor in read.items():
        check_numbers(tensor, name, _OtherError)
    layers = {
        number: LayerGate(**{name: read[f"layers.{number}.{name}"] for name in TENSORS}, interleaved=flag)
        for number, flag in numbers.items()
    }
    return Gates(layers, page_size, about)


def _header(opened: BufferedReader, size: int) -> tuple[dict[str, Any], int]:
    """The header, and the offset of the tensors."""
    length = int.from_bytes(opened.read(8), "little")
    if size < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
        raise _OtherError("a safetensors file", f"{size} bytes, whose first 8 say that {length} more are its header")
    text = opened.read(length)
    try:
        return _json(text.decode(), "the header"), 8 + length
    except (UnicodeDecodeError, _OtherError) as error:
        raise _OtherError("a safetensors file", f"a header that is no JSON object ({error})") from error


def _json(text: Any, what: str) -> dict[str, Any]:
    """A JSON object; duplicate names are refused."""
    try:
        found = json.loads(text, object_pairs_hook=unique) if isinstance(text, str) else None
    except (ValueError, RecursionError) as error:
        raise _OtherError(f"JSON as {what}", f"{type(error).__name__} ({shown(str(error))})") from error
    if not isinstance(found, dict):
        raise _OtherError(f"a JSON object as {what}", shown(text))
    return found


def _layers(interleaved: Any) -> dict[int, bool]:
    """Layer -> whether its RoPE pairs are interleaved."""
    expected = "metadata 'interleaved' with true or false by layer number"
    if not isinstance(interleaved, dict) or not interleaved:
        raise _OtherError(expected, shown(interleaved))
    for name, flag in interleaved.items():
        plain = (
            name.isascii() and name.isdigit() and len(name) < 6 and name == str(int(name)) and int(name) < _MOST_LAYERS
        )
        if not plain or type(flag) is not bool:
            raise _OtherError(expected, f"{shown(name)}: {shown(flag)}")
    return {int(name): flag for name, flag in interleaved.items()}


def _places(header: dict[str, Any], size: int) -> dict[str, tuple[int, tuple[int, ...], torch.dtype]]:
    """Name -> offset, shape and dtype of each tensor. Together they must fill the `size` bytes after the header."""
    places, spans = {}, []
    for name, entry in header.items():
        entry = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not (isinstance(dtype, str) and dtype in _DTYPES):
            raise _OtherError(f"{name} of dtype {', '.join(_DTYPES)}", shown(dtype))
        if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2):
            raise _OtherError(f"shape and data_offsets of {name} as counts", shown(entry))
        begin, end = offsets
        if end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
            raise _OtherError(f"as many bytes of {name} as its shape {shown(shape)} takes", shown(end - begin))
        places[name] = begin, tuple(shape), _DTYPES[dtype]
        spans.append((begin, end))
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise _OtherError(
                "tensors one behind the other", f"one at {shown(begin)} behind one that ends at {shown(at)}"
            )
        at = end
    if at != size:
        raise _OtherError(f"{shown(at)} bytes of tensors", f"{size} (was it cut?)")
    return places


def _are_counts(given: Any) -> TypeGuard[list[int]]:
    return isinstance(given, list) and len(given) <= 8 and all(type(number) is int and number >= 0 for number in given)


def _tensor(opened: BufferedReader, at: int, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor:
    """Read one tensor, as float32."""
    raw = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
    opened.seek(at)
    if raw.numel() and opened.readinto(memoryview(raw.numpy())) != raw.numel():  # type: ignore[arg-type]
        raise _OtherError(f"{raw.numel()} bytes of {name}", "fewer (was it cut?)")
    return raw.view(dtype).view(shape).float()
