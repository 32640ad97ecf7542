"""Other interpreters: a new one that has imported nothing, and what the Python of an engine needs to find us."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
"""PYTHONPATH of a process that is not run by the project's own environment."""


def printed(code: str, *arguments: str) -> str:
    """Returns what the code prints; `sys.argv[1:]` are the arguments.

    Raises:
        subprocess.CalledProcessError: it ended with an error.
    """
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
