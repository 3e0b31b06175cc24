"""Writing a checkpoint, while training goes on if that is wanted (checkpoint.py says what it is, and reads it)."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import queue
import shutil
import signal
import zlib
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding

from r1.parallel import folders
from r1.parallel.folders import CheckpointError, partial_of, unwritten, write_bytes, write_text
from r1.parallel.model import checkpoint_metadata, sharded_state
from r1.parallel.trainer import Trainer

MANIFEST = "manifest.json"
SPARE_BYTES = 1 << 20  # beside the tensors: state and manifest
BYTES_OF_METADATA = 1 << 10  # of each of a process's tensors, at most
PARENT_DEATH_SIGNAL = 1  # of Linux's prctl


def save(
    trainer: Trainer,
    folder: str | Path,
    state: dict[str, Any],
    optimizer: bool = True,
    reference: Trainer | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write the weights (and optimiser, and a reference model's weights) of all processes, `state` (JSON) and `files`
    (the main process's, for `hf/`) to `folder`, replacing what was there.

    Collective: every process calls it with the same arguments. A process killed in the middle leaves the old one.
    CheckpointError, on every process, where the folder cannot be written; the old one is whole then too.
    """
    Writing(trainer, folder, state, optimizer, reference, files, background=False).finish()


class Writing:
    """A checkpoint that is being written while training goes on: made, it has the state of that moment.

    In the `background` a process of its own, forked, writes the shards from host memory (a GPU's tensors are copied
    there first). Everyone then calls `finish`, best when `done` says so. Other arguments as `save`; what had the name
    before is renamed to `keep`.
    """

    def __init__(
        self,
        trainer: Trainer,
        folder: str | Path,
        state: dict[str, Any],
        optimizer: bool = True,
        reference: Trainer | None = None,
        files: Mapping[str, bytes] | None = None,
        keep: Path | None = None,
        background: bool = True,
    ) -> None:
        self.folder, self.keep, self._world = Path(folder).absolute(), keep, trainer.world
        trainer.gather_weights()
        tensors = sharded_state(trainer.chunks, trainer.world)
        if optimizer and trainer.optimizer is not None:
            metadata = checkpoint_metadata(trainer.world)
            tensors["optimizer"] = trainer.optimizer.sharded_state_dict(tensors, is_loading=False, metadata=metadata)
        if reference is not None:
            tensors["reference"] = reference_state(reference)
        self._files = {f"hf/{name}": contents for name, contents in (files or {}).items()}
        contents = {
            "model": trainer.model_config.model_dump(),
            "dtype": trainer.parallel.dtype,
            "value_head": trainer.value_head,
            "optimizer": "optimizer" in tensors,
            "reference": reference is not None,
            "steps_taken": trainer.steps_taken,
            **state,
        }
        self._files["state.json"] = json.dumps(contents, indent=1).encode()
        try:
            self._write(tensors, background)
        finally:
            if "optimizer" in tensors:
                trainer.optimizer.to_host()

    def _write(self, tensors: dict[str, Any], background: bool) -> None:
        shards = _sharded(tensors)
        self._begin(sum(map(_nbytes, shards)), len(shards))
        # Megatron starts a manager process (which imports the main module again) for a queue between processes; here
        # both ends are in this one.
        self._results: queue.Queue[Any] = queue.Queue()
        filesystem_async._results_queue = self._results
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
        self._request = dist_checkpointing.save(
            tensors, str(partial_of(self.folder) / "shards"), sharded_strategy=strategy, async_sharded_save=True
        )
        self._process: Any = None
        self._staged: Any = None
        self._written: _Written = ({}, {}, None)
        if self._request.async_fn is not None:  # this process has something to write
            self._start(background)

    def _begin(self, nbytes: int, tensors: int) -> None:
        """An empty folder on a disk that has room."""
        counts: list[Any] = [None] * self._world.size
        dist.all_gather_object(counts, (nbytes, tensors))
        self._bytes_of_metadata = SPARE_BYTES + sum(n for _, n in counts) * BYTES_OF_METADATA
        problem = None
        if self._world.is_main:
            try:
                shards = folders.begin(self.folder, "state.json") / "shards"
                shards.mkdir()
                folders.probe(shards)
                if problem := folders.missing_room(sum(n for n, _ in counts) + self._bytes_of_metadata, shards):
                    problem = unwritten(self.folder, problem)
            except OSError as error:
                problem = unwritten(self.folder, error)
            except CheckpointError as error:
                problem = str(error)
        self._agree(problem)

    def _start(self, background: bool) -> None:
        transforms, buckets = self._request.async_fn.args[0], self._request.preload_fn()
        if not background:
            self._written = _write_shards(transforms, buckets)
            return
        # Held until it is written: a GPU's copies lie in pinned memory, which a fork shares and does not copy.
        self._staged = buckets
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_write_and_tell, args=(transforms, buckets, theirs, os.getpid()), daemon=True)
        try:
            process.start()
            self._process = process
        except OSError:  # no memory for another process: then here
            self._written = _write_shards(transforms, buckets)
        theirs.close()

    def done(self) -> bool:
        """Whether every process's shards are written. Collective."""
        mine = self._process is None or self._pipe.poll() or not self._process.is_alive()
        everyone = torch.tensor(int(mine), device=self._world.device)
        dist.all_reduce(everyone, dist.ReduceOp.MIN)
        return bool(everyone)

    def finish(self) -> None:
        """Wait for the shards and give the folder its name. Collective; raises as `save`."""
        if self._process is not None:
            try:
                self._written = self._pipe.recv()
            except (EOFError, OSError):
                self._process.join()
                memory = "; is the host's memory full?" if self._process.exitcode == -signal.SIGKILL else ""
                how = f"the process that wrote it ended ({self._process.exitcode}){memory}"
                self._written = ({}, {}, how)
            self._process.join()
            self._pipe.close()
        results, sums, error = self._written
        problem = None if error is None else unwritten(self.folder, error)
        self._staged = None
        self._results.put(results)
        if self._world.is_main and problem is None:
            try:  # Megatron's metadata: if rank 0 failed there, the others would wait for it
                folders.probe(partial_of(self.folder) / "shards", self._bytes_of_metadata)
            except OSError as reason:
                problem = unwritten(self.folder, reason)
        self._agree(problem)
        for finalize in self._request.finalize_fns:
            finalize()
        parts: list[Any] = [None] * self._world.size
        dist.all_gather_object(parts, sums)
        if self._world.is_main and problem is None:
            try:
                self._publish({name: value for part in parts for name, value in sorted(part.items())})
            except OSError as error:
                problem = unwritten(self.folder, error)
        self._agree(problem)

    def _publish(self, sums: dict[str, list[int]]) -> None:
        partial = partial_of(self.folder)
        for name, contents in self._files.items():
            path = partial / name
            path.parent.mkdir(exist_ok=True)
            write_bytes(path, contents)
        for path in _files(partial):
            name = str(path.relative_to(partial))
            if name not in sums:  # Megatron's metadata and what was written here
                sums[name] = [path.stat().st_size, crc32_of(path)]
        write_text(partial / MANIFEST, json.dumps(dict(sorted(sums.items())), indent=1))
        folders.publish(self.folder, self.keep)

    def _agree(self, problem: str | None) -> None:
        """CheckpointError on every process for what one of them met; then nothing of the new folder is left."""
        problems: list[Any] = [None] * self._world.size
        dist.all_gather_object(problems, problem)
        for rank, found in enumerate(problems):
            if found:
                if self._world.is_main:
                    shutil.rmtree(partial_of(self.folder), ignore_errors=True)
                raise CheckpointError(found if self._world.size == 1 else f"rank {rank}: {found}")


