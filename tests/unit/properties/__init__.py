"""Properties that must hold for any input. tests/unit/test_fuzz.py checks them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hypothesis.strategies import SearchStrategy


@dataclass(frozen=True)
class Property:
    """A property and the inputs for which it must hold.

    Args:
        check: raises if the property does not hold. It takes one keyword argument for each of `inputs`.
        inputs: strategies for the arguments.
        examples: number of inputs to try in a test.
        program: executable that the check needs, if any.
    """

    check: Callable[..., None]
    inputs: Mapping[str, SearchStrategy] = field(default_factory=dict)
    examples: int = 100
    program: str | None = None
