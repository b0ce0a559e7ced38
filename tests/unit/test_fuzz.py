"""A few inputs for every property. `FUZZ=100 pytest tests/unit/test_fuzz.py -k loss` tries 100 times as many.

If a property does not hold, Hypothesis prints the input, keeps it in .hypothesis/ and tries it first next time.
"""

import os
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from properties import advantages, configuration, loss, rewards

PROPERTIES = loss.PROPERTIES | advantages.PROPERTIES | configuration.PROPERTIES | rewards.PROPERTIES
FUZZ = int(os.environ.get("FUZZ", "1"))


@pytest.mark.timeout(300 * FUZZ)
@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name):
    each = PROPERTIES[name]
    if each.program and shutil.which(each.program) is None:
        pytest.skip(f"{each.program} is not installed")
    options = settings(max_examples=FUZZ * each.examples, suppress_health_check=list(HealthCheck) if FUZZ > 1 else [])
    options(given(**each.inputs)(each.check))()
