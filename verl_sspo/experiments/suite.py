"""What a suite is: the YAML files of recipes/suites, and the runs (cells) they stand for."""

import itertools
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from verl_sspo.experiments.evaluation import Evaluation
from verl_sspo.run.overrides import hydra_overrides

# The row of the model before training, in `Published.values`.
UNTRAINED = "untrained"

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass
class Arm:
    """An algorithm, or a variant that every algorithm is run in.

    Args:
        title: its name in tables and legends.
        overrides: configuration keys, dotted or nested, and their values.
    """

    title: str = MISSING
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass
class Measure:
    """A column of the result table.

    Args:
        metrics: names in verl's metrics; the mean of several.
        summary: what stands for a run: its "last" value, or the "mean" over all steps.
        percent: show shares in percent.
    """

    metrics: list[str] = MISSING
    summary: str = "last"
    percent: bool = False


@dataclass
class Published:
    """Numbers that others printed, to stand beside ours.

    Args:
        source: paper, version and table, and settings that differ from ours.
        status: "published" if read in the paper itself, "restated" if read with a third party.
        rows: titles of rows that the suite does not run itself.
        values: algorithm, "untrained" or one of `rows` -> measure -> number as printed; what is unknown is left out.
    """

    source: str = MISSING
    status: str = MISSING
    rows: dict[str, str] = field(default_factory=dict)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Suite:
    """A suite file.

    Args:
        title: a line.
        shows, shows_not: what its results can and cannot tell; the first lines of its report.
        recipe: recipe of recipes/ that all cells run.
        seeds: one run each for every algorithm and variant; runs of one seed are paired.
        seed_keys: configuration keys that take the seed.
        overrides: for all cells.
        variants: what every algorithm is run in, e.g. learning rates; one without overrides if left out.
        algorithms: the arms that are compared.
        baseline: the algorithm that paired differences are taken against.
        measures: columns of the result table, by title.
        evaluation: of the last checkpoints, or null.
        published: numbers of others.
    """

    title: str = MISSING
    shows: str = MISSING
    shows_not: str = MISSING
    recipe: str = MISSING
    seeds: list[int] = MISSING
    seed_keys: list[str] = MISSING
    overrides: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, Arm] = field(default_factory=lambda: {"default": Arm("default")})
    algorithms: dict[str, Arm] = MISSING
    baseline: str = MISSING
    measures: dict[str, Measure] = MISSING
    evaluation: Evaluation | None = None
    published: list[Published] = field(default_factory=list)


@dataclass(frozen=True)
class Cell:
    """One run of a suite.

    Args:
        suite: name of the suite.
        variant, algorithm, seed: its place in it.
        recipe: recipe of recipes/.
        overrides: Hydra overrides of main_ppo.
        evaluation: of its last checkpoint, or None.
    """

    suite: str
    variant: str
    algorithm: str
    seed: int
    recipe: str
    overrides: tuple[str, ...]
    evaluation: Evaluation | None = None

    @property
    def name(self) -> str:
        """Its folder below that of the suite."""
        return f"{self.variant}/{self.algorithm}/seed{self.seed}"


def load_suite(path: Path) -> Suite:
    """Reads and checks a suite.

    Raises:
        FileNotFoundError: there is no such file; the message names the suites there are.
        ValueError: the file does not say what a suite needs, or says something that does not fit together.
    """
    if not path.is_file():
        others = sorted(each.stem for each in path.parent.glob("*.yaml"))
        raise FileNotFoundError(f"there is no suite {path}; {path.parent} has {', '.join(others) or 'none'}")
    try:
        given = OmegaConf.load(path)
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file of a suite: {error}") from error
    if not isinstance(given, DictConfig):
        raise ValueError(f"{path} holds a list: a suite has keys")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Suite), given)
        missing = OmegaConf.missing_keys(merged)
        if missing:
            raise ValueError(f"{path}: {', '.join(sorted(missing))} must be set")
        if "variants" in given:
            merged.variants = OmegaConf.merge(
                {name: OmegaConf.structured(Arm) for name in given.variants}, given.variants
            )
        suite = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {error}") from error
    assert isinstance(suite, Suite)
    _check(suite, path)
    return suite


