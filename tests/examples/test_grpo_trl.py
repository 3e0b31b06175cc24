"""examples/grpo_trl.py against TRL's own GRPOTrainer: same model, same batch, same loss, gradients and metrics."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
TOLERANCE = 1e-5
CLIP_LOW, CLIP_HIGH, DELTA = 0.2, 0.28, 2.0
PROMPT, COMPLETION, COMPLETIONS = 5, 9, 6


def load_example() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "grpo_trl.py"
    spec = importlib.util.spec_from_file_location("example_grpo_trl", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load_example()


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")  # TRL reports each trainer that is made, but not where this is set


def make_trainer(kind: type[GRPOTrainer], folder: Path, **settings) -> GRPOTrainer:
    """A trainer of the tiny model in folder, which it makes there first."""
    tokenizer = example.tiny_tokenizer()
    if not (folder / "config.json").exists():
        example.tiny_model(tokenizer).save_pretrained(folder)
    defaults = {
        "per_device_train_batch_size": COMPLETIONS,
        "num_generations": 3,
        "max_completion_length": COMPLETION,
        "temperature": 0.7,
        "epsilon": CLIP_LOW,
        "epsilon_high": CLIP_HIGH,
        "logging_steps": 1,
        "bf16": False,
    }
    args = GRPOConfig(
        output_dir=str(folder / "out"), use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True,
        **(defaults | settings),
    )  # fmt: skip
    return kind(
        model=str(folder),
        reward_funcs=example.repeats,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [f"say {word}" for word in example.WORDS] * 4}),
        processing_class=tokenizer,
    )


def random_batch(trainer: GRPOTrainer, empty: bool = False) -> dict[str, Tensor]:
    """What TRL gives to _compute_loss: prompts padded on the left, completions on the right, ratios on both sides of
    every bound and, so that rounding decides nothing, none close to one."""
    V = len(example.tiny_tokenizer())
    prompt_lengths, lengths = (
        torch.randint(1, PROMPT + 1, (COMPLETIONS,)),
        torch.randint(1, COMPLETION + 1, (COMPLETIONS,)),
    )
    lengths[0], lengths[-1] = COMPLETION, 0 if empty else 2
    batch = {
        "prompt_ids": torch.randint(3, V, (COMPLETIONS, PROMPT)),
        "prompt_mask": (torch.arange(PROMPT) >= PROMPT - prompt_lengths[:, None]).long(),
        "completion_ids": torch.randint(3, V, (COMPLETIONS, COMPLETION)),
        "completion_mask": (torch.arange(COMPLETION) < lengths[:, None]).long(),
        "advantages": torch.randn(COMPLETIONS),
        "num_items_in_batch": torch.tensor(2 * int(lengths.sum()) + 3),
    }
    ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    with torch.no_grad():
        logprobs, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, COMPLETION)
    shape = (COMPLETIONS, 1 if trainer.importance_sampling_level == "sequence" else COMPLETION)
    log_ratio = torch.tensor([-0.5, -0.1, 0.1, 0.5, 1.0])[torch.randint(5, shape)] + 0.02 * torch.randn(logprobs.shape)
    # One completion that is clipped from above, one from below.
    log_ratio[0], log_ratio[1] = 0.5, -0.5
    batch["advantages"][0], batch["advantages"][1] = 1.0, -1.0
    batch["old_per_token_logps"] = logprobs - log_ratio
    batch["ref_per_token_logps"] = logprobs + 0.5 * torch.randn(logprobs.shape)
    return batch


def loss_gradients_metrics(
    trainer: GRPOTrainer, batch: dict[str, Tensor], kind: type[GRPOTrainer] | None = None
) -> tuple[Tensor, dict, dict]:
    """Of the trainer's own loss, or of the loss that another kind of trainer makes with it."""
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    loss = (kind or type(trainer))._compute_loss(trainer, trainer.model, dict(batch))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    return loss.detach(), gradients, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def assert_same(ours: tuple[Tensor, dict, dict], stock: tuple[Tensor, dict, dict], size: float) -> None:
    """size: that of the terms which the loss adds up, since they may cancel."""
    torch.testing.assert_close(ours[0], stock[0], rtol=TOLERANCE, atol=TOLERANCE * size)
    assert ours[1].keys() == stock[1].keys()
    for name, gradient in stock[1].items():
        atol = TOLERANCE * float(gradient.abs().max())
        torch.testing.assert_close(ours[1][name], gradient, rtol=TOLERANCE, atol=atol)
    assert ours[2].keys() == stock[2].keys()
    for name, value in stock[2].items():
        assert ours[2][name] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), name


