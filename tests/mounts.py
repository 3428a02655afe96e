"""A small disk for a test: a tmpfs that only the processes started in it see."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
UNSHARE = ["unshare", "--map-root-user", "--mount", "sh", "-c"]


def in_a_small_disk(disk: Path, size: str, *command, seconds: float = 300) -> subprocess.CompletedProcess:
    """Runs a command where the folder `disk` is a tmpfs of such a size ("64k", "40m"), owned by what may mount.

    Skips where this machine does not let a user mount one.
    """
    mount = f'mount -t tmpfs -o size={size} none "$0"'
    try:
        allowed = subprocess.run([*UNSHARE, mount, disk], capture_output=True).returncode == 0
    except OSError:
        allowed = False
    if not allowed:
        pytest.skip("this machine does not let a user mount a tmpfs (unshare --map-root-user --mount)")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [*UNSHARE, f'{mount} && exec "$@"', disk, *map(str, command)],
        env={**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
        cwd=ROOT, capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip


def python_in_a_small_disk(disk: Path, size: str, program: str, **options) -> subprocess.CompletedProcess:
    """The same for a program in Python, whose argument is the disk."""
    return in_a_small_disk(disk, size, sys.executable, "-c", program, disk, **options)
