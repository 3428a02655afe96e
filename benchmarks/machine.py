"""Where and when a benchmark ran, as each of its results says."""

import datetime
import os
import platform
from pathlib import Path


def describe_machine() -> dict[str, str]:
    """date, hardware (the CPU's) and python."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} CPU cores, {name}",
        "python": platform.python_version(),
    }
