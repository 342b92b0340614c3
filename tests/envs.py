"""Tiny deterministic environments, whose every output can be worked out by hand."""

import copy
import os
import random
import re
import signal
import sys
import time

import gymnasium
import numpy as np
from gymnasium import spaces

import puffer_core


class Counter(gymnasium.Env):
    """Observes (last seed, episode, step of the episode, sum of the actions, a random draw); rewards step + action / 8.

    Episodes have `length` steps (a list: in turn) and then truncate or terminate; `ends="both"` does both at once.
    """

    observation_space = spaces.Box(-(2**40), 2**40, (5,), np.int64)
    action_space = spaces.Discrete(5)

    def __init__(self, length=3, ends="terminate", delay=0.0):
        self.lengths, self.ends, self.delay = [length] if isinstance(length, int) else length, ends, delay
        self.seed, self.episode, self.tag = -1, -1, None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.episode = self.seed if seed is None else seed, self.episode + 1
        self.steps, self.total = 0, 0
        return self._observation(), {"began": self.episode} | (options or {})

    def step(self, action):
        time.sleep(self.delay) if self.delay else None
        self.steps, self.total = self.steps + 1, self.total + int(action)
        over = self.steps >= self.lengths[self.episode % len(self.lengths)]
        terminated, truncated = over and self.ends != "truncate", over and self.ends != "terminate"
        return self._observation(), self.steps + action / 8, terminated, truncated, {"steps": self.steps}

    def _observation(self):
        draw = self.np_random.integers(1000)
        return np.array([self.seed, self.episode, self.steps, self.total, draw], np.int64)

    def pid(self):
        """For `call`: the process that it lives in."""
        return os.getpid()

    def plus(self, number, scale=1):
        """For `call`."""
        return (self.seed + number) * scale


class NoOp(gymnasium.Env):
    """Does nothing, for ever."""

    observation_space = spaces.Box(0, 255, (4,), np.uint8)
    action_space = spaces.Discrete(2)
    observation = np.zeros(4, np.uint8)

    def reset(self, *, seed=None, options=None):
        return self.observation, {}

    def step(self, action):
        return self.observation, 0.0, False, False, {}


class Nested(gymnasium.Env):
    """Nested observations of many dtypes (with padding between them) and nested discrete actions with starts."""

    observation_space = spaces.Dict(
        {
            "flag": spaces.MultiBinary(3),
            "inner": spaces.Dict(
                {"position": spaces.Box(-9, 9, (), np.float32), "small": spaces.Box(0, 255, (3,), np.uint8)}
            ),
            "pair": spaces.Tuple([spaces.Discrete(9, start=-4), spaces.Box(0, 2000, (2, 2), np.float64)]),
        }
    )
    action_space = spaces.Dict(
        {
            "move": spaces.Discrete(3, start=-1),
            "rest": spaces.Tuple([spaces.MultiBinary(2), spaces.MultiDiscrete([2, 4])]),
        }
    )

    def __init__(self, length=4):
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observation(0), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action} is not in {self.action_space}"
        self.steps += 1
        bits, numbers = action["rest"]
        value = action["move"] * 100 + int(bits @ [10, 20]) + int(numbers @ [1, 2])
        return self._observation(value), float(value), False, self.steps == self.length, {"value": value}

    def _observation(self, value):
        draw = self.np_random.random()
        return {
            "flag": np.array([value % 2, self.steps % 2, 1], np.int8),
            "inner": {"position": np.float32(draw), "small": np.full(3, self.steps, np.uint8)},
            "pair": (self.steps % 9 - 4, np.array([[value, draw], [self.steps, 2.0]])),
        }


class Recycling(gymnasium.Env):
    """Fills the same observation, array and info dict again and again, at a reset too."""

    observation_space = spaces.Dict({"a": spaces.Box(0, 99, (3,), np.int32), "b": spaces.Box(0, 99, (2,), np.uint8)})
    action_space = spaces.Discrete(2)

    def __init__(self, length=3):
        self.length, self.steps, self.info = length, 0, {"steps": 0, "trace": np.zeros(2, np.int64)}
        self.observation = {"a": np.zeros(3, np.int32), "b": np.zeros(2, np.uint8)}

    def _fill(self, steps):
        self.steps = self.info["steps"] = steps
        for array in (*self.observation.values(), self.info["trace"]):
            array[:] = 10 + steps
        return self.observation

    def reset(self, *, seed=None, options=None):
        return self._fill(0), self.info

    def step(self, action):
        return self._fill(self.steps + 1), 1.0, self.steps == self.length, False, self.info


