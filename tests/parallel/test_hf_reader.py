"""Reading Hugging Face folders: what is in them, in bands, and what is refused by name."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from r1.parallel import hf_reader
from r1.parallel.config import ParallelConfig
from r1.parallel.convert import load_hf, read_config
from r1.parallel.folders import CheckpointError
from r1.parallel.hf_reader import Source, check_sum, checksums
from r1.parallel.trainer import Trainer
from r1.parallel.world import join
from tests.parallel import published

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("published") / "good"
    found = published.tensors(published.CONFIG, 3)
    published.write(folder, published.CONFIG, found, 3)
    return folder, found


@pytest.fixture
def folder(good: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> Path:
    """A copy to do damage to."""
    return Path(shutil.copytree(good[0], tmp_path / "copy"))


def dequantized(found: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The definition: every value times its block's scale, one by one."""
    q, scales = found[name].double(), found[f"{name}_scale_inv"].double()
    out = torch.empty(q.shape, dtype=torch.float64)
    for row in range(q.shape[0]):
        for block in range(scales.shape[1]):
            part = slice(128 * block, 128 * (block + 1))
            out[row, part] = q[row, part] * scales[row // 128, block]
    return out.float()


def test_every_tensor_and_no_scale(good: tuple[Path, dict[str, torch.Tensor]]) -> None:
    read, wanted = Source(good[0]), published.shapes(published.CONFIG)
    assert read.shapes == {name: shape for name, (shape, _) in wanted.items()}
    kinds = {"fp8": "F8_E4M3", "bf16": "BF16", "f32": "F32"}
    assert read.dtypes == {name: kinds[kind] for name, (_, kind) in wanted.items()}


@pytest.mark.parametrize("band", [1 << 10, hf_reader.BAND_BYTES])
@pytest.mark.parametrize("mapped", [1, hf_reader.MAPPED_BYTES])
def test_any_part_of_an_fp8_weight(
    band: int, mapped: int, good: tuple[Path, dict[str, torch.Tensor]], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts that begin and end within blocks, in bands of a few rows, from a file that is mapped anew for each."""
    monkeypatch.setattr(hf_reader, "BAND_BYTES", band)
    monkeypatch.setattr(hf_reader, "MAPPED_BYTES", mapped)
    generator = torch.Generator().manual_seed(seed)
    for name in (EXPERT, "model.layers.0.mlp.down_proj.weight", "model.layers.3.self_attn.q_b_proj.weight"):
        wanted = dequantized(good[1], name)
        for source in (Source(good[0]), Source(good[1])):
            for _ in range(4):
                index = []
                for size in wanted.shape:
                    ends = torch.randperm(size + 1, generator=generator)[:2].sort().values
                    index.append(slice(int(ends[0]), int(ends[1])))
                target = torch.full([s.stop - s.start for s in index], float("nan"))
                source.copy_to(target, name, tuple(index))
                assert torch.equal(target, wanted[tuple(index)]), (name, index)
                turned = torch.full([s.stop - s.start for s in reversed(index)], float("nan"), dtype=torch.bfloat16)
                source.copy_to(turned.T, name, tuple(index))
                assert torch.equal(turned.T, wanted[tuple(index)].bfloat16())


def _rewrite(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change what the file that holds `name` holds, and nothing else."""
    file = folder / hf_reader.read_index(folder)[name]
    held = load_file(file)
    change(held)
    save_file(held, file, metadata={"format": "pt"})


def _reindex(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    path = folder / hf_reader.INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def _both(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    _rewrite(folder, name, change)
    _reindex(folder, change)


def _shard(folder: Path) -> Path:
    return folder / hf_reader.read_index(folder)[EXPERT]


def _cut(folder: Path) -> None:
    path = _shard(folder)
    path.write_bytes(path.read_bytes()[:-1000])


def _nan(held: dict[str, torch.Tensor], name: str = EXPERT) -> None:
    held[name].view(torch.uint8)[-1, -1] = 0x7F


def _flip(folder: Path) -> None:
    data = bytearray(_shard(folder).read_bytes())
    data[-7] ^= 0x04
    _shard(folder).write_bytes(data)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sums(folder: Path) -> None:
    lines = [f"{_sha256(path)}  {path.name}\n" for path in folder.glob("*.safetensors")]
    (folder / "SHA256SUMS").write_text("".join(lines))


def _downloaded(folder: Path) -> None:
    """As huggingface_hub leaves a folder: a note of the file's SHA-256 when it was downloaded."""
    note = folder / ".cache" / "huggingface" / "download" / f"{_shard(folder).name}.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{'a' * 40}\n{_sha256(_shard(folder))}\n1.5\n")


def _cached(folder: Path) -> None:
    """As huggingface_hub's cache has it: a link to a blob whose name is its SHA-256."""
    path = _shard(folder)
    blob = folder / "blobs" / _sha256(path)
    blob.parent.mkdir()
    path.rename(blob)
    path.symlink_to(blob)


def _move(index: dict[str, str]) -> None:
    index[EXPERT] = next(file for file in sorted(set(index.values())) if file != index[EXPERT])


def _add(folder: Path) -> None:
    _rewrite(folder, EXPERT, lambda held: held.update({"model.layers.2.bias": torch.ones(3)}))
    _reindex(folder, lambda index: index.update({"model.layers.2.bias": index[EXPERT]}))


DAMAGE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "a shard cut short": (_cut, ["model-0000", "is damaged"]),
    "a shard that is missing": (lambda f: _shard(f).unlink(), ["model-0000", "is missing"]),
    "a shard of other things": (lambda f: _shard(f).write_bytes(b"\x93NUMPY" * 100), ["model-0000", "is damaged"]),
    "a bit that changed": (lambda f: [_sums(f), _flip(f)], ["model-0000", "does not match its checksum"]),
    "a bit that changed since the download": (
        lambda f: [_downloaded(f), _flip(f)],
        ["model-0000", "does not match its checksum"],
    ),
    "a bit that changed in the cache": (
        lambda f: [_cached(f), _flip(f)],
        ["model-0000", "does not match its checksum"],
    ),
    "a value that is not a number": (lambda f: _rewrite(f, EXPERT, _nan), [EXPERT, "not finite"]),
    "a tensor gone from its file": (
        lambda f: _rewrite(f, EXPERT, lambda held: held.pop(EXPERT)),
        [EXPERT, "no tensor"],
    ),
    "a tensor gone": (lambda f: _both(f, EXPERT, lambda held: held.pop(EXPERT)), [EXPERT]),
    "a scale gone": (
        lambda f: _both(f, f"{EXPERT}_scale_inv", lambda held: held.pop(f"{EXPERT}_scale_inv")),
        [f"{EXPERT}_scale_inv", "no tensor"],
    ),
    "a scale of another shape": (
        lambda f: _rewrite(
            f, f"{EXPERT}_scale_inv", lambda held: held.update({f"{EXPERT}_scale_inv": torch.ones(1, 1)})
        ),
        [f"{EXPERT}_scale_inv", "(1, 1)", "(2, 2)"],
    ),
    "a tensor of another shape": (
        lambda f: _rewrite(f, "model.norm.weight", lambda held: held.update({"model.norm.weight": torch.ones(3)})),
        ["model.norm.weight", "(3,)", "(144,)"],
    ),
    "a tensor of another type": (
        lambda f: _rewrite(
            f, "model.norm.weight", lambda held: held.update({"model.norm.weight": torch.ones(144, dtype=torch.int32)})
        ),
        ["model.norm.weight", "I32"],
    ),
    "a tensor too many": (_add, ["model.layers.2.bias", "no place"]),
    "a tensor too many in a file": (
        lambda f: _rewrite(f, EXPERT, lambda held: held.update({"model.layers.2.bias": torch.ones(3)})),
        ["model.layers.2.bias", "does not place"],
    ),
    "an index that places a tensor elsewhere": (lambda f: _reindex(f, _move), [EXPERT]),
    "an index that leaves the folder": (
        lambda f: _reindex(f, lambda index: index.update({EXPERT: "../x.safetensors"})),
        [EXPERT, "../x.safetensors"],
    ),
    "half an index": (
        lambda f: (f / hf_reader.INDEX).write_bytes((f / hf_reader.INDEX).read_bytes()[:500]),
        [hf_reader.INDEX, "damaged"],
    ),
    "a copy that is none": (
        lambda f: _rewrite(
            f,
            "model.layers.3.embed_tokens.weight",
            lambda held: held["model.layers.3.embed_tokens.weight"].mul_(2),
        ),
        ["model.layers.3.embed_tokens.weight", "model.embed_tokens.weight"],
    ),
    "no configuration": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "pickles": (
        lambda f: [p.rename(p.with_suffix(".bin")) for p in f.glob("*.safetensors")] + [(f / hf_reader.INDEX).unlink()],
        ["no safetensors", "pickle"],
    ),
}


def read_all(folder: str, layout: dict[str, Any]) -> str:
    """Collective: what loading the folder says."""
    try:
        model, _ = read_config(folder)
        parallel = ParallelConfig(**layout)
        load_hf(Trainer(model, parallel, join(parallel), seed=1), folder)
    except CheckpointError as error:
        return str(error)
    return "it was loaded"


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_told_by_name_on_every_process(kind: str, folder: Path, pools: dict[int, Any]) -> None:
    damage, words = DAMAGE[kind]
    damage(folder)
    messages = [read_all(str(folder), {}), *pools[2].run(read_all, str(folder), {"expert": 2})]
    for message in messages:
        assert all(word in message for word in words), message
        assert "\n" not in message and len(message) < 400, message


def test_what_is_whole_is_loaded(folder: Path, pools: dict[int, Any]) -> None:
    assert [read_all(str(folder), {}), *pools[2].run(read_all, str(folder), {"expert": 2})] == ["it was loaded"] * 3


def test_checksums_of_all_three_kinds_pass(folder: Path) -> None:
    assert checksums(folder) == {}
    for note in (_downloaded, _cached):
        note(folder)
        assert set(checksums(folder)) == {_shard(folder).name}
        check_sum(_shard(folder), checksums(folder)[_shard(folder).name])
    _sums(folder)
    assert len(checksums(folder)) == 4
    for name, value in checksums(folder).items():
        check_sum(folder / name, value)
