"""Settings as Hydra overrides, whatever stands in them."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

# What Hydra's override grammar reads as one unquoted string.
_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./@-]*")


def hydra_overrides(*settings: Mapping[str, Any]) -> list[str]:
    """Mappings as Hydra overrides, later ones over earlier ones: nested keys are joined by dots."""
    flat: dict[str, Any] = {}
    for each in settings:
        flat.update(_flat(each))
    return [f"{key}={hydra_value(value)}" for key, value in flat.items()]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def hydra_value(value: Any) -> str:
    """A value in Hydra's grammar; what is no number, list or mapping is a text, e.g. a path."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(hydra_value(each) for each in value)}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{hydra_value(each)}' for key, each in value.items())}}}"
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in ("null", "true", "false", "nan", "inf"):
        return text
    return quoted(text)


def quoted(text: str) -> str:
    """A text in Hydra's quotes."""
    # A backslash is one there, except before a quote.
    escaped = re.sub(r"\\*('|\Z)", lambda found: found[0][:-1] * 2 + "\\'" if found[1] else found[0] * 2, text)
    return f"'{escaped}'"
