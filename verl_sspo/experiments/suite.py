"""Suites: the YAML files of recipes/suites, and the runs (cells) that they define."""

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

from verl_sspo.compose import hydra_overrides
from verl_sspo.experiments.evaluation import Evaluation

# The row of the model before training, in `Published.values`.
UNTRAINED = "untrained"


@dataclass
class Arm:
    """An algorithm, or a variant that every algorithm is run in."""

    title: str = MISSING  # its name in tables and legends
    overrides: dict[str, Any] = field(default_factory=dict)  # configuration keys, dotted or nested, and their values


@dataclass
class Measure:
    """A column of the result table."""

    metrics: list[str] = MISSING  # names of verl's metrics; several are averaged
    summary: str = "last"  # the value of a run: its "last", or the "mean" over all steps
    percent: bool = False  # show fractions in percent


@dataclass
class Published:
    """Numbers that others published, to show beside ours."""

    source: str = MISSING  # paper, version and table, and settings that differ from ours
    status: str = MISSING  # "published" if read in the paper itself, "restated" if read in a third party's text
    rows: dict[str, str] = field(default_factory=dict)  # titles of rows that the suite does not run itself
    # Algorithm, "untrained" or one of `rows` -> measure -> number as printed; leave out unknown ones.
    values: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Suite:
    """A suite file."""

    title: str = MISSING
    # What its results can and cannot tell; the first lines of its report.
    shows: str = MISSING
    shows_not: str = MISSING
    recipe: str = MISSING  # recipe of recipes/ that all cells run
    seeds: list[int] = MISSING  # one run per seed, algorithm and variant; runs with the same seed are paired
    seed_keys: list[str] = MISSING  # configuration keys that take the seed
    overrides: dict[str, Any] = field(default_factory=dict)  # for all cells
    trainer: str = "verl"  # or "plain", see `experiments.plain`
    # Every algorithm is run in each of these, e.g. learning rates.
    variants: dict[str, Arm] = field(default_factory=lambda: {"default": Arm("default")})
    algorithms: dict[str, Arm] = MISSING  # what is compared
    baseline: str = MISSING  # the algorithm that the others are compared with
    measures: dict[str, Measure] = MISSING  # columns of the result table, by title
    evaluation: Evaluation | None = None  # of the last checkpoints
    published: list[Published] = field(default_factory=list)
    staleness: bool = False  # the report also shows metrics over the lag of the rollout; for asynchronous modes


@dataclass(frozen=True)
class Cell:
    """One run of a suite."""

    suite: str  # its name
    variant: str
    algorithm: str
    seed: int
    recipe: str
    overrides: tuple[str, ...]  # Hydra overrides of main_ppo
    evaluation: Evaluation | None = None  # of its last checkpoint
    trainer: str = "verl"

    @property
    def name(self) -> str:
        """Its folder below that of the suite."""
        return f"{self.variant}/{self.algorithm}/seed{self.seed}"


def load_suite(path: Path) -> Suite:
    """Reads and checks a suite.

    Raises:
        FileNotFoundError: there is no such file; the message names the existing suites.
        ValueError: the file lacks something that a suite needs, or is inconsistent.
    """
    if not path.is_file():
        others = sorted(each.stem for each in path.parent.glob("*.yaml"))
        raise FileNotFoundError(f"there is no suite {path}; {path.parent} has {', '.join(others) or 'none'}")
    try:
        given = OmegaConf.load(path)
        if not isinstance(given, DictConfig):
            raise ValueError("a suite has keys, and this file is a list")
        # Variants of the file replace the default one.
        schema = Suite(variants={}) if "variants" in given else Suite()
        merged = OmegaConf.merge(OmegaConf.structured(schema), given)
        if missing := OmegaConf.missing_keys(merged):
            raise ValueError(f"{', '.join(sorted(missing))} must be set")
        suite = OmegaConf.to_object(merged)
        assert isinstance(suite, Suite)
        _check(suite)
    except (YAMLError, OSError) as error:
        raise ValueError(f"{path} is not a YAML file of a suite: {error}") from error
    except HydraException as error:
        raise ValueError(f"{path}: not valid as Hydra overrides: {error}") from error
    except (OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from error
    return suite


def _check(suite: Suite) -> None:
    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(message)

    def are(kind: type, values: list) -> bool:
        """Whether this is a list of `kind`, not empty: OmegaConf also accepts lists of lists."""
        return bool(values) and all(isinstance(value, kind) for value in values)

    for name in (*suite.algorithms, *suite.variants):
        allowed = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name)
        require(bool(allowed), f"{name!r} names a folder: letters, digits, . _ + - only")
    numbers = are(int, suite.seeds) and min(suite.seeds) >= 0 and len(suite.seeds) == len(set(suite.seeds))
    require(numbers, "seeds must be different numbers of at least 0")
    require(suite.trainer in ("verl", "plain"), f"trainer={suite.trainer!r} must be verl or plain")
    require(suite.trainer == "verl" or suite.evaluation is None, "trainer: plain leaves no checkpoint to evaluate")
    require(are(str, suite.seed_keys), "seed_keys must name the keys that take the seed")
    for cell in expand(suite, "suite", seeds=suite.seeds[:1]):
        OverridesParser.create().parse_overrides(list(cell.overrides))
    require(suite.baseline in suite.algorithms, f"baseline={suite.baseline!r} is not an algorithm of the suite")
    for title, measure in suite.measures.items():
        require(measure.summary in ("last", "mean"), f"measures.{title}.summary must be last or mean")
        require(are(str, measure.metrics), f"measures.{title}.metrics must be names of metrics")
    for published in suite.published:
        require(published.status in ("published", "restated"), f"status {published.status!r}: published or restated")
        for algorithm, values in published.values.items():
            known = {*suite.algorithms, *published.rows, UNTRAINED}
            require(algorithm in known, f"published: {algorithm!r} is neither an algorithm nor one of its rows")
            for title, value in values.items():
                require(title in suite.measures, f"published.{algorithm}: {title!r} is not a measure")
                require(isinstance(value, int | float | None), f"published.{algorithm}: {value!r} is not a number")


def expand(
    suite: Suite,
    name: str,
    *,
    algorithms: Collection[str] = (),
    variants: Collection[str] = (),
    seeds: Collection[int] = (),
) -> list[Cell]:
    """The cells of a suite, all algorithms of a seed before the next seed, so that finished runs are paired.

    Args:
        suite: the suite.
        name: its name, the folder of its runs.
        algorithms, variants, seeds: only these; empty means all.

    Raises:
        ValueError: a name that the suite does not have.
    """
    for kind, chosen, known in (("algorithm", algorithms, suite.algorithms), ("variant", variants, suite.variants)):
        if unknown := sorted(set(chosen) - set(known)):
            raise ValueError(f"{name} has no {kind} {', '.join(unknown)}: there are {', '.join(known)}")
    cells = []
    for seed, variant, algorithm in itertools.product(seeds or suite.seeds, suite.variants, suite.algorithms):
        if variant in (variants or suite.variants) and algorithm in (algorithms or suite.algorithms):
            arms = (suite.variants[variant].overrides, suite.algorithms[algorithm].overrides)
            # In Hydra the last override wins, but groups (algo=...) come before all values.
            overrides = hydra_overrides(suite.overrides, *arms, dict.fromkeys(suite.seed_keys, seed))
            cells.append(
                Cell(name, variant, algorithm, seed, suite.recipe, tuple(overrides), suite.evaluation, suite.trainer)
            )
    return cells
