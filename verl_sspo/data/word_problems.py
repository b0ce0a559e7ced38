"""Generates word problems of one or two steps: a task that a small pretrained language model learns in minutes.

The prompt is plain text with one worked example, and the answer ends at the first line break:

    Question: Ann has 5 pens and buys 2 more. How many pens does Ann have now?
    Answer: 5 + 2 = 7

    Question: Tom has 12 apples and gives away 4. How many apples are left?
    Answer:

The reward is 1 if the last number of the response is right (`verl_sspo.rewards.last_number`). `data_source` is
`word_problems/OPERATION`, so that verl's validation reports the accuracy of each operation.

verl applies the tokenizer's chat template to every prompt. For plain text a recipe sets a template that adds nothing
and data.filter_overlong_prompts=false, since that filter uses the tokenizer's own template:

    actor_rollout_ref.model.custom_chat_template: "{% for message in messages %}{{ message.content }}{% endfor %}"

verl has no setting for stop words, so the model's generation_config.json lists the line break in `eos_token_id`.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from verl_sspo.data.prepare import Split
from verl_sspo.data.schema import make_row

TASK = "word-problems"
DATA_SOURCE = "word_problems"
EXAMPLE = "Question: Ann has 5 pens and buys 2 more. How many pens does Ann have now?\nAnswer: 5 + 2 = 7\n\n"
TRAIN, VALIDATION = 2048, 256
NAMES = "Tom Mia Ben Eva Sam Lea Max Ida Leo Zoe Jon Amy".split(" ")  # noqa: SIM905
THINGS = "apples coins pens books cards shells stamps marbles eggs stickers".split(" ")  # noqa: SIM905

# Each operation: stories, questions, and the result for `x` and `n`.
ADD = (
    ("{name} has {x} {things} and buys {n} more.", "{name} has {x} {things} and finds {n} more."),
    ("How many {things} does {name} have now?", "How many {things} does {name} have in all?"),
    lambda x, n: x + n,
)
SUBTRACT = (
    ("{name} has {x} {things} and gives away {n}.", "{name} has {x} {things} and loses {n}."),
    ("How many {things} are left?", "How many {things} does {name} still have?"),
    lambda x, n: x - n,
)
MULTIPLY = (
    ("{name} has {n} boxes with {x} {things} in each.", "{name} fills {n} bags with {x} {things} each."),
    ("How many {things} does {name} have?", "How many {things} are there in all?"),
    lambda x, n: x * n,
)
Operation = tuple[tuple[str, ...], tuple[str, ...], Callable[[int, int], int]]
OPERATIONS: dict[str, Operation] = {"addition": ADD, "subtraction": SUBTRACT, "multiplication": MULTIPLY}
SECOND = {"addition": "Then {name} gets {n} more.", "subtraction": "Then {name} sells {n}."}
# level: (steps, largest number, largest number of boxes)
LEVELS = {"one-step": (1, 20, 9), "two-steps": (2, 20, 9), "larger-numbers": (1, 500, 20)}


def problem(level: str, operation: str, rng: random.Random) -> tuple[str, int]:
    """One problem and its answer. A second step adds or subtracts."""
    steps, largest, boxes = LEVELS[level]
    stories, questions, result = OPERATIONS[operation]
    x = rng.randint(2, largest)
    n = rng.randint(2, boxes if operation == "multiplication" else largest)
    if operation == "subtraction":
        x, n = max(x, n), min(x, n)
    words = {"name": rng.choice(NAMES), "things": rng.choice(THINGS)}
    story, answer = rng.choice(stories).format(x=x, n=n, **words), result(x, n)
    if steps == 2:
        operation = "addition" if answer < 2 else rng.choice(list(SECOND))
        n = rng.randint(2, largest if operation == "addition" else min(answer, largest))
        story += " " + SECOND[operation].format(n=n, **words)
        questions, answer = OPERATIONS[operation][1], OPERATIONS[operation][2](answer, n)
    return f"{story} {rng.choice(questions).format(**words)}", answer


def make_splits(levels: list[str], seed: int) -> list[Split]:
    """2,048 training and 256 validation problems, all different, with every level and operation equally often."""
    rng = random.Random(seed)
    drawn: dict[str, tuple[str, int]] = {}  # problem: operation, answer
    turns = [(level, operation) for level in levels for operation in OPERATIONS]
    while len(drawn) < TRAIN + VALIDATION:
        level, operation = turns[len(drawn) % len(turns)]
        text, answer = problem(level, operation, rng)
        drawn.setdefault(text, (operation, answer))
    items = list(drawn.items())
    splits = [Split("train"), Split("val")]
    for split, part in zip(splits, (items[:TRAIN], items[TRAIN:]), strict=True):
        split.rows = [
            make_row(
                data_source=f"{DATA_SOURCE}/{operation}",
                prompt=[{"role": "user", "content": f"{EXAMPLE}Question: {text}\nAnswer:"}],
                ability="math",
                ground_truth=str(answer),
                split=split.name,
                index=index,
            )
            for index, (text, (operation, answer)) in enumerate(part)
        ]
    return splits
