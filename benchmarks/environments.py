"""What the benchmarks step: from environments that cost nothing to real games."""

import os
import time
from collections.abc import Callable

import gymnasium
import numpy as np
from gymnasium import spaces

NETHACK_KEYS = ("glyphs", "chars", "colors", "specials", "blstats", "message", "tty_chars", "tty_colors", "tty_cursor")


class NoOp(gymnasium.Env):
    """Does nothing, for ever: what is left is the vectorizer's own cost."""

    observation_space, action_space = spaces.Box(0, 255, (64,), np.uint8), spaces.Discrete(4)
    observation = np.zeros(64, np.uint8)

    def reset(self, *, seed=None, options=None):
        """Return the one observation."""
        return self.observation, {}

    def step(self, action):
        """Return the one observation, and no reward."""
        return self.observation, 0.0, False, False, {}


class Spin(NoOp):
    """Keeps its core busy for 100 us a step on average, or for exponentially distributed times of that mean.

    An exponential distribution's standard deviation is its mean: a spread of 100 %. With `slow_reset`, a step in 100
    ends the episode, and its reset takes as long as 100 steps. Times are of the processor, not of the clock: an
    environment that waits for its core does no work meanwhile, and must not seem to.
    """

    mean = 100e-6

    def __init__(self, spread: bool = False, slow_reset: bool = False):
        self.spread, self.slow_reset = spread, slow_reset

    def reset(self, *, seed=None, options=None):
        """Draw the times of the coming steps, anew if there is a seed."""
        super(NoOp, self).reset(seed=seed)
        if seed is not None:
            draws = self.np_random.exponential(self.mean, 1000) if self.spread else np.full(1000, self.mean)
            self.times, self.ends = draws.tolist(), (self.np_random.random(1009) < 1 / 100).tolist()
            self.steps = 0
        elif self.slow_reset:
            _spin(100 * self.mean)
        return self.observation, {}

    def step(self, action):
        """Take the time that is due."""
        self.steps += 1
        _spin(self.times[self.steps % 1000])
        return self.observation, 0.0, self.slow_reset and self.ends[self.steps % 1009], False, {}


def _spin(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


class Slow(NoOp):
    """Takes 5 ms a step on average, exponentially distributed, and 50 steps an episode; `spend` takes the time."""

    def __init__(self, spend: Callable[[float], None]):
        self.spend = spend

    def reset(self, *, seed=None, options=None):
        """Begin to count."""
        super(NoOp, self).reset(seed=seed)
        self.steps = 0
        return self.observation, {}

    def step(self, action):
        """Take some time."""
        self.steps += 1
        self.spend(self.np_random.exponential(5e-3))
        return self.observation, 0.0, False, self.steps == 50, {}


def working() -> gymnasium.Env:
    """Return one that keeps its core busy."""
    return Slow(_spin)


def waiting() -> gymnasium.Env:
    """Return one that waits, as for a simulator on another machine."""
    return Slow(time.sleep)


def cartpole() -> gymnasium.Env:
    """Return gymnasium's CartPole."""
    return gymnasium.make("CartPole-v1")


def breakout() -> gymnasium.Env:
    """Return Breakout behind this project's one wrapper."""
    from atari_wrappers import AtariWrapper

    return AtariWrapper(gymnasium.make("BreakoutNoFrameskip-v4"))


def bare_minihack() -> gymnasium.Env:
    """Return a task of MiniHack as it is; it observes nine arrays, 12.6 kB in all."""
    import minihack  # noqa: F401  makes its tasks known to gymnasium

    return gymnasium.make("MiniHack-River-v0", observation_keys=NETHACK_KEYS)


def minihack() -> gymnasium.Env:
    """Return that task behind this project's one wrapper."""
    from nethack_wrappers import NetHackWrapper

    return NetHackWrapper(bare_minihack())


def spread():
    """Return a game of PettingZoo for three agents."""
    os.environ["PYGAME_HIDE_SUPPORT_PROMPT"] = "1"
    from mpe2 import simple_spread_v3

    return simple_spread_v3.parallel_env()
