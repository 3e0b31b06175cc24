"""Folders written tensor by tensor are what the safetensors library reads."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from r1.parallel import hf_writer
from r1.parallel.hf_reader import SUMS, TYPES, check_sum
from r1.parallel.hf_writer import FolderWriter, Planned, write_sums


def _tensors(generator: torch.Generator) -> dict[str, torch.Tensor]:
    shapes = [(3,), (5, 7), (1, 1), (0, 4), (129, 3), (2, 3, 5), (9,), (64, 64)]
    found = {}
    for number, shape in enumerate(shapes * 3):
        dtype = list(TYPES.values())[int(torch.randint(len(TYPES), (), generator=generator))]
        found[f"t.{number}.ä"] = torch.randn(shape, generator=generator).to(dtype)
    return found


def _planned(name: str, tensor: torch.Tensor) -> Planned:
    return Planned(name, next(n for n, dtype in TYPES.items() if dtype == tensor.dtype), tuple(tensor.shape))


@pytest.mark.parametrize("bytes_per_file", [1, 1000, 1 << 40])
def test_the_library_reads_what_was_written(
    bytes_per_file: int, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_writer, "BYTES_PER_FILE", bytes_per_file)
    found = _tensors(torch.Generator().manual_seed(seed))
    names = list(found)
    groups = [[_planned(name, found[name]) for name in names[i : i + 2]] for i in range(0, len(names), 2)]
    writer = FolderWriter(tmp_path, groups)
    random.Random(seed).shuffle(names)
    for name in names:
        writer.write(name, found[name])
    writer.finish()
    write_sums(tmp_path, lambda: None)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == {1: 12, 1 << 40: 1}.get(bytes_per_file, len(files))
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert read.keys() == found.keys()
    for name, tensor in found.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    places = {name: file.name for file in files for name in safe_open(file, "pt").keys()}
    for a, b in groups:
        assert places[a.name] == places[b.name], "a group lies in one file"
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == places
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    sums = dict(reversed(line.split("  ")) for line in (tmp_path / SUMS).read_text().splitlines())
    assert sums.keys() == {path.name for path in tmp_path.iterdir()} - {SUMS}
    assert all(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == sum for name, sum in sums.items())
    for name, value in sums.items():
        check_sum(tmp_path / name, value)


def test_what_is_not_as_planned_is_refused(tmp_path: Path) -> None:
    writer = FolderWriter(tmp_path, [[Planned("a", "F32", (2, 2)), Planned("b", "BF16", (3,))]])
    for wrong in (torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="planned"):
            writer.write("a", wrong)
    writer.write("a", torch.zeros(2, 2))
    with pytest.raises(ValueError, match="'b'"):
        writer.finish()


def test_no_room(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"wants 4,000,000.0 GB and its disk has \d"):
        FolderWriter(tmp_path, [[Planned("a", "F32", (1000, 10**12))]])
