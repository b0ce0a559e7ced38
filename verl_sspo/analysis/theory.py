"""Bias and variance of each objective's gradient where the exact gradient is known, limits of SSPO, trust regions.

The toy policy is a table: a softmax over `tokens` tokens for every prefix of a sequence of `length` tokens. There are
few enough sequences to enumerate. With a reward R(y) for each, the exact policy gradient at theta is

    g = sum_y pi_theta(y) A(y) grad log pi_theta(y),     A(y) = (R(y) - mean) / std under the old policy,

and an objective gives the random vector ghat(y) for one response y sampled from the old policy. Its mean and variance
under the old policy are sums over all y too. Each objective is scaled by the one constant that makes it exact on
policy.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from scipy.optimize import brentq
from verl.workers.config import ActorConfig

from verl_sspo.algorithm.gates import SHAPES
from verl_sspo.analysis.objectives import actor_config, policy_gradient, policy_loss, with_policy_loss

#: Shown for comparison: exact importance weights, which have no bias.
EXACT = "exact importance weights"
DRIFTS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
# Tokens of a response in `token_coefficients`.
LENGTH = 32


@dataclass(frozen=True)
class Toy:
    """All sequences of a tabular policy, whose logits are (states, tokens), float64.

    Args:
        sequences: (count, length), every sequence of tokens.
        states: (count, length), the row of the table that gives each token.
        rewards: (count,).
    """

    sequences: torch.Tensor
    states: torch.Tensor
    rewards: torch.Tensor

    @classmethod
    def draw(cls, tokens: int, length: int, generator: torch.Generator) -> "Toy":
        """All sequences, with reward 1 for a random third of them (at least one) and 0 for the rest."""
        sequences = list(itertools.product(range(tokens), repeat=length))
        prefixes = [p for n in range(length) for p in itertools.product(range(tokens), repeat=n)]
        states = torch.tensor([[prefixes.index(s[:t]) for t in range(length)] for s in sequences])
        rewards = torch.zeros(len(sequences), dtype=torch.float64)
        rewards[torch.randperm(len(sequences), generator=generator)[: max(1, len(sequences) // 3)]] = 1.0
        return cls(torch.tensor(sequences), states, rewards)

    def log_prob(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probability of every token of every sequence, (count, length)."""
        return torch.log_softmax(logits, dim=-1)[self.states, self.sequences]

    def probability(self, logits: torch.Tensor) -> torch.Tensor:
        """Probability of every sequence, (count,)."""
        return self.log_prob(logits).sum(-1).exp()

    def advantages(self, old: torch.Tensor) -> torch.Tensor:
        """Advantages in an infinite group sampled from the old policy, (count,)."""
        weight = self.probability(old)
        centred = self.rewards - (weight * self.rewards).sum()
        return centred / (weight * centred**2).sum().sqrt()

    def exact_gradient(self, logits: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        """The exact gradient g, (states, tokens)."""
        return torch.func.grad(lambda theta: (self.probability(theta) * advantages).sum())(logits)

    def coefficients(
        self, config: ActorConfig | None, logits: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor
    ) -> torch.Tensor:
        """Coefficient of each token's grad log pi in ghat(y), (count, length); exact weights if `config` is None."""
        log_prob, old_log_prob = self.log_prob(logits), self.log_prob(old)
        token_advantages = advantages[:, None].expand_as(log_prob).contiguous()
        if config is None:
            return token_advantages * (log_prob - old_log_prob).sum(-1, keepdim=True).exp()
        # On policy, every token of the exact gradient has coefficient A. This fixes the scale of the loss.
        on_policy = policy_gradient(config, old_log_prob, old_log_prob, token_advantages)[0, 0]
        gradient = policy_gradient(config, log_prob, old_log_prob, token_advantages)
        return gradient * token_advantages[0, 0] / on_policy

    def estimates(
        self, config: ActorConfig | None, logits: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor
    ) -> torch.Tensor:
        """ghat(y) of one response for every y, (count, states, tokens)."""
        # sum_t c_t grad log pi(y_t): 1 at the token's own entry of the table, minus the softmax of its state.
        coefficients = self.coefficients(config, logits, old, advantages)
        token = torch.nn.functional.one_hot(self.sequences, logits.shape[1])
        scores = coefficients[..., None] * (token - torch.softmax(logits, dim=-1)[self.states])
        estimates = torch.zeros(len(self.sequences), *logits.shape, dtype=logits.dtype)
        return estimates.scatter_add(1, self.states[..., None].expand_as(scores), scores)


def bias_and_variance(
    objectives: Mapping[str, ActorConfig], drifts: Sequence[float] = DRIFTS, draws: int = 20
) -> pd.DataFrame:
    """Bias and variance of every objective's gradient over the drift between old and current policy.

    Args:
        objectives: what to compare, by title.
        drifts: mean |log-ratio| of a token under the old policy.
        draws: toy problems of 3 tokens and sequences of 3; every number is a mean over them.

    Returns:
        Rows: objective, direction ("random", or "learnt": along the policy gradient at the old policy), drift, and
        bias: |mean(ghat) - g| / |g|;
        cosine: between mean(ghat) and g;
        variance: trace of the covariance of ghat of one response / |g|^2.
    """
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(draws):
        toy = Toy.draw(3, 3, generator)
        shape = int(toy.states.max()) + 1, 3
        old, random = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
        advantages, weight = toy.advantages(old), toy.probability(old)[:, None, None]
        directions = {"random": random, "learnt": toy.exact_gradient(old, advantages)}
        for (name, direction), drift in itertools.product(directions.items(), drifts):
            logits = old + step_for(toy, old, direction, drift) * direction
            exact = toy.exact_gradient(logits, advantages)
            for title, config in {**objectives, EXACT: None}.items():
                estimates = toy.estimates(config, logits, old, advantages)
                mean = (weight * estimates).sum(0)
                figures = {
                    "bias": (mean - exact).norm() / exact.norm(),
                    "cosine": (mean * exact).sum() / (mean.norm() * exact.norm()).clamp(min=1e-300),
                    "variance": (weight * (estimates - mean) ** 2).sum() / exact.norm() ** 2,
                }
                place = {"objective": title, "direction": name, "drift": drift}
                rows.append(place | {key: float(value) for key, value in figures.items()})
    return pd.DataFrame(rows).groupby(["objective", "direction", "drift"], sort=False, as_index=False).mean()


def step_for(toy: Toy, old: torch.Tensor, direction: torch.Tensor, drift: float) -> float:
    """The step along `direction` at which the mean |log-ratio| of a token under the old policy is `drift`."""
    before, weight = toy.log_prob(old), toy.probability(old)

    def missing(step: float) -> float:
        moved = (toy.log_prob(old + step * direction) - before).abs().mean(-1)
        return float((weight * moved).sum()) - drift

    return brentq(missing, 0.0, 1e6) if drift else 0.0


def limits(compared: Mapping[str, ActorConfig]) -> dict[str, pd.DataFrame]:
    """The limit cases of SSPO, computed with the real losses; each column is a curve over the index.

    Args:
        compared: objectives by title, including "SSPO", "SSPO v1" and "SAPO".

    Returns:
        temperature: relative distance of gradients to GSPO's with a clip range that never binds, per gate shape;
        drift: relative distance to the plain policy gradient as the scale of the log-ratios falls;
        log-ratio: weight of a response with A = 1 whose tokens share one log-ratio, relative to on policy.
    """
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(8, 16, dtype=torch.float64, generator=generator) - 1.0
    z = 0.2 * torch.randn(8, 16, dtype=torch.float64, generator=generator)
    advantages = torch.randn(8, 1, dtype=torch.float64, generator=generator).expand(8, 16).contiguous()

    def distance(config: ActorConfig, scale: float, reference: torch.Tensor) -> float:
        return float((policy_gradient(config, old + scale * z, old, advantages) - reference).norm() / reference.norm())

    def weight(config: ActorConfig, log_ratio: float) -> float:
        one = torch.ones_like(old)
        moved, on_policy = (policy_loss(config, old + x, old, one, one.bool()) for x in (log_ratio, 0.0))
        return float(moved / on_policy)

    def with_gate(shape: str, tau: float) -> ActorConfig:
        return with_policy_loss(compared["SSPO"], gate=shape, tau_pos=tau, tau_neg=tau)

    ends = [f"actor_rollout_ref.actor.clip_ratio{end}=1.0e9" for end in ("", "_low", "_high")]
    unclipped = policy_gradient(actor_config(["algo=gspo", *ends]), old + z, old, advantages)
    plain = advantages / advantages.numel()
    temperatures, drifts = torch.logspace(-4, 1.5, 23).tolist(), torch.logspace(-6, 0, 25).tolist()
    log_ratios = torch.linspace(-3, 3, 121).tolist()
    family = ("SSPO", "SSPO v1", "SAPO")
    return {
        "temperature": pd.DataFrame(
            {gate: [distance(with_gate(gate, tau), 1.0, unclipped) for tau in temperatures] for gate in SHAPES},
            temperatures,
        ),
        "drift": pd.DataFrame(
            {title: [distance(config, d, plain) for d in drifts] for title, config in compared.items()}, drifts
        ),
        "log-ratio": pd.DataFrame({t: [weight(compared[t], x) for x in log_ratios] for t in family}, log_ratios),
    }


def token_coefficients(config: ActorConfig, z: torch.Tensor, advantage: float, together: bool) -> torch.Tensor:
    """The policy-gradient coefficient of a response's first token, (count,); 1 on policy.

    Args:
        config: the objective.
        z: log-ratios, (count,), float64.
        advantage: of the response.
        together: all `LENGTH` tokens of the response have the log-ratio, not only the first.
    """
    old = torch.full((len(z), LENGTH), -4.0, dtype=torch.float64)
    moved = torch.zeros_like(old)
    moved[:, : LENGTH if together else 1] = z[:, None]
    advantages = torch.full_like(old, advantage)
    gradient, on_policy = (policy_gradient(config, old + shift, old, advantages) for shift in (moved, 0.0))
    return (gradient / on_policy)[:, 0]
