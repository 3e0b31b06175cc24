"""The tensors of a Hugging Face checkpoint, read a band of rows at a time: a folder of safetensors files, or a dict.

FP8 weights with one float32 scale a 128 x 128 block (`weight_scale_inv`, DeepSeek-V3) are read as the product. The
experts that transformers >= 5 keeps fused (`mlp.experts.gate_up_proj`, (E, 2F, H)) go by their published names, one
tensor an expert. Nothing here reads a pickle.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from r1.kernels.fp8 import BLOCK
from r1.parallel.folders import CheckpointError

SCALE = "_scale_inv"
INDEX = "model.safetensors.index.json"
SUMS = "SHA256SUMS"
BAND_BYTES = 16 << 20  # of float32 that one band of rows becomes
# Pages of a mapped file count as this process's memory once they are read: after so many bytes it is mapped anew.
MAPPED_BYTES = 64 << 20

POINTER = b"version https://git-lfs"

# safetensors' names of the types that weights may have.
TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}
_NAMES = {dtype: name for name, dtype in TYPES.items()}
_FUSED = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)")


@dataclass(frozen=True)
class _Stored:
    """A tensor as it lies in a file (or, where `file` is None, in memory), or an expert's part of a fused one."""

    file: Path | None
    name: str
    shape: tuple[int, ...]
    dtype: str
    leading: tuple[int, ...] = ()
    shift: int = 0


