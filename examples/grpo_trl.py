"""r1's fused loss inside TRL's GRPOTrainer (written against TRL 1.16).

    python examples/grpo_trl.py

trains a tiny Llama on a CPU to repeat the word it is given. To use it, put FusedGRPOTrainer where GRPOTrainer stood;
under torchrun it runs with DDP as it is. TRL 1.16 has a head without whole logits of its own, in chunks; here r1's
operator takes its place. For TRL's other losses (cispo, sapo, an entropy bonus, ...) leave _compute_loss out, and the
first half of refuse_unsupported: TRL's own loss then runs on r1's log-probabilities.

Letters: B completions, L tokens of prompt and completion, C those of the completion, T packed tokens, H hidden.
"""

from __future__ import annotations

import functools
import tempfile

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import nanmax, nanmin

from r1.kernels import aggregation_weights, grpo_loss, linear_logprob

AGGREGATIONS = {"grpo": "sequence_mean", "bnpo": "token_mean", "dapo": "token_mean", "dr_grpo": "constant"}


class FusedGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose log-probabilities and loss are made from hidden states; only sampling makes logits.

    Raises ValueError for settings that it does not support: see refuse_unsupported.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        refuse_unsupported(self)
        for model in filter(None, (self.model, self.ref_model)):
            add_logprob_forward(self.accelerator.unwrap_model(model), self.args)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **_
    ):
        # TRL calls this for the old and for the reference policy, _compute_loss for the policy that learns.
        scored_BL = attention_mask != 0
        scored_BL[:, :-logits_to_keep] = False
        batches = (x_BL.split(batch_size or len(x_BL)) for x_BL in (input_ids, attention_mask, scored_BL))
        with self.accelerator.autocast():
            parts = [model(input_ids=i, attention_mask=a, scored_BL=s) for i, a, s in zip(*batches)]
        logprobs_BC, entropy_BC = (torch.cat(x)[:, -logits_to_keep:] for x in zip(*parts))
        return logprobs_BC, entropy_BC if compute_entropy else None, None

    def _compute_loss(self, model, inputs):
        whole = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
        mask_BC = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()
        logprobs_BC, entropy_BC, _ = self._get_per_token_logps_and_entropies(
            model, *whole, mask_BC.shape[1], None, True
        )
        # TRL leaves the old log-probabilities out where the policy has not moved since it sampled.
        old_BC = inputs.get("old_per_token_logps", logprobs_BC.detach())
        reference_BC = inputs["ref_per_token_logps"] if self.beta else None
        # vLLM's importance ratio is never negative: it can go into the advantage, past the minimum that clips.
        advantages_BC = inputs["advantages"][:, None] * inputs.get("importance_sampling_ratio", 1)
        lengths_B = mask_BC.sum(1)
        weights_B = loss_weights(self, lengths_B, inputs["num_items_in_batch"])
        correct_kl = self.beta != 0 and self.args.use_bias_correction_kl
        loss, sums = grpo_loss(
            logprobs_BC[mask_BC], old_BC[mask_BC], reference_BC[mask_BC] if self.beta else None,
            advantages_BC.expand_as(mask_BC)[mask_BC], weights_B.repeat_interleave(lengths_B),
            cu_seqlens=torch.nn.functional.pad(lengths_B.cumsum(0), (1, 0)), ratio=self.importance_sampling_level,
            clip_low=self.epsilon_low, clip_high=self.epsilon_high, ratio_max=self.args.delta,
            kl_coefficient=0.0 if correct_kl else self.beta,
        )  # fmt: skip
        ratio_BC, kl_sum = importance_ratio(self, logprobs_BC - old_BC, mask_BC), sums["kl_k3_sum"]
        if correct_kl:  # DeepSeek-V3.2's estimate, TRL's default; r1 has no such option
            ahead_BC = reference_BC - logprobs_BC
            kl_BC = (ratio_BC * (ahead_BC.expm1() - ahead_BC)).masked_fill(~mask_BC, 0)
            loss, kl_sum = loss + self.beta * (weights_B @ kl_BC.sum(1)), kl_BC.sum()
        log_metrics(self, ratio_BC, inputs["advantages"], entropy_BC, mask_BC, kl_sum)
        return loss


