"""The benchmark runs on tiny sizes, its ratios and counts are right, and its table says what its JSON says.

Nothing here asserts how long anything takes.
"""

import json
from types import SimpleNamespace

import pytest
import torch

import verl_sspo.benchmark.__main__ as benchmark_command
from verl_sspo.benchmark import advantages, bandwidth, losses, machine, rollout, sandbox, step
from verl_sspo.benchmark.host_reads import host_reads
from verl_sspo.benchmark.memory import peak_bytes, saved_bytes
from verl_sspo.benchmark.table import Aim, Column, NotMeasuredError, Section
from verl_sspo.benchmark.timing import LEAST_ROUNDS, MOST_ROUNDS, WARM_UP_CALLS, Spread, interleave
from verl_sspo.rewards.sandbox import SandboxError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def script():
    return benchmark_command


def spread(median):
    return Spread(median, median, median, 5)


def test_spread_is_median_and_quartiles():
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(median=3.0, q1=2.0, q3=4.0, rounds=5)
    assert Spread.of([1.0, 3.0]).median == 2.0


def test_calls_take_turns_and_none_is_always_first():
    order = []
    spreads = interleave({name: lambda name=name: order.append(name) for name in "abc"}, seconds=0)
    called = order[3 * WARM_UP_CALLS :]
    rounds = ["".join(called[i : i + 6]) for i in range(0, len(called), 6)]
    assert rounds == ["aabbcc", "bbccaa", "ccaabb", "aabbcc", "bbccaa"]
    assert {s.rounds for s in spreads.values()} == {LEAST_ROUNDS}


def test_rounds_are_limited():
    assert interleave({"nothing": lambda: None}, seconds=1)["nothing"].rounds == MOST_ROUNDS


def test_interleave_times_the_call_it_names_and_not_its_neighbour(monkeypatch):
    clock = SimpleNamespace(now=0.0, last=None)

    def spend(name, seconds):
        clock.now += seconds if clock.last == name else 10 * seconds
        clock.last = name

    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    calls = {"short": lambda: spend("short", 0.25), "long": lambda: spend("long", 1.75)}
    spreads = interleave(calls, seconds=240)
    assert spreads == {"short": Spread(0.25, 0.25, 0.25, 6), "long": Spread(1.75, 1.75, 1.75, 6)}


def test_peak_memory_is_what_was_there_at_a_time():
    kib = 256  # floats of a KiB

    def call():
        a = torch.zeros(4 * kib)
        b = torch.zeros(2 * kib)
        del a
        c = torch.zeros(3 * kib)
        return b, c

    assert peak_bytes(call, CPU) == 6 * 1024
    assert peak_bytes(lambda: None, CPU) == 0


def test_peak_memory_has_what_operators_and_the_backward_pass_allocate():
    x = torch.zeros(256, requires_grad=True)
    # exp's result, its sum and the sum's gradient, then the resulting gradient.
    assert peak_bytes(lambda: torch.autograd.grad(x.exp().sum(), x), CPU) == 2 * 1024 + 2 * 4


def test_saved_memory_counts_a_storage_once_and_no_input():
    x = torch.rand(256, requires_grad=True)
    y = torch.rand(256)
    assert saved_bytes(lambda: x * y, [x, y]) == 0
    assert saved_bytes(lambda: x.exp(), [x]) == 1024
    assert saved_bytes(lambda: (x.exp() * y)[:128].exp(), [x, y]) == 1024 + 512

    def twice():
        z = x.exp()
        return z * z

    assert saved_bytes(twice, [x]) == 1024


def test_host_reads_are_counted():
    x = torch.ones(3)
    assert host_reads(lambda: (x[0].item(), x.tolist(), bool(x[0] > 0), float(x.sum()), x.cpu(), x.nonzero()), CPU) == 6
    assert host_reads(lambda: x.exp().sum(), CPU) == 0


def test_the_copy_moves_the_bytes_of_a_loss():
    copied = bandwidth.copy_of_as_many(40, CPU)()
    assert 2 * copied.nbytes == 40 * 25
    assert copied.eq(1).all()


def test_every_loss_runs_as_verl_calls_it_and_sspo_reads_once():
    contestants = losses.contestants()
    assert len(contestants) == 5 + 8 + 7  # verl's; gates x domains; the same forward, without SAPO's own gate
    batch = losses.Batch.random(3, 8, CPU)
    batch.log_prob.requires_grad_()
    for name, config in contestants.items():
        forward = losses.bind(config, batch)
        (gradient,) = torch.autograd.grad(forward(), batch.log_prob)
        assert gradient[batch.response_mask].isfinite().all()
        assert gradient.abs().sum() > 0
        assert host_reads(forward, CPU) == (1 if name.startswith("sspo") else 3)


