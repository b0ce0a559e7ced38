"""What a check has to say."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One result of one check.

    Args:
        severity: "error" stops a run or silently changes what it computes; "warning" is most likely not meant;
            "ok" is worth knowing.
        check: short name of the check, stable, for machines.
        message: what is the case.
        remedy: what to do about it; empty for "ok".
    """

    severity: Severity
    check: str
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"\n          {self.remedy}" if self.remedy else ""
        return f"{self.severity.upper():8}{self.check}: {self.message}{remedy}"
