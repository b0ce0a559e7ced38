"""The gates: value and slope of every shape in both domains, from `verl_sspo.algorithm.gates`."""

from pathlib import Path

import torch

from verl_sspo.algorithm.gates import DOMAINS, SHAPES, Gate
from verl_sspo.report import style

CAPTION = (
    "The gates of SSPO at temperature 10 over the log-ratio z of a token. Left: the "
    "gated log-ratio, relative to its value on policy. Right: the slope, the share of a token's policy gradient that "
    "the gate lets through, relative to the slope on policy. Grey: no gate."
)


def draw(path: Path, tau: float = 10.0) -> Path:
    z = torch.linspace(-1.0, 1.0, 801, dtype=torch.float64)
    temperature = torch.tensor(tau, dtype=torch.float64)
    figure, axes = style.new_figure(2, 2, 4.4, 2.8)
    for row, domain in enumerate(DOMAINS):
        values, slopes = axes[2 * row : 2 * row + 2]
        values.plot(z, z, color="#B0B0B0", linewidth=1)
        slopes.axhline(1, color="#B0B0B0", linewidth=1)
        for index, shape in enumerate(SHAPES):
            gate = Gate(shape, domain, tau, tau)
            value, slope = gate.log_value_and_slope(z, temperature)
            look = style.line(index + 1)
            relative = value - gate.on_policy_value(temperature).log()
            values.plot(z, relative, label=shape, linewidth=1.7, **look)
            slopes.plot(z, slope / gate.on_policy_slope(temperature), linewidth=1.7, **look)
        name = "gate on the log-ratio" if domain == "log" else "gate on the ratio"
        values.set_title(f"log f, {name}", loc="left", fontsize=10)
        slopes.set_title(f"slope κ, {name}", loc="left", fontsize=10)
        values.set_ylim(-0.35, 0.35)
        # SAPO's sigmoid, in a geometric mean, lets more through where r < 1 than on policy.
        slopes.set_ylim(0, 1.75 if domain == "ratio" else 1.15)
        for panel in (values, slopes):
            panel.set_xlabel("log-ratio z")
    style.legend_below(figure, axes[0], 4)
    return style.save(figure, path)