def test_ratios_of_losses():
    (section,) = losses.measure([(2, 16)], CPU, seconds=0)
    rows = {row["loss"]: row for row in section.rows}
    assert set(rows) == {*losses.contestants(), losses.COPY}
    fastest = min(losses.VERL_LOSSES, key=lambda name: rows[name]["ms"])
    assert f"verl's fastest is {fastest}." in section.note
    ours = rows[losses.DEFAULT]
    assert ours["to_fastest"] == pytest.approx(ours["ms"] / rows[fastest]["ms"])
    assert ours["to_gspo"] == pytest.approx(ours["ms"] / rows["gspo"]["ms"])
    assert ours["to_geo_mean"] == pytest.approx(ours["ms"] / rows["geo_mean"]["ms"])
    assert ours["to_copy"] == pytest.approx(ours["ms"] / rows[losses.COPY]["ms"])
    assert ours["peak_to_gspo"] == pytest.approx(ours["peak"] / rows["gspo"]["peak"])
    assert ours["saved"] <= 1.0  # the gradient and nothing else


def test_aims_of_losses_are_computed_for_the_default_and_the_worst_gate():
    keys = ("to_fastest", "to_gspo", "to_geo_mean", "saved", "peak_to_gspo", "to_copy")
    rows = [
        {"loss": "gspo"} | dict.fromkeys(keys, 9.0),
        {"loss": "sspo arctan log"} | dict.fromkeys(keys, 0.4),
        {"loss": "sspo erf ratio"} | dict.fromkeys(keys, 3.0),
    ]
    aims = losses.aims_of(rows, "sapo", CPU, beyond_cache=True)
    assert [aim.measured for aim in aims] == [0.4, 3.0] * 6
    assert [aim.met for aim in aims] == [True, False] * 5 + [True, True]  # within 4x of the copy
    assert "worst gate (erf ratio)" in aims[1].text
    assert len(losses.aims_of(rows, "sapo", CPU, beyond_cache=False)) == 10
    on_cuda = losses.aims_of(rows, "sapo", torch.device("cuda"), beyond_cache=True)
    assert not on_cuda[-1].met  # 3 times the copy is too slow there


def test_a_size_that_does_not_fit_is_said(monkeypatch):
    monkeypatch.setattr(machine, "available_bytes", lambda device: 0)
    (section,) = losses.measure([(2, 16)], CPU, seconds=0)
    assert "too little free memory" in section.note
    assert not section.rows


def test_estimators_agree_on_the_benchmark_inputs():
    arguments = advantages.inputs(32, 12)
    results = {name: advantages.get_adv_estimator_fn(name)(**arguments)[0] for name in advantages.ESTIMATORS}
    assert results["sspo"].abs().sum() > 0
    for other in ("grpo", "grpo_vectorized"):
        torch.testing.assert_close(results["sspo"], results[other], rtol=1e-4, atol=1e-5)


def test_ratios_and_aims_of_estimators():
    rows = []
    for responses, (sspo, grpo, vectorized) in {
        512: (1.0, 4.0, 0.5),
        8192: (2.0, 12.0, 4.0),
        16384: (4.0, 30.0, 6.0),
    }.items():
        spreads = {"sspo": spread(sspo), "grpo": spread(grpo), "grpo_vectorized": spread(vectorized)}
        rows += advantages.rows_of(responses, 10, spreads)
    assert [row["to_sspo"] for row in rows] == [1, 4, 0.5, 1, 6, 2, 1, 7.5, 1.5]
    assert rows[3]["ns_per_token"] == pytest.approx(2e9 / 81920)
    grpo, vectorized, exponent = advantages.aims_of(rows)
    assert (grpo.measured, grpo.met) == (6.0, True)
    assert (vectorized.measured, vectorized.met) == (0.5, False)
    assert "512 responses" in vectorized.text
    assert exponent.measured == pytest.approx(1.0)
    assert exponent.met


def test_estimators_run_with_shorter_responses_where_memory_demands(monkeypatch):
    monkeypatch.setattr(machine, "available_bytes", lambda device: 2 * 32 * 16 * 5)
    (section,) = advantages.measure([16], tokens=12, seconds=0)
    assert {row["tokens"] for row in section.rows} == {5}


def test_rollout_runs_and_counts_only_what_was_drawn():
    (section,) = rollout.measure(requests=3, limits=(2,), seconds=0)
    embedded, generate = section.rows
    assert 3 <= embedded["tokens"] <= 6
    assert embedded["tokens_per_second"] == pytest.approx(1e3 * embedded["tokens"] / embedded["ms"])
    assert embedded["to_generate"] == pytest.approx(embedded["tokens_per_second"] / generate["tokens_per_second"])
    assert section.aims[0].measured == embedded["to_generate"]

    drawn = torch.tensor([[5, 9, 0, 0], [5, 6, 7, 8], [9, 0, 0, 0]])  # 9 ends a response, 0 pads

    def pretend(input_ids, attention_mask, generation_config):
        assert attention_mask.tolist() == [[0, 1], [1, 1], [0, 1]]
        return torch.cat([input_ids, drawn], dim=1)

    model = SimpleNamespace(generate=pretend)
    assert rollout.generate(model, [[1], [1, 2], [3]], max_new_tokens=4, eos=9, pad=0)() == 2 + 4 + 1


