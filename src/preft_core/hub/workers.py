"""Threads for parallel downloads. Ctrl-C cancels those that have not started."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def worker_threads(num_threads: int) -> Iterator[ThreadPoolExecutor]:
    """Yields an executor and waits for its tasks at the end. An error, or Ctrl-C, cancels tasks that have not started.

    The executor's own context manager would run all of them first.
    """
    threads = ThreadPoolExecutor(num_threads)
    try:
        yield threads
    except BaseException:
        threads.shutdown(wait=False, cancel_futures=True)
        raise
    threads.shutdown()
