"""Metrics over the lag of the rollout: the lag, the data of the runs, and the picture."""

import json
from pathlib import Path

import pandas as pd
import pytest

from verl_sspo.experiments import staleness
from verl_sspo.experiments.results import read_results
from verl_sspo.report import style

SUITE = Path(__file__).parents[2] / "recipes" / "suites" / "staleness.yaml"
SSPO = {"sspo/slope": 0.5, "sspo/sequence_weight": 1.0, "sspo/abs_log_weight": 0.1}


def off_policy(newest, oldest):
    return {
        "training/off_policy/trajectory_staleness/mean": newest,
        "training/off_policy/trajectory_staleness_worst/mean": oldest,
    }


@pytest.fixture
def root(tmp_path):
    (tmp_path / "suite.yaml").write_text(SUITE.read_text())
    return tmp_path


def write_run(root, algorithm, every, lags, finished=True, **metrics):
    place = {"suite": "staleness", "variant": f"sync{every}", "algorithm": algorithm, "seed": 0}
    folder = root / place["variant"] / algorithm / "seed0"
    (folder / "attempt-1").mkdir(parents=True)
    (folder / "cell.json").write_text(json.dumps(place | {"versions": []}))
    (folder / "config.yaml").write_text(f"trainer: {{v1: {{separate_async: {{parameter_sync_step: {every}}}}}}}\n")
    if finished:
        (folder / "result.json").write_text("{}")
    logged = {"critic/score/mean": 0.25, "actor/ppo_kl": 0.01} | {f"actor/{k}": v for k, v in metrics.items()}
    steps = {step: (off_policy(*lags[step - 1]) if lags else {}) | logged for step in (1, 2)}
    steps[2]["val-core/arithmetic/acc/mean@1"] = 0.75
    lines = [json.dumps({"step": step, "data": data}) + "\n" for step, data in steps.items()]
    (folder / "attempt-1" / "metrics.jsonl").write_text("".join(lines))


def test_data_table_and_picture(root, tmp_path, monkeypatch):
    write_run(root, "sspo", 4, [(0, 0), (1, 2)], **SSPO)
    write_run(root, "sspo", 1, [(0, 0), (0, 0)], **SSPO)
    write_run(root, "gspo", 4, [(0, 0), (1, 1)], pg_clipfrac=0.2)
    write_run(root, "sapo", 4, [(0, 0), (1, 1)], pg_clipfrac=0.0)
    write_run(root, "sspo", 16, [(0, 0), (1, 1)], finished=False, **SSPO)
    results = read_results(root)
    data = staleness.over_lag(results)
    assert list(data.algorithm) == ["gspo"] * 2 + ["sapo"] * 2 + ["sspo"] * 4
    # On policy the lag is 0. The four updates of a step have 0 to 3 updates before them, 1.5 on average. Responses that
    # are one transfer old add 4 updates; in sspo's last row they are one or two transfers old, which adds 6.
    assert list(data.lag) == [1.5, 5.5, 1.5, 5.5, 0, 0, 1.5, 7.5]
    assert list(data.step) == [1, 2] * 4
    assert data.slope.isna().tolist() == [True] * 4 + [False] * 4
    assert data.accuracy.isna().tolist() == [True, False] * 4
    last = data.iloc[-1]
    assert (last.slope, last.reward, last.accuracy, last.abs_log_weight) == (0.5, 0.25, 0.75, 0.1)
    assert pd.isna(last.clipped)

    lines = staleness.means_table(results.suite, data).splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    titles = ["SSPO", "SSPO", "GSPO, clip 0.03", "SAPO"]
    assert [row[:2] for row in rows] == [[every, title] for every, title in zip("1444", titles, strict=True)]
    assert rows[1][2:5] == ["4.500", "0.750", "0.250"]

    figures = []
    monkeypatch.setattr(style, "save", lambda figure, path: figures.append(figure) or path)
    staleness.draw(results.suite, data, tmp_path / "x.svg")
    # SAPO, which logs neither slope nor clipped tokens, is named where it is missing.
    assert [text.get_text() for text in figures[0].axes[1].texts] == ["not logged: SAPO"]
    labels = {text.get_text() for text in figures[0].legends[0].get_texts()}
    assert labels == {*titles, "one step"}


def test_the_report_has_the_section(root, tmp_path):
    write_run(root, "sapo", 4, [(0, 0), (1, 1)], pg_clipfrac=0.0)
    heading, *_ = staleness.sections(read_results(root), tmp_path / "report")
    assert heading == "## Over the lag of the rollout"
    assert len(pd.read_csv(tmp_path / "report" / "staleness.csv")) == 2
    assert (tmp_path / "report" / "pictures" / "staleness.svg").exists()


def test_a_run_that_was_not_asynchronous_is_refused(root):
    write_run(root, "sapo", 4, None, pg_clipfrac=0.0)
    with pytest.raises(KeyError, match="trajectory_staleness"):
        staleness.over_lag(read_results(root))
