"""Answers of the first and the last validation, side by side."""

import json

import pytest

from verl_sspo.report.samples import lines, markdown, read_samples

EXAMPLE = "Question: 5 + 2?\nAnswer: 7\n\n"


@pytest.fixture
def dumps(tmp_path):
    """Three validations in verl's files. The last one has its problems in another order, and one problem is new."""
    for step, rows in {
        0: [("a", "4 and\n4", 0.0), ("b", "b" * 200 + " 9", 0.25)],
        8: [("a", "5", 0.0)],
        12: [("c", "1", 1.0), ("b", "9", 1.0), ("a", "```\n8\n```", 1.0)],
    }.items():
        entries = [
            {"input": f"{EXAMPLE}Question: {name}?\nAnswer:", "output": text, "gts": "8", "score": score}
            for name, text, score in rows
        ]
        (tmp_path / f"{step}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return tmp_path


def test_the_same_problem_before_and_after(dumps):
    first, second = read_samples(dumps)
    assert list(lines(first)) == [
        "Question: a? Answer:",
        "  right answer      8",
        "  step    0  wrong  4 and 4",
        "  step   12  right  ``` 8 ```",
    ]
    _, _, before, _ = lines(second)
    # A score between 0 and 1 is shown as a number. The end of a long answer, with its result, is not cut off.
    assert before.startswith("  step    0  0.25   bbb")
    assert before.endswith("b 9")
    assert len(before) <= 80
    assert len(read_samples(dumps, count=1)) == 1


def test_a_long_problem_takes_three_lines(dumps):
    (sample, *_) = read_samples(dumps)
    long = type(sample)("word " * 500 + "end?", "8", sample.answers)
    shown = list(lines(long))
    assert len(shown) == 6
    assert shown[2].endswith("end?")
    assert max(map(len, shown)) <= 80


def test_markdown_shows_texts_as_they_are(dumps):
    (sample, *_) = read_samples(dumps)
    text = markdown([sample])
    assert "```text\nQuestion: 5 + 2?" in text
    assert "Step 0, wrong:\n\n```text\n4 and\n4\n```" in text
    assert "Step 12, right:\n\n````text\n```\n8\n```\n````" in text


def test_one_validation_is_no_comparison(dumps):
    for step in (8, 12):
        (dumps / f"{step}.jsonl").unlink()
    assert read_samples(dumps) == []
