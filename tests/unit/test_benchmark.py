"""The benchmark runs on tiny sizes, and its ratios and counts are right. No test limits how long anything takes."""

import json
import time
from importlib.metadata import version
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import verl_sspo.benchmark.command as command
from verl_sspo.benchmark import advantages, losses, measure, rollout, sandbox, startup, step
from verl_sspo.rewards.sandbox import SandboxError

CPU = torch.device("cpu")


def test_every_call_is_timed_in_every_round():
    counts = dict.fromkeys("ab", 0)

    def call(name, seconds):
        counts[name] += 1
        time.sleep(seconds)

    table = measure.side_by_side({"a": lambda: call("a", 0), "b": lambda: call("b", 0.02)}, seconds=0)
    assert counts["a"] == counts["b"] >= measure.LEAST_ROUNDS
    assert list(table.index) == ["a", "b"]
    assert table.loc["b", "ms"] >= 20
    assert (table["q1"] <= table["ms"]).all()
    assert (table["ms"] <= table["q3"]).all()


def test_peak_memory_is_what_was_there_at_a_time():
    def call():
        a = torch.zeros(4 * 2**18)  # 4 MiB
        b = torch.zeros(2 * 2**18)
        del a
        return b, torch.zeros(3 * 2**18)

    assert measure.peak_bytes(call, CPU) / 2**20 == pytest.approx(6, rel=0.01)
    assert measure.peak_bytes(lambda: None, CPU) == 0


def test_saved_memory_counts_a_storage_once_and_no_input():
    x = torch.rand(256, requires_grad=True)
    y = torch.rand(256)
    assert measure.saved_bytes(lambda: x * y, [x, y]) == 0
    assert measure.saved_bytes(lambda: x.exp(), [x]) == 1024

    def twice():
        z = x.exp()
        return z * z

    assert measure.saved_bytes(twice, [x]) == 1024


def test_losses_are_compared_with_each_other(monkeypatch):
    names = [*losses.VERL_LOSSES, "sspo arctan log"]
    some = {name: config for name, config in losses.contestants().items() if name in names}
    monkeypatch.setattr(losses, "contestants", lambda: some)
    (section,) = losses.measure([(3, 64)], CPU, seconds=0)
    table = section.table
    assert list(table.index) == [*names, losses.FLOOR]
    fastest = min(losses.VERL_LOSSES, key=lambda name: table.loc[name, "ms"])
    assert f"fastest loss, {fastest}." in section.note
    ours = table.loc["sspo arctan log"]
    assert ours["/ fastest"] == pytest.approx(ours["ms"] / table.loc[fastest, "ms"])
    assert ours["/ copy"] == pytest.approx(ours["ms"] / table.loc[losses.FLOOR, "ms"])
    assert ours["peak / gspo"] == pytest.approx(ours["peak"] / table.loc["gspo", "peak"])
    assert ours["saved"] < table.loc["gspo", "saved"]
    assert table[["/ fastest", "/ gspo", "/ geo_mean"]].notna().all(axis=None)


def test_every_loss_has_a_gradient_on_the_benchmarks_batch():
    batch = losses.random_batch(3, 8, CPU)
    for name, config in losses.contestants().items():
        gradient = losses.gradient(config, batch)[batch[3]]
        assert gradient.isfinite().all(), name
        assert gradient.abs().sum() > 0, name


def test_estimators_agree_on_the_benchmarks_inputs():
    arguments = advantages.inputs(32, 12)
    results = {name: advantages.get_adv_estimator_fn(name)(**arguments)[0] for name in advantages.ESTIMATORS}
    assert results["sspo"].abs().sum() > 0
    for other in ("grpo", "grpo_vectorized"):
        torch.testing.assert_close(results["sspo"], results[other], rtol=1e-4, atol=1e-5)
    (section,) = advantages.measure([16], tokens=4, seconds=0)
    assert section.table.loc["sspo", "/ sspo"] == 1
    assert section.table.loc["grpo", "ns per token"] == pytest.approx(1e6 * section.table.loc["grpo", "ms"] / 64)