class ArrayReward(Counter):
    """Returns rewards and terminations as arrays of one element, as some environments do."""

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, np.array([reward], np.float32), np.array([terminated]), np.bool_(truncated), info


class Crashing(Counter):
    """Fails in `where` ("constructor", "reset" or "step"), after it has survived `after` calls, as `how` says."""

    def __init__(self, where="step", how="raise", after=0, length=1000):
        super().__init__(length)
        self.where, self.how, self.after = where, how, after
        self._fail("constructor")

    def _fail(self, where):
        if where != self.where:
            return
        self.after -= 1
        if self.after >= 0:
            return
        if self.how == "raise":
            raise ZeroDivisionError(f"the {where} divides by zero")
        if self.how == "exit":
            os._exit(3)
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "leave":
            sys.exit("the environment leaves")
        while self.how == "hang":
            time.sleep(1)
        while self.how == "spin":
            pass
        if self.how == "lock up":
            re.match("(a+)+$", "a" * 99 + "b")  # backtracks for years, and lets no other thread run

    def reset(self, *, seed=None, options=None):
        self._fail("reset")
        return super().reset(seed=seed, options=options)

    def step(self, action):
        self._fail("step")
        return super().step(action)


class Stubborn(Crashing):
    """Hangs in a step and cannot be terminated, only killed."""

    def __init__(self):
        super().__init__("step", "hang")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class GlobalRandom(Counter):
    """Draws from the global generators, as old environments do."""

    observation_space = spaces.Box(0, 1, (2,), np.float64)

    def _observation(self):
        return np.array([np.random.random(), random.random()])


class Marker(Counter):
    """Appends a line to a file when it is constructed, and when it is closed."""

    def __init__(self, path, name, delay=0.0):
        super().__init__(delay=delay)
        self.path, self.name, self.made_by = path, name, os.getpid()
        self._write("constructed")

    def _write(self, event):
        with open(self.path, "a") as file:
            file.write(f"{event} {self.name}\n")

    def close(self):
        self._write("closed")


class SlowToClose(Marker):
    """Takes a second to close, as one may that writes a video then."""

    def close(self):
        time.sleep(1.0)
        super().close()


class Leaving(Counter):
    """Leaves a process behind that outlives it for some seconds, and has all that was open."""

    def __init__(self):
        super().__init__()
        if os.fork() == 0:
            time.sleep(6.0)
            os._exit(0)


class Failing(gymnasium.Wrapper):
    """CartPole, which at its 300th step in all has no number as a reward, or fails; its first reset takes a while."""

    def __init__(self, how="nan"):
        super().__init__(gymnasium.make("CartPole-v1"))
        self.how, self.steps = how, 0

    def reset(self, **arguments):
        time.sleep(0.5 * (self.steps == 0))
        return super().reset(**arguments)

    def step(self, action):
        self.steps += 1
        if self.steps == 300 and self.how == "raise":
            raise ZeroDivisionError("the environment fails")
        observation, reward, *rest, info = super().step(action)
        reward = np.nan if self.steps == 300 and self.how == "nan" else reward
        return observation, reward, *rest, {**info, "hits[/s]": 1}


class Napping(Counter):
    """Sleeps for as many tenths of a second as its seed says at a reset, and its action at a step."""

    def reset(self, *, seed=None, options=None):
        time.sleep((seed or 0) / 10)
        return super().reset(seed=seed, options=options)

    def step(self, action):
        time.sleep(action / 10)
        return super().step(action)


class BigInfo(Counter):
    """Has an info of 10 MB at every step."""

    def step(self, action):
        *result, info = super().step(action)
        return *result, info | {"big": bytes([self.steps]) * 10_000_000}


