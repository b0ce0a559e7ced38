"""A plain trainer: verl's training in one process, without Ray, for suites of hundreds of short runs.

A cell of a suite with `trainer: plain` runs here instead of in main_ppo, with the same configuration. Policy loss,
advantage estimator and grader are those that verl calls, and samples come from the generator of the rollout `hf`. Only
the loop around them is new: draw prompts, sample a group for each, compute advantages, and update with AdamW on
mini-batches of whole groups. A mini-batch is one micro-batch. `check` rejects settings that would change the training
but are not read here.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.import_utils import load_extern_object
from verl.utils.metric import reduce_metrics

from verl_sspo.compose import compose_config
from verl_sspo.hf.generation import BatchedGenerator, Request, SamplingParams
from verl_sspo.run.folder import METRICS
from verl_sspo.run.task import data_files

# What this loop does not do: each key, with the value at which verl does not do it either.
NOT_READ = {
    "algorithm.use_kl_in_reward": False,
    "algorithm.rollout_correction.rollout_is": None,
    "algorithm.rollout_correction.rollout_rs": None,
    "actor_rollout_ref.actor.use_kl_loss": False,
    "actor_rollout_ref.actor.entropy_coeff": 0,
    "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": 0.0,
    "actor_rollout_ref.actor.optim.lr_scheduler_type": "constant",
    "actor_rollout_ref.rollout.top_k": -1,
    "actor_rollout_ref.rollout.top_p": 1.0,
}


def train(
    overrides: Sequence[str],
    run_dir: Path,
    *,
    config_dir: Path,
    config_name: str,
    console: Console | None = None,
) -> Path:
    """Trains like `launch.train`, but without checkpoints, and returns the metrics file.

    Args:
        overrides, config_dir, config_name: as in `launch.train`.
        run_dir: new folder for `metrics.jsonl`, with verl's names of metrics.
        console: where to show progress.

    Raises:
        ValueError: a setting that this loop does not read.
    """
    # The process may have loaded torch before this variable was set for the cell.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    config = compose_config(config_name, overrides, config_dir)
    run_dir.mkdir(parents=True)
    with (run_dir / METRICS).open("w", encoding="utf-8") as file:
        for step, metrics in Trainer(config).run():
            print(json.dumps({"step": step, "data": metrics}), file=file, flush=True)
            if console is not None:
                console.print(f"step {step}: reward {metrics.get('critic/score/mean', float('nan')):.3f}")
    return run_dir / METRICS


def check(config: DictConfig) -> None:
    """Raises ValueError for a setting that this loop does not read."""
    for key, value in NOT_READ.items():
        if (given := OmegaConf.select(config, key)) != value:
            raise ValueError(f"trainer: plain does not read {key}={given}: leave it at {value}, or use trainer: verl")


class Trainer:
    """Trains one cell of a suite.

    Args:
        config: configuration of main_ppo. Model and data must be local and small: all prompts are tokenised first.
    """

    def __init__(self, config: DictConfig) -> None:
        check(config)
        self.config = config
        model, actor, rollout = (config.actor_rollout_ref[name] for name in ("model", "actor", "rollout"))
        self.actor = omega_conf_to_dataclass(actor)
        self.rollout, self.temperature = rollout, rollout.temperature
        self.tokenizer = AutoTokenizer.from_pretrained(model.path)
        if (template := model.get("custom_chat_template")) is not None:
            self.tokenizer.chat_template = template
        attention = {"attn_implementation": "sdpa", "dtype": torch.float32}
        self.model = AutoModelForCausalLM.from_pretrained(model.path, **attention).train()
        ends = GenerationConfig.from_pretrained(model.path).eos_token_id
        self.stop = tuple(ends) if isinstance(ends, list) else (ends,)
        # As with hardware=cpu_bf16: matrix products in bfloat16, master weights in float32.
        self.half = actor.fsdp_config.dtype == "bfloat16"
        self.sampler = deepcopy(self.model).to(torch.bfloat16) if self.half else self.model
        optim = actor.optim
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), optim.lr, tuple(optim.betas), weight_decay=optim.weight_decay, fused=True
        )
        reward = config.reward.custom_reward_function
        self.score: Callable[..., dict[str, Any]] = load_extern_object(reward.path, reward.name)  # type: ignore[assignment]
        self.rows = {split: self._read(f"{split}_files") for split in ("train", "val")}
        self.generator = torch.Generator().manual_seed(int(config.data.seed))

    def _read(self, key: str) -> pd.DataFrame:
        rows = pd.concat([pd.read_parquet(file) for file in data_files(self.config, key)], ignore_index=True)
        if key == "val_files" and (most := self.config.data.val_max_samples) > 0:
            rows = rows.head(most)
        prompts = [
            self.tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
            for prompt in rows["prompt"]
        ]
        return rows.assign(tokens=[self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts])

    def run(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Yields (step, metrics) of each step, with validation as configured."""
        trainer, batch = self.config.trainer, self.config.data.train_batch_size
        if trainer.val_before_train:
            yield 0, self.validate(0)
        order: list[int] = []
        for step in range(1, trainer.total_training_steps + 1):
            while len(order) < batch:
                order += torch.randperm(len(self.rows["train"]), generator=self.generator).tolist()
            chosen, order = order[:batch], order[batch:]
            metrics = self.step(step, self.rows["train"].iloc[chosen])
            if step == trainer.total_training_steps or (trainer.test_freq > 0 and step % trainer.test_freq == 0):
                metrics |= self.validate(step)
            yield step, metrics

    def sample(self, rows: pd.DataFrame, n: int, step: int) -> list[list[int]]:
        """`n` responses to each row's prompt, grouped by prompt."""
        seeds = np.random.SeedSequence([self.rollout.seed, step, n]).generate_state(n * len(rows)).tolist()
        limit = self.config.data.max_response_length
        requests = [
            Request(str(i), tokens, SamplingParams(limit, self.temperature, stop_token_ids=self.stop, seed=seed))
            for i, (tokens, seed) in enumerate(zip(rows["tokens"].repeat(n), seeds, strict=True))
        ]
        return [c.token_ids for c in BatchedGenerator(self.sampler, max_num_batched_tokens=1 << 16).generate(requests)]

    def grade(self, rows: pd.DataFrame, responses: list[list[int]]) -> list[dict[str, Any]]:
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        repeated = rows.loc[rows.index.repeat(len(responses) // len(rows))]
        answers = [row["ground_truth"] for row in repeated["reward_model"]]
        return [
            self.score(source, text, answer)
            for source, text, answer in zip(repeated["data_source"], texts, answers, strict=True)
        ]

    def validate(self, step: int) -> dict[str, float]:
        """Accuracy of sampled answers for each data source."""
        rows = self.rows["val"]
        graded = self.grade(rows, self.sample(rows, 1, -step % (1 << 32)))
        accuracies = pd.Series([each["acc"] for each in graded]).groupby(rows["data_source"].to_numpy()).mean()
        return {f"val-core/{source}/acc/mean@1": float(value) for source, value in accuracies.items()}

    def step(self, step: int, rows: pd.DataFrame) -> dict[str, float]:
        """One rollout of these prompts and the updates on it; returns their metrics."""
        n, actor = self.rollout.n, self.actor
        sampled = self.sample(rows, n, step)
        scores = torch.tensor([each["score"] for each in self.grade(rows, sampled)])
        groups = Groups(rows["tokens"].tolist(), sampled, n)
        with torch.no_grad():
            old, distribution = self.log_probs(groups)
            entropy = -(distribution.exp() * distribution).sum(-1)
        rewards = torch.zeros_like(old)
        rewards[torch.arange(len(old)), groups.mask.sum(-1) - 1] = scores
        algorithm = self.config.algorithm
        grpo = algorithm.adv_estimator == "grpo"
        advantages, _ = get_adv_estimator_fn(algorithm.adv_estimator)(
            token_level_rewards=rewards,
            response_mask=groups.mask,
            index=np.repeat(np.arange(len(rows)), n),
            config=algorithm,
            **({"norm_adv_by_std_in_grpo": algorithm.norm_adv_by_std_in_grpo} if grpo else {}),
        )
        updates = []
        for _ in range(actor.ppo_epochs):
            order = torch.randperm(len(rows), generator=self.generator)
            for prompts in order.split(self.config.actor_rollout_ref.actor.ppo_mini_batch_size):
                updates.append(self.update(groups, prompts, old, advantages))
        if self.half:
            for ours, theirs in zip(self.sampler.parameters(), self.model.parameters(), strict=True):
                ours.data.copy_(theirs.data)
        means = pd.DataFrame(updates).mean().to_dict()
        return means | {
            "critic/score/mean": scores.mean().item(),
            "actor/entropy": (entropy * groups.mask).sum().div(groups.mask.sum()).item(),
            "response_length/mean": groups.mask.sum(-1).float().mean().item(),
        }

    def update(
        self, groups: "Groups", prompts: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor
    ) -> dict[str, float]:
        """One update on the responses to these prompts; returns its metrics."""
        part, rows = groups.select(prompts), groups.rows_of(prompts)
        log_prob, _ = self.log_probs(part)
        loss, metrics = get_policy_loss_fn(self.actor.policy_loss.loss_mode)(
            old_log_prob=old[rows],
            log_prob=log_prob,
            advantages=advantages[rows],
            response_mask=part.mask,
            loss_agg_mode=self.actor.loss_agg_mode,
            config=self.actor,
        )
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.actor.optim.clip_grad)
        if norm.isfinite():  # verl skips such an update as well
            self.optimizer.step()
        z = (log_prob.detach() - old[rows]) * part.mask
        lengths = part.mask.sum(-1)
        # verl's trainer puts `actor/` before names that lack it.
        return {f"actor/{name.removeprefix('actor/')}": value for name, value in reduce_metrics(metrics).items()} | {
            "actor/grad_norm": norm.item(),
            # Logged for every algorithm: mean absolute log-ratio of tokens, and of responses (their token mean).
            "plain/abs_log_ratio": (z.abs().sum() / lengths.sum()).item(),
            "plain/abs_mean_log_ratio": (z.sum(-1) / lengths).abs().mean().item(),
        }

    def log_probs(self, groups: "Groups") -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the response tokens, (responses, T), and of the whole vocabulary; float32."""
        with torch.autocast("cpu", torch.bfloat16) if self.half else nullcontext():
            logits = groups.logits(self.model)
        distribution = (logits.float() / self.temperature).log_softmax(-1)
        return distribution.gather(-1, groups.responses[..., None]).squeeze(-1), distribution


class Groups:
    """Prompts with their responses, one row per prompt, so that the model computes each prompt only once.

    Attributes:
        responses, mask: (responses, T), int64 and bool, grouped by prompt and padded on the right.
    """

    def __init__(self, prompts: list[list[int]], responses: list[list[int]], n: int) -> None:
        self.prompts, self.n = prompts, n
        width = max(map(len, responses))
        self.responses = torch.tensor([row + [0] * (width - len(row)) for row in responses])
        self.mask = torch.arange(width) < torch.tensor([len(row) for row in responses])[:, None]

    def rows_of(self, prompts: torch.Tensor) -> torch.Tensor:
        """The rows of `responses` that belong to these prompts."""
        return (prompts[:, None] * self.n + torch.arange(self.n)).flatten()

    def select(self, prompts: torch.Tensor) -> "Groups":
        part = object.__new__(Groups)
        part.prompts, part.n = [self.prompts[i] for i in prompts.tolist()], self.n
        part.responses, part.mask = (tensor[self.rows_of(prompts)] for tensor in (self.responses, self.mask))
        return part

    def logits(self, model: PreTrainedModel) -> torch.Tensor:
        """Logits that predict each token of the responses, (responses, T, vocabulary)."""
        count, width, longest = len(self.prompts), self.responses.shape[1], max(map(len, self.prompts))
        lengths = torch.tensor([len(prompt) for prompt in self.prompts])[:, None]
        padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in self.prompts])
        ids = torch.cat([padded, self.responses.view(count, -1)], dim=1)
        # 0 in the prompt, k in its k-th response, -1 in the padding on the left.
        part = torch.cat([torch.zeros(longest), 1 + torch.arange(self.n).repeat_interleave(width)]).expand_as(ids)
        padding = torch.arange(ids.shape[1]) < longest - lengths
        part = part.masked_fill(padding, -1)
        seen = (part[:, None, :] == 0) | (part[:, :, None] == part[:, None, :])
        seen &= torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        positions = torch.cat(
            [torch.arange(longest) - (longest - lengths), lengths + torch.arange(width).repeat(self.n)], dim=1
        ).clamp(min=0)
        logits = model(
            input_ids=ids,
            attention_mask=seen[:, None],
            position_ids=positions,
            logits_to_keep=self.n * width + 1,
            use_cache=False,
        ).logits
        # The prompt's last token predicts the first of each response.
        own = logits[:, 1:].unflatten(1, (self.n, width))[:, :, :-1]
        first = logits[:, :1, None].expand(-1, self.n, -1, -1)
        return torch.cat([first, own], dim=2).flatten(0, 1)
