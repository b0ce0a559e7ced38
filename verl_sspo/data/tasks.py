"""The data sets that `verl-sspo prepare-data` knows: where each comes from and how its rows are read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from verl_sspo.data import code, mathematics
from verl_sspo.data.prepare import Example, Split, Task, make_split
from verl_sspo.data.sources import open_source

_mathematics = partial(Task, read=mathematics.read_mathematics)
_code = partial(Task, ability="code", template="code")

TASKS = {
    "gsm8k": Task("openai/gsm8k", "openai/gsm8k", mathematics.read_gsm8k, config="main", splits=("train", "test")),
    "math": Task(
        "DigitalLearningGmbH/MATH-lighteval",
        "DigitalLearningGmbH/MATH-lighteval",
        mathematics.read_math,
        splits=("train", "test"),
    ),
    "deepmath": _mathematics("zwhe99/DeepMath-103K", "zwhe99/DeepMath-103K", splits=("train",)),
    "math500": _mathematics("HuggingFaceH4/MATH-500", "HuggingFaceH4/MATH-500"),
    "aime24": _mathematics("math-ai/aime24", "aime24"),
    "aime25": _mathematics("math-ai/aime25", "aime25"),
    # The 83 problems of AMC 12 2022 and 2023 with integer answers; their only split is called train.
    "amc": _mathematics("AI-MO/aimo-validation-amc", "amc", splits=("train",)),
    "minerva": _mathematics("math-ai/minervamath", "minerva"),
    "olympiadbench": Task("math-ai/olympiadbench", "olympiadbench", mathematics.read_olympiadbench),
    # --source also takes TACO-verified (likaixin/TACO-verified) and DeepCoder (agentica-org/DeepCoder-Preview-Dataset).
    "code": _code("PRIME-RL/Eurus-2-RL-Data", "taco", code.read_code, splits=("train", "validation", "test")),
    "humaneval": _code("openai/openai_humaneval", "openai_humaneval", code.read_humaneval),
    "mbpp": _code(
        "google-research-datasets/mbpp", "mbpp", code.read_mbpp, config="full", splits=("train", "validation", "test")
    ),
    # The hub loads this set with a script, which `datasets` does not run: download one of its files, such as
    # test6.jsonl, and pass it with --source.
    "livecodebench": _code("livecodebench/code_generation_lite", "livecodebench", code.read_livecodebench),
}
# name: the sets it is made of, in equal parts
MIXES = {"gsm8k_deepmath": ("gsm8k", "deepmath")}
LEVELS = frozenset("345")


def prepare(
    name: str,
    *,
    source: str | None = None,
    config: str | None = None,
    split: str | None = None,
    template: str | None = None,
    levels: frozenset[str] | None = LEVELS,
    keep_repeated: bool = True,
) -> list[Split]:
    """Reads one data set.

    Args:
        name: A key of `TASKS`.
        source: File, folder or hub id; the task's own by default.
        config: Configuration on the hub; the task's own by default.
        split: The only split to read; also the split of a single file.
        template: Name of a template, or a text with `{problem}` in it.
        levels: Levels of MATH to keep; None keeps all.
        keep_repeated: Keep rows that repeat the problem of an earlier row.

    Raises:
        SourceError: The source cannot be read.
        ValueError: There is no such template.
    """
    task = TASKS[name]
    messages = _template(task, template)
    read: Callable[[dict[str, Any]], Example] = partial(task.read, levels=levels) if name == "math" else task.read
    opened = open_source(
        source or task.source,
        # The task's configuration fits only its own data set, of which a folder may be a copy.
        config=config or (task.config if source in (None, task.source) or Path(source).is_dir() else None),
        splits=(split,) if split else task.splits,
        file_split=split or task.splits[0],
    )
    return [make_split(task, rows, each, read, messages, keep_repeated) for each, rows in opened.items()]


def _template(task: Task, template: str | None) -> list[dict[str, str]]:
    templates = code.TEMPLATES if task.ability == "code" else mathematics.TEMPLATES
    if template and template not in templates and "{problem}" not in template:
        raise ValueError(f"no template {template!r}: give one of {sorted(templates)}, or a text with {{problem}}")
    return templates.get(template or task.template, [{"role": "user", "content": template or ""}])
