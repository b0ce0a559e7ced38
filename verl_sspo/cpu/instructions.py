"""The CPU's instructions."""

import re
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")


def has_bf16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16 numbers. Without them float32 is faster."""
    return CPU_INFO.exists() and bool(re.search("amx_bf16|avx512_bf16", CPU_INFO.read_text()))
