"""A few examples of every property that tests/fuzz.py tries for an hour."""

import shutil

import pytest
from hypothesis import given, settings
from properties import advantages, configuration, loss, rewards

PROPERTIES = loss.PROPERTIES | advantages.PROPERTIES | configuration.PROPERTIES | rewards.PROPERTIES


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name):
    each = PROPERTIES[name]
    if each.program and shutil.which(each.program) is None:
        pytest.skip(f"{each.program} is not installed")
    settings(max_examples=each.examples)(given(**each.inputs)(each.check))()
