"""Reports: statistics compared with values computed by hand, and reports of runs in any state."""

import itertools
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from filelock import FileLock

from verl_sspo.experiments import cell as cells
from verl_sspo.experiments import figures, report, suite_report
from verl_sspo.experiments.results import read_metrics, read_results
from verl_sspo.experiments.suite import Measure
from verl_sspo.experiments.tables import differences_table, measured_table
from verl_sspo.report import style
from verl_sspo.report.statistics import paired_differences, simulated_coverage, simultaneous_level
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
    plan = place | {"versions": [{"verl": "0.9.1", "commit": None}]}
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


def test_paired_differences_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t of 2 degrees of freedom 4.303 at 95 %."""
    table = paired_differences(pd.DataFrame({"a": [1.0, 2.0, 3.0, np.nan]}))
    row = table.loc["a"]
    assert (row["seeds"], row["ahead"], row["mean"]) == (3, 3, 2.0)
    assert row["low"] == pytest.approx(2 - 4.30265 / math.sqrt(3), rel=1e-5)
    assert row["high"] == pytest.approx(2 + 4.30265 / math.sqrt(3), rel=1e-5)
    # A family of one needs no correction.
    assert (row["low_all"], row["high_all"], row["p_all"]) == (row["low"], row["high"], row["p"])
    # Two of the 8 sign patterns are as extreme.
    assert row["p_sign"] == pytest.approx(2 / 8)


def test_five_seeds_cannot_reach_five_percent_by_their_signs():
    rng = np.random.default_rng(0)
    assert paired_differences(pd.DataFrame({"a": 1 + rng.random(5)})).loc["a", "p_sign"] == pytest.approx(1 / 16)
    mixed = paired_differences(pd.DataFrame({"a": [-1.0, 2.0, 3.0, 4.0, 5.0]})).loc["a"]
    # Sums of at least 13 in size: 15 and 13, in both tails.
    assert mixed["p_sign"] == pytest.approx(4 / 32)
    assert mixed["ahead"] == 4


def test_a_family_is_corrected_by_bonferroni_and_holm():
    rng = np.random.default_rng(1)
    raw = pd.DataFrame(rng.normal(0.5, 1.0, (5, 4)), columns=list("abcd"))
    table = paired_differences(raw.assign(e=[1.0] + [np.nan] * 4, f=np.nan))
    assert list(table.index) == ["a", "b", "c", "d", "e"]
    for name in "abcd":
        low, high = scipy.stats.ttest_1samp(raw[name], 0).confidence_interval(1 - 0.05 / 4)
        assert table.loc[name, ["low_all", "high_all"]].tolist() == pytest.approx([low, high])
    ordered = table["p"].dropna().sort_values()
    holm = np.maximum.accumulate(ordered.to_numpy() * [4, 3, 2, 1]).clip(max=1)
    assert table.loc[ordered.index, "p_all"].tolist() == pytest.approx(holm.tolist())
    # One pair has a mean and nothing else.
    assert table.loc["e"].isna().tolist() == [False] * 3 + [True] * 7


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_simulated_coverage_of_t_intervals(seeds):
    """Normal differences: the nominal level. The others: numbers from another implementation with other draws."""
    covered = simulated_coverage(seeds, 0.95)
    assert covered["normal"] == pytest.approx(0.95, abs=0.005)
    known = {3: (0.884, 0.774), 5: (0.883, 0.937), 10: (0.901, 0.944)}[seeds]
    assert (covered["skewed"], covered["bimodal"]) == pytest.approx(known, abs=0.008)
    level = simultaneous_level(16)
    family = simulated_coverage(seeds, level)
    assert family["normal"] == pytest.approx(level, abs=0.002)
    assert all(family[kind] > covered[kind] for kind in covered)


def test_an_attempt_replaces_the_steps_from_where_it_resumed(root):
    folder = write_run(root, "grpo", 0, [0.1, 0.2, 0.3, 0.4], finished=False)
    write_run(root, "grpo", 0, [0.35, 0.45], attempt=2, first=2)
    (folder / "attempt-1" / launch.METRICS).open("a").write('{"step": 4, "da')
    (folder / "attempt-3").mkdir()
    steps = read_metrics(folder)
    assert steps[ACCURACY].to_dict() == {0: 0.1, 1: 0.2, 2: 0.35, 3: 0.45}


def test_values_of_a_run(root):
    folder = write_run(root, "grpo", 0, [0.1, 0.2, 0.4])
    (folder / cells.EVALUATION).mkdir()
    (folder / cells.EVALUATION / "metrics.json").write_text('{"evaluation/a/greedy": 0.6, "evaluation/b/greedy": 0.8}')
    write_run(root, "grpo", 1, [0.9], finished=False)
    results = read_results(root)

    def value(*metrics, first=False, **options):
        table = results.values(Measure(list(metrics), **options), "lr1e-4", first)
        assert list(table.index) in ([0], [])
        return table["grpo"].get(0) if "grpo" in table else None

    assert value(ACCURACY) == 0.4
    assert value(ACCURACY, first=True) == 0.1
    assert value("critic/score/mean", summary="mean") == pytest.approx(0.2)
    assert value("critic/score/mean", summary="mean", first=True) is None
    assert value("evaluation/a/greedy", "evaluation/b/greedy") == pytest.approx(0.7)
    assert value("nothing") is None
    assert value(ACCURACY, "nothing") is None


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
    results = read_results(root)
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in measured_table(results, "lr1e-4").splitlines()
    }
    assert rows["GRPO"] == ["5", "52.0 (50.0 to 54.0)", "36.0 (35.0 to 37.0)", "0/5", "", ""]
    assert rows["SSPO"] == ["5", "51.2 (10.0 to 63.0)", "35.6 (15.0 to 41.5)", "1/5", "71.25", ""]
    assert rows["before training"] == ["5", "30.0 (30.0 to 30.0)", "", "", "9.5", ""]
    assert rows["Others"] == ["", "", "", "", "33", ""]
    assert "GSPO" not in rows
    # Differences 10, 10, 10, 10 and -44 points.
    line = next(line for line in differences_table(results, "lr1e-4").splitlines() if "final accuracy" in line)
    assert [cell.strip() for cell in line.split("|")][1:5] == ["final accuracy", "SSPO", "4 of 5", "-0.8"]
    assert "[-30.8, +29.2]" in line
    note = suite_report.differences_note(results, "lr1e-4")
    assert "for all 2 comparisons" in note
    assert "it cannot be below 1/16, so that no sign pattern alone is significant" in note
    assert "in 95 % of normal" in note


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
        source = suite_report.write_suite_report(root, output)
    text = source.read_text()
    assert text.index("What it does not show") < 1500
    assert "7 of 90 runs started: 4 finished" in text
    assert "1 running" in text
    assert "Failed: `lr1e-4/sapo/seed0`" in text
    assert "verl-sspo reproduce tiny" in text
    for picture in re.findall(r"\]\((pictures/\S+\.svg)\)", text):
        assert (output / picture).exists()
        assert (output / picture).with_suffix(".pdf").exists()
    assert len(re.findall(r"!\[", text)) == 2
    table = pd.read_csv(output / "runs.csv")
    assert table["state"].value_counts().to_dict() == {"finished": 4, "interrupted": 1, "failed": 1, "running": 1}
    curves = pd.read_csv(output / "curves.csv.gz")
    assert curves[curves["algorithm"] == "sspo"]["actor/sspo/slope"].notna().sum() == 4


def drawn(monkeypatch, draw, *arguments):
    """The figure that `draw` would save."""
    figures_ = []
    monkeypatch.setattr(style, "save", lambda figure, path: figures_.append(figure) or path)
    draw(*arguments)
    return figures_[0]


def test_a_single_validation_is_a_dot_per_seed_and_their_mean(root, tmp_path, monkeypatch):
    for seed in range(3):
        for algorithm in ("grpo", "sspo"):
            folder = write_run(root, algorithm, seed, [0.3, 0.5, 0.6 + seed / 10])
            path = folder / "attempt-1" / launch.METRICS
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            for each in lines[:-1]:
                each["data"].pop(ACCURACY)
            path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    arguments = (read_results(root), "lr1e-4", ["grpo", "sspo"], tmp_path / "x.svg")
    panel = drawn(monkeypatch, figures.draw_curves, *arguments).axes[0]
    dots = [(list(line.get_xdata()), list(line.get_ydata())) for line in panel.get_lines() if len(line.get_xdata())]
    seeds = pytest.approx([0.6, 0.7, 0.8])
    assert dots == [([i] * n, y) for i in (0, 1) for n, y in ((3, seeds), (1, pytest.approx([0.7])))]
    assert panel.get_xlabel() == "after step 2"


def test_the_accuracy_of_several_data_sets_is_drawn_as_their_mean(root, tmp_path, monkeypatch):
    for seed in range(2):
        folder = write_run(root, "grpo", seed, [0.3, 0.5, 0.6])
        path = folder / "attempt-1" / launch.METRICS
        path.write_text(path.read_text().replace(f'"{ACCURACY}"', f'"val-core/other/acc/mean@1": 0.1, "{ACCURACY}"'))
    results = read_results(root)
    results.suite.measures["final accuracy"].metrics.append("val-core/other/acc/mean@1")
    panel = drawn(monkeypatch, figures.draw_curves, results, "lr1e-4", ["grpo"], tmp_path / "x.svg").axes[0]
    assert list(panel.get_lines()[0].get_ydata()) == pytest.approx([0.2, 0.3, 0.35])


def test_a_gradient_of_zero_draws_no_block_on_the_logarithmic_axis(root, tmp_path, monkeypatch):
    for seed in range(2):
        folder = write_run(root, "grpo", seed, [0.3, 0.5, 0.6])
        path = folder / "attempt-1" / launch.METRICS
        path.write_text(path.read_text().replace('"actor/grad_norm": 2.0', f'"actor/grad_norm": {2.0 * seed}'))
    figure = drawn(monkeypatch, figures.draw_curves, read_results(root), "lr1e-4", ["grpo"], tmp_path / "x.svg")
    panel = next(each for each in figure.axes if each.get_title(loc="left") == "gradient norm")
    assert panel.get_yscale() == "log"
    assert not panel.collections
    assert list(panel.get_lines()[0].get_ydata()) == [1.0, 3.0]


def test_differences_are_drawn_pair_by_pair(root, tmp_path, monkeypatch):
    assert differences_table(read_results(root), "lr1e-4") == ""
    for seed, (grpo, sspo) in enumerate([(0.2, 0.5), (0.8, 0.7), (0.4, None)]):
        write_run(root, "grpo", seed, [0.3, grpo])
        if sspo is not None:
            write_run(root, "sspo", seed, [0.3, sspo])
    figure = drawn(monkeypatch, figures.draw_differences, read_results(root), "lr1e-4", tmp_path / "x.svg")
    accuracy, reward = figure.axes
    assert [label.get_text() for label in accuracy.get_yticklabels()] == ["SSPO"]
    for panel in (accuracy, reward):
        # The line at 0, a dot for each common seed, and their mean.
        zero, dots, mean = panel.get_lines()
        assert list(zero.get_xdata()) == [0, 0]
        assert sorted(dots.get_xdata()) == [pytest.approx(-10), pytest.approx(30)]
        assert list(mean.get_xdata()) == [pytest.approx(10)]
    # The legend explains every mark.
    assert len(figure.legends[0].get_texts()) == 4


def test_many_algorithms_are_spread_over_pictures_of_nine_at_most():
    algorithms = [f"a{i}" for i in range(20)]
    # 19 besides the baseline: split into 7, 6 and 6 rather than 8, 8 and 3.
    baseline, *others = algorithms
    expected = [[baseline, *others[:7]], [baseline, *others[7:13]], [baseline, *others[13:]]]
    assert suite_report.grouped(algorithms, baseline) == expected
    assert suite_report.grouped(["a"], "a") == [["a"]]
    assert suite_report.grouped(["b"], "a") == [["b"]]


def test_printed_commands_can_be_pasted(tmp_path, monkeypatch):
    root = tmp_path / "my runs" / "tiny"
    root.mkdir(parents=True)
    (root / "suite.yaml").write_text(TINY.read_text())
    write_run(root, "grpo", 0, [0.3, 0.5])
    monkeypatch.chdir(tmp_path)
    lines = suite_report.commands(root, read_results(root)).splitlines()
    assert [shlex.split(line) for line in lines] == [
        ["verl-sspo", "reproduce", "tiny", "--output", "my runs/tiny"],
        ["verl-sspo", "report", "my runs/tiny", "--output", "my runs/tiny/report"],
    ]


def test_the_output_is_checked_before_anything_is_computed(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(suite_report, "write_suite_report", lambda *_: pytest.fail("computed"))
    with pytest.raises(SystemExit):
        report.main(["runs", "--output", str(tmp_path / "file" / "report")])
    assert f"{tmp_path / 'file'} is not a folder to write to" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    program = "import sys; from verl_sspo.experiments import evaluate, report, reproduce\n"
    program += "for c in evaluate, report, reproduce:\n  try: c.main(['--help'])\n  except SystemExit: pass\n"
    program += "sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: verl-sspo") == 3


def test_no_runs_no_report(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no runs of a suite"):
        suite_report.write_suite_report(tmp_path, tmp_path / "report")


def test_curves_are_told_apart_by_colour_and_dashes():
    looks = [style.line(i) for i in range(len(style.COLOURS))]
    assert len({look["color"] for look in looks}) == len(looks) == 10
    # Neighbours also differ in dashes, for print without colour.
    assert all(one["dashes"] != other["dashes"] for one, other in itertools.pairwise(looks))
