"""The picture of staleness: the lag it is drawn over, and what a run without SSPO's metrics leaves open."""

from pathlib import Path

import pandas as pd
import pytest

from verl_sspo.experiments import staleness
from verl_sspo.experiments.runs import Run
from verl_sspo.experiments.suite import load_suite
from verl_sspo.report.summary import Metrics

SUITE = load_suite(Path(__file__).parents[2] / "recipes" / "suites" / "staleness.yaml")
SSPO = {
    "sspo/slope": 0.5,
    "sspo/sequence_weight": 1.0,
    "sspo/abs_log_weight": 0.1,
}


def off_policy(newest, oldest):
    return {
        "training/off_policy/trajectory_staleness/mean": newest,
        "training/off_policy/trajectory_staleness_worst/mean": oldest,
    }


def a_run(folder, algorithm, every, lags, state="finished", **metrics):
    folder.mkdir()
    (folder / "config.yaml").write_text(f"trainer: {{v1: {{separate_async: {{parameter_sync_step: {every}}}}}}}\n")
    logged = {"critic/score/mean": 0.25, "actor/ppo_kl": 0.01} | {f"actor/{k}": v for k, v in metrics.items()}
    steps = {step: off_policy(*lags[step - 1]) | logged for step in (1, 2)}
    steps[2]["val-core/arithmetic/acc/mean@1"] = 0.75
    return Run(folder, "staleness", f"sync{every}", algorithm, 0, state, Metrics(steps), [])


def test_lag_counts_updates():
    # On policy.
    assert staleness.lag(off_policy(0, 0), 1) == 0
    # The four updates of a step have 0, 1, 2 and 3 of them before them.
    assert staleness.lag(off_policy(0, 0), 4) == 1.5
    # Between one and two transfers of four updates besides.
    assert staleness.lag(off_policy(1, 2), 4) == 4 * 1.5 + 1.5


def test_table_and_picture(tmp_path):
    runs = [
        a_run(tmp_path / "a", "sspo", 4, [(0, 0), (1, 2)], **SSPO),
        a_run(tmp_path / "b", "sspo", 1, [(0, 0), (0, 0)], **SSPO),
        a_run(tmp_path / "c", "gspo", 4, [(0, 0), (1, 1)], pg_clipfrac=0.2),
        a_run(tmp_path / "d", "sapo", 4, [(0, 0), (1, 1)], pg_clipfrac=0.0),
        a_run(tmp_path / "e", "sspo", 16, [(0, 0), (1, 1)], state="running", **SSPO),
    ]
    data = staleness.table(SUITE, runs)
    assert list(data.algorithm) == ["gspo"] * 2 + ["sapo"] * 2 + ["sspo"] * 4
    assert list(data.lag) == [1.5, 5.5, 1.5, 5.5, 0, 0, 1.5, 7.5]
    assert list(data.step) == [1, 2] * 4
    assert data.slope.isna().tolist() == [True] * 4 + [False] * 4
    assert data.accuracy.isna().tolist() == [True, False] * 4
    last = data.iloc[-1]
    assert (last.slope, last.reward, last.accuracy, last.weight, last.abs_log_weight) == (0.5, 0.25, 0.75, 1.0, 0.1)
    assert pd.isna(last.clipped)
    lines = staleness.summary(SUITE, data).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| SSPO, 1", "| SSPO, 4", "| GSPO, clip 0.03, 4", "| SAPO, 4"]
    assert lines[1] == "| SSPO, 4 | 4.5 | 0.010 |  | 0.500 |  | 1.000 | 0.100 |  | 25.0 | 75.0 |"
    picture = staleness.draw(SUITE, data, tmp_path / "picture" / "staleness.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_picture_needs_no_more_than_one_run(tmp_path):
    data = staleness.table(SUITE, [a_run(tmp_path / "a", "sapo", 4, [(0, 0), (1, 1)], pg_clipfrac=0.0)])
    assert staleness.draw(SUITE, data, tmp_path / "one.png").exists()


def test_a_run_that_was_not_asynchronous_is_refused(tmp_path):
    run = a_run(tmp_path / "a", "sapo", 4, [(0, 0), (1, 1)], pg_clipfrac=0.0)
    for data in run.metrics.steps.values():
        del data["training/off_policy/trajectory_staleness/mean"]
    with pytest.raises(KeyError, match="trajectory_staleness"):
        staleness.table(SUITE, [run])