def _check(suite: Suite, path: Path) -> None:
    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"{path}: {message}")

    for name in (*suite.algorithms, *suite.variants):
        require(bool(_FOLDER_NAME.fullmatch(name)), f"{name!r} names a folder: letters, digits, . _ + - only")
    lists: dict[str, tuple[list[Any], type]] = {"seeds": (suite.seeds, int), "seed_keys": (suite.seed_keys, str)}
    lists |= {f"measures.{title}.metrics": (measure.metrics, str) for title, measure in suite.measures.items()}
    for name, (elements, kind) in lists.items():  # OmegaConf lets lists of lists pass
        require(all(isinstance(each, kind) for each in elements), f"{name} must be a list of {kind.__name__}")
    settings = [arm.overrides for arm in (*suite.variants.values(), *suite.algorithms.values())]
    for each in (suite.overrides, *settings, dict.fromkeys(suite.seed_keys, 0)):
        try:
            OverridesParser.create().parse_overrides(hydra_overrides(each))
        except HydraException as error:
            raise ValueError(f"{path}: no overrides for Hydra: {error}") from error
    require(bool(suite.seeds) and len(set(suite.seeds)) == len(suite.seeds), "seeds must be different numbers")
    require(bool(suite.seed_keys), "seed_keys must name the keys that take the seed, or all seeds run the same")
    require(suite.baseline in suite.algorithms, f"baseline={suite.baseline!r} is no algorithm of the suite")
    for title, measure in suite.measures.items():
        require(measure.summary in ("last", "mean"), f"measures.{title}.summary must be last or mean")
    for published in suite.published:
        require(published.status in ("published", "restated"), f"status {published.status!r}: published or restated")
        for algorithm, values in published.values.items():
            known = {*suite.algorithms, *published.rows, UNTRAINED}
            require(algorithm in known, f"published: {algorithm!r} is neither an algorithm nor one of its rows")
            for column, value in values.items():
                require(column in suite.measures, f"published.{algorithm}: {column!r} is no measure")
                require(value is None or isinstance(value, int | float), f"published.{algorithm}: {value!r}")


def expand(
    suite: Suite,
    name: str,
    *,
    algorithms: Collection[str] = (),
    variants: Collection[str] = (),
    seeds: Collection[int] = (),
) -> list[Cell]:
    """The cells of a suite, all algorithms of a seed before the next seed, so that what is done is paired.

    Args:
        suite: the suite.
        name: its name, the folder of its runs.
        algorithms, variants, seeds: only these; all of them where empty.

    Raises:
        ValueError: a name that the suite does not have.
    """
    for kind, chosen, known in (("algorithm", algorithms, suite.algorithms), ("variant", variants, suite.variants)):
        if unknown := sorted(set(chosen) - set(known)):
            raise ValueError(f"{name} has no {kind} {', '.join(unknown)}: there are {', '.join(known)}")
    return [
        Cell(
            suite=name,
            variant=variant,
            algorithm=algorithm,
            seed=seed,
            recipe=suite.recipe,
            # The last one wins in Hydra, except for groups (algo=...), which come before all values.
            overrides=tuple(
                hydra_overrides(
                    suite.overrides,
                    suite.variants[variant].overrides,
                    suite.algorithms[algorithm].overrides,
                    dict.fromkeys(suite.seed_keys, seed),
                )
            ),
            evaluation=suite.evaluation,
        )
        for seed, variant, algorithm in itertools.product(
            seeds or suite.seeds,
            [each for each in suite.variants if not variants or each in variants],
            [each for each in suite.algorithms if not algorithms or each in algorithms],
        )
    ]
