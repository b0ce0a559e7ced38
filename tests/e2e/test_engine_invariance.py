"""verl's own actor learns and logs the same from a batch, however the batch is split.

The tests call `ActorRolloutRefWorker.update_actor` on FSDP2 and gloo, as main_ppo does, but without a Ray cluster.
torch's SGD runs at rate 1 without clipping, so the change of the parameters is the gradient itself. Adam or a clipped
norm would hide an error of scale. Every split is compared with the formula in float64, computed row by row.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from moe_model import create_moe_model
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM
from verl.utils.metric import reduce_metrics
from verl.utils.py_functional import rename_dict
from verl.workers.engine.fsdp.utils import unfuse_moe_params

from verl_sspo.algorithm.gates import Gate
from verl_sspo.algorithm.reference import sspo_loss_matrix
from verl_sspo.quickstart.model import create_model, create_tokenizer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

# Relative to the largest gradient. The forward pass computes log-probabilities of about -6 with an error of 1e-6, and
# a gate of temperature 12 multiplies that by up to 12 in its slope. Measured: 4e-6, and 4e-7 with v1's temperature of
# 1. The smallest error of a wrong split, one row of twelve counted wrongly, would be 8e-2.
TOLERANCE = 2e-5

# AdamW's learning rate, about a hundredth of a weight.
ADAM_RATE = 1e-3

# (prompt length, response length, advantage): ragged, and one response has a single token.
ROWS = [(5, 1, 1.3), (9, 24, -0.7), (3, 7, 0.4), (12, 16, -1.1), (7, 11, 0.9), (4, 3, -0.2)]
# Row 3 calls a tool, which wrote these tokens of the response.
TOOL_ROW, TOOL_TOKENS = 3, slice(5, 10)
# verl pads a batch with rows of 128 tokens, none of them valid.
PADDING_TOKENS = 128
GATES = {"sspo": Gate(), "sspo_v1": Gate("sigmoid", "ratio", 1.0, 1.05), "sspo_forward": Gate(side="forward")}
GATES["sspo_sequence"] = Gate("erf", "log", 100.0, 100.0, "forward", "sequence")


@dataclass(frozen=True)
class Setting:
    """How the batch is split.

    Args:
        ranks: FSDP2 ranks, each with an equal part of the rows.
        micro: rows per micro-batch. None: use_dynamic_bsz, as many rows as fit in a number of tokens.
        packed: use_remove_padding.
        padding: number of verl's padding rows, after the real ones.
        counted: number of rows over which verl takes the mean.
        reverse: whether to reverse the order of the rows.
        algorithm: recipe of `recipes/algo`.
        rejecting: whether there are rollout-correction weights. Some are 0; in one row, all are.
        optimizer: torch's SGD at rate 1 without clipping, or AdamW as in the recipes.
    """

    ranks: int = 1
    micro: int | None = None
    packed: bool = False
    padding: int = 2
    counted: int = 8
    reverse: bool = False
    algorithm: str = "sspo"
    rejecting: bool = False
    optimizer: str = "SGD"

    def as_json(self) -> dict:
        """The setting as `engine_updates` reads it."""
        actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
        overrides = [
            # verl's own engine, not the one of `hf`; test_hf_engine.py compares the two.
            "actor_rollout_ref.model.external_lib=null",
            f"actor_rollout_ref.model.use_remove_padding={self.packed}",
            f"{actor}.use_dynamic_bsz={self.micro is None}",
            # Too small for two padding rows in one micro-batch.
            f"{actor}.ppo_max_token_len_per_gpu={PADDING_TOKENS + 2}",
            f"{actor}.ppo_micro_batch_size_per_gpu={self.micro}",
            f"{rollout}.log_prob_micro_batch_size_per_gpu=1",
            f"{actor}.optim.optimizer={self.optimizer}",
        ]
        if self.optimizer == "SGD":
            overrides += [f"{actor}.optim.lr=1", f"{actor}.optim.weight_decay=0", f"{actor}.optim.clip_grad=1e9"]
        else:
            overrides += [f"{actor}.optim.lr={ADAM_RATE}"]
        order = list(range(len(ROWS) + self.padding))
        return {
            "algorithm": self.algorithm,
            "overrides": overrides,
            "padding_rows": self.padding,
            "order": order[::-1] if self.reverse else order,
            "global_batch_size": self.counted,
            "rejecting": self.rejecting,
        }

    @property
    def formula(self) -> tuple[str, bool]:
        """The key of the expected update in `exact`."""
        return self.algorithm, self.rejecting


SAME = {
    "whole": Setting(micro=8),
    "micro_1": Setting(micro=1),
    "micro_2": Setting(micro=2),
    "micro_4": Setting(micro=4),
    "dynamic": Setting(),
    "packed": Setting(micro=8, packed=True),
    "packed_micro_2": Setting(micro=2, packed=True),
    "packed_dynamic": Setting(packed=True),
    "padding": Setting(micro=4, padding=6),
    "reverse": Setting(micro=2, reverse=True),
    "ranks_whole": Setting(ranks=2, micro=4),
    "ranks_micro_1": Setting(ranks=2, micro=1),
    "ranks_micro_2": Setting(ranks=2, micro=2),
    "ranks_dynamic": Setting(ranks=2),
    "ranks_packed": Setting(ranks=2, micro=4, packed=True),
    "ranks_packed_dynamic": Setting(ranks=2, packed=True),
    # The second rank has only padding rows.
    "ranks_padding": Setting(ranks=2, micro=2, padding=6),
    "v1": Setting(micro=2, algorithm="sspo_v1"),
    "ranks_v1": Setting(ranks=2, packed=True, algorithm="sspo_v1"),
    "forward": Setting(micro=2, algorithm="sspo_forward"),
    "ranks_forward": Setting(ranks=2, packed=True, algorithm="sspo_forward"),
    "ranks_sequence": Setting(ranks=2, micro=1, algorithm="sspo_sequence"),
    "rejecting": Setting(micro=8, rejecting=True),
    "rejecting_micro_1": Setting(micro=1, rejecting=True),
    "ranks_rejecting": Setting(ranks=2, packed=True, rejecting=True),
}
OTHER = {
    "counted_padding": Setting(micro=4, padding=6, counted=12),
    "ranks_counted_padding": Setting(ranks=2, micro=2, padding=6, counted=12),
    "geo_mean_whole": Setting(micro=8, algorithm="gmpo"),
    "geo_mean_micro_1": Setting(micro=1, algorithm="gmpo"),
    "adam_whole": Setting(micro=8, optimizer="AdamW"),
    "ranks_adam": Setting(ranks=2, packed=True, optimizer="AdamW"),
}
SETTINGS = SAME | OTHER


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder with all updates, see `engine_updates`."""
    folder = tmp_path_factory.mktemp("updates")
    tokenizer = create_tokenizer()
    model = create_model(tokenizer, seed=0)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "rows.json").write_text(json.dumps(_rows(model)))
    (folder / "settings.json").write_text(json.dumps({name: s.as_json() for name, s in SETTINGS.items()}))

    def run(ranks):
        _run(folder, ranks, [name for name, setting in SETTINGS.items() if setting.ranks == ranks])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, (1, 2)))
    return folder


