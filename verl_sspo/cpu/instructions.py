"""What the CPU can do."""

import re
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")


def has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 numbers by instructions of its own; without them float32 is faster."""
    return CPU_INFO.exists() and bool(re.search("amx_bf16|avx512_bf16", CPU_INFO.read_text()))