class Source:
    """A Hugging Face checkpoint's tensors. `shapes` and `dtypes` (safetensors' names of types) are those of the
    weights; the scales of FP8 weights belong to them. CheckpointError where it is not whole."""

    def __init__(self, source: Mapping[str, Tensor] | str | Path) -> None:
        self._memory = source if isinstance(source, Mapping) else {}
        self.folder = None if isinstance(source, Mapping) else Path(source)
        stored = _in_memory(source) if isinstance(source, Mapping) else _in_folder(Path(source))
        self._weights: dict[str, _Stored] = {}
        self._scales: dict[str, _Stored] = {}
        for name, tensor in stored.items():
            weight = stored.get(name.removesuffix(SCALE))
            if name.endswith(SCALE) and weight and weight.dtype == "F8_E4M3":
                self._scales[name.removesuffix(SCALE)] = tensor
            else:
                self._weights |= _apart(name, tensor)
        self.shapes = {name: tensor.shape for name, tensor in self._weights.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._weights.items()}
        for name, dtype in self.dtypes.items():
            if dtype not in TYPES:
                raise CheckpointError(f"{name} has type {dtype} in the checkpoint; wanted one of {', '.join(TYPES)}")
            if dtype == "F8_E4M3":
                self._check_scale(name)
        self._opened: tuple[Path, Any] | None = None
        self._mapped = 0

    def _check_scale(self, name: str) -> None:
        if name not in self._scales:
            raise CheckpointError(f"the Hugging Face checkpoint has no tensor {name}{SCALE}, which {name} (FP8) needs")
        scale, wanted = self._scales[name], tuple(-(-size // BLOCK) for size in self.shapes[name])
        if scale.shape != wanted or scale.dtype != "F32":
            raise CheckpointError(
                f"{name}{SCALE} has shape {scale.shape} and type {scale.dtype} in the Hugging Face checkpoint;"
                f" wanted {wanted} and F32: one scale a block of {BLOCK} x {BLOCK}"
            )

    def place(self, name: str) -> tuple[str, str]:
        """To sort by, so that every file is read once."""
        stored = self._weights[name]
        return str(stored.file), stored.name

    def copy_to(self, target: Tensor, name: str, index: tuple[slice, ...]) -> None:
        """target[...] = tensor[index], in target's type and on its device. CheckpointError for values that are not
        finite: no training run wrote them."""
        # By the whole width: pages are read whole, also where few of a row's columns are wanted.
        step = max(1, BAND_BYTES // (4 * prod(self.shapes[name][1:])))
        for start in range(index[0].start, index[0].stop, step):
            stop = min(start + step, index[0].stop)
            band = self._band(name, (slice(start, stop), *index[1:]))
            if not torch.isfinite(band).all():
                raise CheckpointError(f"the Hugging Face checkpoint is damaged: {name} has values that are not finite")
            target[start - index[0].start : stop - index[0].start].copy_(band)

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors of one shape have the same values."""
        rows, *rest = self.shapes[name]
        step = max(1, BAND_BYTES // (4 * max(1, prod(rest))))
        for start in range(0, rows, step):
            index = (slice(start, min(start + step, rows)), *(slice(0, size) for size in rest))
            if not torch.equal(self._band(name, index).clone(), self._band(other, index)):
                return False
        return True

    def scales(self) -> bytes:
        """All scales of FP8 weights, as a safetensors file's contents; b"" where there are none."""
        names = sorted(self._scales)
        return save({name + SCALE: self._read(self._scales[name], ()).clone() for name in names}) if names else b""

    def _band(self, name: str, index: tuple[slice, ...]) -> Tensor:
        stored = self._weights[name]
        first = slice(index[0].start + stored.shift, index[0].stop + stored.shift)
        band = self._read(stored, (*stored.leading, first, *index[1:]))
        if stored.dtype != "F8_E4M3":
            return band
        blocks = tuple(slice(part.start // BLOCK, -(-part.stop // BLOCK)) for part in index)
        rows, columns = (
            torch.arange(part.start, part.stop) // BLOCK - block.start
            for part, block in zip(index, blocks, strict=True)
        )
        return band.float().mul_(self._read(self._scales[name], blocks)[rows][:, columns])

    def _read(self, stored: _Stored, index: tuple[int | slice, ...]) -> Tensor:
        if stored.file is None:
            return self._memory[stored.name][index]
        if self._opened is None or self._opened[0] != stored.file or self._mapped > MAPPED_BYTES:
            self._opened = None  # unmapped before the next is mapped
            self._opened, self._mapped = (stored.file, _open(stored.file)), 0
        tensor = self._opened[1].get_slice(stored.name)[index or ...]
        rows = tensor.shape[0] if index else stored.shape[0]
        self._mapped += rows * prod(stored.shape[1:]) * TYPES[stored.dtype].itemsize
        return tensor


def _in_memory(tensors: Mapping[str, Tensor]) -> dict[str, _Stored]:
    return {name: _Stored(None, name, tuple(t.shape), _NAMES.get(t.dtype, str(t.dtype))) for name, t in tensors.items()}


def _apart(name: str, tensor: _Stored) -> dict[str, _Stored]:
    """The tensor by its published name, or by those of the experts that it holds."""
    fused = _FUSED.fullmatch(name)
    if not fused:
        return {name: tensor}
    projections = ("gate_proj", "up_proj") if fused[2] == "gate_up_proj" else ("down_proj",)
    experts, rows, columns = tensor.shape
    rows //= len(projections)
    return {
        f"{fused[1]}.{e}.{projection}.weight": _Stored(
            tensor.file, tensor.name, (rows, columns), tensor.dtype, (e,), i * rows
        )
        for e in range(experts)
        for i, projection in enumerate(projections)
    }


def _in_folder(folder: Path) -> dict[str, _Stored]:
    """All tensors of the files that the index names, or that are there where it has no index."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no Hugging Face folder at {folder}")
    index = read_index(folder)
    files = sorted({folder / name for name in index.values()}) if index else sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = " (it has pickled weights, which can run code: convert them)" if list(folder.glob("*.bin")) else ""
        raise CheckpointError(f"{folder} holds no safetensors files{pickles}")
    found: dict[str, _Stored] = {}
    for file in files:
        handle = _open(file)
        for name in handle.keys():
            if index and index.get(name) != file.name:
                raise CheckpointError(f"{file} holds a tensor {name}, which {INDEX} does not place there")
            if name in found:
                raise CheckpointError(f"tensor {name} is in {found[name].file} and in {file}; wanted it once")
            part = handle.get_slice(name)
            found[name] = _Stored(file, name, tuple(part.get_shape()), part.get_dtype())
    for name, where in index.items():
        if name not in found:
            raise CheckpointError(f"{folder / where} has no tensor {name}, which {INDEX} places there")
    return found


def read_index(folder: Path) -> dict[str, str]:
    """{tensor: its file's name} of a folder's index; empty where it has none."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        index = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    for name, file in index.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path} places tensor {name} in {file!r}; wanted the name of a file beside it")
    return index


def _open(file: Path) -> Any:
    if not file.is_file():
        raise CheckpointError(f"{file.parent} is incomplete: {file.name}, which its index names, is missing")
    try:
        with file.open("rb") as opened:
            if opened.read(len(POINTER)) == POINTER:
                raise CheckpointError(f"{file} is a git-lfs pointer, not the file itself: run git lfs pull")
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None


# ------------------------------------------------------------------------------------------------ checksums


def checksums(folder: Path) -> dict[str, str]:
    """{file: SHA-256} of a folder's weights, as far as it is known.

    From SHA256SUMS, which our exports have; from what huggingface_hub notes of a file it has downloaded; from the
    name of the blob that a file of its cache is a link to.
    """
    known: dict[str, str] = {}
    indexed = {folder / name for name in read_index(folder).values()}
    files = sorted(indexed or folder.glob("*.safetensors"))  # there may be other files beside those of an index
    for file in files:
        note = folder / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
        told = note.read_text().split()[1:2] if note.is_file() else [file.resolve().name]
        if told and re.fullmatch(r"[0-9a-f]{64}", told[0]):
            known[file.name] = told[0]
    if (folder / SUMS).is_file():
        for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():  # as `sha256sum` writes it
            value, _, name = line.partition(" ")
            if folder / (name := name.lstrip(" *")) in files:
                known[name] = value
    return known


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check_sum(file: Path, wanted: str) -> None:
    """CheckpointError where the file is not what its SHA-256 says."""
    if not file.is_file():
        raise CheckpointError(f"{file.parent} is incomplete: {file.name} is missing")
    if sha256(file) != wanted:
        raise CheckpointError(f"{file} is damaged: it does not match its checksum")
