import io
import json
import math

import pytest
from matplotlib import image
from rich.console import Console

from verl_sspo.report.curves import draw
from verl_sspo.report.summary import accuracy, read_attempts, read_metrics, summarize, table

ACCURACY = "val-core/arithmetic/acc/mean@1"


def write(path, entries):
    path.write_text("".join(json.dumps({"step": step, "data": data}) + "\n" for step, data in entries))
    return path


def step(reward, entropy, slope, seconds, **more):
    data = {"critic/score/mean": reward, "actor/entropy": entropy, "timing_s/step": seconds, **more}
    return data if slope is None else data | {"actor/sspo/slope": slope}


@pytest.fixture
def run(tmp_path):
    entries = [
        (0, {ACCURACY: 0.25, "val-aux/arithmetic/acc/std@1": 9.0}),
        (1, step(0.3, 0.2, 0.9, 5.0)),
        (2, step(0.4, 0.18, 0.8, 1.0, **{ACCURACY: 0.5})),
        (3, step(0.6, 0.15, 1.0, 1.5, **{ACCURACY: 0.625})),
    ]
    return write(tmp_path / "metrics.jsonl", entries)


def test_summary_by_hand(run):
    assert summarize(read_metrics(run), seconds=100.0) == {
        "accuracy_before": 0.25,
        "accuracy_after": 0.625,
        "entropy_before": 0.2,
        "entropy_after": 0.15,
        "effective_update_ratio": pytest.approx(0.9),
        "steps": 3,
        "seconds_per_step": 1.5,
        "seconds": 100.0,
    }


def test_starts_that_resume_are_one_run(tmp_path):
    def start(name, entries):
        (tmp_path / name).mkdir()
        if entries is not None:
            write(tmp_path / name / "metrics.jsonl", entries)
        return tmp_path / name

    folders = [
        start("a", [(0, {ACCURACY: 0.25}), *((i, {"critic/score/mean": i / 10}) for i in (1, 2, 3, 4))]),
        # Killed during start-up.
        start("b", None),
        start("c", []),
        # Resumed from step 2, with a validation first; step 4 of the first start is no longer part of the run.
        start("d", [(2, {ACCURACY: 0.5}), (3, {"critic/score/mean": 0.9})]),
        start("e", [(4, {"critic/score/mean": 0.7})]),
    ]
    metrics = read_attempts(folders)
    assert metrics["critic/score/mean"].dropna().to_dict() == {1: 0.1, 2: 0.2, 3: 0.9, 4: 0.7}
    assert metrics[ACCURACY].dropna().to_dict() == {0: 0.25, 2: 0.5}
    assert 4 not in read_attempts(folders[:4]).index


def test_other_losses_have_no_effective_update_ratio(tmp_path):
    entries = [(0, {ACCURACY: 0.25}), (1, step(0.3, 0.2, None, 1.0, **{ACCURACY: 0.25}))]
    metrics = read_metrics(write(tmp_path / "m.jsonl", entries))
    summary = summarize(metrics, 1.0)
    assert summary["effective_update_ratio"] is None
    draw(metrics, tmp_path / "curves.png", "GRPO", "caption")


def test_a_run_without_validation_has_no_accuracy(tmp_path):
    metrics = read_metrics(write(tmp_path / "m.jsonl", [(1, step(0.3, 0.2, 1.0, 1.0))]))
    summary = summarize(metrics, 1.0)
    assert (summary["accuracy_before"], summary["accuracy_after"]) == (None, None)
    assert summary["steps"] == 1
    assert draw(metrics, tmp_path / "curves.png", "title", "caption").exists()


def test_mean_accuracy_is_taken_where_validation_samples_several_times(tmp_path):
    names = ["best@4/mean", "maj@4/mean", "mean@4"]
    entries = [(0, {f"val-core/arithmetic/acc/{name}": i / 4 for i, name in enumerate(names)})]
    metrics = read_metrics(write(tmp_path / "m.jsonl", entries))
    assert accuracy(metrics).to_dict() == {0: 0.5}


def test_accuracy_of_several_data_sources_is_their_mean(tmp_path):
    entries = [(0, {f"val-core/{source}/acc/mean@1": value for source, value in (("a", 0.2), ("b", 0.6), ("c", None))})]
    metrics = read_metrics(write(tmp_path / "m.jsonl", entries))
    assert accuracy(metrics).to_dict() == {0: pytest.approx(0.4)}


def test_values_that_are_not_numbers_are_left_out(tmp_path):
    path = write(
        tmp_path / "m.jsonl", [(1, {"x": 1.0}), (2, {"x": None}), (3, {"x": math.nan}), (4, {"y": 2.0, "z": "text"})]
    )
    assert read_metrics(path)["x"].dropna().to_dict() == {1: 1.0}


def test_line_that_is_being_written_is_left_out(run):
    whole = read_metrics(run)
    with run.open("a") as file:
        file.write('{"step": 4, "da')
    assert read_metrics(run).equals(whole)


def test_runs_that_cannot_be_summarized(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    validated = write(tmp_path / "m.jsonl", [(0, {ACCURACY: 0.1})])
    for path in (tmp_path / "absent.jsonl", tmp_path / "empty.jsonl", validated):
        with pytest.raises(ValueError, match="no training step"):
            summarize(read_metrics(path), 1.0)


def test_table_shows_the_figures(run):
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(table(summarize(read_metrics(run), seconds=100.0), "Quickstart"))
    text = console.export_text()
    for figure in ("0.250 → 0.625", "0.200 → 0.150", "0.900", "1.50", "100"):
        assert figure in text


def test_picture_is_drawn(run, tmp_path):
    picture = draw(read_metrics(run), tmp_path / "new" / "curves.png", "title", "caption")
    pixels = image.imread(picture)
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 1200
    # Not blank: the curves' blue is there.
    assert ((abs(pixels[..., 0] - 0) < 0.02) & (abs(pixels[..., 2] - 0xB2 / 255) < 0.02)).sum() > 100