def _rows(model):
    """Random tokens, and log-ratios with standard deviation 0.15. At 0.1 and 0.083 the gates halve a token's gradient.

    Every fifth rollout weight is 0. In the first row, which has a single token, all are.
    """
    random = torch.Generator().manual_seed(0)
    rows = []
    for prompt_length, response_length, advantage in ROWS:
        tokens = torch.randint(256, (prompt_length + response_length,), generator=random).tolist()
        row = {"prompt": tokens[:prompt_length], "response": tokens[prompt_length:], "advantage": advantage}
        with torch.no_grad():
            log_probs = _log_probs(model, row)
        row["old_log_probs"] = (log_probs + 0.15 * torch.randn(response_length, generator=random)).tolist()
        row["mask"] = [1] * response_length
        row["weights"] = [0.0 if token % 5 == 0 else 0.5 + token / 10 for token in range(response_length)]
        rows.append(row)
    rows[TOOL_ROW]["mask"][TOOL_TOKENS] = [0] * 5
    return rows


def _log_probs(model, row):
    """Log-probs of the response's tokens, (response_length,)."""
    logits = model(torch.tensor([row["prompt"] + row["response"]])).logits[0, len(row["prompt"]) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(row["response"]).unsqueeze(-1)).squeeze(-1)


def _run(folder, ranks, names):
    command = [sys.executable, str(Path(__file__).with_name("engine_updates.py")), str(folder), *names]
    environment = os.environ | {
        "VERL_PLATFORM": "cpu",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(ranks),
        # The ranks meet through a file. verl's Worker requires an address, but nothing uses it.
        "DIST_INIT_METHOD": f"file://{folder}/rendezvous{ranks}",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    logs = [folder / f"{rank}of{ranks}.log" for rank in range(ranks)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as output:
                processes.append(
                    subprocess.Popen(
                        command, env=environment | {"RANK": str(rank)}, stdout=output, stderr=subprocess.STDOUT
                    )
                )
        for process, log in zip(processes, logs, strict=True):
            assert process.wait(timeout=2000) == 0, log.read_text()[-4000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def before(folder):
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def exact(folder):
    """(loss, gradient) of the formula in float64, by algorithm and whether there are rollout weights."""
    rows = json.loads((folder / "rows.json").read_text())
    found = {}
    for algorithm, rejecting in [*((name, False) for name in GATES), ("sspo", True)]:
        model = Qwen2ForCausalLM.from_pretrained(folder / "model", dtype=torch.float64, attn_implementation="eager")
        loss = torch.zeros((), dtype=torch.float64)
        for row in rows:
            old_log_probs, mask = torch.tensor(row["old_log_probs"]).double(), torch.tensor(row["mask"])
            weights = torch.tensor(row["weights"]).double() if rejecting else torch.ones_like(old_log_probs)
            advantages = torch.full_like(old_log_probs, row["advantage"])
            log_prob, *others = (
                x.unsqueeze(0) for x in (_log_probs(model, row), old_log_probs, advantages, mask, weights)
            )
            matrix = sspo_loss_matrix(log_prob, *others[:3], GATES[algorithm], others[3])
            loss = loss + matrix.sum() / max(1, (mask * weights).count_nonzero()) / 8
        loss.backward()
        found[algorithm, rejecting] = loss.item(), {name: p.grad for name, p in model.named_parameters()}
    return found


def _logged(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def _after(folder, name):
    return load_file(folder / f"{name}.safetensors")


def _gradient(folder, before, name):
    """The gradient: SGD at rate 1 subtracted it from the parameters."""
    after = _after(folder, name)
    # verl adds the output layer, which is the same tensor as the embedding.
    assert torch.equal(after.pop("lm_head.weight"), after["model.embed_tokens.weight"])
    assert after.keys() == before.keys()
    return {key: before[key].double() - after[key].double() for key in before}


def _largest(gradient):
    return max(values.abs().max().item() for values in gradient.values())


def _difference(gradient, other):
    """Largest difference between two elements, relative to the largest element of `other`."""
    return _largest({key: gradient[key] - other[key] for key in other}) / _largest(other)


@pytest.mark.parametrize("name", SAME)
def test_gradient_is_the_formula_s_however_the_batch_is_split(folder, before, exact, name):
    loss, gradient = exact[SETTINGS[name].formula]
    assert _difference(_gradient(folder, before, name), gradient) < TOLERANCE
    metrics = _logged(folder, name)["metrics"]
    norm = torch.cat([values.flatten() for values in gradient.values()]).norm().item()
    assert metrics["grad_norm"] == [pytest.approx(norm, rel=TOLERANCE)]
    assert metrics["loss"] == [pytest.approx(loss, rel=TOLERANCE)]


@pytest.mark.slow
def test_a_mixture_of_experts_learns_alike_on_one_rank_and_on_two(tmp_path):
    """FSDP splits the stacked experts and the router over the ranks, and rows use different experts."""
    model = create_moe_model(seed=0)
    model.save_pretrained(tmp_path / "model")
    create_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.json").write_text(json.dumps(_rows(model)))
    settings = {name: SETTINGS[name] for name in ("whole", "micro_1", "ranks_micro_2")}
    (tmp_path / "settings.json").write_text(json.dumps({name: s.as_json() for name, s in settings.items()}))
    _run(tmp_path, 1, ["whole", "micro_1"])
    _run(tmp_path, 2, ["ranks_micro_2"])
    before = dict(unfuse_moe_params(model.state_dict().items(), "qwen3_moe"))
    whole, *others = ({key: before[key] - value for key, value in _after(tmp_path, name).items()} for name in settings)
    assert whole.keys() == before.keys()
    routers = [key for key in whole if key.endswith("mlp.gate.weight")]
    assert len(routers) == 2
    assert all(whole[key].abs().max() > 1e-3 * _largest(whole) for key in routers)
    for other in others:
        assert _difference(other, whole) < TOLERANCE


def test_update_is_not_trivial(folder, before, exact):
    _, gradient = exact["sspo", False]
    # Every parameter moves, and the three gates move them differently.
    assert all(values.abs().max() > 1e-3 * _largest(gradient) for values in gradient.values())
    for name in ("sspo_v1", "sspo_forward"):
        assert _difference(exact[name, False][1], gradient) > 0.1
    assert _difference(exact["sspo", True][1], gradient) > 0.1
    # Off policy: the gates block about half of the gradient.
    assert 0.2 < _logged(folder, "whole")["metrics"]["sspo/slope"][0] < 0.8


def _diagnostics(folder, name):
    """The metrics of the loss as verl's trainer reduces them, by their names in metrics.jsonl."""
    metrics = reduce_metrics(rename_dict(_logged(folder, name)["metrics"], "actor/"))
    return {key: value for key, value in metrics.items() if key.startswith("actor/sspo/") or key == "actor/ppo_kl"}


# Settings in which verl counts all rows, padding included, as its trainer does.
COUNTED = [
    name
    for name, setting in SETTINGS.items()
    if setting.counted == len(ROWS) + setting.padding and setting.algorithm in GATES and setting.optimizer == "SGD"
]


@pytest.mark.parametrize("name", COUNTED)
def test_diagnostics_are_the_same_however_the_batch_is_split(folder, name):
    first = next(other for other in COUNTED if SETTINGS[other].formula == SETTINGS[name].formula)
    expected, got = _diagnostics(folder, first), _diagnostics(folder, name)
    assert len(expected) > 10
    # With another split the forward pass rounds differently.
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)
    if SETTINGS[name].rejecting:
        kept = [weight for row in json.loads((folder / "rows.json").read_text()) for weight in _kept(row)]
        assert got["actor/sspo/tokens_left_out"] == pytest.approx(kept.count(0.0) / len(kept))
        assert got["actor/sspo/responses_left_out"] == 1 / 8


def _kept(row):
    return [weight for weight, valid in zip(row["weights"], row["mask"], strict=True) if valid]


@pytest.mark.parametrize("name", SAME)
def test_batch_was_split_as_the_setting_says(folder, name):
    setting, shapes = SETTINGS[name], _logged(folder, name)["shapes"]
    rows = (len(ROWS) + setting.padding) // setting.ranks
    if setting.packed:
        assert all(shape[0] == 1 for shape in shapes)
    else:
        assert sum(shape[0] for shape in shapes) == rows
    if setting.packed and setting.ranks == 1:
        tokens = sum(prompt + response for prompt, response, _ in ROWS)
        assert sum(shape[1] for shape in shapes) == tokens + setting.padding * PADDING_TOKENS
    if setting.micro is None:
        # Each padding row fills a micro-batch. The rank without them has as many micro-batches as the other.
        assert len(shapes) == 3
    else:
        assert len(shapes) == rows // setting.micro


@pytest.mark.parametrize("name", ["counted_padding", "ranks_counted_padding"])
def test_verl_counts_padding_rows_in_the_mean(folder, before, exact, name):
    """verl's trainer divides by all rows. Four more padding rows, 12 rows instead of 8, shrink the gradient to 8/12."""
    _, gradient = exact["sspo", False]
    counted = _gradient(folder, before, name)
    assert _difference(counted, {key: values * 8 / 12 for key, values in gradient.items()}) < TOLERANCE


def test_a_loss_that_depends_on_the_split_is_seen(folder, before):
    """verl's geo_mean divides by the rows of the micro-batch: eight micro-batches give eight times the gradient."""
    whole, split = (_gradient(folder, before, f"geo_mean_{name}") for name in ("whole", "micro_1"))
    assert _difference(split, whole) == pytest.approx(7, rel=1e-3)
    assert _difference(split, {key: 8 * values for key, values in whole.items()}) < TOLERANCE


def test_adam_moves_the_parameters_alike(folder, before, exact):
    """The recipes' optimizer, with clipping. Its first step is the rate times the sign of the gradient.

    Except for Adam's epsilon of 1e-8 and the weight decay, it is the same wherever the gradient is more than noise.
    """
    whole, split = (load_file(folder / f"{name}.safetensors") for name in ("adam_whole", "ranks_adam"))
    _, gradient = exact["sspo", False]
    for key, values in gradient.items():
        clear = values.abs() > TOLERANCE * _largest(gradient)
        assert clear.float().mean() > 0.9
        assert (whole[key] - split[key]).abs()[clear].max() < 1e-3 * ADAM_RATE
        moved = (before[key] - whole[key])[clear] / ADAM_RATE
        torch.testing.assert_close(moved, values[clear].sign().float(), atol=0.03, rtol=0)
