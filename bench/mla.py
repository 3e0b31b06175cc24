"""The mla family against its peers, in one run: `python -m r1.bench.mla [--longest S] [--repeats N]`.

- `training`: one packed causal sequence, forward and forward with backward: ours, torch's scaled_dot_product_attention
  (on a GPU its flash and its cuDNN backend) and flash-attn where it is installed. Peers get what they want inside the
  timed call, as a model has to give it: the rope part of the key expanded to the heads, values padded to the keys'
  width. TFLOP/s count what a causal sequence needs, once: no recomputation, no padding. At the shortest length errors
  are against float64.
- `decode`: one query a sequence over a paged latent cache: ours, pages gathered and scaled_dot_product_attention, and
  FlashMLA where it is installed; where latents are whole blocks of 128, ours over an FP8 cache too, whose error is its
  quantisation's as well (FlashMLA reads such a cache for sparse attention only, and is left out). GB/s count the used
  rows of the cache as they lie, read once.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from r1.bench import _measure
from r1.kernels import append_kv, fp8_latent_bytes, mla_attention, mla_decode

# (query heads, key heads, own width of the keys, shared rope width, width of the values)
TRAINING = {
    "cpu": {"tiny preset": (4, 4, 32, 16, 32), "grouped": (8, 2, 64, 0, 64)},
    "cuda": {"DeepSeek-V3, 128 heads": (128, 128, 128, 64, 128), "Llama 70B, 64 heads": (64, 8, 128, 0, 128)},
}
LENGTHS = {"cpu": (256, 512, 1024), "cuda": (2048, 4096, 8192, 16384, 32768, 65536)}
# (sequences, cached tokens each, heads, latent width, rope width, tokens a page)
DECODE = {
    "cpu": {"tiny preset": (8, 256, 4, 32, 16, 16), "latents of 128": (8, 256, 4, 128, 32, 16)},
    "cuda": {
        "DeepSeek-V3, 128 heads": (128, 4096, 128, 512, 64, 64),
        "16 of its heads": (128, 4096, 16, 512, 64, 64),
        "128 heads, long": (16, 32768, 128, 512, 64, 64),
    },
}


def _record(task: str, name: str, shape: str, **values: Any) -> _measure.Record:
    return {"task": task, "name": name, "shape": shape, **values}


def whole_heads(q: Tensor, k: Tensor, v: Tensor, rope: Tensor | None, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys with their rope part, and values padded to `width`."""
    if rope is not None:
        k = torch.cat([k, rope[:, None].expand(-1, k.shape[1], -1)], -1)
    return q, k, pad(v, (0, width - v.shape[2]))


def by_sdpa(backend: SDPBackend | None, padded: bool) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, rope: Tensor | None, scale: float) -> Tensor:
        heads = whole_heads(q, k, v, rope, q.shape[2] if padded else v.shape[2])
        q_NTD, k_NTD, v_NTD = (x.transpose(0, 1)[None] for x in heads)
        options = {"is_causal": True, "scale": scale, "enable_gqa": k.shape[1] != q.shape[1]}
        if backend is None:
            out = scaled_dot_product_attention(q_NTD, k_NTD, v_NTD, **options)
        else:
            with sdpa_kernel(backend):
                out = scaled_dot_product_attention(q_NTD, k_NTD, v_NTD, **options)
        return out[0].transpose(0, 1)[..., : v.shape[2]]

    return attend


def by_flash_attn(q: Tensor, k: Tensor, v: Tensor, rope: Tensor | None, scale: float) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    S = len(q)
    bounds = torch.tensor([0, S], dtype=torch.int32, device=q.device)
    heads = whole_heads(q, k, v, rope, q.shape[2])
    out = flash_attn_varlen_func(
        *heads, bounds, bounds, S, S, softmax_scale=scale, causal=True, deterministic=True
    )  # fmt: skip
    return out[..., : v.shape[2]]


def by_r1(q: Tensor, k: Tensor, v: Tensor, rope: Tensor | None, scale: float) -> Tensor:
    bounds = torch.tensor([0, len(q)], dtype=torch.int32, device=q.device)
    return mla_attention(q, k, v, bounds, len(q), scale, k_rope_SD=rope)


def _peers(device: str) -> dict[str, Callable[..., Tensor]]:
    if device == "cpu":
        return {"SDPA": by_sdpa(None, padded=True)}
    peers = {
        "SDPA flash, v padded": by_sdpa(SDPBackend.FLASH_ATTENTION, padded=True),
        "SDPA cuDNN": by_sdpa(SDPBackend.CUDNN_ATTENTION, padded=False),
    }
    if importlib.util.find_spec("flash_attn") is not None:
        peers["flash-attn, v padded, deterministic"] = by_flash_attn
    return peers


