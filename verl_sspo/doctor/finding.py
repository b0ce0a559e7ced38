"""The result of one check."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Args:
        severity: "error": the run would stop, or compute something else than the configuration says. "warning": most
            likely not intended. "ok": worth knowing.
        check: short, stable name of the check.
        message: what is wrong, in one line.
        remedy: what to do about it; empty for "ok".
    """

    severity: Severity
    check: str
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.severity.upper():8}{self.check}: {self.message}{self.remedy and '; '}{self.remedy}"
