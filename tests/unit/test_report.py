"""Reports: statistics against hand-computed values, reports of runs in any state, and the page in a browser."""

import itertools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from filelock import FileLock

from verl_sspo.experiments import cell as cells
from verl_sspo.experiments import paired_plot, suite_report, tables, training_curves
from verl_sspo.experiments import runs as runs_
from verl_sspo.experiments.suite import Measure, load_suite
from verl_sspo.report import statistics, style
from verl_sspo.run import launch

TINY = Path(__file__).parents[2] / "recipes" / "suites" / "tiny.yaml"
ACCURACY = "val-core/arithmetic/acc/mean@1"


def write_run(root, algorithm, seed, accuracies, *, finished=True, variant="lr1e-4", attempt=1, first=0, sspo=False):
    folder = root / variant / algorithm / f"seed{seed}"
    attempt_folder = folder / f"attempt-{attempt}"
    attempt_folder.mkdir(parents=True)
    lines = []
    for step, accuracy in enumerate(accuracies, first):
        data = {ACCURACY: accuracy}
        if step > 0:
            data |= {"critic/score/mean": accuracy - 0.1, "actor/entropy": 0.5 / step, "actor/grad_norm": 1.0 + step}
        if step > 0 and sspo:
            data |= {"actor/sspo/slope": 1 - step / 20, "actor/sspo/abs_log_weight": 0.01 * step}
        lines.append(json.dumps({"step": step, "data": data}) + "\n")
    (attempt_folder / launch.METRICS).write_text("".join(lines))
    place = {"suite": "tiny", "variant": variant, "algorithm": algorithm, "seed": seed}
    plan = place | {"ran_with": {"verl": "0.9.1", "commit": None}}
    (folder / cells.PLAN).write_text(json.dumps(plan))
    if finished:
        (folder / cells.RESULT).write_text("{}")
    return folder


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "tiny"
    root.mkdir()
    (root / "suite.yaml").write_text(TINY.read_text())
    return root


def test_interquartile_mean_by_hand():
    values = [0.0, 1.0, 2.0, 3.0, 100.0]
    estimate = statistics.interquartile_mean(values)
    assert estimate.value == 2.0
    assert estimate.low < 2.0 < estimate.high
    assert statistics.interquartile_mean([1.0, 3.0]).value == 2.0
    assert statistics.interquartile_mean([math.nan]) is None
    alone = statistics.interquartile_mean([0.7])
    assert (alone.value, alone.low, alone.high) == (0.7, None, None)
    assert alone.text() == "0.700"
    constant = statistics.interquartile_mean([0.5, 0.5, 0.5])
    assert (constant.low, constant.high) == (0.5, 0.5)


