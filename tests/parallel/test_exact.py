"""`parallel.numerics = "exact"`: what is decoded and what is read are the same bits, whatever is beside it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from r1.parallel.config import ParallelConfig
from r1.parallel.loss import PolicyLoss, TokenLogprobs
from r1.parallel.model import EXACT_BACKENDS, build
from r1.parallel.packing import MicroBatch
from r1.parallel.trainer import Trainer
from r1.parallel.world import join
from tests.parallel import test_decode
from tests.parallel.test_decode import Story, story  # noqa: F401 (a fixture)
from tests.parallel.tiny import ADAM, LOSSES, MODELS, VOCABULARY, Problem, make_problem, own_part, same_metrics

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the torch backend is exact on a CPU alone")

LAYOUTS = {
    name: (processes, layout | {"numerics": "exact"}, model)
    for name, (processes, layout, model) in test_decode.LAYOUTS.items()
    if "tensor" not in layout
}


@on_cpu
@pytest.mark.parametrize("name", LAYOUTS)
def test_decoding_is_reading(name: str, pools: Any, story: Story) -> None:  # noqa: F811
    processes, layout, model = LAYOUTS[name]
    decode_and_read = test_decode.decode_and_read
    results = [decode_and_read(model, layout, story)] if processes == 1 else []
    results = results or pools[processes].run(decode_and_read, model, layout, story)
    alone = one_at_a_time(model, story)
    fast = test_decode._one_process(model, story)
    for by_decoding, by_reading in results:
        for found in (by_decoding, by_reading):
            assert found and all(values == alone[row][: len(values)] for row, values in found.items()), name
    for row, values in alone.items():
        assert values == pytest.approx(fast[row], abs=1e-4)


_known: dict[str, dict[tuple[int, int], list[float]]] = {}


@torch.no_grad()
def one_at_a_time(model: str, story: Story) -> dict[tuple[int, int], list[float]]:  # noqa: F811
    if model not in _known:
        parallel = ParallelConfig(numerics="exact")
        trainer = Trainer(MODELS[model], parallel, join(parallel), seed=3)
        _known[model] = {}
        for i in range(len(story[0])):
            _known[model] |= test_decode._read(trainer, story, [i])
    return _known[model]


def steps(layout: dict[str, Any], problem: Problem) -> list[dict[str, float]]:
    parallel = ParallelConfig(**layout)
    world = join(parallel)
    trainer = Trainer(MODELS["deepseek"], parallel, world, seed=7, adam=ADAM)
    batches = own_part(problem.batches(), world)
    return [trainer.train_step(batches, LOSSES["supervised"], 0.02) for _ in range(3)]


@on_cpu
@pytest.mark.parametrize(
    "layout",
    [{}, {"overlap_grad_reduce": True, "overlap_param_gather": True}, {"expert": 2}, {"pipeline": 2}, {"context": 2}],
    ids=str,
)
def test_it_trains_as_without(layout: dict[str, Any], pools: Any) -> None:
    """The gradients, too: what follows an update is the same."""
    problem = make_problem(5, [9, 17, 4, 20, 12, 6], [[0, 1], [2, 3], [4], [5]])
    wanted = steps({}, problem)
    layout = layout | {"numerics": "exact"}
    for got in [steps(layout, problem)] if len(layout) == 1 else pools[2].run(steps, layout, problem):
        for exact, fast in zip(got, wanted, strict=True):
            same_metrics(exact, fast, 1e-3)


@on_cpu
def test_weights_on_their_way_are_waited_for() -> None:
    """Megatron waits in hooks before a module's forward, which the latents' up projection has not here."""
    parallel = ParallelConfig(numerics="exact")
    trainer = Trainer(MODELS["deepseek"], parallel, join(parallel), seed=3)
    asked = []
    modules = [
        m for name, m in trainer.chunks[0].named_modules() if name.endswith("linear_kv_up") and "mtp" not in name
    ]
    for module in modules:
        module.register_forward_pre_hook(lambda module, inputs: asked.append(module))
    trainer.read(make_problem(5, [9, 17], [[0, 1]]).batches(), TokenLogprobs(VOCABULARY))
    assert asked == modules and len(modules) == 4


def first_ratio(layout: dict[str, Any], story: Story) -> tuple[float, float]:  # noqa: F811
    """Collective: the sum of the ratios of a first minibatch to what was decoded, and of how many tokens."""
    parallel = ParallelConfig(**layout)
    world = join(parallel)
    trainer = Trainer(MODELS["deepseek"], parallel, world, seed=3, adam=ADAM)
    prompts, tails = story
    with torch.no_grad():
        own = list(range(len(prompts)))[world.groups.dp_cp.rank() :: world.groups.dp_cp.size()]
        decoded = test_decode._decode(trainer, story, own)
    rows = [row for row, values in decoded.items() if len(values) == test_decode.NEW]
    texts = [prompts[i] + tails[i, c] for i, c in rows]
    stream, ends = torch.tensor(sum(texts, [])), torch.tensor([0] + [len(t) for t in texts]).cumsum(0)
    old, weights = torch.zeros(len(stream)), torch.zeros(len(stream))
    for row, end in zip(rows, ends[1:].tolist()):
        completion = slice(end - 1 - test_decode.NEW, end - 1)  # row i predicts token i + 1
        old[completion], weights[completion] = torch.tensor(decoded[row]), 0.01
    fields = {"targets": stream.roll(-1), "weights": weights, "advantages": torch.ones(len(stream))}
    batch = MicroBatch(stream, ends.int(), fields | {"old_logprobs": old})
    metrics = trainer.train_step([batch], PolicyLoss(VOCABULARY), 0.01)
    return metrics["ratio_sum"], metrics["token_count"]


@on_cpu
@pytest.mark.parametrize("layout", [{}, {"expert": 2}, {"pipeline": 2}], ids=str)
def test_the_first_ratio_is_one(layout: dict[str, Any], pools: Any, story: Story) -> None:  # noqa: F811
    layout = layout | {"numerics": "exact"}
    for ratios, tokens in (
        [first_ratio(layout, story)] if len(layout) == 1 else pools[2].run(first_ratio, layout, story)
    ):
        assert ratios == tokens >= test_decode.NEW


@pytest.mark.parametrize(
    ("layout", "match"),
    [
        ({"fp8": "block"}, "parallel.fp8 = block is not possible with numerics = exact, wanted off"),
        ({"tensor": 2}, "parallel.tensor = 2 is not possible with numerics = exact, wanted 1"),
    ],
)
def test_what_it_does_not_go_with(layout: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ParallelConfig(numerics="exact", **layout).check_model(MODELS["deepseek"])


TRITON = "norm=triton,moe=triton,mla=triton,grpo=triton"


@pytest.mark.slow
@pytest.mark.parametrize(("model", "dtype"), [("llama", "float32"), ("deepseek", "bfloat16")])
def test_decoding_is_reading_in_triton(model: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted: the order of the sums is the kernels' own, and of a product's as on a GPU, whatever its rows are
    (tests/kernels/interpreter.py). The longer sequence goes over a page's end."""
    pytest.importorskip("triton")
    from tests.kernels import interpreter  # noqa: F401 (mends the interpreter)

    print(f"seed {test_decode.SEED}")
    draw = random.Random(test_decode.SEED)
    tokens = lambda count: [draw.randrange(VOCABULARY) for _ in range(count)]
    short = (
        [tokens(2), tokens(62)],
        {(p, c): tokens(test_decode.NEW) for p in (0, 1) for c in range(test_decode.COPIES)},
    )
    monkeypatch.setenv("R1_KERNELS", TRITON)
    monkeypatch.setitem(EXACT_BACKENDS, "cpu", "triton")
    layout = {"numerics": "exact", "dtype": dtype}
    decoded, read = test_decode.decode_and_read(model, layout, short)
    assert decoded == {row: values[: len(decoded[row])] for row, values in read.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["deepseek", "llama", "qwen2"])
def test_decoding_is_reading_on_a_gpu(model: str, dtype: str, story: Story, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("R1_KERNELS", TRITON)
    layout = {"numerics": "exact", "dtype": dtype}
    decoded, read = test_decode.decode_and_read(model, layout, story)
    assert decoded == {row: values[: len(decoded[row])] for row, values in read.items()}


def test_backends_that_are_not_exact_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel, world = ParallelConfig(numerics="exact"), join(ParallelConfig())
    for device, kernels, message in (
        ("cuda", "norm=triton", "the moe family's backend is 'torch', wanted R1_KERNELS=triton with"),
        ("cpu", "moe=triton", "the moe family's backend is 'triton', wanted R1_KERNELS=torch with"),
    ):
        monkeypatch.setenv("R1_KERNELS", kernels)
        with pytest.raises(ValueError, match=message):
            build(MODELS["deepseek"], parallel, replace(world, device=torch.device(device)), seed=3)
