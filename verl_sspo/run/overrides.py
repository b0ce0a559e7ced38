"""Settings as Hydra overrides, whatever stands in them."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

# What Hydra's override grammar reads as one unquoted string.
_PLAIN = re.compile(r"(?!(?:null|true|false|nan|inf)\Z)[A-Za-z_/][A-Za-z0-9_./@-]*", re.IGNORECASE)


def hydra_overrides(*settings: Mapping[str, Any]) -> list[str]:
    """Mappings as Hydra overrides, later ones over earlier ones: nested keys are joined by dots."""
    flat = {key: value for each in settings for key, value in _flat(each)}
    return [f"{key}={hydra_value(value)}" for key, value in flat.items()]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def hydra_value(value: Any) -> str:
    """A value in Hydra's grammar. What is no number, list or mapping is a text, e.g. a path."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(hydra_value(each) for each in value)}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{hydra_value(each)}' for key, each in value.items())}}}"
    return str(value) if _PLAIN.fullmatch(str(value)) else quoted(str(value))


def quoted(text: str) -> str:
    """A text in Hydra's quotes."""
    return QuotedString(text=text, quote=Quote.single).with_quotes()