class Threads(Counter):
    """Tells how many threads the numerical libraries of its process may use."""

    def threads(self):
        import cv2
        import torch

        numbers = {"torch": torch.get_num_threads(), "cv2": cv2.getNumThreads()}
        return numbers | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")}


class Actor(gymnasium.Env):
    """Has any action space, and refuses actions that are not in it; the reward is the sum of an action's numbers."""

    observation_space = spaces.Box(0, 1, (1,), np.float32)

    def __init__(self, action_space):
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        return np.zeros(1, np.float32), total(action), False, False, {}


def total(action):
    """Sum all numbers of a nested action."""
    if isinstance(action, dict):
        return sum(total(part) for part in action.values())
    if isinstance(action, tuple):
        return sum(total(part) for part in action)
    return float(np.sum(action))


class Observer(gymnasium.Env):
    """Has any observation space, and observes its samples."""

    action_space = spaces.Discrete(2)

    def __init__(self, observation_space):
        self.observation_space = copy.deepcopy(observation_space)  # with a generator of its own

    def reset(self, *, seed=None, options=None):
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


class Team:
    """A ParallelEnv that plays scripts, one an episode in turn: a string a step, a character an agent.

    "+" is an agent that lives on, "T" one that terminates, "X" one that truncates, "." one that is absent. The first
    string is the reset's. An episode ends with the first string that has no "+". Agents observe (own number from 1,
    episode, step), earn 10 * number + step, and are told their step in their info.
    """

    metadata = {"name": "team"}
    render_mode = None

    def __init__(self, scripts=(("++.", "+T.", "+.+", "+++", "X.T"),)):
        self.scripts, self.episode = scripts, -1
        self.possible_agents = [f"agent_{number}" for number in range(len(scripts[0][0]))]
        self.agents, self.seed = [], None

    def observation_space(self, agent):
        return spaces.Dict({"id": spaces.Box(0, 99, (), np.uint8), "time": spaces.Box(0, 10**6, (2,), np.int32)})

    def action_space(self, agent):
        return spaces.Discrete(3, start=1)

    def _present(self):
        now = self.scripts[self.episode % len(self.scripts)][self.time]
        self.agents = [agent for agent, state in zip(self.possible_agents, now) if state == "+"]
        return [
            (row, agent, state) for row, (agent, state) in enumerate(zip(self.possible_agents, now)) if state != "."
        ]

    def _observe(self, present):
        time = np.array([self.episode, self.time], np.int32)
        return {agent: {"id": np.uint8(row + 1), "time": time} for row, agent, _ in present}

    def reset(self, seed=None, options=None):
        self.seed = self.seed if seed is None else seed
        self.episode, self.time = self.episode + 1, 0
        present = self._present()
        return self._observe(present), {agent: {"began": self.episode} for _, agent, _ in present}

    def step(self, actions):
        assert set(actions) == set(self.agents), f"actions for {set(actions)}, but {self.agents} live"
        assert all(self.action_space(agent).contains(action) for agent, action in actions.items()), actions
        self.time += 1
        present = self._present()
        rewards = {agent: 10 * (row + 1) + self.time for row, agent, _ in present}
        terminations = {agent: state == "T" for _, agent, state in present}
        truncations = {agent: state == "X" for _, agent, state in present}
        infos = {agent: {"time": self.time} for _, agent, _ in present}
        return self._observe(present), rewards, terminations, truncations, infos

    def close(self):
        pass


class Blind(Counter):
    """Observes nothing but NaN, the first `blind` times that it is made."""

    observation_space, made, blind = spaces.Box(-np.inf, np.inf, (2,), np.float32), 0, 0

    def __init__(self):
        super().__init__()
        type(self).made += 1
        self.seen = np.full(2, np.nan if self.made <= self.blind else 0.0, np.float32)

    def _observation(self):
        return self.seen


class Silent(Team):
    """A team whose agents, when they terminate, are told no more than that and their reward."""

    def __init__(self, scripts=(("+++", "T++", ".T+", "..T"), ("+++", "T+T", ".T."))):
        super().__init__(scripts)

    def _observe(self, present):
        return super()._observe([one for one in present if one[2] != "T"])


