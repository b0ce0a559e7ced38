"""Quickstart: a model learns with SSPO, in verl's own main_ppo, without a GPU.

    verl-sspo quickstart                            a tiny model learns to carry
    verl-sspo quickstart --model smollm2-135m       a pretrained language model learns to solve word problems
    verl-sspo quickstart algo=gspo task.seed=1      with Hydra overrides

Makes the problems and the model in data/ and models/ if they are missing, trains like `verl-sspo train`, and shows
answers from before and after training. The run folder, runs/TASK/ALGORITHM, also gets the learning curves
(`curves.png`) and a report with curves and answers (`report.md`).
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from verl_sspo.cpu.instructions import has_bf16
from verl_sspo.run import train
from verl_sspo.run.result import headline, read_metrics, short


@dataclass(frozen=True)
class Lesson:
    """What a model learns.

    Attributes:
        task: its recipe.
        plan: what the command will do, and how long it takes.
        title, caption: of the picture; format strings, the title with `loss`, the caption with `config`.
        prepare: makes what the recipe does not make itself; returns an exit status.
    """

    task: str
    plan: str
    title: str
    caption: str
    prepare: Callable[[], int] = lambda: 0


def prepare_word_problems() -> int:
    from verl_sspo.data import command, language_model

    if status := language_model.main(["smollm2-135m", "--end-at-line-break"]):
        return status
    return 0 if Path("data/word-problems/train.parquet").exists() else command.main(["word-problems"])


LESSONS = {
    "tiny": Lesson(
        task="quickstart",
        plan="Teaches a tiny model to add numbers and to forget the carry, then trains it to carry: 24 steps.\n"
        "Measured on 2 CPU cores: 5 minutes; on a busy machine twice that.",
        title="{loss} teaches a tiny model to carry",
        caption="{config.task.digits}-digit additions with worked steps; a tiny Qwen2 whose teacher forgot to carry.",
    ),
    "smollm2-135m": Lesson(
        task="word_problems",
        plan="Prepares SmolLM2-135M-Instruct (0.5 GB) and one-step word problems, then trains it: 12 steps.\n"
        "Estimate: 9 minutes on 2 idle CPU cores with bf16 instructions, 15 without, twice that on a busy machine. "
        "Needs 9 GB of memory.",
        title="{loss} teaches SmolLM2-135M to solve word problems",
        caption="One-step word problems after one worked example; SmolLM2-135M-Instruct.",
        prepare=prepare_word_problems,
    ),
}


def main(argv: list[str] | None = None) -> int:
    arguments = train.parse(argv, __doc__, {model: lesson.task for model, lesson in LESSONS.items()})
    # After parsing, so that `--help` is fast, and before training, so that a missing extra is reported at once.
    from verl_sspo.report import samples
    from verl_sspo.report.curves import draw

    lesson = LESSONS[arguments.model]
    print(lesson.plan, file=sys.stderr)
    if status := lesson.prepare():
        return status
    own_hardware = any(each.startswith("hardware=") for each in arguments.overrides)
    if arguments.model != "tiny" and has_bf16() and not own_hardware:
        arguments.overrides.append("hardware=cpu_bf16")
    if status := train.run(arguments):
        return status
    config, run_dir = arguments.config, arguments.run_dir
    caption = (
        f"{lesson.caption.format(config=config)} {'; '.join(headline(config, lesson.task)[:2])}; "
        f"seed {config.data.seed}. Responses are sampled at temperature 1, for validation too."
    )
    title = lesson.title.format(loss=config.actor_rollout_ref.actor.policy_loss.loss_mode.upper())
    picture = draw(read_metrics(run_dir), run_dir / "curves.png", title, caption)
    report = run_dir / "report.md"
    answers = samples.read_samples(Path(config.trainer.validation_data_dir), count=12)
    report.write_text(
        f"# {title}\n\n{caption}\n\n![{title}]({picture.name})\n\n"
        f"## Answers to the first {len(answers)} validation problems\n\n{samples.markdown(answers)}\n"
    )
    print(f"{'picture':13} {short(picture)}\n{'report':13} {short(report)}")
    return 0