def refuse_unsupported(trainer: GRPOTrainer) -> None:
    """Raises ValueError that names all that the trainer is set to do and FusedGRPOTrainer does not."""
    args, model = trainer.args, trainer.model
    text = model.config.get_text_config()
    unsupported = {
        f"loss_type={args.loss_type!r} (it has {', '.join(AGGREGATIONS)})": args.loss_type not in AGGREGATIONS,
        "top_entropy_quantile": args.top_entropy_quantile < 1,
        "off_policy_mask_threshold": args.off_policy_mask_threshold is not None,
        "entropy_coef and use_adaptive_entropy": args.entropy_coef != 0 or args.use_adaptive_entropy,
        # From here on it is the log-probabilities that would be wrong, or are not tested.
        "a router's auxiliary loss": trainer.aux_loss_enabled,
        "images": trainer._is_vlm,
        "PEFT": hasattr(model, "peft_config"),
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "a head with a bias": getattr(model.get_output_embeddings(), "bias", None) is not None,
        "capped logits": getattr(text, "final_logit_softcapping", None) is not None,
        "scaled logits": any(
            getattr(text, name, None) not in (None, 1)
            for name in ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
        ),
    }
    found = [name for name, is_set in unsupported.items() if is_set]
    if found:
        raise ValueError(f"FusedGRPOTrainer does not support {'; '.join(found)}")


def add_logprob_forward(model: torch.nn.Module, args: GRPOConfig) -> None:
    """Makes model(..., scored_BL=mask) return log-probabilities and entropies, (B, L), 0 where the mask is not set.

    This happens inside the model's forward because DDP and FSDP work there: outside it the head's weight is a slice of
    the whole, and its gradient is not reduced over the ranks. FSDP must not wrap the head on its own (Transformers'
    wrapping of the layers does not): with it in the root's group, the root's forward has it whole.
    """
    plain_forward = model.forward

    @functools.wraps(plain_forward)  # generate() checks its arguments against the signature
    def forward(*inputs, scored_BL=None, **kwargs):
        if scored_BL is None:
            return plain_forward(*inputs, **kwargs)
        hidden_BLH = model.base_model(*inputs, use_cache=False, **kwargs).last_hidden_state
        scored_next = scored_BL[:, 1:]  # what stands before a token is what predicts it
        hidden_TH, targets_T = hidden_BLH[:, :-1][scored_next], kwargs["input_ids"][:, 1:][scored_next]
        weight_VH = model.get_output_embeddings().weight
        device = hidden_TH.device.type
        if torch.is_autocast_enabled(device) and not args.cast_lm_head_to_fp32:
            # Autocast rounds the operands of nn.Linear, but not those of operators that it does not know.
            hidden_TH, weight_VH = (x.to(torch.get_autocast_dtype(device)) for x in (hidden_TH, weight_VH))
        per_token = linear_logprob(hidden_TH, weight_VH, targets_T, args.temperature, return_entropy=True)
        return tuple(x_T.new_zeros(scored_BL.shape).masked_scatter(scored_BL, x_T) for x_T in per_token)

    model.forward = forward