class Pausing(Team):
    """A team whose second agent is not there for a step, and nobody says why."""

    def __init__(self, scripts=(("+++", "+.+", "+++", "X" * 3),)):
        super().__init__(scripts)


class Halting(Team):
    """A team that is cut off, of which then only the last is told what it sees; and all have another kind of info."""

    def __init__(self, scripts=(("+++", "+++", "X" * 3), ("+++", "XTX"))):
        super().__init__(scripts)

    def _observe(self, present):
        return super()._observe([one for one in present if one[2] == "+" or one[0] == 2])

    def step(self, actions):
        *told, infos = super().step(actions)
        kinds = ({"rank": 1}, {"rank": None}, {"rank": lambda: np.zeros(2)})
        return *told, dict(zip(infos, kinds)) if not self.agents else infos


# Nine arrays, 13 kB: what MiniHack observes.
MINIHACK_SPACE = spaces.Dict(
    {
        "blstats": spaces.Box(-(2**31), 2**31 - 1, (27,), np.int64),
        "chars": spaces.Box(0, 255, (21, 79), np.uint8),
        "colors": spaces.Box(0, 15, (21, 79), np.uint8),
        "glyphs": spaces.Box(0, 5976, (21, 79), np.int16),
        "inv_glyphs": spaces.Box(0, 5976, (55,), np.int16),
        "inv_letters": spaces.Box(0, 127, (55,), np.uint8),
        "inv_strs": spaces.Box(0, 255, (55, 80), np.uint8),
        "message": spaces.Box(0, 255, (256,), np.uint8),
        "specials": spaces.Box(0, 255, (21, 79), np.uint8),
    }
)


class CounterTeam:
    """A ParallelEnv of which every agent plays a `Counter` of its own, all with the same seed and actions."""

    metadata = {}
    render_mode = None

    def __init__(self, size, length=(3, 2)):
        self.possible_agents, self.agents = list(range(size)), []
        self.counters = [Counter(list(length)) for _ in range(size)]

    def observation_space(self, agent):
        return Counter.observation_space

    def action_space(self, agent):
        return Counter.action_space

    def reset(self, seed=None, options=None):
        self.agents = list(self.possible_agents)
        results = [counter.reset(seed=seed, options=options) for counter in self.counters]
        return tuple(dict(enumerate(part)) for part in zip(*results))

    def step(self, actions):
        results = [counter.step(actions[agent]) for agent, counter in enumerate(self.counters)]
        self.agents = [agent for agent in self.agents if not (results[agent][2] or results[agent][3])]
        return tuple(dict(enumerate(part)) for part in zip(*results))

    def close(self):
        pass


class Uneven(gymnasium.Env):
    """Takes 0 to 2 ms a step, at random; observes (seed, episode, step, last action), earns the step's number.

    Episodes last 3 and 5 steps in turn; the short ones terminate, the long ones truncate.
    """

    observation_space = spaces.Box(-100, 100, (4,), np.float32)
    action_space = spaces.Discrete(3)
    most_seconds = 0.002

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.episode = (seed, 0) if seed is not None else (self.seed, self.episode + 1)
        self.steps = self.action = 0
        return self._observation(), {}

    def step(self, action):
        time.sleep(random.random() * self.most_seconds)
        self.steps, self.action = self.steps + 1, int(action)
        terminated, truncated = self.episode % 2 == 0 and self.steps == 3, self.episode % 2 == 1 and self.steps == 5
        return self._observation(), float(self.steps), terminated, truncated, {}

    def _observation(self):
        return np.array([self.seed, self.episode, self.steps, self.action], np.float32)


