"""Exact numerics: a row's result has the same bits whatever the other rows are, and however many. What there is to it
in Triton is mla/triton_exact.py; this is for plain torch.

A matrix product on a CPU takes other instructions, in another order, for another number of rows, and an elementwise
function others for the last few numbers of a tensor. Here every product is one of matrices of a fixed size, and the
exponential, which is the same everywhere, stands for what is made of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

ROWS, WIDTH = 32, 16  # of a product: its rows, and what the other two sizes are multiples of
KEYS = 32  # that attention takes at a time
PAGE = 64  # rows, of which a page of a cache has a multiple
QUERIES = 1024  # whose scores exist at a time

_exact = False


@contextlib.contextmanager
def numerics(kind: str) -> Iterator[None]:
    """Within it the torch, cpu and Triton backends compute as `kind` says: "fast", the default, or "exact".

    Under "exact" forward results depend on nothing but their own row, so that rollout and training, which see other
    batches, give the same bits. Gradients are right, and promise no more than under "fast". Raises ValueError for
    another kind.
    """
    global _exact
    if kind not in ("fast", "exact"):
        raise ValueError(f"numerics is {kind!r}, wanted 'fast' or 'exact'")
    before, _exact = _exact, kind == "exact"
    try:
        yield
    finally:
        _exact = before


def is_exact() -> bool:
    return _exact


def product(x_MK: Tensor, weight_KN: Tensor, out: Tensor | None = None) -> Tensor:
    """x @ weight, in out if that is given."""
    if not _exact:
        return torch.mm(x_MK, weight_KN, out=out)
    (M, K), N = x_MK.shape, weight_KN.shape[1]
    weight_KN = _filled_up(_filled_up(weight_KN).t()).t()
    tiles = -(-M // ROWS)
    padded = x_MK.new_zeros(tiles * ROWS, weight_KN.shape[0])
    padded[:M, :K] = x_MK
    products = torch.bmm(padded.view(tiles, ROWS, len(weight_KN)), weight_KN.expand(tiles, *weight_KN.shape))
    result = products.flatten(0, 1)[:M, :N]
    return result.contiguous() if out is None else out.copy_(result)


def _filled_up(x: Tensor) -> Tensor:
    """With zeros to a multiple of WIDTH: narrow products are of other instructions for other rows, and for matrices
    that lie otherwise in memory."""
    more = -x.shape[-1] % WIDTH
    return torch.nn.functional.pad(x, (0, more)) if more else x


def sigmoid(x: Tensor) -> Tensor:
    return x.neg().exp_().add_(1).reciprocal_() if _exact else x.sigmoid()


def silu(x: Tensor, out: Tensor | None = None) -> Tensor:
    if not _exact:
        return torch.nn.functional.silu(x) if out is None else torch.ops.aten.silu.out(x, out=out)
    return torch.mul(x, sigmoid(x), out=out)


def attention(
    q_BMGD: Tensor,
    seq_lens_B: Tensor,
    keys: Callable[[slice, int], Tensor],
    values: Callable[[slice, int], Tensor],
    value_width: int,
) -> tuple[Tensor, Tensor]:
    """(out (B, M, G, Dv), log-sum-exp (B, M, G)) of B queries, G heads for each of M key heads; q is scaled already.

    keys(queries, first) gives (b, KEYS, M, D), finite, from each query's place `first` on, values likewise; a query
    sees seq_lens of them, or an average of all where that is 0. A softmax over blocks of keys in order: those that a
    query does not see add exactly nothing.
    """
    B, M, G, D = q_BMGD.shape
    out, lse = q_BMGD.new_empty(B, M, G, value_width), q_BMGD.new_empty(B, M, G)
    of_heads = lambda x: x.transpose(1, 2).reshape(-1, KEYS, x.shape[-1])
    for begin in range(0, B, QUERIES):
        part = slice(begin, begin + QUERIES)
        q, lens = _filled_up(q_BMGD[part].reshape(-1, G, D)), seq_lens_B[part]
        blocks, scores = range(0, max(int(lens.max()), 1), KEYS), []
        for first in blocks:
            unseen = torch.arange(first, first + KEYS, device=q.device) >= lens[:, None]
            unseen = unseen.repeat_interleave(M, 0)[:, None]
            # The most negative number, not -inf, so that a query without keys has scores too.
            found = torch.bmm(q, _filled_up(of_heads(keys(part, first))).transpose(1, 2))
            scores.append(found.masked_fill_(unseen, torch.finfo(q.dtype).min))
        largest = torch.stack([s.amax(-1) for s in scores]).amax(0)[..., None]
        total = q.new_zeros(())
        for first, s in zip(blocks, scores):
            # The column of ones adds up the weights.
            v = _filled_up(torch.nn.functional.pad(of_heads(values(part, first)), (0, 1), value=1.0))
            total = torch.bmm(s.sub_(largest).exp_(), v) + total
        weight = total[..., value_width, None]
        out[part] = (total[..., :value_width] / weight).view(-1, M, G, value_width)
        lse[part] = (weight.log() + largest).view(-1, M, G)
    return out, lse
