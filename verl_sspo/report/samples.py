"""A model's answers to the same problems in the first and the last validation, from the files that verl writes."""

import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERDICTS = {0.0: "wrong", 1.0: "right"}


@dataclass(frozen=True)
class Sample:
    """A problem and its answers.

    Attributes:
        prompt: as the model reads it.
        truth: the right answer; empty if the data has none.
        answers: verl's entries of the first and the last validation; their `step`, `output` and `score` are shown.
    """

    prompt: str
    truth: str
    answers: tuple[dict[str, Any], ...]


def read_samples(folder: Path, count: int = 4) -> list[Sample]:
    """The first `count` problems that both validations have; none if there are fewer than two validations.

    Args:
        folder: verl's `trainer.validation_data_dir`, with a file `<step>.jsonl` per validation.
        count: maximum number of problems.
    """
    dumps = sorted(folder.glob("*.jsonl"), key=lambda path: int(path.stem))
    if len(dumps) < 2:
        return []
    first, last = (_first_answers(path) for path in (dumps[0], dumps[-1]))
    shared = [prompt for prompt in first if prompt in last][:count]
    return [Sample(prompt, str(first[prompt]["gts"]), (first[prompt], last[prompt])) for prompt in shared]


def lines(sample: Sample, width: int = 80) -> Iterator[str]:
    """A sample for a terminal: the last lines (up to 3) of the prompt's last paragraph, and a line per answer."""
    yield from textwrap.wrap(" ".join(sample.prompt.strip().split("\n\n")[-1].split()), width)[-3:]
    if sample.truth:
        yield f"  {'right answer':16}  {_cut(sample.truth, width - 20)}"
    for answer in sample.answers:
        head = f"  step {answer['step']:4}  {_verdict(answer):5}  "
        yield head + _cut(" ".join(answer["output"].split()), width - len(head))


def markdown(samples: list[Sample]) -> str:
    """Samples in full. The fence around each text is longer than any in it."""
    blocks = []
    for sample in samples:
        blocks.append(_fenced(sample.prompt) + (f"\n\nRight answer: {sample.truth}" if sample.truth else ""))
        blocks += [f"Step {a['step']}, {_verdict(a)}:\n\n{_fenced(a['output'])}" for a in sample.answers]
    return "\n\n".join(blocks)


def _verdict(answer: dict[str, Any]) -> str:
    return VERDICTS.get(answer["score"], f"{answer['score']:.3g}")


def _fenced(text: str) -> str:
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}text\n{text.strip()}\n{fence}"


def _cut(text: str, width: int) -> str:
    half = (width - 5) // 2
    return text if len(text) <= width else f"{text[:half]} ... {text[-half:]}"


def _first_answers(path: Path, most: int = 1000) -> dict[str, dict[str, Any]]:
    answers: dict[str, dict[str, Any]] = {}
    with path.open(encoding="utf-8") as dump:
        for line, _ in zip(dump, range(most), strict=False):
            entry = json.loads(line)
            answers.setdefault(entry["input"], entry | {"step": int(path.stem)})
    return answers
