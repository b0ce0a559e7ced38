"""Data preparation: each row is kept, left out for a stated reason, or reported as bad. Files are whole or absent."""

import base64
import json
import os
import pickle
import re
import zlib
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import verl_sspo.data.command as prepare_data
from verl_sspo.data import schema, word_problems
from verl_sspo.data.schema import SCHEMA, make_row, write_rows
from verl_sspo.data.sources import SourceError, open_source
from verl_sspo.data.tasks import TASKS, prepare
from verl_sspo.rewards import compute_score

pytestmark = pytest.mark.timeout(120)
FIXTURES = Path(__file__).parents[1] / "fixtures"
SHARED = Path(os.environ.get("VERL_SSPO_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
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


def _run(script, capsys, *arguments):
    """Exit status, stdout and stderr, also if argparse exits."""
    try:
        status = script([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


# A bad line of a GSM8K file, and what the message about it must say.
BAD = {
    "{not json": "not JSON: Expecting property name enclosed in double quotes at column 2",
    "[1]": "not an object: [1]",
    "[" * 100_000: "not JSON: nested too deeply",
    '{"question": "q"}': "no column answer, only question",
    '{"problem": "q", "solution": "s"}': "no column answer, only problem, solution",
    '{"question": "q", "answer": null}': "column answer is null",
    '{"question": "q", "answer": 72}': "column answer is not text: 72",
    '{"question": "q", "answer": "no hashes"}': "no number after #### in column answer: 'no hashes'",
    '{"question": "q", "answer": "#### "}': "no number after #### in column answer",
    '{"question": null, "answer": "#### 1"}': "column question is null",
    '{"question": " ", "answer": "#### 1"}': "column question is empty",
    '{"question": ["q"], "answer": "#### 1"}': "column question is not text: ['q']",
    '{"question": "\\ud800", "answer": "#### 1"}': "half a character (lone surrogate), which cannot be written",
    '{"question": "\udcfc", "answer": "#### 1"}': "not UTF-8: byte 0xfc at column 15",
}


def _with_bad_lines(path, bad):
    """A file with good rows in lines 1, 3 and 5, an empty line 2, bad ones in 4 and from 6 on."""
    good = [json.dumps(row) for row in GSM8K[:3]]
    lines = [good[0], "", good[1], bad[0], good[2], *bad[1:]]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode(errors="surrogateescape"))
    return str(path)


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_is_named_with_file_line_and_reason(script, tmp_path, capsys, bad):
    source, output = _with_bad_lines(tmp_path / "my rows.jsonl", [bad]), tmp_path / "out"
    status, out, err = _run(script, capsys, "gsm8k", "--source", source, "--output", output)
    assert status == 1
    assert f"{source}, line 4: {BAD[bad]}" in err
    assert "--skip-bad" in err
    assert out == ""
    assert not output.exists()
    status, out, err = _run(script, capsys, "gsm8k", "--source", source, "--output", output, "--skip-bad")
    assert status == 0
    assert f"  1 x {BAD[bad].partition(':')[0]}" in err
    assert "train: 3 rows" in out
    indices = [row["extra_info"]["index"] for row in pq.read_table(output / "train.parquet").to_pylist()]
    assert indices == [0, 1, 3]


def test_bad_rows_are_counted_by_kind(script, tmp_path, capsys):
    source = _with_bad_lines(tmp_path / "x.jsonl", ["{not json", '{"question": "q"}', "}", "]", "a", "b"])
    _, _, err = _run(script, capsys, "gsm8k", "--source", source, "--output", tmp_path / "out", "--skip-bad")
    assert "  5 x not JSON" in err
    assert "    and 2 more" in err
    assert "  1 x no column answer, only question" in err
    assert [f"line {number}" in err for number in (4, 6, 7, 8, 9, 10)] == [True, True, True, True, False, False]


def test_repeated_problems_are_told(script, tmp_path, capsys):
    source = _jsonl(tmp_path / "x.jsonl", [*GSM8K[:3], GSM8K[0], GSM8K[0]])
    status, _, err = _run(script, capsys, "gsm8k", "--source", source, "--output", tmp_path / "kept")
    assert status == 0
    assert "repeated rows, kept:\n  2 x repeats a problem\n" in err
    assert f"{source}, line 4: repeats a problem: {source}, line 1" in err
    assert pq.read_table(tmp_path / "kept" / "train.parquet").num_rows == 5
    _run(script, capsys, "gsm8k", "--source", source, "--output", tmp_path / "left", "--skip-bad")
    assert pq.read_table(tmp_path / "left" / "train.parquet").num_rows == 3


def test_files_in_other_encodings_and_shapes(script, tmp_path, capsys):
    def refused(name, data, *words):
        (tmp_path / name).write_bytes(data)
        status, _, err = _run(script, capsys, "gsm8k", "--source", tmp_path / name, "--output", tmp_path / "out")
        assert status == 1
        assert str(tmp_path / name) in err
        assert all(word in err for word in words), err
        assert not (tmp_path / "out").exists()

    row = json.dumps(GSM8K[0])
    refused("utf16.jsonl", row.encode("utf-16"), "line 1: not UTF-8: byte 0xff at column 1")
    refused("latin1.jsonl", row.replace("What", "Wie groß").encode("latin-1"), "line 1: not UTF-8: byte 0xdf")
    refused("latin1.csv", "question,answer\nq,#### 1\ngroß,#### 2\n".encode("latin-1"), "byte 0xdf")
    refused("empty.jsonl", b"", "no rows")
    refused("blank.jsonl", b"\n \n", "no rows")
    refused("empty.csv", b"question,answer\n", "no rows")
    refused("list.json", b'[{"question": "q"},', "cannot be read", "line 1 column 20")
    refused("cut.parquet", b"PAR1 and no more", "cannot be read")
    refused("cut.arrow", b"ARROW1 and no more", "cannot be read")
    refused("short.csv", b"question,answer\nq\n", "row 1: column answer is")
    refused("long.csv", b"question,answer\nq,#### 1\nq,#### 1,3\n", "cannot be read", "line 3")
    refused("quote.csv", b'question,answer\n"q,#### 1\n', "cannot be read")
    refused("other.csv", b"frage,antwort\nq,#### 1\n", "no column answer, only frage, antwort", "row 1")


@pytest.mark.parametrize("name", ["x[1].jsonl", "x*.jsonl", "{a}.jsonl", "ä ö.jsonl"])
def test_any_file_name(tmp_path, name):
    (split,) = prepare("gsm8k", source=_jsonl(tmp_path / name, GSM8K))
    assert len(split.rows) == len(GSM8K)


def test_rows_of_another_task(script, tmp_path, capsys):
    sources = {"gsm8k": _jsonl(tmp_path / "g.jsonl", GSM8K), "math": _jsonl(tmp_path / "m.jsonl", MATH)}
    for task, other in (
        ("gsm8k", "math"),
        ("math", "gsm8k"),
        ("code", "gsm8k"),
        ("humaneval", "math"),
        ("mbpp", "math"),
    ):
        status, _, err = _run(script, capsys, task, "--source", sources[other], "--output", tmp_path / "out")
        assert status == 1
        assert f"{len(GSM8K)} x no column" in err
    without = _jsonl(tmp_path / "w.jsonl", [{key: row[key] for key in ("problem", "solution")} for row in MATH])
    status, _, err = _run(script, capsys, "math", "--source", without, "--output", tmp_path / "out")
    assert status == 1
    assert "no column level: --levels all keeps such rows" in err
    assert not (tmp_path / "out").exists()
    assert script(["math", "--source", without, "--output", str(tmp_path / "out"), "--levels", "all"]) == 0


def test_an_earlier_output_is_replaced_only_when_asked(script, tmp_path, capsys):
    source, output = _jsonl(tmp_path / "x.jsonl", GSM8K), tmp_path / "out"
    arguments = ["gsm8k", "--source", source, "--output", output]
    assert _run(script, capsys, *arguments)[0] == 0
    assert _run(script, capsys, *arguments, "--split", "test", "--overwrite")[0] == 0
    before = (output / "train.parquet").read_bytes()
    status, _, err = _run(script, capsys, *arguments, "--limit", "2")
    assert status == 2
    assert f"{output} holds test.parquet, train.parquet: --overwrite replaces" in err
    assert (output / "train.parquet").read_bytes() == before
    assert _run(script, capsys, *arguments, "--limit", "2", "--overwrite")[0] == 0
    assert pq.read_table(output / "train.parquet").num_rows == 2


def test_a_full_disk_leaves_all_splits_as_they_were(script, tmp_path, capsys, monkeypatch):
    folder, output = tmp_path / "source", tmp_path / "out"
    folder.mkdir()
    for split in ("train", "test"):
        _jsonl(folder / f"{split}.jsonl", GSM8K)
    arguments = ["gsm8k", "--source", folder, "--output", output, "--overwrite"]
    assert _run(script, capsys, *arguments)[0] == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    assert before.keys() == {"train.parquet", "test.parquet"}
    write = pq.write_table

    def full(table, path):
        if "test" in path.name:
            path.write_bytes(b"PAR1")
            raise OSError(28, "No space left on device")
        write(table, path)

    monkeypatch.setattr(schema.pq, "write_table", full)
    status, out, err = _run(script, capsys, *arguments, "--limit", "2")
    assert status == 1
    assert "No space left on device" in err
    assert "wrote" not in out
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


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
        ("code", {"problem": "p", "tests": "no json"}),
        ("code", {"prompt": [], "reward_model": {"ground_truth": "{}"}}),
        ("code", {"prompt": None, "reward_model": {"ground_truth": "{}"}}),
        ("code", {"prompt": [{"role": "user", "content": None}], "reward_model": {"ground_truth": "[1]"}}),
        ("livecodebench", {"question_content": "p", "public_test_cases": None, "private_test_cases": None}),
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
def test_rows_that_could_never_be_graded_are_bad(tmp_path, task, row):
    (split,) = prepare(task, source=_jsonl(tmp_path / "x.jsonl", [row]))
    assert not split.rows
    assert len(split.bad) == 1


def test_a_name_that_no_reward_knows_does_not_reach_the_training(tmp_path):
    truth = '{"inputs": ["1"], "outputs": ["1"]}'
    row = {"prompt": [{"role": "user", "content": "p"}], "reward_model": {"ground_truth": truth}, "data_source": "new"}
    (split,) = prepare("code", source=_jsonl(tmp_path / "x.jsonl", [row, row | {"data_source": "apps"}]))
    assert [row["data_source"] for row in split.rows] == ["taco", "apps"]


def test_places_that_cannot_be_written_are_refused_first(script, tmp_path, capsys):
    source = _jsonl(tmp_path / "x.jsonl", GSM8K)
    for bad in (
        *(["--output", source], ["--output", f"{source}/below"], ["--output", ""], ["--split", "../elsewhere"]),
        *(["--split", ""], ["--levels", "3"], ["--levels", "all"], ["--limit", "0"]),
    ):
        with pytest.raises(SystemExit):
            script(["gsm8k", "--source", source, *bad])
    assert not (tmp_path / "out").exists()


def test_what_word_problems_do_not_read_is_refused(script, tmp_path, capsys):
    for unread in (["--template", "boxed"], ["--source", "x.jsonl"], ["--skip-bad"]):
        with pytest.raises(SystemExit):
            script(["word-problems", "--output", str(tmp_path / "out"), *unread])
        assert f"{unread[0]} has no effect here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
        assert not split.bad
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
    # A text in place of a list would be read letter by letter.
    source = _jsonl(tmp_path / "text.jsonl", [{"question": "q", "final_answer": "$-12$"}])
    (split,) = prepare("olympiadbench", source=source)
    assert not split.rows
    assert "must be a list of texts" in str(split.bad)
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
    assert [row for _, row in opened["train"]] == GSM8K
    assert opened.keys() == {"train"}


def test_sources_that_cannot_be_read(tmp_path, script, capsys):
    for source in (str(tmp_path / "absent.jsonl"), "./absent", "absent/x.jsonl", "a/b/c"):
        with pytest.raises(SourceError, match="does not exist"):
            open_source(source, config=None, splits=("train",), file_split="train")
    (tmp_path / "x.pdf").write_text("")
    with pytest.raises(SourceError, match="unknown kind"):
        open_source(str(tmp_path / "x.pdf"), config=None, splits=("train",), file_split="train")
    assert script(["gsm8k", "--source", str(tmp_path / "absent.jsonl"), "--output", str(tmp_path)]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_folders(tmp_path):
    def opened(**files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, rows in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _jsonl(folder / f"{name}.jsonl", rows)
        return open_source(str(folder), config="main", splits=("train", "test"), file_split="train")

    one, two = GSM8K[:1], GSM8K[1:2]
    for files in (
        {"train": one, "test": two},
        {"data/train-00000-of-00001": one, "data/test-00000-of-00001": two},
        {"main/train-00000": one, "main/test6": two, "socratic/train-00000": two},
    ):
        assert {split: [row for _, row in rows] for split, rows in opened(**files).items()} == {
            "train": one,
            "test": two,
        }
    assert [row for _, row in opened(a=one, b=two)["train"]] == one + two
    with pytest.raises(SourceError, match=r"validation.jsonl, but no file of the splits train, test"):
        opened(validation=one)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="no data files"):
        open_source(str(tmp_path / "empty"), config=None, splits=("train",), file_split="train")


@pytest.mark.parametrize(
    "error", [ConnectionError("no route"), RuntimeError("Dataset scripts are no longer supported")]
)
def test_hub_out_of_reach(monkeypatch, error):
    import datasets

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(SourceError, match=f"{error}.*--source"):
        prepare("gsm8k")


def test_the_hub_gives_the_splits_that_are_wanted(monkeypatch):
    import datasets

    loaded = {"train": GSM8K[:1], "validation": GSM8K[1:2], "test": GSM8K[2:3]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: loaded)
    found = open_source("some/set", config=None, splits=("train", "test"), file_split="train")
    assert found == {
        "train": [("some/set train, row 1", GSM8K[0])],
        "test": [("some/set test, row 1", GSM8K[2])],
    }
    with pytest.raises(SourceError, match="none of"):
        open_source("some/set", config=None, splits=("absent",), file_split="train")


def test_mix_is_half_and_half_and_the_same_every_time(script, tmp_path):
    deepmath = [{"question": f"d{i}", "final_answer": str(i), "difficulty": 5} for i in range(6)]
    sources = [_jsonl(tmp_path / "g.jsonl", GSM8K), _jsonl(tmp_path / "d.jsonl", deepmath)]
    for name, options in (("a", []), ("b", []), ("c", ["--seed", "1"])):
        output = str(tmp_path / name)
        assert script(["gsm8k_deepmath", *options, "--source", *sources, "--output", output]) == 0
    a, b, c = (pq.read_table(tmp_path / name / "train.parquet").to_pylist() for name in "abc")
    assert a == b != c
    assert sorted(row["data_source"] for row in a) == ["openai/gsm8k"] * 6 + ["zwhe99/DeepMath-103K"] * 6


def test_templates(tmp_path, script):
    source = _jsonl(tmp_path / "g.jsonl", GSM8K)
    (think,) = prepare("gsm8k", source=source, template="think")
    assert [message["role"] for message in think.rows[0]["prompt"]] == ["system", "user"]
    assert "<answer>" in think.rows[0]["prompt"][0]["content"]
    assert think.rows[0]["prompt"][1]["content"] == GSM8K[0]["question"]
    (own,) = prepare("gsm8k", source=source, template="Q: {problem} {x}")
    assert own.rows[0]["prompt"] == [{"role": "user", "content": f"Q: {GSM8K[0]['question']} {{x}}"}]
    output = tmp_path / "out"
    assert script(["gsm8k", "--source", source, "--template", "absent", "--output", str(output)]) == 1
    assert not output.exists()


def test_a_mix_needs_rows_of_each(script, tmp_path, capsys):
    good, bad = _jsonl(tmp_path / "g.jsonl", GSM8K), _jsonl(tmp_path / "e.jsonl", ["{}"])
    status, _, err = _run(script, capsys, "gsm8k_deepmath", "--source", good, bad, "--output", tmp_path / "out")
    assert status == 1
    assert "e.jsonl, line 1: no column" in err
    proofs = _jsonl(tmp_path / "o.jsonl", [{"question": "Prove it.", "final_answer": None}])
    status, _, err = _run(script, capsys, "olympiadbench", "--source", proofs, "--output", tmp_path / "out")
    assert status == 1
    assert "no row of olympiadbench is left (left out: 1 asks for a proof)" in err


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
    assert not split.bad
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
    assert not split.bad
    called, printing = split.rows
    assert "class Solution" in called["prompt"][0]["content"]
    assert "standard input" in printing["prompt"][0]["content"]
    method = "class Solution:\n    def f(self, x, y):\n        return x + y[0]\n"
    right = {0: method, 1: "print(int(input()) + eval(input())[0])"}
    wrong = {0: method.replace("y[0]", "2"), 1: "print(3)"}  # right only on the public test
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
    assert len(split.bad) == 1
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
    assert len(split.bad) == 2


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
    assert not split.bad
    assert split.dropped == ({} if kept else {"tests need objects of the program's own classes": 1})


@pytest.mark.parametrize("levels", [["one-step"], list(word_problems.LEVELS)])
def test_word_problems(levels):
    train, val = word_problems.make_splits(levels, seed=0)
    assert (train.name, len(train.rows), val.name, len(val.rows)) == ("train", 2048, "val", 256)
    prompts = [row["prompt"][0]["content"] for row in train.rows + val.rows]
    assert len(set(prompts)) == 2048 + 256
    sources = Counter(row["data_source"] for row in val.rows)
    assert sources.keys() == {f"word_problems/{name}" for name in ("addition", "subtraction", "multiplication")}
    assert max(sources.values()) - min(sources.values()) < 10
    numbers = [int(row["reward_model"]["ground_truth"]) for row in train.rows]
    assert min(numbers) >= 0
    if levels == ["one-step"]:
        assert max(numbers) <= 180  # 9 boxes of 20
        for row in train.rows:
            x, n = map(int, re.findall("[0-9]+", row["prompt"][0]["content"])[5:])
            operation = row["data_source"].partition("/")[2]
            result = {"addition": x + n, "subtraction": x - n, "multiplication": x * n}[operation]
            assert row["reward_model"]["ground_truth"] == str(result)
    for row in train.rows[:50]:
        assert row["prompt"][0]["content"].startswith(word_problems.EXAMPLE + "Question: ")
        assert row["prompt"][0]["content"].endswith("?\nAnswer:")
        assert "{" not in row["prompt"][0]["content"]
        truth = row["reward_model"]["ground_truth"]
        assert compute_score(row["data_source"], f" 1 + 2 = {truth}", truth)["score"] == 1.0
        assert compute_score(row["data_source"], f" {truth} + 1 = {int(truth) + 1}", truth)["score"] == 0.0
    assert [row["prompt"] for row in word_problems.make_splits(levels, seed=0)[0].rows] == [
        row["prompt"] for row in train.rows
    ]
    assert word_problems.make_splits(levels, seed=1)[0].rows != train.rows


@pytest.mark.parametrize(
    ("response", "score"),
    [
        (" 12 - 4 = 8", 1.0),
        (" 4 - 12 = -8", 0.0),
        ("12-8", 1.0),
        ("7.8", 0.0),
        ("It is 8.", 1.0),
        ("8.0", 0.0),
        ("08", 1.0),
        ("18", 0.0),
        ("1,008", 0.0),
        ("", 0.0),
        ("eight", 0.0),
        ("8 of 9", 0.0),
    ],
)
def test_the_last_number_counts(response, score):
    assert compute_score("word_problems/subtraction", response, "8")["score"] == score
    assert compute_score("arithmetic", response, "8")["score"] == score


def test_word_problems_are_written(script, tmp_path, capsys):
    arguments = ["word-problems", "--levels", "two-steps", "--limit", "20", "--output", tmp_path / "out"]
    assert _run(script, capsys, *arguments)[0] == 0
    for split in ("train", "val"):
        table = pq.read_table(tmp_path / "out" / f"{split}.parquet")
        assert table.schema.equals(SCHEMA)
        assert table.num_rows == 20
    for wrong in (["word-problems", "--levels", "3"], ["word-problems", "gsm8k"]):
        assert _run(script, capsys, *wrong, "--output", tmp_path / "other")[0] == 2


def test_real_rows():
    for task, name, count, options in (
        ("gsm8k", "gsm8k.jsonl", 40, {}),
        ("math", "math.jsonl", 40, {"levels": None}),
        ("math500", "math.jsonl", 40, {}),
        ("humaneval", "humaneval.jsonl", 16, {}),
    ):
        (split,) = prepare(task, source=str(FIXTURES / name), **options)
        assert len(split.rows) == count
        assert not split.bad
        assert split.name == TASKS[task].splits[0]


@needs_data
def test_more_real_rows():
    for task, name, count in (("gsm8k", "gsm8k_train.jsonl", 1024), ("math500", "math_sample.jsonl", 100)):
        (split,) = prepare(task, source=str(SHARED / name))
        assert (len(split.rows), split.bad) == (count, [])