def measure_training(
    label: str, shape: tuple[int, ...], S: int, device: str, repeats: int, exact: bool
) -> list[_measure.Record]:
    N, M, own, rope_width, value = shape
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    normal = lambda *size: torch.randn(*size, generator=generator, device=device).to(dtype)
    leaves = [normal(S, N, own + rope_width), normal(S, M, own + value)]
    leaves += [normal(S, rope_width)] if rope_width else []
    leaves = [x.requires_grad_() for x in leaves]
    up, scale = normal(S, N, value), (own + rope_width) ** -0.5

    def forward(attend: Callable[..., Tensor], given: list[Tensor]) -> Tensor:
        return attend(given[0], *given[1].split([own, value], -1), given[2] if rope_width else None, scale)

    def both(attend: Callable[..., Tensor], given: list[Tensor], up: Tensor) -> list[Tensor]:
        out = forward(attend, given)
        return [out.detach(), *torch.autograd.grad(out, given, up)]

    contenders = _peers(device) | dict.fromkeys(_measure.ours("mla", device), by_r1)
    want: list[Tensor] = []
    if exact:
        doubled = [x.detach().double().requires_grad_() for x in leaves]
        want = both(by_sdpa(SDPBackend.MATH, padded=False), doubled, up.double())
    records, calls, forwards, errors = [], {}, {}, {}
    for name, attend in contenders.items():
        if name == "r1 torch" and device == "cuda" and S > min(LENGTHS[device]):
            continue  # the definition, not a contender
        call = _measure.with_kernels(name, lambda f=attend: both(f, leaves, up))
        try:
            got = call()
        except Exception as error:  # a peer that fails must not cost the other results
            if name.startswith("r1 "):
                raise
            reason = f"{type(error).__name__}: {error}"[:300]
            records.append(_record("training", name, label, tokens=S, failed=reason))
            continue
        errors[name] = [_measure.relative_error(a, b) for a, b in zip(got, want)]
        del got
        calls[name] = call
        forwards[name] = _measure.with_kernels(name, torch.no_grad()(lambda f=attend: forward(f, leaves)))
    took_both = _measure.side_by_side(calls, device, repeats)
    took_forward = _measure.side_by_side(forwards, device, repeats)
    pairs, width = N * S * (S + 1), own + rope_width  # half of the square, two operations each
    flops_forward, flops_backward = pairs * (width + value), pairs * (3 * width + 2 * value)
    for name, took in took_both.items():
        backward = took - took_forward[name]
        records.append(_record(
            "training", name, label, tokens=S, seconds_forward=took_forward[name], seconds_forward_backward=took,
            tflops_forward=flops_forward / took_forward[name] / 1e12,
            tflops_backward=flops_backward / backward / 1e12 if backward > 0 else None,  # a machine with other work
            relative_errors=dict(zip(("out", "dq", "dkv", "dk_rope"), errors[name])),
            extra_bytes=_measure.peak_bytes(calls[name], device) if device == "cuda" else None,
        ))  # fmt: skip
    return records