def test_intervals_cover_as_often_as_they_say():
    """Percentile bootstrap of 20 normal values: about 93 % of 95 % intervals hold the true mean."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        estimate = statistics.mean(rng.normal(3.0, 1.0, 20).tolist())
        covered += estimate.low <= 3.0 <= estimate.high
    assert 50 <= covered <= 60


def test_paired_differences_take_common_seeds_alone():
    estimate = statistics.paired_difference({0: 0.5, 1: 0.8, 2: 9.0}, {0: 0.4, 1: 0.6, 3: 0.0})
    assert estimate.value == pytest.approx(0.15)
    assert (estimate.low, estimate.high) == (pytest.approx(0.1), pytest.approx(0.2))
    assert estimate.text(100, 1, signed=True) == "+15.0 [+10.0, +20.0]"
    assert statistics.paired_difference({0: 1.0}, {1: 1.0}) is None


def test_an_attempt_replaces_the_steps_from_where_it_resumed(root):
    folder = write_run(root, "grpo", 0, [0.1, 0.2, 0.3, 0.4], finished=False)
    write_run(root, "grpo", 0, [0.35, 0.45], attempt=2, first=2)
    (folder / "attempt-1" / launch.METRICS).open("a").write('{"step": 4, "da')
    (folder / "attempt-3").mkdir()
    metrics = runs_.read_metrics(folder)
    assert metrics.series(ACCURACY) == ([0, 1, 2, 3], [0.1, 0.2, 0.35, 0.45])


def test_values_of_a_run(root):
    folder = write_run(root, "grpo", 0, [0.1, 0.2, 0.4])
    (folder / cells.EVALUATION).mkdir()
    (folder / cells.EVALUATION / "metrics.json").write_text('{"evaluation/a/greedy": 0.6, "evaluation/b/greedy": 0.8}')
    (run,) = runs_.read_runs(root)
    assert run.value(Measure([ACCURACY])) == 0.4
    assert run.value(Measure([ACCURACY]), first=True) == 0.1
    assert run.value(Measure(["critic/score/mean"], summary="mean")) == pytest.approx(0.2)
    assert run.value(Measure(["critic/score/mean"], summary="mean"), first=True) is None
    assert run.value(Measure(["evaluation/a/greedy", "evaluation/b/greedy"])) == pytest.approx(0.7)
    assert run.value(Measure(["nothing"])) is None


def test_the_table_has_measured_paired_and_published_figures(root):
    text = TINY.read_text() + (
        "\npublished:\n  - source: a paper, Table 1\n    status: restated\n    rows: {other: Others}\n"
        "    values:\n      untrained: {final accuracy: 9.5}\n      sspo: {final accuracy: 71.25}\n"
        "      other: {final accuracy: 33}\n"
    )
    (root / "suite.yaml").write_text(text)
    for seed in range(5):
        write_run(root, "grpo", seed, [0.3, 0.4, 0.5 + seed / 100])
        write_run(root, "sspo", seed, [0.3, 0.4, 0.1 if seed == 4 else 0.6 + seed / 100])
    write_run(root, "gspo", 0, [0.3, 0.9], finished=False)
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in tables.results(load_suite(root / "suite.yaml"), runs_.read_runs(root), "lr1e-4").splitlines()
    }
    assert rows["GRPO"][0] == "5"
    assert rows["GRPO"][1].startswith("52.0 [")
    assert rows["GRPO"][-3:-1] == ["0/5", ""]
    assert rows["SSPO"][1].startswith("61.0 [")
    # Mean of 10, 10, 10, 10 and -44 points.
    assert rows["SSPO"][3].startswith("-0.8 [")
    assert rows["SSPO"][5:] == ["1/5", "71.25", ""]
    assert rows["before training"][1] == "30.0 [30.0, 30.0]"
    assert rows["before training"][-2] == "9.5"
    assert rows["Others"] == ["", "", "", "", "", "", "33", ""]
    assert "GSPO" not in rows


def test_a_report_of_unfinished_runs_with_gaps(root, tmp_path):
    for seed in range(2):
        write_run(root, "grpo", seed, [0.3, 0.5, 0.6])
        write_run(root, "sspo", seed, [0.3, 0.6, 0.7], sspo=True)
    write_run(root, "gspo", 0, [0.3], finished=False)
    failed = write_run(root, "sapo", 0, [], finished=False)
    (failed / cells.FAILURE).write_text('{"error": "x"}')
    running = write_run(root, "gmpo", 1, [0.3, 0.2], finished=False)
    output = tmp_path / "report"
    with FileLock(running / cells.LOCK):
        source, page = suite_report.write_suite_report(root, output)
    text = source.read_text()
    assert text.index("What it does not show") < 1500
    assert "7 of 90 runs started: 4 finished" in text
    assert "1 running" in text
    assert "Failed: `lr1e-4/sapo/seed0`" in text
    assert "verl-sspo reproduce tiny" in text
    for picture in re.findall(r"\]\((pictures/\S+\.svg)\)", text):
        assert (output / picture).exists()
        assert (output / picture).with_suffix(".pdf").exists()
    html = page.read_text()
    # Self-contained: nothing is fetched.
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert html.count("<img") == len(re.findall(r"!\[", text)) == 4
    table = pd.read_csv(output / "runs.csv")
    assert table["state"].value_counts().to_dict() == {"finished": 4, "interrupted": 1, "failed": 1, "running": 1}
    curves = pd.read_csv(output / "curves.csv.gz")
    assert curves[curves["algorithm"] == "sspo"]["actor/sspo/slope"].notna().sum() == 4


def test_a_single_validation_is_a_dot_with_its_interval(root, tmp_path):
    suite = load_suite(root / "suite.yaml")
    for seed in range(3):
        for algorithm in ("grpo", "sspo"):
            folder = write_run(root, algorithm, seed, [0.3, 0.5, 0.6 + seed / 10])
            lines = [json.loads(line) for line in (folder / "attempt-1" / launch.METRICS).read_text().splitlines()]
            for each in lines[:-1]:
                each["data"].pop(ACCURACY)
            (folder / "attempt-1" / launch.METRICS).write_text("".join(json.dumps(each) + "\n" for each in lines))
    _, (panel, *_) = style.new_figure(1, 2, 3, 2)
    runs = runs_.read_runs(root)
    for index, algorithm in enumerate(("grpo", "sspo")):
        chosen = [run for run in runs if run.algorithm == algorithm]
        assert training_curves._draw_curve(panel, chosen, ACCURACY, index, algorithm)
    dots = [tuple(line.get_xydata()[0]) for line in panel.get_lines()]
    assert dots == [(0, pytest.approx(0.7)), (1, pytest.approx(0.7))]
    assert panel.get_xlabel().startswith("after step 2")
    assert training_curves.draw(suite, runs, "lr1e-4", ["grpo", "sspo"], tmp_path / "x.svg").exists()


def test_differences_are_drawn_pair_by_pair(root, tmp_path, monkeypatch):
    suite = load_suite(root / "suite.yaml")
    assert paired_plot.draw(suite, [], "lr1e-4", tmp_path / "x.svg") is None
    for seed, (grpo, sspo) in enumerate([(0.2, 0.5), (0.8, 0.7), (0.4, None)]):
        write_run(root, "grpo", seed, [0.3, grpo])
        if sspo is not None:
            write_run(root, "sspo", seed, [0.3, sspo])
    figures = []
    monkeypatch.setattr(style, "save", lambda figure, path: figures.append(figure) or path)
    assert paired_plot.draw(suite, runs_.read_runs(root), "lr1e-4", tmp_path / "x.svg")
    accuracy, reward = figures[0].axes
    assert [label.get_text() for label in accuracy.get_yticklabels()] == ["SSPO"]
    for panel in (accuracy, reward):
        # The line at 0, a dot for each common seed, and their mean.
        zero, dots, mean = panel.get_lines()
        assert list(zero.get_xdata()) == [0, 0]
        assert sorted(dots.get_xdata()) == [pytest.approx(-10), pytest.approx(30)]
        assert list(mean.get_xdata()) == [pytest.approx(10)]


def test_many_algorithms_are_shared_out_over_pictures(tmp_path, monkeypatch):
    drawn = []

    def draw(suite, runs, variant, algorithms, path):
        drawn.append(algorithms)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("<svg/>")
        return path

    monkeypatch.setattr(training_curves, "draw", draw)
    monkeypatch.setattr(paired_plot, "draw", lambda *_: None)
    monkeypatch.setattr(suite_report, "losses", lambda output: [])
    (tmp_path / "suite.yaml").write_text((TINY.parent / "gates.yaml").read_text())
    algorithms = list(load_suite(tmp_path / "suite.yaml").algorithms)
    assert len(algorithms) == 20
    for key in algorithms:
        write_run(tmp_path, key, 0, [0.4, 0.5], variant="default")
    report = suite_report.write_suite_report(tmp_path, tmp_path / "report")[0].read_text()
    # 19 beside the baseline: 7, 7 and 5 rather than 8, 8 and 3.
    baseline, *others = algorithms
    assert drawn == [[baseline, *others[:7]], [baseline, *others[7:14]], [baseline, *others[14:]]]
    assert ", default" not in report  # the only variant needs no name


def test_no_runs_no_report(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no runs of a suite"):
        suite_report.write_suite_report(tmp_path, tmp_path / "report")


def test_curves_are_told_apart_by_colour_and_dashes():
    looks = [style.line(i) for i in range(20)]
    assert len({(look["color"], look["dashes"]) for look in looks}) == 20
    # Neighbours differ in both, for print without colour.
    for one, other in itertools.pairwise(looks):
        assert one["color"] != other["color"]
        assert one["dashes"] != other["dashes"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium (Debian: apt-get install chromium)")
def test_the_page_shows_its_pictures_in_a_browser(root, tmp_path):
    for seed in range(2):
        write_run(root, "grpo", seed, [0.3, 0.5, 0.6])
        write_run(root, "sspo", seed, [0.3, 0.6, 0.7], sspo=True)
    _, page = suite_report.write_suite_report(root, tmp_path / "report")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,5000", "--hide-scrollbars"]
    shot = tmp_path / "page.png"
    subprocess.run(["chromium", *options, f"--screenshot={shot}", page.as_uri()], check=True, timeout=90)
    image = matplotlib.image.imread(shot)[..., :3]
    assert image.shape[:2] == (5000, 1200)
    # Colours of curves that only the embedded pictures have: text and tables are grey.
    for colour in ("#0072B2", "#D55E00"):
        wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert (np.abs(image - wanted).max(axis=-1) < 0.02).sum() > 500, colour