def test_judges_of_programs_agree_with_the_truth():
    tasks = sandbox.tasks_of(len(sandbox.PROGRAMS))
    assert [right for _, _, right in tasks].count(False) == 1
    sandbox.judge_all(sandbox.unsandboxed, tasks, workers=1)
    try:
        sandbox.judge_all(sandbox.sandboxed, tasks, workers=2)
    except SandboxError as error:
        pytest.skip(str(error))


def test_a_wrong_verdict_stops_the_measurement():
    with pytest.raises(RuntimeError, match="misjudged"):
        sandbox.judge_all(lambda response, tests: True, sandbox.tasks_of(4), workers=1)


def test_ratios_of_judges():
    rows = sandbox.rows_of(10, 2, {"sandbox": spread(2.0), "prime_code": spread(5.0)})
    assert [row["programs_per_second"] for row in rows] == [5.0, 2.0]
    assert [row["to_prime_code"] for row in rows] == [2.5, 1.0]


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
    assert {row["part"]: row["seconds"] for row in section.rows} == {
        "step": 5.0,
        "update_actor": 2.5,
        "gen": 1.5,
        "rest": 1.0,
    }
    assert [row["share"] for row in section.rows] == [1.0, 0.5, 0.3, 0.2]
    assert {row["rounds"] for row in section.rows} == {2}


def test_a_step_without_a_run_says_what_to_do(tmp_path):
    with pytest.raises(NotMeasuredError, match=r"run scripts/quickstart\.py first"):
        step.measure(tmp_path / "metrics.jsonl")


def test_aims_are_met_up_to_their_limit():
    assert Aim("x", 1.0, 1.0).met
    assert not Aim("x", 1.01, 1.0).met
    assert Aim("x", 1.0, 1.0, at_least=True).met
    assert not Aim("x", 0.99, 1.0, at_least=True).met


def test_a_cell_without_a_value_is_a_dash():
    columns = (Column("a", "{a:.1f} to {b:.1f}"),)
    section = Section("T", "note", columns, [{"a": 1.0, "b": 2.0}, {"a": 1.0, "b": None}], [Aim("x", 0.5, 1.0)])
    cells = [line.split("|")[1].strip() for line in section.as_markdown().splitlines() if line.startswith("|")]
    assert cells == ["a", "----------", "1.0 to 2.0", "-", "Aim", "---", "x"]


def cells_of(markdown):
    """The tables of a Markdown text, each a list of rows without the rule below the heading."""
    tables = []
    inside = False
    for line in markdown.splitlines():
        if line.startswith("|"):
            if not inside:
                tables.append([])
            tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        inside = line.startswith("|")
    return [table[:1] + table[2:] for table in tables]


def test_script_writes_a_table_and_json_that_agree(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "SIZES", ((2, 16),))
    monkeypatch.setattr(losses, "VERL_LOSSES", ("gspo", "geo_mean"))
    measure = losses.measure
    monkeypatch.setattr(losses, "measure", lambda sizes, device, seconds: measure(sizes, device, seconds=0))
    metrics = metrics_file(tmp_path / "metrics.jsonl")
    arguments = ["--quick", "--only", "losses,step", "--device", "cpu", "--quickstart-metrics", str(metrics)]
    monkeypatch.setattr("sys.argv", ["benchmark.py", *arguments, "--output", str(tmp_path / "out")])
    assert script.main() == 0

    markdown = (tmp_path / "out/results.md").read_text()
    assert capsys.readouterr().out.strip() in markdown
    document = json.loads((tmp_path / "out/results.json").read_text())
    assert document["machine"]["torch"] == torch.__version__
    assert f"`{document['command']}`" in markdown
    described, loss_table, loss_aims, step_table = cells_of(markdown)
    assert dict(described[1:]) == {key: str(value) for key, value in document["machine"].items()}
    loss_section, step_section = document["sections"]
    assert len(loss_table) - 1 == len(loss_section["rows"]) == 2 + 15 + 1
    for cells, row in zip(loss_table[1:], loss_section["rows"], strict=True):
        shown = dict(zip(loss_table[0], cells, strict=True))
        assert shown["loss"] == row["loss"]
        assert float(shown["ms"]) == pytest.approx(row["ms"], abs=5e-4)
        assert float(shown["/ gspo"]) == pytest.approx(row["ms"] / loss_section["rows"][0]["ms"], abs=5e-3)
    for cells, aim in zip(loss_aims[1:], loss_section["aims"], strict=True):
        assert cells[0] == aim["text"]
        assert float(cells[1]) == pytest.approx(aim["measured"], abs=5e-3)
        assert aim["met"] is (aim["measured"] <= aim["limit"])
        assert cells[3] == ("met" if aim["met"] else "**not met**")
    assert [cells[0] for cells in step_table[1:]] == [row["part"] for row in step_section["rows"]]
    assert [float(cells[1]) for cells in step_table[1:]] == [row["seconds"] for row in step_section["rows"]]


def test_script_says_what_it_could_not_measure(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--only", "step", "--quickstart-metrics", str(tmp_path / "none")])
    assert script.main() == 1
    assert "Not measured: there is no" in capsys.readouterr().out


def test_script_refuses_an_unknown_section(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--only", "loss"])
    with pytest.raises(SystemExit):
        script.main()
    assert "choose from losses" in capsys.readouterr().err