def measure_decode(label: str, shape: tuple[int, ...], device: str, repeats: int) -> list[_measure.Record]:
    B, L, N, R, rope, page = shape
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    normal = lambda *size: torch.randn(*size, generator=generator, device=device).to(dtype)
    q, cache, scale = normal(B, N, R + rope), normal(B * L // page, page, R + rope), (R + rope) ** -0.5
    table = torch.randperm(B * L // page, generator=generator, device=device).int().view(B, -1)
    lens = torch.full((B,), L, dtype=torch.int32, device=device)

    def gathered(q: Tensor, cache: Tensor) -> Tensor:
        kv = cache.index_select(0, table.flatten()).view(B, 1, L, R + rope)
        heads = q.unsqueeze(1)  # the heads as queries of one key head: no expanded copy
        return scaled_dot_product_attention(heads, kv, kv[..., :R], scale=scale).squeeze(1)

    contenders: dict[str, Callable[[], Tensor]] = {"gather and SDPA": lambda: gathered(q, cache)}
    if importlib.util.find_spec("flash_mla") is not None:
        from flash_mla import flash_mla_with_kvcache, get_mla_metadata

        def their_decode() -> Tensor:
            schedule = get_mla_metadata(lens, N, 1)
            kv = cache.unsqueeze(2)
            return flash_mla_with_kvcache(q[:, None], kv, table, lens, R, *schedule, softmax_scale=scale)[0][:, 0]

        contenders["FlashMLA"] = their_decode
    ours = lambda: mla_decode(q, cache, table, lens, scale, R)
    contenders |= {name: _measure.with_kernels(name, ours) for name in _measure.ours("mla", device)}
    token_bytes = dict.fromkeys(contenders, (R + rope) * q.element_size())
    if R % 128 == 0:
        size, token = fp8_latent_bytes(R, rope), torch.arange(B * L, device=device)
        fp8_cache = torch.empty(*cache.shape[:2], size, dtype=torch.uint8, device=device)
        append_kv(fp8_cache, cache.flatten(0, 1), token[:, None] // page, token % page)
        ours_fp8 = lambda: mla_decode(q, fp8_cache, table, lens, scale, R)
        for name in _measure.ours("mla", device):
            contenders[f"{name}, FP8 cache"] = _measure.with_kernels(name, ours_fp8)
            token_bytes[f"{name}, FP8 cache"] = size
    few = slice(0, 4)  # sequences whose error is looked at: float64 is slow
    pages = cache[table[few].long()].double().flatten(1, 2)
    scores = torch.einsum("bnd,bld->bnl", q[few].double(), pages) * scale
    want = torch.einsum("bnl,bld->bnd", scores.softmax(-1), pages[..., :R])
    records, errors = [], {}
    for name in list(contenders):
        try:
            errors[name] = _measure.relative_error(contenders[name]()[few], want)
        except Exception as error:
            if name.startswith("r1 "):
                raise
            del contenders[name]
            records.append(_record("decode", name, label, tokens=L, failed=f"{type(error).__name__}: {error}"[:300]))
    flops = 2 * B * L * N * (2 * R + rope)
    for name, took in _measure.side_by_side(contenders, device, repeats).items():
        records.append(_record(
            "decode", name, label, tokens=L, seconds_forward=took, tflops_forward=flops / took / 1e12,
            gigabytes_per_second=B * L * token_bytes[name] / took / 1e9, relative_errors={"out": errors[name]},
        ))  # fmt: skip
    return records


def table(records: list[_measure.Record]) -> None:
    rows = []
    for r in records:
        name = [f"{r['task']}: {r['name']}", r["shape"], str(r["tokens"])]
        if "failed" in r:
            rows.append([*name, r["failed"], "", "", "", "", ""])
            continue
        errors, both = r["relative_errors"], r.get("seconds_forward_backward")
        rows.append([
            *name, f"{r['seconds_forward'] * 1e3:.3g}", f"{r['tflops_forward']:.3g}",
            f"{both * 1e3:.3g}" if both else "", f"{r['tflops_backward']:.3g}" if r.get("tflops_backward") else "",
            f"{r['gigabytes_per_second']:.3g}" if "gigabytes_per_second" in r else "",
            f"{max(errors.values()):.1e}" if errors else "",
        ])  # fmt: skip
    columns = ["", "shape", "tokens", "forward ms", "TFLOP/s", "both ms", "TFLOP/s backward", "GB/s", "error"]
    _measure.show("both: forward with backward", columns, rows)


def plot(records: list[_measure.Record], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys((r["task"], r["shape"]) for r in records))
    figure, axes = pyplot.subplots(len(shapes), 1, figsize=(9, 3.5 * len(shapes)), squeeze=False)
    for axis, (task, shape) in zip(axes[:, 0], shapes):
        rows = [r for r in records if (r["task"], r["shape"]) == (task, shape) and "failed" not in r]
        for name in dict.fromkeys(r["name"] for r in rows):
            mine = [r for r in rows if r["name"] == name]
            tokens = [r["tokens"] for r in mine]
            axis.plot(tokens, [r["tflops_forward"] for r in mine], "o-", label=f"{name}, forward")
            if task == "training":
                axis.plot(tokens, [r["tflops_backward"] or 0 for r in mine], "s--", label=f"{name}, backward")
        axis.set(xscale="log", xlabel=f"{task}, {shape}: tokens", ylabel="TFLOP/s", ylim=(0, None))
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=_measure.RESULTS)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    lengths = [S for S in LENGTHS[options.device] if not options.longest or options.longest >= S]
    training, decode = TRAINING[options.device], DECODE[options.device]
    records = []
    with Progress(transient=True) as progress:
        bar = progress.add_task("", total=len(training) * len(lengths) + len(decode))
        for label, shape in training.items():
            for S in lengths:
                progress.update(bar, description=f"{label}: {S} tokens")
                records += measure_training(
                    label, shape, S, options.device, options.repeats, exact=S == min(LENGTHS[options.device])
                )
                progress.advance(bar)
        for label, shape in decode.items():
            progress.update(bar, description=f"decode, {label}")
            records += measure_decode(label, shape, options.device, options.repeats)
            progress.advance(bar)
    path = _measure.save("mla", options.device, records, options.out)
    plot(records, path.with_suffix(".png"))
    table(records)
    print(f"{path}\n{path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
