"""The report on the losses alone: bias and variance, limits, trust regions, gates."""

from pathlib import Path

import pandas as pd

from verl_sspo.analysis import figures, theory
from verl_sspo.analysis.objectives import COMPARED, actor_config
from verl_sspo.report.style import picture


def write_theory_report(output: Path) -> Path:
    """Writes report.md, bias.csv and pictures/ into the folder `output`, and returns report.md."""
    compared = {title: actor_config(overrides) for title, overrides in COMPARED.items()}
    bias, pictures = theory.bias_and_variance(compared), output / "pictures"
    drawn = {
        "Bias, cosine and variance over drift": (figures.draw_bias(bias, pictures / "bias.svg"), figures.BIAS),
        "Limits": (figures.draw_limits(theory.limits(compared), pictures / "limits.svg"), figures.LIMITS),
        "Trust regions": (figures.draw_trust_regions(compared, pictures / "trust_region.svg"), figures.TRUST_REGIONS),
        "Gates": (figures.draw_gates(pictures / "gates.svg"), figures.GATES),
    }
    parts = [
        "# What the losses do by themselves",
        "**What it shows.** Bias and variance of the gradients on toy problems that are solved exactly, limits, trust "
        "regions and gates, through the losses that train.",
        "**What it does not show.** How any of this matters for a language model.",
        f"```\nverl-sspo report --theory --output {output.name}\n```",
        "## Bias and variance of the gradient",
        bias_table(bias),
        "*Bias / cosine / variance of each objective's gradient relative to the exact one, where the policy has moved "
        "along the policy gradient: the columns are mean |log-ratios|, 0 is on policy.*",
    ]
    for name, (path, caption) in drawn.items():
        parts += [f"## {name}", picture(path, output, name, caption)]
    bias.to_csv(output / "bias.csv", index=False)
    (output / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return output / "report.md"


def bias_table(table: pd.DataFrame) -> str:
    """Bias / cosine / variance of every objective at every drift along the policy gradient, as Markdown."""
    learnt = table[table["direction"] == "learnt"]
    cells = [f"{row.bias:.3f} / {row.cosine:.2f} / {row.variance:.3g}" for row in learnt.itertuples()]
    shown = learnt.assign(cell=cells).pivot(index="objective", columns="drift", values="cell")
    shown = shown.reindex(learnt["objective"].unique()).rename(columns="mean ∣z∣ {:g}".format)
    return shown.rename_axis("", axis=0).to_markdown(disable_numparse=True)
