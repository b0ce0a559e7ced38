"""The result of one check."""

from dataclasses import dataclass
from functools import partial
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Args:
        severity: "error": the run would stop, or not do what the configuration says. "warning": most likely not
            intended. "ok": worth knowing.
        check: short, stable name of the check.
        message: what was found, in one line.
        remedy: what to do about it; empty for "ok".
    """

    severity: Literal["ok", "warning", "error"]
    check: str
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.severity.upper():8}{self.check}: {self.message}{self.remedy and '; '}{self.remedy}"


error, warning, ok = partial(Finding, "error"), partial(Finding, "warning"), partial(Finding, "ok")