class Recall(gymnasium.Env):
    """Shows a cue on the first step and asks for it on the last, of `length`: a reward of 1 for the right answer."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, length=8):
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cue, self.steps = int(self.np_random.integers(2)), 0
        return np.array([2 * self.cue - 1, 0], np.float32), {}

    def step(self, action):
        self.steps += 1
        over = self.steps == self.length
        observation = np.array([0, self.steps == self.length - 1], np.float32)
        return observation, float(over and action == self.cue), over, False, {}


class FloatTeam(Team):
    """A team whose observations are floats, and of whose agents some are absent, die, or come back."""

    def __init__(self):
        super().__init__((("++.", "+T.", "+.+", "+++", "XXT"), ("+++", "T++", ".+X", ".+.", ".T.")))

    def observation_space(self, agent):
        return spaces.Box(-100, 100, (3,), np.float32)

    def action_space(self, agent):
        return spaces.Discrete(3)

    def _observe(self, present):
        return {agent: np.array([row + 1, self.episode, self.time], np.float32) for row, agent, _ in present}


class OneSlow(Uneven):
    """Takes no time at a step, but 20 ms if its seed is even."""

    def step(self, action):
        time.sleep(0.02 * (self.seed % 2 == 0))
        return super().step(action)

    most_seconds = 0.0


class Leaver(FloatTeam):
    """The first of two agents is cut short at step 3, while the second goes on to the end of the episode."""

    def __init__(self):
        Team.__init__(self, (("++", "++", "++", "X+", ".+", ".T"),))


class OddInfos(Counter):
    """Has infos under keys that are no names."""

    def step(self, action):
        *result, info = super().step(action)
        return *result, info | {0: 1.0, "": 2.0}


class Depth(NoOp):
    """Observes distances as depth cameras give them."""

    observation_space = spaces.Box(0, 2**16 - 1, (4,), np.uint16)


def counted():
    """An environment made as CleanRL makes them, which counts its episodes itself."""
    return gymnasium.wrappers.RecordEpisodeStatistics(Counter(3))


def cut_short():
    """The same within gymnasium's TimeLimit, as `gymnasium.register` has it: it never sees that they are cut."""
    return gymnasium.wrappers.TimeLimit(gymnasium.wrappers.RecordEpisodeStatistics(Counter(99)), 3)


class EpisodeStatus(Counter):
    """Counts nothing, though its name begins as that of a wrapper that does."""


class Written(Counter):
    """Can be read, if it is made for that."""

    metadata = {"render_modes": ["ansi"], "render_fps": 5}

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode

    def render(self):
        return f"step {self.steps}"


def drawn(render_mode=None):
    """An environment that can be watched, made by a function."""
    return gymnasium.make("CartPole-v1", render_mode=render_mode)


def flat():
    """An environment that is made flat too early."""
    return puffer_core.GymnasiumPufferEnv(Nested())


class Unpaid(FloatTeam):
    """Says that whoever is not there earns NaN."""

    def step(self, actions):
        observations, rewards, *rest = super().step(actions)
        return observations, dict.fromkeys(self.possible_agents, np.nan) | rewards, *rest


class Away(FloatTeam):
    """The second agent is paid for its first action, sees nothing then, and is back when the team is cut off."""

    def __init__(self):
        Team.__init__(self, (("++", "++", "XX"),))

    def _observe(self, present):
        return super()._observe([one for one in present if (one[0], self.time) != (1, 1)])


class Repeater(FloatTeam):
    """The first agent dies at the first step, and is told so at each step that follows."""

    def __init__(self):
        Team.__init__(self, (("++", "T+", "T+", "TT"),))


class MuteTeam(FloatTeam):
    """The first of two agents dies at once, the second goes on for seven more steps; nobody can watch them."""

    def __init__(self):
        Team.__init__(self, (("++", "T+", *[".+"] * 6, ".X"),))


class DrawnTeam(MuteTeam):
    """Can be watched: the brighter, the later."""

    metadata = {"render_fps": 10}

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode

    def render(self):
        return np.full((32, 32, 3), 20 * self.time, np.uint8)


class HumanTeam(DrawnTeam):
    """Opens a window, or so it says, whatever it is asked for."""

    def __init__(self, render_mode=None):
        super().__init__("human")

    def render(self):
        return None


class BlindTeam(DrawnTeam):
    """Cannot draw on this machine, and ends the program if it is asked again, as MuJoCo does without a display."""

    was_asked = False

    def render(self):
        if self.was_asked:
            sys.exit("asked again")
        self.was_asked = True
        raise OSError("no display")


def needy():
    """An environment that cannot be made."""
    raise KeyError("size")
