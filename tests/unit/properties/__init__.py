"""What must hold whatever the input: checked by tests/unit/test_fuzz.py."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hypothesis.strategies import SearchStrategy


@dataclass(frozen=True)
class Property:
    """A property and the inputs that it must hold for.

    Args:
        check: raises for an input that it does not hold for; takes one keyword argument for each of `inputs`.
        inputs: where the arguments come from.
        examples: inputs to try in a test.
        program: executable without which it cannot be checked, if any.
    """

    check: Callable[..., None]
    inputs: Mapping[str, SearchStrategy] = field(default_factory=dict)
    examples: int = 100
    program: str | None = None
