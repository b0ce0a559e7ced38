"""Rule-based rewards: one function that verl calls for every response.

Used as `reward.custom_reward_function.path=pkg://verl_sspo.rewards`.
"""

from __future__ import annotations

from typing import Any

#: What every call returns, whatever the task. verl takes the keys of the first row of a batch for all of them,
#: so a batch that mixes tasks needs one set of keys. Strings are written to the dumps and left out of the curves.
COLUMNS: dict[str, Any] = {
    "score": 0.0,  # what the advantage is computed from
    "acc": 0.0,  # 1.0 if the answer is right, whatever the score adds to or takes from it
    "format": 0.0,  # 1.0 if an answer was found where the task asks for it
    "timeout": 0.0,  # 1.0 if judging ran out of time
    "error": "",  # why the answer did not count; empty where it did
    "pred": None,  # the answer as text, for verl's majority vote; None where voting has no meaning
}

MATHEMATICS = (
    "openai/gsm8k",
    "lighteval/MATH",
    "DigitalLearningGmbH/MATH-lighteval",
    "HuggingFaceH4/MATH-500",
    "zwhe99/DeepMath-103K",
)
CODE = ("codecontests", "apps", "codeforces", "taco", "openai_humaneval", "mbpp")


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict | None = None, **kwargs: Any
) -> dict[str, Any]:
    """Score one response.

    Args:
        data_source: Name of the data set, as on the Hugging Face hub; it selects the task.
        solution_str: The response, without the prompt.
        ground_truth: What the data preparation stored under `reward_model.ground_truth`.
        extra_info: The row's `extra_info`; unused.
        **kwargs: `reward.custom_reward_function.reward_kwargs`.

    Returns:
        The keys of `COLUMNS`.

    Raises:
        ValueError: `data_source` belongs to no task.
    """
    if data_source == "arithmetic":
        from verl_sspo.rewards import arithmetic

        scored = arithmetic.score(solution_str, ground_truth)
    else:
        raise ValueError(f"no reward for data_source={data_source!r}")
    if unknown := scored.keys() - COLUMNS.keys():
        raise TypeError(f"the reward of {data_source!r} returned {sorted(unknown)}, which COLUMNS does not list")
    return COLUMNS | scored