def test_rollout_counts_only_what_was_drawn():
    (section,) = rollout.measure(requests=3, limits=(2,), seconds=0)
    ours, generate = section.table.loc["cpu"], section.table.loc["generate"]
    assert 2.99 <= ours["tokens/s"] * ours["ms"] / 1e3 <= 6.01
    assert ours["/ generate"] == pytest.approx(ours["tokens/s"] / generate["tokens/s"])

    drawn = torch.tensor([[5, 9, 0, 0], [5, 6, 7, 8], [9, 0, 0, 0]])  # 9 ends a response, 0 pads

    def pretend(input_ids, attention_mask, generation_config):
        assert attention_mask.tolist() == [[0, 1], [1, 1], [0, 1]]
        return torch.cat([input_ids, drawn], dim=1)

    model = SimpleNamespace(generate=pretend)
    assert rollout.generate(model, [[1], [1, 2], [3]], max_new_tokens=4, eos=9, pad=0)() == 2 + 4 + 1


def test_graders_of_programs_agree_with_the_truth():
    tasks = sandbox.tasks_of(len(sandbox.PROGRAMS))
    assert [right for _, _, right in tasks].count(False) == 1
    sandbox.grade_all(sandbox.unsandboxed, tasks, workers=1)
    try:
        sandbox.grade_all(sandbox.sandboxed, tasks, workers=2)
    except SandboxError as error:
        pytest.skip(str(error))


def test_a_wrong_grade_stops_the_measurement():
    with pytest.raises(RuntimeError, match="wrongly"):
        sandbox.grade_all(lambda response, tests: True, sandbox.tasks_of(3), workers=1)


def test_a_sandbox_that_cannot_run_is_not_measured(monkeypatch):
    def refuse(*arguments, **options):
        raise SandboxError("no bubblewrap")

    monkeypatch.setattr(sandbox.code, "score", refuse)
    (section,) = sandbox.measure(3, seconds=0)
    assert section.as_markdown() == "## Grading programs\n\nNot measured: no bubblewrap"


def metrics_file(path):
    def timing(**parts):
        return {f"timing_s/{name.replace('__', '/')}": value for name, value in parts.items()}

    steps = [
        {"val-core/x": 0.1},
        timing(gen=50.0, update_actor=9.0, step=60.0),
        timing(gen=1.0, agent_loop__slowest=0.9, update_actor=2.0, step=4.0),
        timing(gen=1.0, update_actor=2.0, testing=30.0, step=34.0),
        timing(gen=2.0, update_actor=3.0, step=6.0),
    ]
    path.write_text("".join(json.dumps({"step": i, "data": data}) + "\n" for i, data in enumerate(steps)))
    return path


def test_parts_of_a_step(tmp_path):
    (section,) = step.measure(metrics_file(tmp_path / "metrics.jsonl"))
    assert section.table["seconds"].to_dict() == {"step": 5.0, "update_actor": 2.5, "gen": 1.5, "rest": 1.0}
    assert section.table["fraction of the step"].tolist() == [1.0, 0.5, 0.3, 0.2]
    assert "over 2 steps" in section.note


def test_the_import_of_verl_and_of_the_plugin_are_told_apart(monkeypatch):
    output = iter(["a warning\n4.0 0.1\n", "6.0 0.3\n", "5.0 0.2\n"])
    monkeypatch.setattr(startup.subprocess, "check_output", lambda *command, **options: next(output))
    (section,) = startup.measure(3)
    assert section.table["seconds"].to_dict() == {"verl": 5.0, "plugin": 0.2}
    assert section.table.loc["plugin", "/ verl"] == pytest.approx(0.04)


def test_the_report_is_printed_and_written(tmp_path, monkeypatch, capsys):
    table = pd.DataFrame({"ms": [1.23456, 2.0]}, index=["a", "b"])
    monkeypatch.setattr(command.losses, "measure", lambda *arguments: [measure.Section("Title", "Note.", table)])
    output = tmp_path / "new" / "folder"
    arguments = ["--only", "losses", "step", "--quickstart-metrics", str(metrics_file(tmp_path / "m")), "--quick"]
    assert command.main([*arguments, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() in (output / "results.md").read_text()
    assert "## Title\n\nNote.\n\n|" in printed
    assert "1.23 |" in printed
    assert "update_actor" in printed
    assert version("torch") in printed
    assert f"`verl-sspo benchmark {' '.join(arguments)}" in printed


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--only", "loss"], "choose from"),
        (["--device", "cuda"], "finds no CUDA device"),
        (["--output", "{file}"], "is not a folder to write to"),
        (["--output", "{file}/below"], "is not a folder to write to"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys, arguments, reason):
    monkeypatch.setattr(command, "measure", lambda *arguments: pytest.fail("measured"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        command.main([each.format(file=tmp_path / "file") for each in arguments])
    assert reason in capsys.readouterr().err
