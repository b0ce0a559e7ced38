"""Rule-based rewards: one function that verl calls for every response.

Used as `reward.custom_reward_function.path=pkg://verl_sspo.rewards`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any

#: What every call returns, for every task. verl uses the keys of a batch's first row for all rows, so all tasks in a
#: mixed batch need the same keys. Strings appear in the dumps, not in the curves.
COLUMNS: dict[str, Any] = {
    "score": 0.0,  # what the advantage is computed from
    "acc": 0.0,  # 1.0 if the answer is right; partial credit and format reward do not change it
    "format": 0.0,  # 1.0 if an answer was found where the task asks for it
    "timeout": 0.0,  # 1.0 if grading ran out of time
    "ungradable": 0.0,  # 1.0 if the row has no grader, or a ground truth that its grader cannot read
    "error": "",  # why the answer did not count; empty where it did
    "pred": None,  # the answer as text, for verl's majority vote; None where voting has no meaning
}
_logger = logging.getLogger(__name__)
_shown: set[tuple[str, str]] = set()  # ungradable rows already logged

# Names from the hub and from verl's own data scripts. Names that start with "aime" are mathematics too.
MATHEMATICS = frozenset(
    {
        *("openai/gsm8k", "lighteval/MATH", "DigitalLearningGmbH/MATH-lighteval", "HuggingFaceH4/MATH-500", "math"),
        *("HuggingFaceH4/aime_2024", "math-ai/aime24", "math-ai/aime25", "amc", "minerva", "olympiadbench"),
        *("zwhe99/DeepMath-103K", "math_dapo", "math_dapo_reasoning", "numina_aops_forum", "numina_synthetic_math"),
        *("numina_amc_aime", "numina_synthetic_amc", "numina_cn_k12", "numina_olympiads"),
    }
)
# Prompts of these sets ask for a last line `Answer: 13`, which verl's own reward reads.
ANSWER_LINE = frozenset({"math", "math_dapo", "math_dapo_reasoning"})
CODE = frozenset(
    {
        *("apps", "codecontests", "codeforces", "taco", "livecodebench", "primeintellect", "openai_humaneval"),
        *("openai/openai_humaneval", "mbpp", "google-research-datasets/mbpp"),
    }
)
# verl passes these to every reward function if it also runs a reward model.
_REWARD_MODEL = frozenset({"reward_router_address", "reward_model_tokenizer"})


@cache
def _options(score: Callable[..., Any]) -> frozenset[str]:
    return frozenset(name for name, each in signature(score).parameters.items() if each.kind is each.KEYWORD_ONLY)


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict | None = None, **kwargs: Any
) -> dict[str, Any]:
    """Scores one response.

    A row that cannot be graded scores 0, counts as `ungradable` and is logged once. A bad row never ends a run.

    Args:
        data_source: Name of the data set, as on the Hugging Face hub; it selects the task.
        solution_str: The response, without the prompt.
        ground_truth: What the data preparation stored under `reward_model.ground_truth`.
        extra_info: The row's `extra_info`; its `index` names the row in the log.
        **kwargs: `reward.custom_reward_function.reward_kwargs`: the options of `mathematics.score` and `code.score`.
            Each task uses its own options, so one configuration works for a mix.

    Returns:
        A value for each key of `COLUMNS`.

    Raises:
        TypeError: An option that no task has.
        SandboxError: Model-written programs cannot run safely on this host.
    """
    from verl_sspo.rewards import code, mathematics

    known = _options(mathematics.score) | _options(code.score)
    if unknown := kwargs.keys() - known - _REWARD_MODEL:
        raise TypeError(f"unknown reward options {sorted(unknown)}; known: {sorted(known)}")
    try:
        return COLUMNS | _score(data_source, solution_str, ground_truth, kwargs)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        index = (extra_info or {}).get("index")
        if (row := (data_source, str(index))) not in _shown:
            _shown.add(row)
            _logger.warning("row %s of %s cannot be graded and scores 0: %s", index, data_source, error, exc_info=True)
        return COLUMNS | {"ungradable": 1.0, "error": f"ungradable: {error}"[:200]}


def _score(data_source: str, solution_str: str, ground_truth: Any, options: dict[str, Any]) -> dict[str, Any]:
    from verl_sspo.rewards import code, last_number, mathematics

    def chosen(score: Callable[..., Any]) -> dict[str, Any]:
        return {name: value for name, value in options.items() if name in _options(score)}

    if data_source == "arithmetic" or data_source.startswith("word_problems/"):
        return dict(last_number.score(solution_str, ground_truth))
    if data_source in MATHEMATICS or data_source.startswith("aime"):
        answer_line = data_source in ANSWER_LINE or data_source.startswith("aime")
        return mathematics.score(solution_str, ground_truth, answer_line, **chosen(mathematics.score))
    if data_source in CODE:
        return code.score(solution_str, ground_truth, **chosen(code.score))
    raise ValueError(
        f"no reward for data_source={data_source!r}; known: 'arithmetic', names that start with 'word_problems/' or "
        f"'aime', {sorted(MATHEMATICS)} and {sorted(CODE)}"
    )
