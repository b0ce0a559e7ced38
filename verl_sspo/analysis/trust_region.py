"""The trust region of each algorithm: how much of a token's policy gradient is left once its ratio has moved."""

from collections.abc import Mapping
from pathlib import Path

import torch

from verl_sspo.analysis.objectives import Objective
from verl_sspo.report import style

LENGTH = 32
CAPTION = (
    "Coefficient of a token's policy gradient against its log-ratio z, 1 on policy, found by backpropagation through "
    "verl's own losses and ours with the settings of recipes/algo. Top: one token of a response of 32 moves, the "
    "others stay on policy. Bottom: all tokens of the response move together. Left: positive advantage, right: "
    "negative. To the right of 0 in the left column, and to the left of it in the right one, the token has moved the "
    "way its advantage pushes."
)


def coefficients(objective: Objective, z: torch.Tensor, advantage: float, together: bool) -> torch.Tensor:
    """The coefficient of the first token of a response for every log-ratio in `z`, (len(z),).

    Args:
        objective: the loss.
        z: log-ratios, (count,).
        advantage: of the response.
        together: all of its tokens have the log-ratio, instead of the first alone.
    """
    old = torch.full((len(z), LENGTH), -4.0, dtype=torch.float64)
    moved = torch.zeros_like(old)
    moved[:, : LENGTH if together else 1] = z[:, None]
    advantages = torch.full_like(old, advantage)
    return objective.relative_gradient(old + moved, old, advantages, torch.ones_like(old, dtype=torch.bool))[:, 0]


def draw(objectives: Mapping[str, Objective], path: Path) -> Path:
    z = torch.linspace(-1.0, 1.0, 1001, dtype=torch.float64)
    figure, axes = style.new_figure(2, 2, 4.6, 2.9)
    for i, panel in enumerate(axes):
        together, advantage = i >= 2, (1.0, -1.0)[i % 2]
        for index, (title, objective) in enumerate(objectives.items()):
            values = coefficients(objective, z, advantage, together)
            panel.plot(z, values, label=title, linewidth=1.7, **style.line(index))
        moves = "the whole response moves" if together else "one token of 32 moves"
        panel.set_title(f"A {'>' if advantage > 0 else '<'} 0, {moves}", loc="left", fontsize=10)
        panel.axvline(0, color="#B0B0B0", linewidth=0.8)
        panel.set_ylim(-0.05, 2.2)
        panel.set_xlabel("log-ratio z of the token")
        panel.set_ylabel("gradient coefficient")
    style.legend_below(figure, axes[0], 6)
    return style.save(figure, path)
