"""The pictures of the losses: bias and variance, limits, trust regions, gates."""

import math
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch
from verl.workers.config import ActorConfig

from verl_sspo.algorithm.gates import DOMAINS, SHAPES, Gate
from verl_sspo.analysis.theory import EXACT, LENGTH, token_coefficients
from verl_sspo.report import style

BIAS = (
    "Gradient of each objective against the exact one, on enumerable toy problems (3 tokens, sequences of 3, random "
    "rewards and policies), one sampled response, over the mean |log-ratio| between old and current policy; means "
    "over 20 problems. Top: the policy moved in a random direction. Bottom: along the policy gradient. Bias and "
    "variance are relative to the exact gradient, the cosine is that between mean and exact gradient. A trust region "
    "is a bias on purpose: a method that stops or turns back once the policy has moved shows here as biased."
)
LIMITS = (
    "Limits of SSPO, through the losses themselves. Left: as the temperature falls, the gradient tends to that of "
    "verl's GSPO without clipping, for every gate on the log-ratio. Middle: as the drift falls, every gradient tends "
    "to the plain policy gradient. Right: the weight of a response whose tokens share one log-ratio, relative to on "
    "policy: SSPO v1 is SAPO, and the arctan of the log-ratio stays between the bounds."
)
TRUST_REGIONS = (
    "Coefficient of a token's policy gradient against its log-ratio z, 1 on policy, found by backpropagation through "
    f"verl's own losses and ours with the settings of recipes/algo. Top: one token of a response of {LENGTH} moves, "
    "the others stay on policy. Bottom: all tokens of the response move together. Left: positive advantage, right: "
    "negative. To the right of 0 in the left column, and to the left of it in the right one, the token has moved the "
    "way its advantage pushes."
)
GATES = (
    "The gates of SSPO at temperature 10 over the log-ratio z of a token. Left: the gated log-ratio, relative to its "
    "value on policy. Right: the slope, the fraction of a token's policy gradient that the gate lets through, relative "
    "to the slope on policy."
)


def draw_bias(table: pd.DataFrame, path: Path) -> Path:
    """A row per direction, a column per figure of `theory.bias_and_variance`."""
    figure, axes = style.new_figure(2, 3, 3.9, 2.8)
    directions = {"random": "random direction", "learnt": "along the gradient"}
    panels = iter(axes)
    for direction, where in directions.items():
        for column in ("bias", "cosine", "variance"):
            panel = next(panels)
            # Exact weights have no bias, which has no place on a logarithmic axis.
            shown = table[(table["direction"] == direction) & (table["drift"] > 0)]
            for index, (name, rows) in enumerate(shown.groupby("objective", sort=False)):
                if (column, name) != ("bias", EXACT):
                    look = style.line(index) | {"marker": style.MARKERS[index], "markersize": 3.5, "linewidth": 1.4}
                    panel.plot(rows["drift"], rows[column], label=name, **look)
            panel.set_xscale("log")
            panel.set_yscale("linear" if column == "cosine" else "log")
            panel.set_title(f"{column}, {where}", loc="left", fontsize=10)
            panel.set_xlabel("mean |z|")
    style.legend_below(figure, 4)
    return style.save(figure, path)


def draw_limits(limits: Mapping[str, pd.DataFrame], path: Path) -> Path:
    """The tables of `theory.limits`."""
    figure, axes = style.new_figure(1, 3, 4.2, 3.2)
    titles = {
        "temperature": ("distance to unclipped GSPO", "temperature τ"),
        "drift": ("distance to the policy gradient", "drift (scale of z)"),
        "log-ratio": ("weight of a response", "log-ratio z of all tokens"),
    }
    for panel, (key, (title, label)) in zip(axes, titles.items(), strict=True):
        every = max(1, len(limits[key]) // 12)
        for index, (name, values) in enumerate(limits[key].items()):
            look = style.line(index) | {"marker": style.MARKERS[index], "markevery": (index % every, every)}
            panel.plot(values.index, values, label=name, linewidth=1.4, markersize=4, markerfacecolor="none", **look)
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_xlabel(label)
        if key != "log-ratio":
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.set_ylabel("relative distance of gradients")
    bounds = [math.exp(sign * math.pi / (2 * 10.0)) for sign in (-1, 1)]
    axes[2].hlines(bounds, -3, 3, color=style.GREY, linewidth=0.8, label="exp(±π/(2τ)), τ = 10")
    for panel in axes:
        panel.legend(frameon=False, fontsize=8)
    return style.save(figure, path)


def draw_trust_regions(objectives: Mapping[str, ActorConfig], path: Path) -> Path:
    """Coefficients of the policy gradient over the log-ratio."""
    z = torch.linspace(-1.0, 1.0, 1001, dtype=torch.float64)
    figure, axes = style.new_figure(2, 2, 4.6, 2.9)
    for i, panel in enumerate(axes):
        together, advantage = i >= 2, (1.0, -1.0)[i % 2]
        for index, (title, config) in enumerate(objectives.items()):
            values = token_coefficients(config, z, advantage, together)
            panel.plot(z, values, label=title, linewidth=1.7, **style.line(index))
        moves = "the whole response moves" if together else f"one token of {LENGTH} moves"
        panel.set_title(f"A {'>' if advantage > 0 else '<'} 0, {moves}", loc="left", fontsize=10)
        panel.set_ylim(-0.05, 2.2)
        panel.set_xlabel("log-ratio z of the token")
        panel.set_ylabel("gradient coefficient")
    style.legend_below(figure, 4)
    return style.save(figure, path)


def draw_gates(path: Path) -> Path:
    """Value and slope of every gate shape in both domains."""
    z = torch.linspace(-1.0, 1.0, 801, dtype=torch.float64)
    temperature = torch.tensor(10.0, dtype=torch.float64)
    figure, axes = style.new_figure(2, 2, 4.4, 2.8)
    for row, domain in enumerate(DOMAINS):
        values, slopes = axes[2 * row : 2 * row + 2]
        values.plot(z, z, color=style.GREY, linewidth=1, label="no gate")
        slopes.axhline(1, color=style.GREY, linewidth=1)
        for index, shape in enumerate(SHAPES, start=1):
            gate = Gate(shape, domain, 10.0, 10.0)
            value, slope = gate.log_value_and_slope(z, temperature)
            look = style.line(index) | {"linewidth": 1.7}
            values.plot(z, value - gate.on_policy_value(temperature).log(), label=shape, **look)
            slopes.plot(z, slope / gate.on_policy_slope(temperature), **look)
        name = "gate on the log-ratio" if domain == "log" else "gate on the ratio"
        values.set_title(f"log f, {name}", loc="left", fontsize=10)
        slopes.set_title(f"slope κ, {name}", loc="left", fontsize=10)
        values.set_ylim(-0.35, 0.35)
        # SAPO's sigmoid, in a geometric mean, lets more through where r < 1 than on policy.
        slopes.set_ylim(0, 1.75 if domain == "ratio" else 1.15)
        for panel in (values, slopes):
            panel.set_xlabel("log-ratio z")
    style.legend_below(figure, 5)
    return style.save(figure, path)
