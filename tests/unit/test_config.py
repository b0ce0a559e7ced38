import pytest
from omegaconf import OmegaConf
from verl.utils.config import omega_conf_to_dataclass

from verl_sspo.algorithm.gates import Gate
from verl_sspo.config import SSPOAdvantageConfig, SSPOPolicyLossConfig

TARGET = "verl_sspo.config.SSPOPolicyLossConfig"


def test_defaults_are_the_preset_v3():
    assert Gate.of_policy_loss(SSPOPolicyLossConfig()) == Gate("arctan", "log", 10.0, 12.0, "both")


def test_reaches_the_dataclass_through_verls_conversion():
    section = OmegaConf.create({"_target_": TARGET, "loss_mode": "sspo", "gate": "erf", "tau_pos": 3, "tau_neg": 4.5})
    config = omega_conf_to_dataclass(section)
    assert isinstance(config, SSPOPolicyLossConfig)
    assert config.loss_mode == "sspo"
    assert Gate.of_policy_loss(config) == Gate("erf", "log", 3, 4.5)


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("gate", "clip", "arctan"),
        ("gate_domain", "x", "log, ratio"),
        ("gate_side", "x", "both"),
        ("gate_level", "x", "token"),
        ("kernel", "cuda", "triton"),
        ("tau_neg", 0, "> 0"),
    ],
)
def test_bad_values_raise_through_verls_conversion(option, value, named):
    with pytest.raises(Exception, match=named):
        omega_conf_to_dataclass(OmegaConf.create({"_target_": TARGET, option: value}))


def test_advantage_options_are_read_and_checked():
    assert SSPOAdvantageConfig.from_algorithm(None) == SSPOAdvantageConfig()
    assert SSPOAdvantageConfig.from_algorithm({"gamma": 1.0}) == SSPOAdvantageConfig("mean", 0.0)
    algorithm = OmegaConf.create({"sspo": {"baseline": "leave_one_out", "std_floor": 0.1}})
    assert SSPOAdvantageConfig.from_algorithm(algorithm) == SSPOAdvantageConfig("leave_one_out", 0.1)
    with pytest.raises(ValueError, match="leave_one_out"):
        SSPOAdvantageConfig(baseline="median")
    with pytest.raises(ValueError, match="std_floor"):
        SSPOAdvantageConfig(std_floor=-0.1)
    with pytest.raises(ValueError, match=r"std_flor.*baseline"):
        SSPOAdvantageConfig.from_algorithm({"sspo": {"std_flor": 0.1}})


@pytest.mark.parametrize("sspo", [True, False, 3, "mean", ["baseline"], {3: 1, "x": 2}, {"std_floor": 10**400}])
def test_advantage_options_of_any_kind_are_refused_by_name(sspo):
    with pytest.raises(ValueError, match=r"algorithm\.sspo"):
        SSPOAdvantageConfig.from_algorithm({"sspo": sspo})