def pair(folder: Path, **settings) -> list[GRPOTrainer]:
    trainers = [make_trainer(kind, folder, **settings) for kind in (example.FusedGRPOTrainer, GRPOTrainer)]
    for trainer in trainers:
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 2
    return trainers


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_loss_and_gradients_are_trls(beta: float, level: str, seed: int, tmp_path: Path) -> None:
    ours, stock = pair(tmp_path, beta=beta, importance_sampling_level=level, steps_per_generation=4)
    ours.model.lm_head.forward = None  # logits are not made
    for loss_type, on_policy in itertools.product(LOSS_TYPES, (False, True)):
        batch = random_batch(stock)
        if on_policy:
            del batch["old_per_token_logps"]
        ours.loss_type = stock.loss_type = loss_type
        expected = loss_gradients_metrics(stock, batch)
        size = float(batch["advantages"].abs().max()) / (COMPLETION if loss_type == "dr_grpo" else 1)
        assert_same(loss_gradients_metrics(ours, batch), expected, size)
        assert on_policy or expected[2]["clip_ratio/region_mean"] > 0


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_options_of_the_loss_are_trls(level: str, seed: int, tmp_path: Path) -> None:
    """Two-sided clip, plain KL, tool tokens, vLLM's importance ratio, a completion that is masked out, evaluation."""
    settings = {"beta": 0.3, "delta": DELTA, "use_bias_correction_kl": False, "importance_sampling_level": level}
    ours, stock = pair(tmp_path, **settings)
    for trainer in (ours, stock):
        trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, True
    for ratio_shape in ((COMPLETIONS, COMPLETION), (COMPLETIONS, 1)):
        batch = random_batch(stock, empty=True)
        batch["importance_sampling_ratio"] = torch.rand(ratio_shape) * (torch.rand(ratio_shape) > 0.3)
        batch["tool_mask"] = (torch.rand(COMPLETIONS, COMPLETION) > 0.3).long()
        batch["tool_mask"][0, 0] = 1
        assert_same(loss_gradients_metrics(ours, batch), loss_gradients_metrics(stock, batch), 3.0)
    for trainer in (ours, stock):
        trainer.model.eval()
    losses = [trainer._compute_loss(trainer.model, dict(batch)) for trainer in (ours, stock)]
    torch.testing.assert_close(*losses, rtol=TOLERANCE, atol=3 * TOLERANCE)


def test_trls_own_losses_run_on_our_logprobs(seed: int, tmp_path: Path) -> None:
    ours, stock = pair(tmp_path)
    batch = random_batch(stock)
    for loss_type in ("cispo", "sapo"):
        ours.loss_type = stock.loss_type = loss_type
        assert_same(loss_gradients_metrics(ours, batch, GRPOTrainer), loss_gradients_metrics(stock, batch), 3.0)


def test_training_is_trls(seed: int, tmp_path: Path) -> None:
    """train() with both: rollouts, old and reference log-probabilities, two updates a rollout. SGD, because Adam makes
    a step of full size out of a rounding error."""
    histories, weights = [], []
    for kind in (example.FusedGRPOTrainer, GRPOTrainer):
        trainer = make_trainer(
            kind, tmp_path, max_steps=4, optim="sgd", learning_rate=0.05, beta=0.1, num_iterations=2, seed=seed % 1000,
            gradient_accumulation_steps=2, mask_truncated_completions=True,
        )  # fmt: skip
        trainer.train()
        histories.append([entry for entry in trainer.state.log_history if "loss" in entry])
        weights.append(trainer.model.state_dict())
    for ours, stock in zip(*histories, strict=True):
        for name in stock.keys() - {"step_time", "grad_norm"}:
            assert ours[name] == pytest.approx(stock[name], rel=1e-4, abs=1e-4), name
    for name, weight in weights[1].items():
        torch.testing.assert_close(weights[0][name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("float32_head", [False, True])
def test_autocast_rounds_as_trl_does(
    float32_head: bool, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes = set()

    def record(hidden_TH: Tensor, weight_VH: Tensor, *rest, **options):
        dtypes.update((hidden_TH.dtype, weight_VH.dtype))
        return linear_logprob(hidden_TH, weight_VH, *rest, **options)

    linear_logprob = example.linear_logprob
    monkeypatch.setattr(example, "linear_logprob", record)
    ours, stock = pair(tmp_path, bf16=True, cast_lm_head_to_fp32=float32_head)
    exact = make_trainer(GRPOTrainer, tmp_path)
    batch = random_batch(exact)
    ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    with torch.no_grad():
        results = [
            t._get_per_token_logps_and_entropies(t.model, ids, mask, COMPLETION, batch_size=4, compute_entropy=True)
            for t in (ours, stock, exact)
        ]
    for fused, plain, reference in zip(*(r[:2] for r in results)):
        assert (fused - reference).abs().max() <= 2 * (plain - reference).abs().max() + 1e-2
    assert dtypes == {torch.float32 if float32_head else torch.bfloat16}


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"loss_type": "cispo"}, "loss_type='cispo'"),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile"),
        ({"off_policy_mask_threshold": 0.5, "entropy_coef": 0.1}, "off_policy_mask_threshold; entropy_coef"),
    ],
)
def test_what_is_not_supported_is_refused(settings: dict, named: str, seed: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=named):
        make_trainer(example.FusedGRPOTrainer, tmp_path, **settings)


def test_main_runs(capsys: pytest.CaptureFixture) -> None:
    history = example.main(steps=3)
    assert [entry["step"] for entry in history] == [1, 2, 3]
    assert all(torch.isfinite(torch.tensor(float(entry["loss"]))) for entry in history)
    assert history[1]["clip_ratio/region_mean"] > 0  # the second step of a rollout is off-policy
    assert "step   3" in capsys.readouterr().out
