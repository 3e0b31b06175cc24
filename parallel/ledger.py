"""What a step takes, counted as it runs: live bytes by what they are for, floating point operations, collectives. Of
real tensors, or of hollow ones, on torch's meta device, for which it answers what only data could."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map_only

from r1.parallel.costs import flops_of, workspace_of

aten = torch.ops.aten
META = torch.device("meta")
KINDS = ("parameters", "gradients", "optimizer", "quantized", "activations", "logits", "backward")
HOST = "host"  # what lies in host memory counts by itself


@dataclass(frozen=True)
class Collective:
    """Calls of one operation over one kind of group, and the bytes of this rank's input to all of them."""

    operation: str
    group: str
    size: int
    calls: int
    bytes: int


class Ledger(TorchDispatchMode):
    """A mode that counts what passes: storages, as `kind` when they are made and until nothing refers to them; FLOPs
    of causal attention over `sequence_length` tokens and of products; collectives by their group's name. With `hollow`
    all tensors are made on the meta device, and no collective is called."""

    def __init__(self, sequence_length: int, hollow: bool = False) -> None:
        super().__init__()
        self.hollow = hollow
        self.sequence_length = sequence_length
        self.kind = "parameters"
        self.live: Counter[str] = Counter()
        self.total = 0
        self.peak: dict[str, int] = {}
        self.peak_total = 0
        self.largest: Counter[str] = Counter()
        self.kept = 0
        self.flops: Counter[str] = Counter()
        self.calls: dict[tuple[str, str, int], list[int]] = {}
        self.group_names: dict[str, str] = {}
        self.forced_kind: str | None = None
        self._known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.hollow:
            if func is aten._local_scalar_dense.default and args[0].is_meta:
                return _value_of(args[0])
            if "device" in kwargs:
                kwargs = {**kwargs, "device": META}
            args = tree_map_only(Tensor, _hollow, args)
            if func is aten.masked_select.default:
                out = args[0].new_empty(self.rows_chosen(args[1]))
            elif func.namespace == "c10d":
                self._collective(func, args, kwargs)
                return _answered(func, args, kwargs)
            else:
                out = func(*args, **kwargs)
        else:
            if func.namespace == "c10d":
                self._collective(func, args, kwargs)
            out = func(*args, **kwargs)
        if count := flops_of(func, args, kwargs, out, self.sequence_length):
            self.flops[func._schema.name.replace("::", ".")] += count
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.note(tensor)
        if size := workspace_of(func, args):
            kind = "logits" if "logprob" in func._schema.name else self._kind_now()
            self._add(kind, size)
            self._add(kind, -size)
        return out

    rows_chosen: Callable[[Tensor], int] = staticmethod(lambda mask: mask.numel())

    def note(self, tensor: Tensor) -> None:
        """Counts the tensor's storage, if it is new, until nothing refers to it any more."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        kind = self._kind_now()
        cell = [kind, storage.nbytes()]
        self._known[storage] = cell
        self._add(kind, cell[1])
        weakref.finalize(storage, self._forget, cell)

    def relabel(self, tensor: Tensor | None, kind: str) -> None:
        if tensor is not None:
            cell = self._known[tensor.untyped_storage()]
            self._add(cell[0], -cell[1])
            cell[0] = kind
            self._add(kind, cell[1])

    def begin(self, kind: str) -> None:
        """From here on: what comes is `kind`, and the peaks and counts are those of what follows."""
        self.kind = kind
        self.peak_total, self.peak, self.largest = self.total, dict(self.live), Counter(self.live)
        self.flops.clear()
        self.calls.clear()

    def resized(self, storage: Any, size: int) -> None:
        """A storage that was given up or taken back while tensors refer to it, as Megatron's recomputation does."""
        cell = self._known.get(storage)
        if cell is not None:
            self._add(cell[0], size - cell[1])
            cell[1] = size

    @contextlib.contextmanager
    def all_is(self, kind: str) -> Iterator[None]:
        self.forced_kind = kind
        try:
            yield
        finally:
            self.forced_kind = None

    def _kind_now(self) -> str:
        if self.forced_kind:
            return self.forced_kind
        if self.kind == "activations" and torch._C._current_graph_task_id() != -1:
            return "backward"
        return self.kind

    def _add(self, kind: str, size: int) -> None:
        self.live[kind] += size
        if kind == HOST:
            self.largest[HOST] = max(self.largest[HOST], self.live[HOST])
            return
        self.total += size
        self.largest[kind] = max(self.largest[kind], self.live[kind])
        if self.total > self.peak_total:
            self.peak_total, self.peak = self.total, dict(self.live)

    def _forget(self, cell: list) -> None:
        self._add(cell[0], -cell[1])

    def _collective(self, func: Any, args: tuple, kwargs: dict) -> None:
        name = func._schema.name.removeprefix("c10d::").strip("_")
        if name in ("monitored_barrier", "barrier"):
            return
        group = next((_group_of(x) for x in (*args, *kwargs.values()) if isinstance(x, torch.ScriptObject)), None)
        which, size = (self.group_names.get(group.group_name, "?"), group.size()) if group is not None else ("?", 0)
        # These name where the result goes first.
        into = name.endswith(("_base", "_coalesced")) or name in ("allgather", "reduce_scatter")
        at = 1 if into else 0
        sent = sum(x.numel() * x.element_size() for x in tree_iter(args[at]) if isinstance(x, Tensor))
        entry = self.calls.setdefault((name, which, size), [0, 0])
        entry[0] += 1
        entry[1] += sent

    def collectives(self) -> list[Collective]:
        return [Collective(*key, *value) for key, value in sorted(self.calls.items())]


def _hollow(x: Tensor) -> Tensor:
    return x if x.is_meta else x.to(META)


def _answered(func: Any, args: tuple, kwargs: dict) -> Any:
    """What the collective returns when it is over, without data."""
    with _disable_current_modes():
        empty = tree_map_only(Tensor, lambda x: torch.empty(0, dtype=x.dtype), args)
        if func is torch.ops.c10d.alltoall_base_.default:
            empty = (*empty[:3], [], [], *empty[5:])  # sizes of the pieces
        answer = func(*empty, **kwargs)
    return (args[0], answer[-1]) if isinstance(answer, tuple) else answer


def _value_of(tensor: Tensor) -> Any:
    """What a tensor without data says when it is asked for its number."""
    return False if tensor.dtype == torch.bool else 0.0 if tensor.is_floating_point() else 0


def _group_of(box: Any) -> Any:
    return dist.distributed_c10d.ProcessGroup.unbox(box)
