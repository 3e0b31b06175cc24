"""A Hugging Face folder of safetensors files, written tensor by tensor: no file is ever whole in memory.

The library writes a file from all of its tensors at once. The format (a header of names, types, shapes and places,
then the bytes) lets each be written to its place as it comes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from r1.parallel.folders import missing_room, write_text
from r1.parallel.hf_reader import INDEX, SUMS, TYPES, sha256

BYTES_PER_FILE = 5 << 30


class Planned(NamedTuple):
    """A tensor to come; `dtype` is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * TYPES[self.dtype].itemsize


class FolderWriter:
    """Writes the planned tensors, in any order, best in that of `groups`. Tensors of a group (a weight and its scales)
    lie in one file. OSError, naming what is wanted and what is free, where the disk has no room for them."""

    def __init__(self, folder: Path, groups: Iterable[Sequence[Planned]]) -> None:
        self.folder = folder
        files: list[list[Planned]] = [[]]
        size = self.total = 0
        for group in groups:
            wanted = sum(tensor.nbytes for tensor in group)
            if files[-1] and size + wanted > BYTES_PER_FILE:
                files.append([])
                size = 0
            files[-1] += group
            size, self.total = size + wanted, self.total + wanted
        if problem := missing_room(self.total, folder):
            raise OSError(problem)
        self._places: dict[str, tuple[str, int, Planned]] = {}
        for i, tensors in enumerate(files):
            name = "model.safetensors" if len(files) == 1 else f"model-{i + 1:05}-of-{len(files):05}.safetensors"
            self._begin(name, tensors)
        self._left = set(self._places)
        self._opened: tuple[str, BinaryIO] | None = None

    def _begin(self, name: str, tensors: list[Planned]) -> None:
        """The file with its header, as large as it will be. Wide types first, so that each lies where its type may."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        places = {}
        for tensor in sorted(tensors, key=lambda tensor: -TYPES[tensor.dtype].itemsize):
            places[tensor.name] = offset
            end = offset + tensor.nbytes
            header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        begin = 8 + len(text)
        with (self.folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(begin + offset)
        self._places |= {tensor.name: (name, begin + places[tensor.name], tensor) for tensor in tensors}

    def write(self, name: str, tensor: Tensor) -> None:
        """A tensor of the planned shape and type, on any device."""
        file, offset, planned = self._places[name]
        if tuple(tensor.shape) != planned.shape or tensor.dtype != TYPES[planned.dtype]:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, planned was {planned}")
        if self._opened is None or self._opened[0] != file:
            self._close()
            self._opened = (file, (self.folder / file).open("rb+"))
        self._opened[1].seek(offset)
        self._opened[1].write(memoryview(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()))
        self._left.remove(name)

    def finish(self) -> None:
        """The index, where there is more than one file. All planned tensors must have been written."""
        self._close()
        if self._left:
            raise ValueError(f"{len(self._left)} planned tensors were not written: {sorted(self._left)[:3]}")
        names = {name: place[0] for name, place in self._places.items()}
        if len(set(names.values())) > 1:
            write_json(self.folder / INDEX, {"metadata": {"total_size": self.total}, "weight_map": names})

    def _close(self) -> None:
        if self._opened is not None:
            self._opened[1].flush()
            os.fsync(self._opened[1].fileno())
            self._opened[1].close()
            self._opened = None


def write_sums(folder: Path, beat: Callable[[], None]) -> None:
    """SHA256SUMS of every file, as `sha256sum -c` reads it; `beat` is called before each."""
    lines = []
    for file in sorted(path for path in folder.iterdir() if path.is_file() and path.name != SUMS):
        beat()
        lines.append(f"{sha256(file)}  {file.name}\n")
    write_text(folder / SUMS, "".join(lines))


def write_json(path: Path, contents: object) -> None:
    write_text(path, json.dumps(contents, indent=2, ensure_ascii=False) + "\n")
