"""The computations of the log-prob noise benchmark, on a random model."""

import math

import pytest
import torch

from verl_sspo.algorithm.gates import DOMAINS, SHAPES, Gate
from verl_sspo.algorithm.loss import sspo_loss
from verl_sspo.benchmark import noise
from verl_sspo.quickstart.model import create_model, create_tokenizer

PROMPT = [49, 43, 50]


@pytest.fixture(scope="module")
def model():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield create_model(create_tokenizer(), seed=0).eval()
    torch.set_num_threads(threads)


@torch.no_grad()
def test_packed_rows_have_the_log_probs_of_each_alone(model):
    responses = [[51, 52, 53], [54], [55, 56]]
    packed = noise.log_probs(model, PROMPT, responses, [[2, 0], [1]])
    for row, response in enumerate(responses):
        logits = model(torch.tensor([[*PROMPT, *response]])).logits[0, 2:-1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).squeeze(-1)
        torch.testing.assert_close(packed[row, : len(response)], expected)
        assert packed[row, len(response) :].tolist() == [0.0] * (3 - len(response))


@pytest.mark.parametrize("precision", ["float32", "bf16 weights", "bf16 weights, float32 logits"])
def test_equal_passes_are_equal_and_bfloat16_is_noisier(model, precision):
    differences = noise.log_ratios(model, PROMPT, 20, noise.PRECISIONS[precision])
    assert noise.noise(differences["same micro-batches"])["max"] == 0
    rollout = noise.noise(differences[noise.ROLLOUT])["mean"]
    assert 0 < rollout < 1e-5 if precision == "float32" else 1e-4 < rollout < 0.1


def test_noise_by_hand():
    found = noise.noise(torch.tensor([3.0, -4.0, 0.0, 0.0], dtype=torch.float64))
    assert found == pytest.approx({"mean": 1.75, "rms": 2.5, "50%": 1.5, "90%": 3.7, "99%": 3.97, "max": 4.0})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("domain", DOMAINS)
def test_slope_is_the_diagnostic_of_the_loss(shape, domain):
    z = 0.1 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    advantages = torch.tensor([1.0, -1.0, 2.0, -0.5])[:, None].expand_as(z)
    mask = torch.ones_like(z, dtype=torch.bool)
    _, diagnostics = sspo_loss(z, torch.zeros_like(z), advantages, mask, Gate(shape, domain, 7.0, 7.0))
    logged = diagnostics.as_metrics()["sspo/slope"]
    assert noise.slope(shape, domain, 7.0, z.double().flatten()) == pytest.approx(sum(logged) / 4, abs=1e-6)


# x = tau z that solves kappa(x) = 0.99, by hand, if all abs(z) are equal.
@pytest.mark.parametrize(
    ("shape", "x"),
    [
        ("arctan", math.sqrt(1 / 0.99 - 1)),
        ("sigmoid", 2 * math.acosh(1 / math.sqrt(0.99))),
        ("erf", math.sqrt(-2 * math.log(0.99))),
        ("softsign", math.sqrt(0.99 ** (-2 / 3) - 1)),
    ],
)
def test_the_temperature_that_keeps_the_gradient(shape, x):
    equal = torch.tensor([0.02, -0.02], dtype=torch.float64)
    assert noise.largest_temperature(shape, equal) == pytest.approx(x / 0.02, rel=1e-6)
    # By Jensen's inequality x / rms is safe for any distribution.
    unequal = torch.tensor([0.3, -0.001, 0.0, 0.02], dtype=torch.float64)
    assert noise.largest_temperature(shape, unequal) >= x / float(unequal.square().mean().sqrt())
    assert noise.largest_temperature(shape, torch.zeros(3, dtype=torch.float64)) == math.inf
