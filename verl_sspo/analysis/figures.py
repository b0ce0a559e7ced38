"""The pictures of the losses: bias and variance, limits, trust regions, gates."""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch
from verl.workers.config import ActorConfig

from verl_sspo.algorithm.gates import SHAPES, Gate
from verl_sspo.analysis.theory import EXACT, LENGTH, token_coefficients
from verl_sspo.report import style

TAU = 10.0
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
    """Plots `theory.bias_and_variance`: a row per direction, a column per quantity."""
    figure, panels = style.new_figure(2, 3, 3.9, 2.8)
    directions = {"random": "random direction", "learnt": "along the gradient"}
    places = itertools.product(directions.items(), ("bias", "cosine", "variance"))
    for panel, ((direction, where), column) in zip(panels, places, strict=True):
        shown = table[(table["direction"] == direction) & (table["drift"] > 0)]
        curves = shown.pivot(index="drift", columns="objective", values=column)[shown["objective"].unique()]
        # Exact weights have bias 0, which a logarithmic axis cannot show.
        style.draw_curves(panel, curves.drop(columns=EXACT if column == "bias" else []), markers=True)
        panel.set_xscale("log")
        panel.set_yscale("linear" if column == "cosine" else "log")
        style.label(panel, f"{column}, {where}", "mean |z|")
    style.legend_below(figure, 4)
    return style.save(figure, path)


def draw_limits(limits: Mapping[str, pd.DataFrame], path: Path) -> Path:
    """Plots the tables of `theory.limits`."""
    figure, panels = style.new_figure(1, 3, 4.2, 3.2)
    titles = {
        "temperature": ("distance to unclipped GSPO", "temperature τ"),
        "drift": ("distance to the policy gradient", "drift (scale of z)"),
        "log-ratio": ("weight of a response", "log-ratio z of all tokens"),
    }
    for panel, (key, (title, x)) in zip(panels, titles.items(), strict=True):
        style.draw_curves(panel, limits[key], markers=True)
        style.label(panel, title, x)
    for panel in panels[:2]:
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_ylabel("relative distance of gradients")
    bounds = [math.exp(sign * math.pi / (2 * TAU)) for sign in (-1, 1)]
    panels[2].hlines(bounds, -3, 3, color=style.GREY, linewidth=0.8, label="exp(±π/(2τ)), τ = 10")
    for panel in panels:
        panel.legend(frameon=False, fontsize=8)
    return style.save(figure, path)


def draw_trust_regions(objectives: Mapping[str, ActorConfig], path: Path) -> Path:
    """Plots the coefficients of the policy gradient over the log-ratio."""
    z = torch.linspace(-1.0, 1.0, 1001, dtype=torch.float64)
    figure, panels = style.new_figure(2, 2, 4.6, 2.9)
    for panel, (together, advantage) in zip(panels, itertools.product((False, True), (1.0, -1.0)), strict=True):
        values = {
            title: token_coefficients(config, z, advantage, together).numpy() for title, config in objectives.items()
        }
        style.draw_curves(panel, pd.DataFrame(values, z.numpy()))
        moves = "the whole response moves" if together else f"one token of {LENGTH} moves"
        style.label(panel, f"A {'>' if advantage > 0 else '<'} 0, {moves}", "log-ratio z of the token")
        panel.set_ylim(-0.05, 2.2)
        panel.set_ylabel("gradient coefficient")
    style.legend_below(figure, 4)
    return style.save(figure, path)


def draw_gates(path: Path) -> Path:
    """Plots value and slope of every gate shape in both domains."""
    z, tau = torch.linspace(-1.0, 1.0, 801, dtype=torch.float64), torch.tensor(TAU, dtype=torch.float64)
    figure, panels = style.new_figure(2, 2, 4.4, 2.8)
    for row, (domain, name) in enumerate({"log": "gate on the log-ratio", "ratio": "gate on the ratio"}.items()):
        values, slopes = pd.DataFrame({"no gate": z.numpy()}, z.numpy()), pd.DataFrame({"no gate": 1.0}, z.numpy())
        for shape in SHAPES:
            gate = Gate(shape, domain, TAU, TAU)
            value, slope = gate.log_value_and_slope(z, tau)
            values[shape] = (value - gate.on_policy_value(tau).log()).numpy()
            slopes[shape] = (slope / gate.on_policy_slope(tau)).numpy()
        left, right = panels[2 * row : 2 * row + 2]
        style.draw_curves(left, values)
        style.draw_curves(right, slopes)
        style.label(left, f"log f, {name}", "log-ratio z")
        style.label(right, f"slope κ, {name}", "log-ratio z")
        left.set_ylim(-0.35, 0.35)
        # SAPO's sigmoid, in a geometric mean, lets more through where r < 1 than on policy.
        right.set_ylim(0, 1.75 if domain == "ratio" else 1.15)
    style.legend_below(figure, 5)
    return style.save(figure, path)
