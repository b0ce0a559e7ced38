"""The report of the losses themselves: bias and variance, limits, trust regions, gates."""

from pathlib import Path

from verl_sspo.analysis import gates_plot, objectives, theory, theory_plot, trust_region
from verl_sspo.report.document import picture, write


def write_theory_report(output: Path) -> tuple[Path, Path]:
    """The report of the losses by themselves: theory, limits, trust regions, gates; it takes seconds."""
    compared = {title: objectives.objective(title, settings) for title, settings in objectives.COMPARED.items()}
    compared["SSPO v1"] = objectives.objective("SSPO v1", ["algo=sspo_v1"])
    bias = theory.bias_and_variance(compared)
    clip = "actor_rollout_ref.actor.clip_ratio"
    unclipped = objectives.objective("GSPO", ["algo=gspo", *(f"{clip}{end}=1.0e9" for end in ("", "_low", "_high"))])

    def with_gate(shape: str, tau: float) -> objectives.Objective:
        gate = {"gate": shape, "gate_domain": "log", "gate_side": "both", "tau_pos": tau, "tau_neg": tau}
        return objectives.with_policy_loss(compared["SSPO"], **gate)

    own = ("SSPO", "SSPO v1")
    limits = theory.limits(
        {title: compared[title] for title in own},
        {title: compared[title] for title in ("GRPO", "GSPO", "GMPO", "SAPO")},
        unclipped,
        with_gate,
    )
    pictures = output / "pictures"
    parts = [
        "# What the losses do by themselves",
        "**What it shows.** Bias and variance of the gradients on toy problems that are solved exactly, and the limits "
        "of SSPO, through the very losses that train.",
        "**What it does not show.** How any of this matters for a language model.",
        "```\npython scripts/report.py --theory --output OUTPUT\n```",
        "## Bias and variance of the gradient",
        theory_plot.bias_table(bias),
        "*Bias / cosine / variance of each objective's gradient relative to the exact one, where the policy has moved "
        "along the policy gradient: the columns are mean |log-ratios|, 0 is on policy.*",
        picture(
            theory_plot.draw_bias(bias, pictures / "bias.svg"),
            output,
            "Bias, cosine and variance over drift",
            theory_plot.BIAS_CAPTION,
        ),
        "## Limits of SSPO",
        picture(
            theory_plot.draw_limits(limits, pictures / "limits.svg"), output, "Limit cases", theory_plot.LIMITS_CAPTION
        ),
        *losses(output),
    ]
    output.mkdir(parents=True, exist_ok=True)
    bias.to_csv(output / "bias.csv", index=False)
    return write(parts, output, "What the losses do by themselves")


def losses(output: Path) -> list[str]:
    """Trust regions and gates, the same in every report."""
    compared = {title: objectives.objective(title, settings) for title, settings in objectives.COMPARED.items()}
    pictures = output / "pictures"
    return [
        "## Trust regions",
        picture(
            trust_region.draw(compared, pictures / "trust_region.svg"),
            output,
            "Gradient coefficient over log-ratio",
            trust_region.CAPTION,
        ),
        "## Gates",
        picture(gates_plot.draw(pictures / "gates.svg"), output, "Gates and their slopes", gates_plot.CAPTION),
    ]