# Megatron's results, {file: [bytes, CRC-32]}, what went wrong
_Written = tuple[dict[int, Any], dict[str, list[int]], Exception | str | None]


def _write_and_tell(transforms: list[Any], buckets: list[Any], pipe: Connection, parent: int) -> None:
    """What the forked process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent says when to end
    # The checkpoint of a process that was killed is nobody's: another run may be writing there.
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before that
        os._exit(1)
    pipe.send(_write_shards(transforms, buckets))


def _write_shards(transforms: list[Any], buckets: list[Any]) -> _Written:
    results: dict[int, Any] = {}
    sums: dict[str, list[int]] = {}
    error = None
    for number, bucket in enumerate(buckets):
        answers: queue.Queue[Any] = queue.Queue()
        counted: queue.Queue[int] = queue.Queue()
        counted.put(number)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, answers, counted, True)
        results[number] = answers.get()[1]
        if isinstance(results[number], Exception):
            error = results[number]
            try:
                folders.probe(Path(bucket[0]).parent)  # torch's writer does not say that a disk is full
            except OSError as reason:
                error = reason
            break
        path = Path(bucket[0])
        sums[f"shards/{path.name}"] = [path.stat().st_size, crc32_of(path)]
    return results if error is None else {}, sums, error


def _sharded(tensors: dict[str, Any]) -> list[ShardedTensor]:
    return [t for t in nested_values(tensors) if isinstance(t, ShardedTensor) and t.data is not None]


def _nbytes(tensor: ShardedTensor) -> int:
    return tensor.data.nbytes if is_main_replica(tensor.replica_id) else 0


def reference_state(reference: Trainer) -> dict[str, Any]:
    state = sharded_state(reference.chunks, reference.world)
    for part in state.values():
        replace_prefix_for_sharding(part, "", "reference.")
    return state


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def crc32_of(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
