"""Runs the scripts as a person does, from the command line, in a directory of their own."""

import atexit
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# Just long enough for games of Breakout to be lost on the way: five lives take at least 120 steps.
NUM_ENVS, NUM_STEPS, UPDATES = 4, 48, 3
BATCH = NUM_ENVS * NUM_STEPS
TINY = (
    *("--num-envs", str(NUM_ENVS), "--num-steps", str(NUM_STEPS), "--total-timesteps", str(UPDATES * BATCH)),
    *("--num-minibatches", "2", "--update-epochs", "1", "--no-cuda"),
)
ROOM = ("--env-id", "MiniHack-Room-5x5-v0")  # a game takes at most 100 steps, one of River up to 350
OWN_FLAGS = {"puffer_ppo_minihack.py": ROOM, "puffer_vec_ppo_minihack.py": (*ROOM, "--num-workers", "2")}


class Run(NamedTuple):
    """What a run printed, and the directory it left things in."""

    stdout: str
    stderr: str
    returncode: int
    directory: Path

    def lines(self, start: str) -> list[str]:
        return [line for line in self.stdout.splitlines() if line.startswith(start)]

    def events(self) -> Any:
        # Here, as the core's tests do without TensorBoard
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (folder,) = (self.directory / "runs").iterdir()
        return EventAccumulator(str(folder)).Reload()

    def scalars(self, tag: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in self.events().Scalars(tag)]


def environment(**variables: str) -> dict[str, str]:
    """One thread each: sums in another order would not be bit-equal, and so little work gains nothing from more."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **variables}


def run(script: str, *flags: str, **variables: str) -> Run:
    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *flags],
        cwd=directory,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=110,
    )
    return Run(done.stdout, done.stderr, done.returncode, directory)


def heed_ctrl_c():
    """For `preexec_fn`: what a shell runs in the background, as these tests may be, ignores Ctrl-C from its start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@functools.cache
def tiny_run(script: str) -> Run:
    """Once for all tests that look at it."""
    return run(script, *TINY, *OWN_FLAGS.get(script, ()))
