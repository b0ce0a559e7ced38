"""Data preparation: every row is kept, left out for a stated reason, or named as unreadable."""

import base64
import json
import os
import pickle
import zlib
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import verl_sspo.data.__main__ as prepare_data
from verl_sspo.data.prepare import SourceError, open_source
from verl_sspo.data.schema import SCHEMA, make_row, write_rows
from verl_sspo.data.tasks import TASKS, prepare
from verl_sspo.rewards import compute_score

pytestmark = pytest.mark.timeout(120)
ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("VERL_SSPO_SHARED_DATA", ROOT.parent / "shared" / "data"))
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no shared data in {SHARED} (VERL_SSPO_SHARED_DATA)")


@pytest.fixture(scope="module")
def script():
    return prepare_data.main


def _jsonl(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


GSM8K = [{"question": f"What is {i} + 1000?", "answer": f"{i} + 1000\n#### {1000 + i:,}"} for i in range(10)]
MATH = [
    {"problem": f"p{i}", "solution": rf"It is \boxed{{\frac{{{i}}}{{7}}}}.", "level": f"Level {i % 5 + 1}"}
    for i in range(10)
]


def test_rows_are_verls(script, tmp_path):
    source = _jsonl(tmp_path / "gsm8k.jsonl", GSM8K)
    assert script(["gsm8k", "--source", source, "--output", str(tmp_path / "out")]) == 0
    table = pq.read_table(tmp_path / "out" / "train.parquet")
    assert table.schema.equals(SCHEMA)
    row = table.to_pylist()[3]
    assert row["data_source"] == "openai/gsm8k"
    assert row["reward_model"] == {"style": "rule", "ground_truth": "1003"}
    assert row["extra_info"] == {"split": "train", "index": 3}
    assert row["prompt"][0]["role"] == "user"
    assert row["prompt"][0]["content"].startswith("What is 3 + 1000?")
    assert r"\boxed{}" in row["prompt"][0]["content"]
    assert compute_score(row["data_source"], r"\boxed{1,003}", row["reward_model"]["ground_truth"])["score"] == 1.0


def test_unreadable_rows_are_counted_and_named(script, tmp_path, capsys):
    rows = [*GSM8K[:2], "{not json", {"question": "no answer"}, {"question": "q", "answer": "no hashes"}, "[1]"]
    assert script(["gsm8k", "--source", _jsonl(tmp_path / "x.jsonl", rows), "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "train: 2 rows" in out
    assert "NOT READABLE: 4" in out
    for index in (2, 3, 4, 5):
        assert f"row {index} of openai/gsm8k train" in out
    assert "longest prompt" in out


def test_unicode_that_no_file_holds_costs_a_row(script, tmp_path):
    source = tmp_path / "x.jsonl"
    rows = [json.dumps(GSM8K[0]), '{"question": "\\ud800", "answer": "#### 5"}', "[" * 100_000, json.dumps(GSM8K[1])]
    source.write_bytes(b"\xef\xbb\xbf" + "\n".join(rows).encode() + b'\n{"question": "\xff", "answer": "#### 5"}')
    (split,) = prepare("gsm8k", source=str(source))
    assert [row["extra_info"]["index"] for row in split.rows] == [0, 3]
    assert len(split.unreadable) == 3
    assert script(["gsm8k", "--source", str(source), "--output", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("gsm8k", {"question": "q", "answer": "#### "}),
        ("math", {"problem": "p", "solution": r"\boxed{}", "level": 5}),
        ("math500", {"problem": "p", "answer": float("nan")}),
        ("math500", {"problem": "p", "answer": {"a": 1}}),
        ("math500", {"problem": "p", "answer": True}),
        ("code", {"problem": None, "tests": {"inputs": ["1"], "outputs": ["1"]}}),
        ("code", {"problem": "p", "tests": {"inputs": "1", "outputs": "1"}}),
        ("code", {"problem": "p", "tests": {"inputs": ["no json"], "outputs": ["1"], "fn_name": "f"}}),
        ("humaneval", {"prompt": "def f(): ...", "test": None, "entry_point": "f"}),
        ("humaneval", {"prompt": "def f(): ...", "test": "def check(", "entry_point": "f"}),
        ("mbpp", {"text": "t", "test_list": "assert f()"}),
        ("mbpp", {"text": "t", "test_list": ["assert ("]}),
        ("mbpp", {"text": "t", "test_list": ["assert f()"], "test_setup_code": "import ("}),
        (
            "code",
            {"problem": "p", "tests": [{"fn_name": "f", "input": [1], "output": 1}, {"input": "1", "output": "1"}]},
        ),
    ],
)
def test_rows_that_could_never_be_judged_are_unreadable(tmp_path, task, row):
    (split,) = prepare(task, source=_jsonl(tmp_path / "x.jsonl", [row]))
    assert not split.rows
    assert len(split.unreadable) == 1


def test_a_name_that_no_reward_knows_does_not_reach_the_training(tmp_path):
    truth = '{"inputs": ["1"], "outputs": ["1"]}'
    row = {"prompt": [{"role": "user", "content": "p"}], "reward_model": {"ground_truth": truth}, "data_source": "new"}
    (split,) = prepare("code", source=_jsonl(tmp_path / "x.jsonl", [row, row | {"data_source": "apps"}]))
    assert [row["data_source"] for row in split.rows] == ["taco", "apps"]


def test_places_that_cannot_be_written_are_refused_first(script, tmp_path, capsys):
    source = _jsonl(tmp_path / "x.jsonl", GSM8K)
    for bad in (["--output", source], ["--output", f"{source}/below"], ["--split", "../elsewhere"]):
        with pytest.raises(SystemExit):
            script(["gsm8k", "--source", source, *bad])
    with pytest.raises(SystemExit):
        script(["gsm8k", "deepmath", "--source", source, source, "--shares", "nan", "1"])
    (tmp_path / "out" / "train.parquet").mkdir(parents=True)
    assert script(["gsm8k", "--source", source, "--output", str(tmp_path / "out")]) == 1
    assert "cannot write" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.parquet"]


def test_levels(tmp_path):
    source = _jsonl(tmp_path / "math.jsonl", [*MATH, {"problem": "p", "answer": "1", "level": "Level ?"}])
    (kept,) = prepare("math", source=source)
    assert [row["reward_model"]["ground_truth"] for row in kept.rows] == [
        rf"\frac{{{i}}}{{7}}" for i in (2, 3, 4, 7, 8, 9)
    ]
    assert kept.dropped == {"level 1": 2, "level 2": 2, "level unknown (--levels all keeps these)": 1}
    (everything,) = prepare("math", source=source, levels=None)
    assert len(everything.rows) == 11


def test_benchmarks_of_mathematics(tmp_path):
    def truths(task, *rows):
        (split,) = prepare(task, source=_jsonl(tmp_path / "x.jsonl", rows))
        assert not split.unreadable
        return [(row["data_source"], row["reward_model"]["ground_truth"]) for row in split.rows], split

    (found,), split = truths("amc", {"problem": "p", "answer": 142.0, "url": "u"})
    assert split.name == "train"
    assert compute_score(*found[:1], r"\boxed{142}", found[1])["score"] == 1.0
    (found,), _ = truths("minerva", {"question": "q", "answer": r"1.6 \times 10^{-3}"})
    assert compute_score(found[0], r"\boxed{1.6 \times 10^{-3}}", found[1])["score"] == 1.0
    found, split = truths(
        "olympiadbench",
        {"question": "q", "final_answer": ["$2$"], "context": "Let x be 1."},
        {"question": "q", "final_answer": ["1", "-3"], "context": None},
        {"question": "Prove it.", "final_answer": None},
    )
    assert [truth for _, truth in found] == ["$2$", "1, -3"]
    assert split.rows[0]["prompt"][0]["content"].startswith("Let x be 1.\n\nq")
    assert split.dropped == {"asks for a proof": 1}
    # A text would be taken letter by letter.
    source = _jsonl(tmp_path / "text.jsonl", [{"question": "q", "final_answer": "$-12$"}])
    (split,) = prepare("olympiadbench", source=source)
    assert not split.rows
    assert "must be a list of texts" in str(split.unreadable)
    assert compute_score(found[0][0], r"\boxed{2}", found[0][1])["score"] == 1.0
    assert compute_score(found[1][0], r"\boxed{-3, 1}", found[1][1])["score"] == 1.0
    assert compute_score(found[1][0], r"\boxed{1}", found[1][1])["score"] == 0.0


@pytest.mark.parametrize("kind", ["json", "lines", "parquet", "csv", "arrow", "saved", "folder"])
def test_every_kind_of_source_gives_the_same_rows(tmp_path, kind):
    import datasets

    data = datasets.Dataset.from_list(GSM8K)
    path = tmp_path / "source"
    path.mkdir()
    if kind == "json":
        (path / "x.json").write_text(json.dumps(GSM8K))
        path /= "x.json"
    elif kind == "lines":
        path = Path(_jsonl(path / "x.json", GSM8K))
    elif kind == "parquet":
        data.to_parquet(path / "x.parquet")
        path /= "x.parquet"
    elif kind == "csv":
        data.to_csv(path / "x.csv")
        path /= "x.csv"
    elif kind == "arrow":
        data.save_to_disk(path)
        (path,) = path.glob("*.arrow")
    elif kind == "saved":
        datasets.DatasetDict(train=data).save_to_disk(path)
    else:
        data.to_parquet(path / "train.parquet")
    opened = open_source(str(path), config=None, splits=("train",), file_split="train")
    assert opened == {"train": GSM8K}


def test_sources_that_cannot_be_read(tmp_path, script, capsys):
    for source in (str(tmp_path / "absent.jsonl"), "./absent", "absent/x.jsonl", "a/b/c"):
        with pytest.raises(SourceError, match="does not exist"):
            open_source(source, config=None, splits=("train",), file_split="train")
    (tmp_path / "x.pdf").write_text("")
    with pytest.raises(SourceError, match="unknown kind"):
        open_source(str(tmp_path / "x.pdf"), config=None, splits=("train",), file_split="train")
    assert script(["gsm8k", "--source", str(tmp_path / "absent.jsonl"), "--output", str(tmp_path)]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_data_sets_that_come_with_a_script(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "set.py").write_text("")
    _jsonl(folder / "test.jsonl", GSM8K)
    with pytest.raises(SourceError, match="script"):
        open_source(str(folder), config=None, splits=("test",), file_split="test")


def test_hub_out_of_reach(monkeypatch):
    import datasets

    def refuse(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(SourceError, match="--source"):
        prepare("gsm8k")


def test_mix_is_half_and_half_and_the_same_every_time(script, tmp_path):
    deepmath = [{"question": f"d{i}", "final_answer": str(i), "difficulty": 5} for i in range(6)]
    sources = [_jsonl(tmp_path / "g.jsonl", GSM8K), _jsonl(tmp_path / "d.jsonl", deepmath)]
    for name, tasks in (
        ("a", ["gsm8k_deepmath"]),
        ("b", ["gsm8k", "deepmath"]),
        ("c", ["gsm8k_deepmath", "--seed", "1"]),
    ):
        assert script([*tasks, "--source", *sources, "--output", str(tmp_path / name)]) == 0
    a, b, c = (pq.read_table(tmp_path / name / "train.parquet").to_pylist() for name in "abc")
    assert a == b != c
    assert sorted(row["data_source"] for row in a) == ["openai/gsm8k"] * 6 + ["zwhe99/DeepMath-103K"] * 6
    shares = ["gsm8k", "deepmath", "--shares", "3", "1", "--output", str(tmp_path / "d"), "--source", *sources]
    assert script(shares) == 0
    counts = [row["data_source"] for row in pq.read_table(tmp_path / "d" / "train.parquet").to_pylist()]
    # Ten rows for three quarters allow three for the last.
    assert (counts.count("openai/gsm8k"), counts.count("zwhe99/DeepMath-103K")) == (10, 3)


def test_templates(tmp_path, script):
    source = _jsonl(tmp_path / "g.jsonl", GSM8K)
    (think,) = prepare("gsm8k", source=source, template="think")
    assert [message["role"] for message in think.rows[0]["prompt"]] == ["system", "user"]
    assert "<answer>" in think.rows[0]["prompt"][0]["content"]
    assert think.rows[0]["prompt"][1]["content"] == GSM8K[0]["question"]
    (own,) = prepare("gsm8k", source=source, template="Q: {problem} {x}")
    assert own.rows[0]["prompt"] == [{"role": "user", "content": f"Q: {GSM8K[0]['question']} {{x}}"}]
    assert script(["gsm8k", "--source", source, "--template", "absent"]) == 1


def test_a_broken_run_leaves_the_old_file(tmp_path):
    row = make_row(data_source="d", prompt=[], ability="math", ground_truth="1", split="train", index=0)
    path = write_rows([row], tmp_path / "train.parquet")
    before = path.read_bytes()

    def breaks():
        yield row
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        write_rows(breaks(), path)
    with pytest.raises(Exception, match="int"):
        write_rows([row | {"extra_info": {"split": "train", "index": "no number"}}], path)
    with pytest.raises(ValueError, match="no rows"):
        write_rows([], path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["train.parquet"]


CODE = {
    "apps": {"question": "q", "input_output": json.dumps({"inputs": ["1"], "outputs": ["2"]}), "starter_code": ""},
    "taco function": {
        "question": "q",
        "input_output": json.dumps({"fn_name": "f", "inputs": [[1]], "outputs": [[2]]}),
        "starter_code": "def f(x):",
    },
    "eurus": {
        "data_source": "codecontests",
        "ability": "code",
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
        "reward_model": {"style": "rule", "ground_truth": json.dumps({"inputs": ["1"], "outputs": ["2"]})},
    },
    "deepcoder": {
        "problem": "q",
        "tests": json.dumps([{"input": "1", "output": "2", "testtype": "stdin", "metadata": {"func_name": None}}]),
    },
    "deepcoder function": {
        "problem": "q",
        "tests": [
            {"fn_name": "f", "type": "function_call", "input": [1], "output": [2]},
            {"fn_name": "f", "type": "function_call", "input": [2], "output": [3]},
        ],
    },
    "metadata as text": {
        "problem": "q",
        "tests": [{"input": "1", "output": "2", "metadata": json.dumps({"func_name": "f"})}],
    },
    "livecodebench": {
        "problem": "q",
        "tests": json.dumps([{"input": "1", "output": "2", "testtype": "functional", "metadata": {"func_name": "f"}}]),
    },
    "mbpp": {"text": "q", "code": "", "test_list": ["assert f(1) == 2"], "test_setup_code": ""},
}


@pytest.mark.parametrize("name", CODE)
def test_code_sets(tmp_path, name):
    (split,) = prepare("code", source=_jsonl(tmp_path / "x.jsonl", [CODE[name]]))
    assert not split.unreadable
    (row,) = split.rows
    tests = json.loads(row["reward_model"]["ground_truth"])
    assert ("fn_name" in tests) is (
        name in {"taco function", "deepcoder function", "metadata as text", "livecodebench"}
    )
    function = "def f(x): return x + 1\n"
    program = function if "fn_name" in tests or "asserts" in tests else function + "print(f(int(input())))"
    scored = compute_score(
        row["data_source"],
        f"```python\n{program}\n```",
        row["reward_model"]["ground_truth"],
        unsafe_without_sandbox=True,
    )
    assert scored["score"] == 1.0
    assert ("`f`" in row["prompt"][0]["content"]) is ("fn_name" in tests)


def _hidden(what):
    return base64.b64encode(zlib.compress(pickle.dumps(what))).decode()


def test_livecodebench(tmp_path):
    public = [{"input": "1\n[2]", "output": "3", "testtype": "functional"}]
    private = [{"input": "2\n[5]", "output": "7", "testtype": "functional"}]
    row = {
        "question_content": "q",
        "starter_code": "class Solution:\n    def f(self, x, y):",
        "public_test_cases": json.dumps(public),
        "private_test_cases": _hidden(json.dumps(private)),
        "metadata": json.dumps({"func_name": "f"}),
    }
    reads = row | {"starter_code": "", "metadata": "{}", "private_test_cases": json.dumps(private)}
    (split,) = prepare("livecodebench", source=_jsonl(tmp_path / "x.jsonl", [row, reads]))
    assert not split.unreadable
    called, printing = split.rows
    assert "class Solution" in called["prompt"][0]["content"]
    assert "standard input" in printing["prompt"][0]["content"]
    method = "class Solution:\n    def f(self, x, y):\n        return x + y[0]\n"
    right = {0: method, 1: "print(int(input()) + eval(input())[0])"}
    wrong = {0: method.replace("y[0]", "2"), 1: "print(3)"}  # right on the public test alone
    for programs, score in ((right, 1.0), (wrong, 0.0)):
        for index, each in enumerate(split.rows):
            response = f"```python\n{programs[index]}\n```"
            truth = each["reward_model"]["ground_truth"]
            assert compute_score(each["data_source"], response, truth, unsafe_without_sandbox=True)["score"] == score


class _Evil:
    def __reduce__(self):
        return os.system, ("echo run by a data set",)


@pytest.mark.parametrize("field", [_hidden(_Evil()), _hidden(3), "AAAA", "not base64", ""])
def test_hidden_tests_run_no_code(tmp_path, capfd, field):
    row = {"question_content": "q", "public_test_cases": "[]", "private_test_cases": field, "metadata": "{}"}
    (split,) = prepare("livecodebench", source=_jsonl(tmp_path / "x.jsonl", [row]))
    assert not split.rows
    assert len(split.unreadable) == 1
    assert "run by a data set" not in capfd.readouterr().out


def test_code_rows_that_are_left_out(tmp_path):
    rows = [
        {"question": "q", "input_output": '{"inputs": [], "outputs": []}'},
        {"question": "q", "input_output": '{"inputs": ["1"], "outputs": []}'},
        {"question": "q", "input_output": "not json"},
        CODE["eurus"] | {"ability": "math"},
    ]
    (split,) = prepare("code", source=_jsonl(tmp_path / "x.jsonl", rows))
    assert split.rows == []
    assert split.dropped == {"no tests": 1, "ability math": 1}
    assert len(split.unreadable) == 2


def test_mbpp_rows_with_objects_of_the_program_are_left_out(tmp_path):
    tree = {"text": "q", "test_list": ["assert h(root) == 2"], "test_setup_code": "root = Node(1)\nroot.left = Node(2)"}
    (split,) = prepare("mbpp", source=_jsonl(tmp_path / "x.jsonl", [CODE["mbpp"], tree]), split="test")
    assert len(split.rows) == 1
    assert sum(split.dropped.values()) == 1
    assert split.name == "test"


@pytest.mark.parametrize(
    ("tests", "setup", "kept"),
    [
        (["assert f([Pair(1, 2)], 1) == 1"], "", False),
        (["assert f(1) == Pair(1, 2)"], "", False),
        (["assert f([Pair(1, 2)], 1) == 1"], "class Pair(tuple): pass", True),
        (["assert Check_Solution(2, 0) == 'Yes'", "assert Check_Solution(1, 0) == 'No'"], "", True),
        (["assert f(1) == Counter('a') and isinstance(f(1), Exception)"], "", True),
        (["assert math.isclose(Area(1), 1.5)"], "import math", True),
        (["assert set(f(1)) == {Fraction(1)}"], "from fractions import Fraction", True),
    ],
)
def test_mbpp_rows_that_call_a_class_of_the_program_are_left_out(tmp_path, tests, setup, kept):
    row = {"text": "q", "test_list": tests, "test_setup_code": setup}
    (split,) = prepare("mbpp", source=_jsonl(tmp_path / "x.jsonl", [row]), split="test")
    assert not split.unreadable
    assert split.dropped == ({} if kept else {"tests need objects of the program's own classes": 1})


@needs_data
def test_real_rows(script, tmp_path):
    for task, name, count in (
        ("gsm8k", "gsm8k_train.jsonl", 1024),
        ("math", "math_sample.jsonl", 100),
        ("math500", "math_sample.jsonl", 100),
        ("humaneval", "humaneval_sample.jsonl", 16),
    ):
        (split,) = prepare(task, source=str(SHARED / name))
        assert len(split.rows) == count
        assert not split.unreadable
        assert split.name == TASKS[task].splits[0]
