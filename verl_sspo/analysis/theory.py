"""Bias and variance of each objective's gradient where the exact gradient is known, and the limits of SSPO.

The toy policy is a table: a softmax over `tokens` tokens for every prefix of sequences of `length` tokens, few enough
to enumerate. With rewards R(y) for every sequence, the exact policy gradient at theta is

    g = sum_y pi_theta(y) A(y) grad log pi_theta(y),     A(y) = (R(y) - mean) / std under the old policy,

and an objective, fed with one response sampled from the old policy, gives the random vector ghat(y). Its mean and
variance under the old policy are sums over all y too.
The losses are those of `objectives`, called as verl calls them. Each is scaled by the one constant that makes it
exact on policy.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd
import torch

from verl_sspo.analysis.objectives import Objective


@dataclass(frozen=True)
class Toy:
    """All sequences of a tabular policy.

    Args:
        sequences: (count, length), every sequence of tokens.
        states: (count, length), the row of the table that gives each token.
        rewards: (count,).
    """

    sequences: torch.Tensor
    states: torch.Tensor
    rewards: torch.Tensor
    tokens: int

    @classmethod
    def draw(cls, tokens: int, length: int, generator: torch.Generator) -> "Toy":
        """All sequences, with rewards 0 or 1 of which at least one is 1 and one is 0."""
        sequences = torch.tensor(list(itertools.product(range(tokens), repeat=length)))
        prefixes = {
            prefix: i
            for i, prefix in enumerate(p for n in range(length) for p in itertools.product(range(tokens), repeat=n))
        }
        states = torch.tensor([[prefixes[tuple(s[:t])] for t in range(length)] for s in sequences.tolist()])
        order = torch.randperm(len(sequences), generator=generator)
        rewards = torch.zeros(len(sequences), dtype=torch.float64)
        rewards[order[: max(1, len(sequences) // 3)]] = 1.0
        return cls(sequences, states, rewards, tokens)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the table of logits."""
        return int(self.states.max()) + 1, self.tokens

    def log_prob(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probability of every token of every sequence, (count, length)."""
        return torch.log_softmax(logits, dim=-1)[self.states, self.sequences]

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """grad log pi of every token, (count, length, parameters)."""
        probabilities = torch.softmax(logits, dim=-1)
        gradient = torch.zeros(*self.sequences.shape, *self.shape, dtype=logits.dtype)
        rows, columns = torch.meshgrid(*(torch.arange(n) for n in self.sequences.shape), indexing="ij")
        gradient[rows, columns, self.states] = -probabilities[self.states]
        gradient[rows, columns, self.states, self.sequences] += 1.0
        return gradient.flatten(2)

    def advantages(self, old_logits: torch.Tensor) -> torch.Tensor:
        """Of an infinite group sampled from the old policy, (count,)."""
        weight = self.log_prob(old_logits).sum(-1).exp()
        mean = (weight * self.rewards).sum()
        return (self.rewards - mean) / (weight * (self.rewards - mean) ** 2).sum().sqrt()

    def exact_gradient(self, logits: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        """g, (parameters,)."""
        weight = self.log_prob(logits).sum(-1).exp()
        return ((weight * advantages)[:, None] * self.scores(logits).sum(1)).sum(0)

    def estimates(
        self, objective: Objective | None, logits: torch.Tensor, old_logits: torch.Tensor, advantages: torch.Tensor
    ) -> torch.Tensor:
        """ghat(y) of one response for every y, (count, parameters); of exact importance weights without `objective`."""
        log_prob, old_log_prob = self.log_prob(logits), self.log_prob(old_logits)
        scores = self.scores(logits)
        if objective is None:
            ratio = (log_prob - old_log_prob).sum(-1).exp()
            return (ratio * advantages)[:, None] * scores.sum(1)
        token_advantages = advantages[:, None].expand_as(log_prob).contiguous()
        mask = torch.ones_like(log_prob, dtype=torch.bool)
        # On policy every token of the exact gradient has the coefficient A: that fixes the loss's scale.
        scale = token_advantages[0, 0] / objective.gradient(old_log_prob, old_log_prob, token_advantages, mask)[0, 0]
        coefficients = objective.gradient(log_prob, old_log_prob, token_advantages, mask) * scale
        return (coefficients[..., None] * scores).sum(1)


#: Exact importance weights beside the objectives: no bias, for comparison.
EXACT = "exact importance weights"


def bias_and_variance(
    objectives: Mapping[str, Objective],
    *,
    drifts: tuple[float, ...] = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0),
    draws: int = 20,
    tokens: int = 3,
    length: int = 3,
    seed: int = 0,
) -> pd.DataFrame:
    """Bias and variance of every objective's gradient over the drift between old and current policy.

    Args:
        objectives: what to compare, by title.
        drifts: mean |log-ratio| of a token under the old policy.
        draws: toy problems; every number is a mean over them.
        tokens, length: size of the toy.
        seed: of the problems.

    Returns:
        Rows: objective, direction ("random", or "learnt": along the policy gradient at the old policy), drift, and
        bias: |mean(ghat) - g| / |g|;
        cosine: between mean(ghat) and g;
        variance: trace of the covariance of ghat of one response / |g|^2.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(draws):
        toy = Toy.draw(tokens, length, generator)
        old = torch.randn(*toy.shape, dtype=torch.float64, generator=generator)
        advantages = toy.advantages(old)
        weight = toy.log_prob(old).sum(-1).exp()
        random = torch.randn(*toy.shape, dtype=torch.float64, generator=generator)
        learnt = toy.exact_gradient(old, advantages).view(*toy.shape)
        for (name, direction), drift in itertools.product((("random", random), ("learnt", learnt)), drifts):
            logits = old + _step(toy, old, direction, drift) * direction
            exact = toy.exact_gradient(logits, advantages)
            for title, objective in {**objectives, EXACT: None}.items():
                estimates = toy.estimates(objective, logits, old, advantages)
                mean = (weight[:, None] * estimates).sum(0)
                variance = (weight[:, None] * (estimates - mean) ** 2).sum()
                rows.append(
                    {
                        "objective": title,
                        "direction": name,
                        "drift": drift,
                        "bias": float((mean - exact).norm() / exact.norm()),
                        "cosine": float(torch.dot(mean, exact) / (mean.norm() * exact.norm()).clamp(min=1e-300)),
                        "variance": float(variance / exact.norm() ** 2),
                    }
                )
    table = pd.DataFrame(rows)
    return table.groupby(["objective", "direction", "drift"], sort=False, as_index=False).mean()


def _step(toy: Toy, old: torch.Tensor, direction: torch.Tensor, drift: float) -> float:
    """How far along `direction` the mean |log-ratio| of a token is `drift`, by bisection."""
    if drift == 0:
        return 0.0
    before = toy.log_prob(old)
    weight = before.sum(-1).exp()

    def moved(step: float) -> float:
        return float((weight * (toy.log_prob(old + step * direction) - before).abs().mean(-1)).sum())

    low, high = 0.0, 1.0
    while moved(high) < drift:
        high *= 2
        if high > 1e6:
            raise ValueError(f"no step along this direction moves the log-ratios by {drift} on average")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if moved(middle) < drift else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Limits:
    """The curves of the limits of SSPO, each as x and the y of every title."""

    temperatures: list[float]
    to_unclipped: dict[str, list[float]]
    drifts: list[float]
    to_policy_gradient: dict[str, list[float]]
    log_ratios: list[float]
    weights: dict[str, list[float]]
    bound: float


def limits(
    sspo: Mapping[str, Objective],
    others: Mapping[str, Objective],
    unclipped: Objective,
    with_gate: Callable[[str, float], Objective],
) -> Limits:
    """Computes the limit cases of the objective through the real losses.

    Args:
        sspo: preset v3 under "SSPO" and v1 under "SSPO v1".
        others: verl's losses, whose gradients SSPO's must equal on policy; SAPO under "SAPO".
        unclipped: verl's GSPO with a clip range that never binds.
        with_gate: gate shape, temperature -> Objective, in the log domain.
    """
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(8, 16, dtype=torch.float64, generator=generator) - 1.0
    z = 0.2 * torch.randn(8, 16, dtype=torch.float64, generator=generator)
    advantages = torch.randn(8, 1, dtype=torch.float64, generator=generator).expand(8, 16).contiguous()
    mask = torch.ones(8, 16, dtype=torch.bool)

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).norm() / b.norm())

    temperatures = [10.0**e for e in torch.linspace(-4, 1.5, 23).tolist()]
    reference = unclipped.gradient(old + z, old, advantages, mask)
    to_unclipped = {
        shape: [
            distance(with_gate(shape, tau).gradient(old + z, old, advantages, mask), reference) for tau in temperatures
        ]
        for shape in ("arctan", "sigmoid", "erf", "softsign")
    }
    drifts = [10.0**e for e in torch.linspace(-6, 0, 25).tolist()]
    plain = advantages / advantages.numel()
    to_policy_gradient = {
        title: [distance(each.gradient(old + d * z, old, advantages, mask), plain) for d in drifts]
        for title, each in {**sspo, **others}.items()
    }
    log_ratios = torch.linspace(-3, 3, 121).tolist()
    weights = {title: [_value(each, x) for x in log_ratios] for title, each in {**sspo, "SAPO": others["SAPO"]}.items()}
    return Limits(
        temperatures, to_unclipped, drifts, to_policy_gradient, log_ratios, weights, math.exp(math.pi / (2 * 10.0))
    )


def _value(objective: Objective, log_ratio: float) -> float:
    """The weight of a response with A = 1 whose tokens all have one log-ratio, over the weight on policy."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    old = torch.full((1, 16), -4.0, dtype=torch.float64)
    one = torch.ones_like(old)
    values = []
    for z in (log_ratio, 0.0):
        loss, _ = get_policy_loss_fn(objective.config.policy_loss.loss_mode)(
            old_log_prob=old,
            log_prob=old + z,
            advantages=one,
            response_mask=one.bool(),
            loss_agg_mode=objective.config.loss_agg_mode,
            config=objective.config,
            rollout_is_weights=None,
        )
        values.append(float(loss))
    return values[0] / values[1]
