import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verl_sspo.algorithm.gates import DOMAINS, SHAPES, Gate
from verl_sspo.algorithm.reference import LOG_GATES

GATES = [(shape, domain) for shape in SHAPES for domain in DOMAINS]


def evaluate(gate: Gate, z: list[float], tau: float, dtype: torch.dtype = torch.float64):
    return gate.log_value_and_slope(torch.tensor(z, dtype=dtype), torch.tensor(tau, dtype=dtype))


@pytest.mark.parametrize(
    ("shape", "domain", "tau", "z", "log_f", "kappa"),
    [
        # tau z = 1
        ("arctan", "log", 2.0, 0.5, math.pi / 8, 0.5),
        ("sigmoid", "log", 2.0, 0.5, math.tanh(0.5), 1 - math.tanh(0.5) ** 2),
        ("erf", "log", 2.0, 0.5, math.sqrt(math.pi / 2) / 2 * math.erf(1 / math.sqrt(2)), math.exp(-0.5)),
        ("softsign", "log", 2.0, 0.5, 0.5 / math.sqrt(2), 2**-1.5),
        # r = 2
        ("sigmoid", "ratio", 1.0, math.log(2), math.log(4 / (1 + math.exp(-1))), 2 / (1 + math.exp(1))),
        ("arctan", "ratio", 1.0, math.log(2), math.log(1 + math.pi / 4), 2 * 0.5 / (1 + math.pi / 4)),
        ("softsign", "ratio", 1.0, math.log(2), math.log(1 + 0.5**0.5), 2 * 2**-1.5 / (1 + 0.5**0.5)),
        (
            "erf",
            "ratio",
            1.0,
            math.log(2),
            math.log(1 + math.sqrt(math.pi / 2) * math.erf(math.sqrt(0.5))),
            2 * math.exp(-0.5) / (1 + math.sqrt(math.pi / 2) * math.erf(math.sqrt(0.5))),
        ),
    ],
)
def test_values_by_hand(shape, domain, tau, z, log_f, kappa):
    value, slope = evaluate(Gate(shape, domain), [z], tau)
    assert value.item() == pytest.approx(log_f, rel=1e-12)
    assert slope.item() == pytest.approx(kappa, rel=1e-12)


@pytest.mark.parametrize(("shape", "domain"), GATES)
@pytest.mark.parametrize("tau", [0.3, 1.0, 10.0])
def test_closed_form_is_the_formula_and_its_derivative(shape, domain, tau):
    z = torch.linspace(-3, 3, 61, dtype=torch.float64, requires_grad=True)
    plain = LOG_GATES[shape, domain](z, torch.tensor(tau, dtype=torch.float64))
    (derivative,) = torch.autograd.grad(plain.sum(), z)
    value, slope = Gate(shape, domain).log_value_and_slope(z.detach(), torch.tensor(tau, dtype=torch.float64))
    # Where SAPO's sigmoid has saturated, the plain formula divides two rounded tiny numbers.
    torch.testing.assert_close(value, plain.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(slope, derivative, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("shape", "domain"), GATES)
@given(tau=st.floats(0.01, 100))
def test_on_policy_the_gate_is_open(shape, domain, tau):
    gate = Gate(shape, domain)
    value, slope = evaluate(gate, [0.0], tau)
    t = torch.tensor([tau], dtype=torch.float64)
    torch.testing.assert_close(value.exp(), gate.on_policy_value(t))
    torch.testing.assert_close(slope, gate.on_policy_slope(t))
    # The gradient on policy is the policy gradient, whatever the gate: f(1) kappa(0) = 1.
    torch.testing.assert_close(value.exp() * slope, torch.ones_like(slope))


@pytest.mark.parametrize(("shape", "domain"), GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(tau=st.floats(1e-4, 1e4), z=st.floats(allow_nan=False))
def test_bounded_for_every_log_ratio_and_temperature(shape, domain, dtype, tau, z):
    value, slope = evaluate(Gate(shape, domain), [z], tau, dtype)
    if domain == "log":
        bound = {"arctan": math.pi / 2, "sigmoid": 2.0, "erf": math.sqrt(math.pi / 2), "softsign": 1.0}[shape] / tau
    elif shape == "sigmoid":
        bound = math.log(4 / tau)
    else:  # f < 1 + pi / (2 tau), the widest of the three
        bound = math.log1p(math.pi / (2 * tau))
    assert torch.isfinite(value).all()
    assert value.item() <= bound + 1e-5 * max(1.0, abs(bound))
    if domain == "log":
        assert value.item() >= -bound * (1 + 1e-5)
    assert torch.isfinite(slope).all()
    assert slope.item() >= 0


@pytest.mark.parametrize(("shape", "domain"), GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturates_at_infinity_and_keeps_nan(shape, domain, dtype):
    value, slope = evaluate(Gate(shape, domain), [math.inf, -math.inf, math.nan], 1.0, dtype)
    assert torch.isfinite(value[:2]).all()
    assert slope[:2].abs().max() < 1e-5
    assert value[2].isnan()
    assert slope[2].isnan()


@pytest.mark.parametrize("shape", SHAPES)
def test_slope_is_even_and_falls_in_the_log_domain(shape):
    z = torch.linspace(0, 5, 501, dtype=torch.float64)
    gate, tau = Gate(shape), torch.tensor(3.0, dtype=torch.float64)
    up, down = gate.log_value_and_slope(z, tau), gate.log_value_and_slope(-z, tau)
    torch.testing.assert_close(up[0], -down[0])
    torch.testing.assert_close(up[1], down[1])
    assert (up[1].diff() < 0).all()


@pytest.mark.parametrize("shape", ["arctan", "erf", "softsign"])
@pytest.mark.parametrize("tau", [1e-3, 0.1, 1.0, 10.0, 1000.0])
def test_ratio_gates_are_positive_at_ratio_zero(shape, tau):
    value, _ = evaluate(Gate(shape, "ratio"), [-math.inf], tau)
    assert torch.isfinite(value).all()  # log f finite, so f > 0
    if shape == "softsign" and tau >= 0.1:
        assert value.exp().item() == pytest.approx(1 - 1 / math.sqrt(1 + tau**2), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"shape": "clip"}, "arctan, sigmoid, erf, softsign"),
        ({"domain": "linear"}, "log, ratio"),
        ({"side": "backward"}, "both, forward"),
        ({"tau_pos": 0.0}, "tau_pos"),
        ({"tau_neg": -1.0}, "tau_neg"),
        ({"tau_pos": math.inf}, "tau_pos"),
        ({"tau_neg": math.nan}, "tau_neg"),
        ({"tau_pos": "10"}, "tau_pos"),
        ({"tau_pos": 10**400}, "tau_pos"),
        ({"tau_pos": True}, "tau_pos"),
        ({"shape": "sigmoid", "domain": "ratio", "side": "forward"}, "f\\(1\\) = 1"),
    ],
)
def test_bad_gates_say_what_is_allowed(options, named):
    with pytest.raises(ValueError, match=named):
        Gate(**options)
