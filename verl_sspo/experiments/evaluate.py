"""Evaluates a model or a checkpoint on benchmark sets: greedy accuracy, avg@k and pass@k, with verl's own validation.

    verl-sspo evaluate Qwen/Qwen2.5-7B-Instruct --recipe math --samples 16
    verl-sspo evaluate runs/math/sspo/checkpoints/global_step_100 --recipe math --samples 16 \\
        --benchmarks data/math500/test.parquet data/aime24/test.parquet

Engine, prompts, lengths and judges are the recipe's, the benchmarks too unless named. Without a GPU the embedded engine
does it: --recipe quickstart, or hardware=cpu model=tiny as overrides. The folder --output then holds every answer
(problems.parquet) and the measures (metrics.json).
"""

import argparse
import json
import sys
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from verl_sspo.experiments.evaluation import PROBLEMS, Evaluation, evaluate
from verl_sspo.run import launch
from verl_sspo.run.compose import RECIPES, compose_config


def table(metrics: dict[str, float]) -> Table:
    """Benchmarks as rows, measures as columns."""
    keys = [key.split("/")[1:] for key in metrics]
    benchmarks, measures = (list(dict.fromkeys(part)) for part in zip(*keys, strict=True))
    result = Table("benchmark", *measures)
    for benchmark in benchmarks:
        values = [metrics.get(f"evaluation/{benchmark}/{measure}") for measure in measures]
        result.add_row(benchmark, *("-" if value is None else f"{value:.4g}" for value in values))
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder or name, or a checkpoint of verl (global_step_N)")
    parser.add_argument("--recipe", required=True, help="recipe of recipes/")
    parser.add_argument(
        "--benchmarks", nargs="+", default=[], help="parquet files; default: the recipe's data.val_files"
    )
    parser.add_argument("--samples", type=int, default=0, help="sampled answers a problem (default: none)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the samples (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="of the samples (default: %(default)s)")
    parser.add_argument("--no-greedy", action="store_true", help="leave the greedy answers out")
    parser.add_argument("--output", type=Path, default=Path("runs/evaluation"), help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of the recipe")
    arguments = parser.parse_intermixed_args(argv)
    console = Console(stderr=True)
    model, output = Path(arguments.model), arguments.output.resolve()
    if model.exists():
        model = model.resolve()
    benchmarks = [str(Path(file).resolve()) for file in arguments.benchmarks]
    try:
        if not benchmarks:
            files = compose_config(arguments.recipe, arguments.overrides, RECIPES).data.val_files
            benchmarks = [files] if isinstance(files, str) else list(files)
        evaluation = Evaluation(
            benchmarks, not arguments.no_greedy, arguments.samples, arguments.temperature, arguments.top_p
        )
        metrics = evaluate(
            model,
            evaluation,
            output,
            recipe=arguments.recipe,
            overrides=arguments.overrides,
            recipes=RECIPES,
            console=console,
        )
    except launch.TrainingFailedError as error:
        launch.report_failure(error, console)
        return 1
    except (ValueError, FileNotFoundError, FileExistsError, HydraException, OmegaConfBaseException) as error:
        parser.error(str(error))
    out = Console()
    out.print(table(metrics))
    out.print(f"every answer: {output / PROBLEMS}", highlight=False, soft_wrap=True)
    print(json.dumps(metrics), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
