"""Quickstart: a tiny model learns to carry, with SSPO, in verl's own main_ppo, without a GPU.

    verl-sspo quickstart algo=gspo task.seed=1

The same as `verl-sspo train quickstart`, with a picture of the learning curves, `curves.png`, in the run folder
runs/quickstart/ALGORITHM. The problems and the model are made once, in data/arithmetic.
"""

from verl_sspo.run import train
from verl_sspo.run.result import headline, read_metrics, short


def main(argv: list[str] | None = None) -> int:
    arguments = train.parse(argv, __doc__, task="quickstart")
    # Before the training: a missing extra is told at once, and after the arguments: `--help` stays fast.
    from verl_sspo.report.curves import draw

    if status := train.run(arguments):
        return status
    config = arguments.config
    caption = (
        f"{config.task.digits}-digit additions with worked steps; a tiny Qwen2 whose teacher forgot to carry. "
        f"{'; '.join(headline(config, 'quickstart')[:2])}; seed {config.task.seed}. "
        "Responses are sampled at temperature 1, for validation too."
    )
    title = f"{config.actor_rollout_ref.actor.policy_loss.loss_mode.upper()} teaches a tiny model to carry"
    picture = draw(read_metrics(arguments.run_dir), arguments.run_dir / "curves.png", title, caption)
    print(f"{'picture':13} {short(picture)}")
    return 0
