"""Our router beside Megatron's own, and its product beside autograd's."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from torch import Tensor

from r1.kernels import route
from r1.parallel.moe import _WideLinear


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(
    ("E", "K", "groups", "group_top"), [(256, 8, 8, 4), (64, 8, 8, 4), (32, 4, 4, 2), (8, 2, 4, 1), (16, 3, 1, 1)]
)
def test_route_against_megatron(
    seed: int, monkeypatch: pytest.MonkeyPatch, backend: str, E: int, K: int, groups: int, group_top: int
) -> None:
    """Ids, weights and gradients on random logits, with groups and a bias. Megatron scores a group by its
    K / group_top best experts, DeepSeek-V3 by two: they are the same in these shapes."""
    if backend == "cpu":
        pytest.importorskip("r1._cpu", reason="r1._cpu is built only where a C++ compiler is found")
    monkeypatch.setenv("R1_KERNELS", f"moe={backend}")
    logits, bias = torch.randn(500, E).requires_grad_(), torch.randn(E) * 0.2
    theirs_TE, chosen_TE = topk_routing_with_score_function(
        logits,
        K,
        num_groups=groups if groups > 1 else None,
        group_topk=group_top if groups > 1 else None,
        scaling_factor=2.5,
        score_function="sigmoid",
        expert_bias=bias,
    )[:2]
    ids, weights, counts = route(logits, bias, K, groups, group_top, 2.5)
    ours_TE = torch.zeros(500, E).scatter(1, ids, weights)

    def chosen(ids: Tensor) -> Tensor:
        return torch.zeros(500, E, dtype=torch.bool).scatter(1, ids, True)

    # A tie is what other last places of the bias decide otherwise.
    others = [bias.double() + 1e-6 * torch.randn(E, dtype=torch.float64) for _ in range(4)]
    choices = [chosen(route(logits.detach().double(), b, K, groups, group_top, 2.5)[0]) for b in others]
    clear = torch.stack([(choice == choices[0]).all(1) for choice in choices]).all(0)
    assert clear.float().mean() > 0.97
    assert torch.equal(chosen(ids)[clear], chosen_TE.bool()[clear])
    assert torch.equal(counts, torch.bincount(ids.flatten(), minlength=E))
    torch.testing.assert_close(ours_TE[clear], theirs_TE[clear], atol=1e-6, rtol=0)
    up = torch.randn(500, E) * clear[:, None]
    for got, want in zip(*(torch.autograd.grad((x * up).sum(), logits) for x in (ours_TE, theirs_TE)), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_autograds(seed: int, dtype: torch.dtype) -> None:
    """To the bit, and the float32 copies are not what is kept."""
    x, w = (torch.randn(n, 48).to(dtype).requires_grad_() for n in (37, 16))
    up, kept = torch.randn(37, 16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y.dtype) or y, lambda y: y):
        ours = _WideLinear.apply(x, w)
    theirs = torch.nn.functional.linear(x.float(), w.float())
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs) and kept == [dtype, dtype]
    for got, want in zip(*(torch.autograd.grad(out, (x, w), up) for out in (ours, theirs)), strict=True):
        assert got.dtype == dtype and torch.equal(got, want)
