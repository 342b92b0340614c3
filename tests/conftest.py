"""What measures time runs alone, also where pytest-xdist runs other tests beside it."""

import contextlib
import fcntl
import os
from pathlib import Path

import pytest


@contextlib.contextmanager
def locked(name, how):
    """Hold a lock that is a file of this directory, so that nothing has to be removed afterwards."""
    with Path(__file__).with_name(name).open() as file:
        fcntl.flock(file, how)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing would not do where a process left behind has the file open too


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest-timeout, which is not to count the wait
def pytest_runtest_protocol(item):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    how = fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH
    with contextlib.ExitStack() as turn:
        with locked("conftest.py", fcntl.LOCK_EX):  # in turn, or those who share would let nobody in who does not
            turn.enter_context(locked("envs.py", how))
        return (yield)
