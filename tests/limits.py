"""A hang and a large allocation, made into errors."""

import contextlib
import resource
import signal
from collections.abc import Iterator
from pathlib import Path


class TooLong(BaseException):
    """Not an `Exception`, which the code under test might catch."""


@contextlib.contextmanager
def limits(seconds: int = 20, megabytes: int = 1024) -> Iterator[None]:
    """The body may take `seconds`, and `megabytes` of address space beyond what the process has."""

    def stop(*_):
        raise TooLong(f"more than {seconds} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + megabytes * 2**20, before[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)
