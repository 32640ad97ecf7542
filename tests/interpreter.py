"""Code in a new interpreter, which has imported nothing."""

import subprocess
import sys


def printed(code: str, *arguments: str) -> str:
    """Returns what the code prints; `sys.argv[1:]` are the arguments.

    Raises:
        subprocess.CalledProcessError: it ended with an error.
    """
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
