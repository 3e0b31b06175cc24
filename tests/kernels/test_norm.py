"""RMSNorm and rotary embedding against transformers and float64."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.llama import modeling_llama as llama

from r1.kernels import apply_rope, rms_norm, rope_tables, yarn_softmax_scale
from tests.kernels.helpers import check_operator, leaf

pytestmark = pytest.mark.usefixtures("on_cpu")

YARN = {
    "factor": 40.0, "original_max_positions": 4096, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
    "mscale_all_dim": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("shape", [(7, 33), (5, 1, 64), (0, 8), (1, 1), (3, 2, 4, 16)])
def test_rms_norm_against_transformers(seed: int, shape: tuple[int, ...]) -> None:
    x, weight = leaf(*shape), leaf(shape[-1])
    module = deepseek.DeepseekV3RMSNorm(shape[-1], eps=1e-5)
    module.weight = torch.nn.Parameter(weight.detach().clone())
    x2 = x.detach().clone().requires_grad_()
    got, want = rms_norm(x, weight, 1e-5), module(x2)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    up = torch.randn(shape)
    grads = torch.autograd.grad((got * up).sum(), (x, weight))
    for a, b in zip(grads, torch.autograd.grad((want * up).sum(), (x2, module.weight))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_rms_norm_strided_large_and_bf16(seed: int) -> None:
    x = (torch.randn(6, 40) * 1e4).bfloat16()[:, ::2]
    weight = torch.randn(20)
    got = rms_norm(x, weight, 1e-6)
    x64 = x.double()
    want = x64 / (x64.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=2**-8)
    assert rms_norm(torch.zeros(2, 4), torch.ones(4), 1e-6).eq(0).all()


def test_gradcheck(seed: int) -> None:
    x, weight = leaf(4, 6, dtype=torch.float64), leaf(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, weight))
    cos, sin = rope_tables(torch.tensor([0, 5, 2, 9]), 6, 100.0, dtype=torch.float64)
    q = leaf(4, 2, 6, dtype=torch.float64)
    for interleaved in (True, False):
        assert torch.autograd.gradcheck(lambda q, i=interleaved: apply_rope(q, cos, sin, i), q)


@pytest.mark.parametrize(("factor", "low", "high"), [(8.0, 1.0, 4.0), (32.0, 1.0, 4.0), (4.0, 0.7, 1.9)])
def test_llama3_rope_tables_against_transformers(factor: float, low: float, high: float) -> None:
    shared = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    rope = {**shared, "rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=128, num_attention_heads=1, max_position_embeddings=131072, rope_parameters=rope)
    positions = torch.tensor([0, 1, 77, 8191, 8192, 131071])
    want = llama.LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    got = rope_tables(positions, 128, 5e5, llama3={**shared, "original_max_positions": 8192})
    for ours, theirs in zip(got, want, strict=True):
        # Their angles are float32: at position 131,071 off by up to 0.008.
        torch.testing.assert_close(ours, theirs[0, :, :64], atol=1e-2, rtol=0)
        torch.testing.assert_close(ours[:3], theirs[0, :3, :64], atol=1e-5, rtol=0)


@pytest.mark.parametrize("yarn", [None, YARN, {**YARN, "mscale": 0.7, "beta_fast": 20.0}])
def test_rope_tables_against_transformers(yarn: dict[str, float] | None) -> None:
    parameters: dict[str, object] = {"rope_type": "default", "rope_theta": 10000.0}
    if yarn:
        parameters = {
            **{k: v for k, v in yarn.items() if k != "original_max_positions"}, "rope_type": "yarn",
            "rope_theta": 10000.0, "original_max_position_embeddings": yarn["original_max_positions"],
        }  # fmt: skip
    config = DeepseekV3Config(qk_rope_head_dim=64, max_position_embeddings=163840, rope_parameters=parameters)
    theirs = deepseek.DeepseekV3RotaryEmbedding(config)
    positions = torch.tensor([0, 1, 2, 77, 900])  # theirs are float32 angles: no farther out
    cos, sin = theirs(torch.zeros(1), positions[None])
    got = rope_tables(positions, 64, 10000.0, yarn=yarn)
    torch.testing.assert_close(got[0], cos[0, :, :32], atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(got[1], sin[0, :, :32], atol=2e-4, rtol=1e-5)
    near = slice(0, 3)
    torch.testing.assert_close(got[0][near], cos[0, near, :32], atol=1e-6, rtol=1e-6)


def test_apply_rope_against_transformers(seed: int) -> None:
    T, N, D = 9, 3, 16
    q, k = torch.randn(T, N, D), torch.randn(T, 1, D)
    positions = torch.randint(0, 500, (T,))
    cos, sin = rope_tables(positions, D, 500000.0)
    theirs = llama.LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=D * N, num_attention_heads=N, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
        )
    )
    their_cos, their_sin = theirs(q, positions[None])
    batch = lambda x: x.transpose(0, 1)[None]
    want, _ = llama.apply_rotary_pos_emb(batch(q), batch(k), their_cos, their_sin)
    torch.testing.assert_close(
        apply_rope(q, cos, sin, interleaved=False), want[0].transpose(0, 1), atol=3e-4, rtol=1e-4
    )
    # DeepSeek in transformers moves the pairs apart; what attention sees, q.k, is the same.
    want_q, want_k = deepseek.apply_rotary_pos_emb_interleave(
        batch(q), batch(k), torch.cat([cos, cos], -1)[None], torch.cat([sin, sin], -1)[None]
    )
    got_q, got_k = apply_rope(q, cos, sin, interleaved=True), apply_rope(k, cos, sin, interleaved=True)
    scores = torch.einsum("tnd,smd->nts", got_q, got_k)
    torch.testing.assert_close(scores, (want_q[0] @ want_k[0].transpose(-1, -2)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got_q[..., 0::2], want_q[0].transpose(0, 1)[..., : D // 2])


@pytest.mark.parametrize("interleaved", [True, False])
def test_apply_rope_strided_empty_and_norm(seed: int, interleaved: bool) -> None:
    wide = torch.randn(5, 2, 24)
    cos, sin = rope_tables(torch.arange(5), 8, 1e4)
    part = wide[..., 13:21]
    torch.testing.assert_close(
        apply_rope(part, cos, sin, interleaved), apply_rope(part.contiguous(), cos, sin, interleaved)
    )
    torch.testing.assert_close(apply_rope(part, cos, sin, interleaved).norm(dim=-1), part.norm(dim=-1))
    assert apply_rope(wide[:0, :, :8], cos[:0], sin[:0], interleaved).shape == (0, 2, 8)
    assert apply_rope(part.bfloat16(), cos, sin, interleaved).dtype == torch.bfloat16


def test_yarn_softmax_scale() -> None:
    assert yarn_softmax_scale(40.0, 1.0) == pytest.approx((0.1 * math.log(40) + 1) ** 2)
    assert yarn_softmax_scale(1.0, 1.0) == 1.0


def test_library_checks_and_compile(seed: int) -> None:
    check_operator(lambda x, w: rms_norm(x, w, 1e-6), leaf(3, 2, 8), leaf(8))
    tables = rope_tables(torch.arange(5), 6, 100.0)
    for interleaved in (True, False):
        check_operator(lambda x, c, s, i=interleaved: apply_rope(x, c, s, i), leaf(5, 2, 6), *tables)


def test_bad_input() -> None:
    bad = lambda match: pytest.raises(ValueError, match=match)
    x = torch.randn(3, 4)
    with bad(r"weight_H is a \(3,\) tensor of float32 on cpu, wanted a floating \(4,\) tensor on cpu"):
        rms_norm(x, torch.ones(3))
    with bad("eps is -1"):
        rms_norm(x, torch.ones(4), -1)
    with bad(r"x is a \(3, 4\) tensor of int64"):
        rms_norm(x.long(), torch.ones(4))
    with bad(r"x_TND is a \(3, 1, 5\)"):
        apply_rope(torch.randn(3, 1, 5), x, x, True)
    with bad(r"cos_TD is a \(3, 4\) tensor.*wanted a \(3, 2\) tensor"):
        apply_rope(torch.randn(3, 1, 4), x, x, True)
    with bad("dim is 5"):
        rope_tables(torch.arange(3), 5, 1e4)
    with bad("base is 1"):
        rope_tables(torch.arange(3), 4, 1)
    with bad("yarn is .*wanted the keys factor"):
        rope_tables(torch.arange(3), 4, 1e4, yarn={"factor": 2})
    with bad("llama3 is .*wanted the keys factor"):
        rope_tables(torch.arange(3), 4, 1e4, llama3={"factor": 2})
