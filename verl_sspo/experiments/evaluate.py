"""Evaluates a model or a checkpoint on benchmark sets: greedy accuracy, avg@k and pass@k, with verl's own validation.

    verl-sspo evaluate Qwen/Qwen2.5-7B-Instruct --recipe math --samples 16
    verl-sspo evaluate runs/math/sspo/checkpoints/global_step_100 --recipe math --samples 16 \\
        --benchmarks data/math500/test.parquet data/aime24/test.parquet
    verl-sspo evaluate MODEL --recipe quickstart data.val_max_samples=64       only the first 64 problems

Engine, prompts, lengths and graders are the recipe's; so are the benchmarks, unless --benchmarks names others. Without
a GPU use --recipe quickstart, or the overrides hardware=cpu model=tiny. The folder --output gets every answer
(problems.parquet) and the measures (metrics.json).
"""

import argparse
from pathlib import Path

from verl_sspo.cli import at_least, output_folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="verl-sspo evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="Hugging Face folder or name, or a checkpoint of verl (global_step_N)")
    parser.add_argument("--recipe", required=True, help="a recipe in recipes/")
    parser.add_argument(
        "--benchmarks", nargs="+", default=[], help="parquet files; default: the recipe's data.val_files"
    )
    parser.add_argument("--samples", type=at_least(0), default=0, help="sampled answers per problem (default: none)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the samples (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="of the samples (default: %(default)s)")
    parser.add_argument("--no-greedy", action="store_true", help="skip the greedy answers")
    parser.add_argument("--output", type=output_folder, default="runs/evaluation", help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", default=[], help="Hydra overrides of the recipe")
    arguments = parser.parse_intermixed_args(argv)

    import pandas as pd
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from rich.console import Console

    from verl_sspo.compose import RECIPES, compose_config
    from verl_sspo.doctor.environment import model_findings
    from verl_sspo.experiments.evaluation import PROBLEMS, Evaluation, evaluate, read_benchmarks
    from verl_sspo.run import launch

    console, output = Console(stderr=True), arguments.output
    model = Path(arguments.model).resolve() if Path(arguments.model).exists() else Path(arguments.model)
    for each in arguments.overrides:
        if "rollout.val_kwargs." in each or each.lstrip("+~").startswith(("data.val_files=", "trainer.resume_")):
            parser.error(f"{each}: an evaluation sets this itself, see --samples, --temperature, --top-p, --benchmarks")
    try:
        config = compose_config(arguments.recipe, arguments.overrides, RECIPES)
        files = arguments.benchmarks or config.data.val_files
        benchmarks = [files] if isinstance(files, str) else [str(file) for file in files]
        evaluation = Evaluation(
            [str(Path(file).resolve()) for file in benchmarks],
            not arguments.no_greedy,
            arguments.samples,
            arguments.temperature,
            arguments.top_p,
        )
        # Checked before the recipe's task is made, which may take minutes.
        if arguments.benchmarks:
            read_benchmarks(arguments.benchmarks)
        if not model.exists():
            config.actor_rollout_ref.model.path = arguments.model
            if wrong := [each.message for each in model_findings(config) if each.severity == "error"]:
                parser.error(wrong[0])
        settings = {"recipe": arguments.recipe, "overrides": arguments.overrides, "recipes": RECIPES}
        metrics = evaluate(model, evaluation, output, **settings, console=console)
    except launch.TrainingFailedError as error:
        launch.report_failure(error, console)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; the same command starts the evaluation again", highlight=False)
        return 130
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        parser.error(str(error))
    table = pd.Series(metrics)
    table.index = pd.MultiIndex.from_tuples([key.split("/")[1:] for key in metrics], names=["benchmark", "measure"])
    print(table.unstack(sort=False).to_markdown(tablefmt="simple", floatfmt=".4g", missingval="-"))
    print(f"every answer: {output / PROBLEMS}")
    return 0
