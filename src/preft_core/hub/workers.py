"""Threads for downloads, several at once, that do not outlive a Ctrl-C by more than what each is at."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def worker_threads(num_threads: int) -> Iterator[ThreadPoolExecutor]:
    """Yields an executor and waits at the end for its tasks. An error, or Ctrl-C, drops those that have not begun.

    The executor's own `with` would run all of them first.
    """
    threads = ThreadPoolExecutor(num_threads)
    try:
        yield threads
    except BaseException:
        threads.shutdown(wait=False, cancel_futures=True)
        raise
    threads.shutdown()
