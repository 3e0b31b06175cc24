"""Folders that are there whole or not at all: written beside their name, renamed when their last file is in place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or of another model, or cannot be written; one sentence."""


def partial_of(folder: Path) -> Path:
    """Where `folder` is written."""
    return folder.with_name(folder.name + ".r1-partial")


def _old(folder: Path) -> Path:
    return folder.with_name(folder.name + ".r1-old")


def begin(folder: Path, sign: str) -> Path:
    """An empty `partial_of(folder)`. CheckpointError where it cannot be written, or `folder` holds other things: what
    may be replaced has a file `sign`."""
    partial = partial_of(folder)
    if folder.exists() and not (folder / sign).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and has no {sign}: it is not what would be replaced; wanted a new name")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(unwritten(folder, error)) from None
    return partial


def publish(folder: Path, keep: Path | None = None) -> None:
    """Give what was written its name. What had the name before is deleted, or renamed to `keep`."""
    old = keep or _old(folder)
    for place in (partial_of(folder), *(p for p in partial_of(folder).rglob("*") if p.is_dir())):
        _sync(place)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        partial_of(folder).rename(folder)
    except FileNotFoundError:
        if not folder.exists():  # else a reader, who came between, has done it
            raise
    _sync(folder.parent)
    if keep is None:
        shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path, last_file: str) -> Path:
    """Do what a `publish` that was killed between its two renames left undone; returns the folder. `last_file` is
    the one that says that what was written is whole."""
    if not folder.exists():
        for left in (partial_of(folder), _old(folder)):
            if (left / last_file).is_file():
                try:
                    left.rename(folder)
                except OSError:
                    if not folder.exists():  # else another process did it
                        raise
                break
    return folder


def unwritten(folder: Path, error: object) -> str:
    """The sentence for a folder that could not be written, and what is left of the one before."""
    before = f"; the one before it, {folder}, is whole" if folder.exists() else ""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return f"{folder} could not be written: {reason}{before}"


def missing_room(wanted: int, folder: Path) -> str | None:
    """What to say where the disk under `folder` has no room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if free >= wanted:
        return None
    unit, name = (1e9, "GB") if wanted >= 1e9 else (1e6, "MB")
    return f"it wants {wanted / unit:,.1f} {name} and its disk has {free / unit:,.1f} {name} free"


def probe(folder: Path, nbytes: int = 1 << 20) -> None:
    """OSError where the disk does not take so much more: it is full, over a quota or read-only."""
    path = folder / "probe"
    try:
        write_bytes(path, bytes(nbytes))
    finally:
        path.unlink(missing_ok=True)


def write_bytes(path: Path, contents: bytes) -> None:
    """They are on the disk when this returns."""
    with path.open("wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def _sync(folder: Path) -> None:
    """A rename outlives a power cut only when the folder around it is on the disk too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
