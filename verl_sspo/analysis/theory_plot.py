"""Pictures and a table of `verl_sspo.analysis.theory`."""

from pathlib import Path

import pandas as pd

from verl_sspo.analysis.theory import EXACT, Limits
from verl_sspo.report import style
from verl_sspo.report.document import markdown_table

BIAS_CAPTION = (
    "Gradient of each objective against the exact one, on enumerable toy problems (3 tokens, sequences of 3, random "
    "rewards and policies), one sampled response, over the mean |log-ratio| between old and current policy; means over "
    "the problems. Top: the policy moved in a random direction. Bottom: along the policy gradient. Bias and variance "
    "are relative to the exact gradient, the cosine is that between mean and exact gradient. A trust region is a bias "
    "on purpose: a method that stops or turns back once the policy has moved shows here as biased."
)
LIMITS_CAPTION = (
    "Limits of SSPO, through the losses themselves. Left: as the temperature falls, the gradient tends to that of "
    "verl's GSPO without clipping, for every gate on the log-ratio. Middle: as the drift falls, every gradient tends "
    "to the plain policy gradient. Right: the weight of a response whose tokens share one log-ratio, relative to on "
    "policy: SSPO v1 is SAPO, and the arctan of the log-ratio stays between the dashed bounds exp(±π/(2τ)), τ = 10."
)


def draw_bias(table: pd.DataFrame, path: Path) -> Path:
    figure, axes = style.new_figure(2, 3, 3.9, 2.8)
    directions = {"random": "random direction", "learnt": "along the gradient"}
    columns = {"bias": "bias", "cosine": "cosine", "variance": "variance"}
    panels = iter(axes)
    for direction, where in directions.items():
        for column, title in columns.items():
            panel = next(panels)
            chosen = table[(table["direction"] == direction) & (table["drift"] > 0)]
            for index, (name, rows) in enumerate(chosen.groupby("objective", sort=False)):
                if column == "bias" and name == EXACT:
                    continue  # it has none
                look = style.line(index) | {"marker": style.MARKERS[index], "markersize": 3.5, "linewidth": 1.4}
                panel.plot(rows["drift"], rows[column], label=name, **look)
            panel.set_xscale("log")
            if column != "cosine":
                panel.set_yscale("log")
            panel.set_title(f"{title}, {where}", loc="left", fontsize=10)
            panel.set_xlabel("mean |z|")
    style.legend_below(figure, axes[1], 4)
    return style.save(figure, path)


def bias_table(table: pd.DataFrame) -> str:
    """Bias / cosine / variance of every objective at every drift, along the policy gradient."""
    learnt = table[table["direction"] == "learnt"]
    drifts = sorted(learnt["drift"].unique())
    rows = []
    for name, group in learnt.groupby("objective", sort=False):
        at = group.set_index("drift")
        cells = [f"{at.bias[d]:.3f} / {at.cosine[d]:.2f} / {at.variance[d]:.3g}" for d in drifts]
        rows.append([str(name), *cells])
    return markdown_table(["", *[f"mean ∣z∣ {drift:g}" for drift in drifts]], rows)


def draw_limits(limits: Limits, path: Path) -> Path:
    figure, axes = style.new_figure(1, 3, 4.2, 3.2)
    left, middle, right = axes
    for panel, x, curves in (
        (left, limits.temperatures, limits.to_unclipped),
        (middle, limits.drifts, limits.to_policy_gradient),
        (right, limits.log_ratios, limits.weights),
    ):
        for index, (title, y) in enumerate(curves.items()):
            every = max(1, len(x) // 12)
            look = style.line(index) | {"marker": style.MARKERS[index], "markevery": (index % every, every)}
            panel.plot(x, y, label=title, linewidth=1.4, markersize=4, markerfacecolor="none", **look)
        panel.legend(frameon=False, fontsize=8)
    left.set_title("distance to unclipped GSPO", loc="left", fontsize=10)
    left.set_xlabel("temperature τ")
    middle.set_title("distance to the policy gradient", loc="left", fontsize=10)
    middle.set_xlabel("drift (scale of z)")
    for panel in (left, middle):
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_ylabel("relative distance of gradients")
    right.set_title("weight of a response", loc="left", fontsize=10)
    right.set_xlabel("log-ratio z of all tokens")
    for bound in (limits.bound, 1 / limits.bound):
        right.axhline(bound, color="#767676", linewidth=0.8, linestyle="--")
    return style.save(figure, path)
