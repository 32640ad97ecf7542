"""`preft` in a process of its own, forked from one that has imported the libraries: importing them costs seconds."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from preft_cli.app import main

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["preft_cli.app", "preft_hf.training.train_run", "transformers.trainer", "datasets"])


class Preft:
    """A command that runs.

    Args:
        arguments: after `preft`
        cwd, env: as subprocess takes them
        input: what it reads
    """

    def __init__(
        self, *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None, input: str = ""
    ):
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("stdin", "stdout", "stderr")]
        self._files[0].write_text(input)
        self._arguments = list(map(str, arguments))
        given = (self._arguments, self._files, cwd or Path.cwd(), dict(os.environ if env is None else env))
        self._process = CONTEXT.Process(target=_main, args=given)
        self._process.start()

    def is_running(self) -> bool:
        return self._process.is_alive()

    def interrupt(self) -> None:
        """Does what Ctrl-C does."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGINT)

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Returns what it printed and its exit code.

        Raises:
            subprocess.TimeoutExpired: it was ended after so many seconds.
        """
        self._process.join(timeout)
        if self._process.is_alive():
            self._process.kill()
            raise subprocess.TimeoutExpired(self._arguments, timeout)
        assert self._process.exitcode is not None
        _, output, errors = (file.read_text() for file in self._files)
        self._folder.cleanup()
        return subprocess.CompletedProcess(self._arguments, self._process.exitcode, output, errors)


def preft(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """Returns what a command printed and its exit code; options as of Preft."""
    return Preft(*arguments, **options).wait()


def preft_from_nothing(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Returns the same of a new interpreter, which imports what the command needs when it needs it."""
    command = [sys.executable, "-W", "ignore", "-c", "from preft_cli.app import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def _main(arguments: list[str], files: list[Path], cwd: Path, env: dict[str, str]) -> None:
    for number, file in enumerate(files):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), number)
    # multiprocessing gives a process an empty one
    sys.stdin = os.fdopen(0, closefd=False)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    warnings.simplefilter("ignore")
    sys.argv = ["preft", *arguments]
    main()