def loss_weights(trainer: GRPOTrainer, lengths_B: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    """The weight of a token of each completion, such that accumulating and averaging over ranks gives TRL's loss."""
    training, processes = trainer.model.training, trainer.accelerator.num_processes
    accumulation = trainer.current_gradient_accumulation_steps if training else 1
    count, parts = None, 1
    if trainer.loss_type == "dapo":
        # Counted over all ranks and over all micro-batches that one rollout is split into.
        count, parts = int(num_items_in_batch), processes * (trainer.args.steps_per_generation if training else 1)
    weights_B = aggregation_weights(
        lengths_B,
        AGGREGATIONS[trainer.loss_type],
        constant_length=trainer.max_completion_length,
        num_tokens=count,
    )
    return weights_B * (parts / accumulation)


def importance_ratio(trainer: GRPOTrainer, log_ratio_BC: torch.Tensor, mask_BC: torch.Tensor) -> torch.Tensor:
    """The ratio of the policy to the old one: (B, C), or (B, 1) where it is one of a completion."""
    if trainer.importance_sampling_level == "sequence":
        lengths_B1 = mask_BC.sum(1, keepdim=True).clamp(min=1)
        log_ratio_BC = log_ratio_BC.masked_fill(~mask_BC, 0).sum(1, keepdim=True) / lengths_B1
    return log_ratio_BC.exp()


@torch.no_grad()
def log_metrics(
    trainer: GRPOTrainer,
    ratio_BC: torch.Tensor,
    advantages_B: torch.Tensor,
    entropy_BC: torch.Tensor,
    mask_BC: torch.Tensor,
    kl_sum: torch.Tensor,
) -> None:
    """Logs kl, entropy and clip_ratio/... as TRL does: means over the tokens of all ranks, or over their completions
    where the ratio is one of a completion; low_min and high_max are over completions."""
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    weight_BC = mask_BC.float() if ratio_BC.shape == mask_BC.shape else torch.ones_like(ratio_BC)
    low_BC = weight_BC * ((ratio_BC < 1 - trainer.epsilon_low) & (advantages_B < 0)[:, None])
    high_BC = weight_BC * ((ratio_BC > 1 + trainer.epsilon_high) & (advantages_B > 0)[:, None])

    sums = torch.stack([low_BC.sum(), high_BC.sum(), weight_BC.sum(), kl_sum, entropy_BC[mask_BC].sum(), mask_BC.sum()])
    low, high, units, kl, entropy, tokens = trainer.accelerator.reduce(sums, reduction="sum").tolist()
    metrics["entropy"].append(entropy / max(tokens, 1))
    if trainer.beta:
        metrics["kl"].append(kl / max(tokens, 1))
    for name, count in (("low", low), ("high", high), ("region", low + high)):
        metrics[f"clip_ratio/{name}_mean"].append(count / max(units, 1))
    share_2B = torch.stack([low_BC.sum(1), high_BC.sum(1)]) / weight_BC.sum(1)  # NaN for a completion without tokens
    low_B, high_B = trainer.accelerator.gather(share_2B.T.contiguous()).unbind(1)
    metrics["clip_ratio/low_min"].append(nanmin(low_B).item())
    metrics["clip_ratio/high_max"].append(nanmax(high_B).item())


WORDS = ("red", "green", "blue", "black", "white", "grey")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    vocabulary = {word: index for index, word in enumerate(("<pad>", "<eos>", "<unk>", "say", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def tiny_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of two layers with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.1,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def repeats(prompts: list[str], completions: list[str], **_) -> list[float]:
    """The reward: the share of a completion's words that are the last word of the prompt."""
    words = [completion.split() for completion in completions]
    return [own.count(prompt.split()[-1]) / max(len(own), 1) for prompt, own in zip(prompts, words)]


class PrintSteps(TrainerCallback):
    """Prints what a step logged; a reward is logged where completions were sampled."""

    def on_log(self, args, state, control, logs=None, **_):
        shown = ("reward", "loss", "kl", "entropy", "clip_ratio/region_mean")
        if logs and "loss" in logs:
            print(f"step {state.global_step:3}", *(f"{x} {float(logs[x]):.4f}" for x in shown if x in logs), sep="  ")


def main(steps: int = 30) -> list[dict]:
    """Trains the tiny model and returns TRL's log, one dictionary a step."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    gpu = torch.cuda.is_available()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(tokenizer).save_pretrained(folder)  # TRL loads its reference model from where the policy came from
        trainer = FusedGRPOTrainer(
            model=folder,
            reward_funcs=repeats,
            args=GRPOConfig(
                output_dir=folder,
                max_steps=steps,
                learning_rate=1e-2,
                lr_scheduler_type="constant",
                per_device_train_batch_size=16,
                gradient_accumulation_steps=2,
                steps_per_generation=4,  # two steps a rollout: the second one is off-policy, and its ratios are not 1
                num_generations=8,
                max_completion_length=8,
                temperature=0.9,
                beta=0.01,
                loss_type="dapo",
                epsilon_high=0.28,
                use_cpu=not gpu,
                bf16=gpu,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"prompt": [f"say {word}" for word in WORDS] * 16}),
            processing_class=tokenizer,
            callbacks=[PrintSteps()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
