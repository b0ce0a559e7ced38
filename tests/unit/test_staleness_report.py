"""The picture of staleness: the lag it is drawn over, and what a run without SSPO's metrics leaves open."""

from pathlib import Path

import pandas as pd
import pytest

from verl_sspo.report import staleness
from verl_sspo.report.runs import Run
from verl_sspo.report.summary import Metrics
from verl_sspo.suites.definition import load_suite

SUITE = load_suite(Path(__file__).parents[2] / "recipes" / "suites" / "staleness.yaml")


def a_run(folder, algorithm, every, newest, oldest, **metrics):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"trainer: {{v1: {{separate_async: {{parameter_sync_step: {every}}}}}}}\n")
    steps = {
        step: {
            "training/off_policy/trajectory_staleness/mean": new,
            "training/off_policy/trajectory_staleness_worst/mean": old,
            "critic/score/mean": 0.25 * step,
            "actor/entropy_loss": 0.5,
            "actor/ppo_kl": 0.01,
            **{f"actor/{name}": value * step for name, value in metrics.items()},
        }
        for step, new, old in zip((1, 2), newest, oldest, strict=True)
    }
    steps[2]["val-core/arithmetic/acc/mean@1"] = 0.75
    return Run(folder, f"sync{every}", algorithm, 0, "finished", Metrics(steps), {})


@pytest.fixture
def runs(tmp_path):
    sspo = {
        "sspo/slope": 0.5,
        "sspo/sequence_weight": 1.0,
        "sspo/sequence_weight_std": 0.1,
        "sspo/sequence_weight_min": 0.5,
        "sspo/sequence_weight_max": 2.0,
    }
    return [
        a_run(tmp_path / "a", "sspo", 4, (1, 1), (1, 3), **sspo),
        a_run(tmp_path / "b", "sspo", 1, (0, 0), (0, 0), **sspo),
        a_run(tmp_path / "c", "gspo", 4, (1, 1), (1, 1), pg_clipfrac=0.2),
        a_run(tmp_path / "d", "sapo", 4, (1, 1), (1, 1), pg_clipfrac=0.0),
    ]


def test_lag_counts_updates(runs):
    # 1.5 transfers of 4 updates, and of the four of a step an average one has 1.5 before it.
    assert staleness.lag(runs[0], 4) == 4 * 1.5 + 1.5
    # On policy.
    assert staleness.lag(runs[1], 1) == 0


def test_table_and_picture(runs, tmp_path):
    unfinished = a_run(tmp_path / "e", "sspo", 8, (0, 0), (0, 0))
    data = staleness.table(SUITE, [*runs, Run(**{**vars(unfinished), "state": "running"})])
    assert list(data.algorithm) == ["gspo", "sapo", "sspo", "sspo"]
    gspo, sapo, on_policy, stale = (data.loc[i] for i in range(4))
    assert (on_policy.lag, stale.lag) == (0, 7.5)
    assert (stale.slope, stale.training_reward, stale.accuracy) == (0.75, 0.375, 0.75)
    assert (stale.sequence_weight_min, stale.sequence_weight_max) == (0.5, 4.0)
    assert gspo.clipped == pytest.approx(0.3)
    assert pd.isna(sapo.slope)
    picture = staleness.draw(SUITE, data, tmp_path / "picture" / "staleness.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
