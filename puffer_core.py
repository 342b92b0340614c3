"""Make every environment look like Atari, and step many of them fast.

    import gymnasium, puffer_core

    if __name__ == "__main__":
        env_fns = [lambda: gymnasium.make("Blackjack-v1")] * 8          # observations are Tuples
        with puffer_core.Multiprocessing(env_fns, num_workers=2) as envs:
            observations, infos = envs.reset(seed=1)                    # one flat row per environment
            for _ in range(100):
                observations, rewards, terminations, truncations, infos = envs.step(envs.action_space.sample())
                player_sum, dealer_card, usable_ace = envs.layout.unflatten(observations)  # views, not copies

Read on: layouts (flatten), adapters (around one environment), vectorizers (around many). For Linux and macOS.
"""

import contextlib
import copy
import ctypes
import multiprocessing.util
import operator
import os
import pickle
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, deque, namedtuple
from collections.abc import Callable, Sequence
from functools import partial, partialmethod
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import CloudpickleWrapper, batch_space

# A worker's flag is one byte in shared memory. The parent writes a request, the worker overwrites it with a status;
# whoever's turn it is not only reads, so the byte needs no lock. MESSAGE: more comes through the pipe.
DONE, MESSAGE, STEP, COMMAND = range(4)
CACHE_LINE = 64  # bytes; every worker's flag has a line of its own, so no two cores fight over one
# Who waits yields for this long and then blocks, or blocks at once if the last wait took longer: others need the cores
SPIN_SECONDS = 1e-3
BLOCK_SECONDS = 0.1  # a blocked process looks around this often even if nobody wakes it
CLOSE_SECONDS = 10.0  # what workers get to close their environments, unless `close` says otherwise, before a kill
_yield = getattr(os, "sched_yield", lambda: time.sleep(0))  # 0.6 us; on Linux, sleep(0) would take 50 to 90 us


class APIUsageError(RuntimeError):
    """A call out of order or on a closed vectorizer, or actions of the wrong shape or dtype."""


class WorkerError(RuntimeError):
    """An environment or the worker process that runs it failed; `env_index`, `worker` and `phase` say where."""

    def __init__(self, env_index: int, worker: int, phase: str, cause: str):
        super().__init__(env_index, worker, phase, cause)  # what unpickling calls this with
        self.env_index, self.worker, self.phase, self.cause = env_index, worker, phase, cause

    def __str__(self) -> str:
        return f"environment {self.env_index} (worker {self.worker}) failed in {self.phase}: {self.cause}"


# ------------------------------------------------------------------------------------------------------------ layouts

# A space that holds no others: bytes `start:stop` of a row; `bounds` holds its lowest and its highest values, flat.
Leaf = namedtuple("Leaf", "path space dtype shape start stop bounds")


def _plan(space: spaces.Space, path: str) -> tuple[np.dtype, list[Leaf], Callable, Callable]:
    """Return a space's dtype and leaves, a function from a sample to leaves' values, and one back from an iterator."""
    if not isinstance(space, (spaces.Dict, spaces.Tuple)) or len(space) == 0:
        box = batch_space(batch_space(space, 1), 1)  # once makes a MultiDiscrete of a Discrete, twice a Box of them all
        if not isinstance(box, spaces.Box) or not box.dtype.isnative:
            raise TypeError(f"{path} is {space!r:.80}; only Box, Discrete, MultiDiscrete and MultiBinary can be flat")
        bounds = np.stack([box.low.ravel(), box.high.ravel()])
        leaf = Leaf(path, space, space.dtype.name, space.shape, 0, bounds[0].nbytes, bounds)
        return np.dtype((space.dtype, space.shape)), [leaf], lambda sample: (sample,), next
    keys = list(space) if (is_dict := isinstance(space, spaces.Dict)) else list(range(len(space)))
    dtypes, nested, readers, builders = zip(*[_plan(space[key], f"{path}[{key!r}]") for key in keys])
    struct = np.dtype({"names": [str(key) for key in keys], "formats": dtypes}, align=True)
    starts = [struct.fields[name][1] for name in struct.names]  # numpy decides where leaves lie
    leaves = [one._replace(start=by + one.start, stop=by + one.stop) for by, own in zip(starts, nested) for one in own]
    count, pick = len(keys), operator.itemgetter(*keys)  # one call takes 0.2 us for NetHack's nine keys, a loop 1.1 us
    is_flat = count > 1 and all(build is next for build in builders)  # of one key, `pick` would return no tuple

    def read(sample: Any) -> Sequence[Any]:
        try:
            if len(sample) != count:
                raise KeyError
            return pick(sample) if is_flat else [leaf for key, read in zip(keys, readers) for leaf in read(sample[key])]
        except (KeyError, IndexError, TypeError):
            got = list(sample) if isinstance(sample, dict) else f"{sample!r:.80}"
            raise ValueError(f"{path}: expected the keys {keys}, got {got}") from None

    def build(values: Any) -> dict | tuple:
        children = [build(values) for build in builders]
        return dict(zip(keys, children)) if is_dict else tuple(children)

    return struct, leaves, read, build


def _cast(leaf: Leaf, value: Any) -> np.ndarray:
    """Return a value as a contiguous array of its leaf's shape and dtype: itself, if it is one."""
    try:
        array = np.asarray(value, order="C")
        if array.shape == leaf.shape and array.dtype.kind in "biuf":
            if array.dtype == leaf.bounds.dtype:
                return array
            with np.errstate(all="ignore"):
                cast = array.astype(leaf.dtype)
            if cast.dtype.kind == "f" or np.array_equal(cast, array):
                return cast
    except ValueError:  # of a ragged list
        pass
    raise ValueError(f"{leaf.path}: need {leaf.shape} {leaf.dtype}, got {getattr(value, 'shape', '')} {value!r:.60}")


class Layout:
    """How a structured observation lies in one flat row. TypeError, with its path: a leaf that has no fixed size.

    A plain Box passes through unchanged. Others become rows `(n,)`: leaves of one dtype keep it, mixed ones become the
    bytes of an aligned struct. `dtype` is the numpy dtype of one row, `flat_space` its Box.
    """

    def __init__(self, space: spaces.Space):
        self.space, (self.dtype, self._leaves, self._read, self._build) = space, _plan(space, "observation")
        low, high = np.concatenate([leaf.bounds for leaf in self._leaves], axis=1)
        if len({leaf.dtype for leaf in self._leaves}) > 1:
            low, high = np.zeros(self.dtype.itemsize, np.uint8), np.full(self.dtype.itemsize, 255, np.uint8)
        self.flat_space = space if isinstance(space, spaces.Box) else spaces.Box(low, high, dtype=low.dtype.type)
        paths, _, dtypes, shapes, starts, *_ = zip(*self._leaves)
        fields = {"names": paths, "formats": list(zip(dtypes, shapes)), "offsets": starts}
        self._struct, self._flat_dtype = np.dtype({**fields, "itemsize": self.dtype.itemsize}), low.dtype.name
        self._out = np.zeros(self.flat_space.shape, low.dtype)
        self._write_out = self._write_scratch = self.writer(self._out)

    def __reduce__(self) -> tuple:
        return type(self), (self.space,)

    def flatten(self, sample: Any, out: np.ndarray | None = None) -> np.ndarray:
        """Copy a sample into a flat row, `out` or a new one; ValueError: a wrong key, shape or value, by its path."""
        if out is None:
            return self._write_scratch(sample).copy()
        if out is not self._out:
            self._out, self._write_out = out, self.writer(out)
        return self._write_out(sample)

    def writer(self, row: np.ndarray) -> Callable[[Any], np.ndarray]:
        """Return a `flatten` that is bound to one row, for a row that is filled again and again."""
        flat, leaves, read, is_not = self.flat_space, self._leaves, self._read, operator.is_not
        if (row.shape, row.dtype) != (flat.shape, flat.dtype) or not row.flags.c_contiguous:
            raise ValueError(f"out: expected contiguous {flat}, got {row.dtype} of shape {row.shape} {row.strides}")
        vector = row.data

        def write_box(value: Any) -> np.ndarray:
            try:
                vector[:] = value  # 0.15 us; compares shape and dtype itself, and takes vectors only
            except (NotImplementedError, TypeError, ValueError):
                row[...] = _cast(leaves[0], value)  # 2.5 us for four frames, where a join takes 7
            return row

        if flat is self.space:
            return write_box
        target, known = row.reshape(-1).view(np.uint8).data, [(leaf.shape, leaf.bounds.dtype) for leaf in leaves]
        ends = [*[leaf.start for leaf in leaves[1:]], row.nbytes]  # of the padding behind each leaf
        chunks = [b""] * 2 * len(leaves)  # of a row: the leaves' arrays, each followed by its padding
        chunks[1::2] = [bytes(end - leaf.stop) for leaf, end in zip(leaves, ends)]
        arrays, views = leaves, []  # at first something that is in no sample

        def write(sample: Any) -> np.ndarray:
            # Environments that refill the same arrays at every step, as NetHack does, need no second check, nor numpy's
            # part in a join: MiniHack's nine take 0.6 to 0.7 times as long as nine assignments, new ones 1.3 to 1.5.
            nonlocal arrays, views  # of the last sample, held so that `is` can be trusted
            values = read(sample)
            try:
                if any(map(is_not, values, arrays)):
                    views = []
                    if [(one.shape, one.dtype) for one in values] != known:
                        raise TypeError
                    chunks[::2] = arrays = values
                elif not views:
                    views = [view for view in map(memoryview, chunks) if view.nbytes]
                target[:] = b"".join(views or chunks)
            except (AttributeError, TypeError):  # not all are arrays as the space says, and contiguous
                chunks[::2] = arrays = [_cast(*pair) for pair in zip(leaves, values)]
                target[:] = b"".join(chunks)
            return row

        return write

    def unflatten(self, flat: Any) -> Any:
        """See flat rows `(*batch, *flat_space.shape)`, numpy or torch, as nested views `(*batch, *leaf.shape)`.

        Only slices and views, so `torch.compile(fullgraph=True)` takes it. ValueError: rows of another length or dtype.
        """
        if isinstance(self.space, spaces.Box):
            return flat
        (size,), is_numpy = self.flat_space.shape, isinstance(flat, np.ndarray)
        named = np.dtype if is_numpy else partial(getattr, sys.modules["torch"])
        if flat.dtype != named(self._flat_dtype) or flat.shape[-1] != size:
            raise ValueError(f"need rows of {size} {self._flat_dtype}, uncast, got {flat.dtype} {tuple(flat.shape)}")
        if is_numpy and size:  # nine fields of a struct, MiniHack's, take half as long as slices, views and reshapes
            rows = flat.view(self._struct)[..., 0]
            return self._build(iter([rows[path] for path in self._struct.names]))
        batch, row = flat.shape[:-1], flat.view(named("uint8"))
        parts = [(leaf, row[..., leaf.start : leaf.stop]) for leaf in self._leaves]
        return self._build(iter([part.view(named(leaf.dtype)).reshape(batch + leaf.shape) for leaf, part in parts]))


class ActionLayout:
    """How an action of any space lies in one flat row that a policy can sample: a sample of `flat_space`.

    Discrete, MultiDiscrete and Box pass through. Nested Box leaves become one float Box, other leaves one MultiDiscrete
    that counts from 0, whatever their `start`. TypeError: a mix of both, or a leaf that has no fixed size, by its path.
    `valid` has a Discrete's first 4096 actions by number, as its `sample` has them; others' is empty.
    """

    def __init__(self, space: spaces.Space):
        self.space, (_, self._leaves, _, self._build) = space, _plan(space, "action")
        is_box = {leaf.path: isinstance(leaf.space, spaces.Box) for leaf in self._leaves}
        if len(set(is_box.values())) > 1:
            raise TypeError(f"Box leaves (True) and others cannot be mixed in one flat action: {is_box}")
        low, high = np.concatenate([leaf.bounds for leaf in self._leaves], axis=1)
        self._ends, self._start = np.cumsum([leaf.bounds.shape[1] for leaf in self._leaves])[:-1], 0
        numbers = range(space.start, space.start + space.n) if isinstance(space, spaces.Discrete) else ()
        self.valid = {number: space.dtype.type(number) for number in numbers[: 2**12]}
        if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete, spaces.Box)):
            self.flat_space = space
        elif all(is_box.values()):
            dtype = np.result_type(np.float32, low)
            self.flat_space = spaces.Box(low.astype(dtype), high.astype(dtype), dtype=dtype.type)
        else:
            self._start, self.flat_space = low, spaces.MultiDiscrete(high.astype(np.int64) - low.astype(np.int64) + 1)

    __reduce__ = Layout.__reduce__

    def unflatten(self, flat: Any) -> Any:
        """Return a sample of the space, Box values clipped and rounded; ValueError: wrong shape, NaN, out of range."""
        try:
            return self.valid[operator.index(flat)]  # a Discrete's: 0.2 us, where what follows takes 8
        except (KeyError, TypeError):  # not one integer, or none of these
            pass
        values, space = np.asarray(flat), self.flat_space
        is_box = isinstance(space, spaces.Box)  # others may be of a dtype that not every integer can be cast to
        fits = not np.isnan(values).any() if is_box else values.dtype.kind in "biu" and values.tolist() in space
        if values.shape != space.shape or not fits:
            raise ValueError(f"expected an action in {space}, got {flat}")

        def take(leaf: Leaf, part: np.ndarray) -> Any:
            if leaf.bounds.dtype.kind == "f":
                part = part.clip(*leaf.bounds)
            elif is_box:  # by Python's exact numbers: 2**63 is a float, but no int64
                part = [round(min(max(x, low), high)) for x, low, high in zip(part.tolist(), *leaf.bounds.tolist())]
            value = np.array(part, leaf.dtype).reshape(leaf.shape)
            return value if is_box else value[()]  # a Discrete's is a scalar

        return self._build(map(take, self._leaves, np.split(values.ravel() + self._start, self._ends)))


# ----------------------------------------------------------------------------------------------------------- adapters


class GymnasiumPufferEnv(gymnasium.ObservationWrapper, gymnasium.utils.RecordConstructorArgs):
    """A Gymnasium environment with flat observations and flat actions.

    This adapter and the next have `layout` and `action_layout`; flat `observation_space` and `action_space` of one
    agent (also under `single_...`); `num_agents` rows; bool `masks`, False where the last call had nothing for an
    agent. Other wrappers go inside: one around this is adapted again, and then `layout` is that of the flat rows. A
    subclass may have a Box of its own as `observation_space`, and its own `action_space`.
    """

    def __init__(self, env: gymnasium.Env):
        gymnasium.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self.layout, self.action_layout = Layout(env.observation_space), ActionLayout(env.action_space)
        self.observation_space = self.single_observation_space = self.layout.flat_space
        self.action_space = self.single_action_space = self.action_layout.flat_space
        self.num_agents, self.masks = 1, np.ones(1, bool)
        self.set_wrapper_attr = env.set_wrapper_attr  # the environment may have names of its own like those here

    def step(self, action: Any) -> tuple[np.ndarray, Any, Any, Any, dict]:
        """Step with a flat action; returns the flat observation, reward, terminated, truncated and info."""
        return super().step(self.action_layout.unflatten(action))

    def observation(self, observation: Any) -> np.ndarray:
        """Flatten an observation."""
        return self.layout.flatten(observation)


class PettingZooPufferEnv:
    """A PettingZoo ParallelEnv as rows: row i is `possible_agents[i]`'s for ever, and zero while that has nothing.

    `step` takes a flat action a row, ignored where its agent is not alive; it returns rows, and infos by agent.
    After a step, `episode_over` tells whether every agent's part has ended. TypeError: agents whose spaces differ.
    """

    reset, env = GymnasiumPufferEnv.reset, None  # until there is one: a copy that is being made asks for attributes

    def __init__(self, env: Any):
        if hasattr(env, "agent_iter") or not getattr(env, "possible_agents", ()):
            known = "a gymnasium.Env or a ParallelEnv with possible_agents (PettingZoo: [turn_based_]aec_to_parallel)"
            raise TypeError(f"expected {known}, got {type(env)}")
        self.env, self.possible_agents, self.num_agents = env, list(env.possible_agents), len(env.possible_agents)
        pairs = [(env.observation_space(agent), env.action_space(agent)) for agent in self.possible_agents]
        if any(pair != pairs[0] for pair in pairs):
            raise TypeError(f"all agents must have the same spaces, got {dict(zip(self.possible_agents, pairs))}")
        self.layout, self.action_layout = Layout(pairs[0][0]), ActionLayout(pairs[0][1])
        self.observation_space = self.single_observation_space = self.layout.flat_space
        self.action_space = self.single_action_space = self.action_layout.flat_space
        self.masks, self.episode_over = np.zeros(self.num_agents, bool), True
        self.get_wrapper_attr = partial(getattr, self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env if hasattr(self.env, name) else self._holder(name), name)

    def set_wrapper_attr(self, name: str, value: Any) -> None:
        """Set an attribute of the outermost wrapper that has it, or else of the environment inside them all."""
        setattr(self._holder(name), name, value)

    def _holder(self, name: str) -> Any:
        env = inner = self.env
        while hasattr(inner, "possible_agents"):  # unlike a simulator, which may be called `env` too
            env, inner = inner, getattr(inner, "env", getattr(inner, "aec_env", None))
            if name in vars(env) or hasattr(type(env), name):
                break
        return env

    def step(self, actions: Sequence[Any]) -> tuple:
        """Step with flat actions; returns rows, arrays of rewards, terminations and truncations, and infos by agent."""
        observations, *columns, infos = self._play(actions)
        return self.observation(observations), *map(np.array, columns), infos

    def observation(self, observations: dict) -> np.ndarray:
        """Flatten observations by agent into rows `(num_agents, *flat)`."""
        rows = np.zeros((self.num_agents, *self.layout.flat_space.shape), self.layout.flat_space.dtype)
        self.writer(rows)(observations)
        return rows

    def writer(self, rows: np.ndarray) -> Callable[[dict], None]:
        """Return an `observation` that fills these rows, again and again."""
        writers = {agent: self.layout.writer(rows[row, ...]) for row, agent in enumerate(self.possible_agents)}

        def write(observations: dict) -> None:
            for agent, observation in observations.items():
                writers[agent](observation)
            self.masks = np.array([agent in observations for agent in writers])
            if len(observations) < len(writers):
                rows[~self.masks] = 0

        return write

    def _play(self, actions: Sequence[Any]) -> tuple:
        """Step, but leave observations by agent and the rest in lists: three agents' arrays would take 20 us more."""
        living, pairs, decode = set(self.env.agents), zip(self.possible_agents, actions), self.action_layout.unflatten
        played = {agent: decode(action) for agent, action in pairs if agent in living}
        observations, rewards, *flags, infos = self.env.step(played)
        ended, cut = [{agent for agent, flag in said.items() if flag} for said in flags]
        self.episode_over = ended | cut >= {*self.env.agents}
        if self.episode_over:  # for whom nobody told, it is cut short, or ended if there is nothing more to see
            untold = living - ended - cut
            ended, cut = ended | untold - observations.keys(), cut | untold & observations.keys()
        rewards = [_scalar(rewards.get(agent, 0.0)) for agent in self.possible_agents]
        flags = [[agent in those for agent in self.possible_agents] for those in (ended, cut)]
        return observations, rewards, *flags, infos


class EpisodeStats(gymnasium.wrappers.RecordEpisodeStatistics):
    """Clears infos but for the "episode" of its last one: return `r`, length `l`, seconds `t`, and numbers' sums."""

    def __init__(self, env: gymnasium.Env, buffer_length: int = 100, stats_key: str = "EpisodeStats"):
        super().__init__(env, buffer_length, stats_key)  # not "episode", which the environment may use itself

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        """Reset the environment and the sums; the info is empty."""
        self._sums = Counter()
        return super().reset(seed=seed, options=options)[0], {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict]:
        """Step the environment; the info is empty until the episode's last step."""
        *result, info = super().step(action)
        episode, numbers = info.pop(self._stats_key, {}), (int, float, np.number, np.bool_)
        self._sums.update({key: float(value) for key, value in info.items() if isinstance(value, numbers)})
        return *result, {"episode": {**self._sums, **episode, "r": _scalar(episode["r"])}} if episode else {}


def _scalar(reward: Any) -> float:
    """Return a reward, which may be any kind of number or an array of one element, as a float."""
    return reward if reward.__class__ is float else float(np.asarray(reward).item())


# -------------------------------------------------------------------------------------------------------- vectorizers


class Batch(namedtuple("Batch", "observations rewards terminations truncations infos agent_ids masks")):
    """What `recv` returns: arrays whose row i is about agent `agent_ids[i]`, and `infos` as gymnasium's vector dict.

    Where `infos["_final_obs"]` is set, an episode ended and the observation is the first of the next one. An agent that
    ended without it keeps its last observation, and is absent (`masks` False, row zero) from the next batch on, until
    it comes back.
    """


def _map_rows(path: str, num_rows: int, observation: Any, action: Any, own: slice = slice(None)) -> Any:
    """Map all that environments and learner exchange: a row an agent, every field contiguous, in a file."""
    fields = [(name, space.dtype, space.shape) for name, space in (("observations", observation), ("actions", action))]
    fields += [("rewards", np.float64, ()), ("terminations", bool, ()), ("truncations", bool, ()), ("masks", bool, ())]
    struct = np.dtype([(name, dtype, (num_rows, *shape)) for name, dtype, shape in fields], align=True)
    memory = np.asarray(np.memmap(path, struct, "r+", shape=1))  # which makes the file large enough
    return SimpleNamespace(**{name: memory[name][0, own] for name in struct.names})


class _Shard:
    """The environments of one process, stepped in turn; `reset` and `step` fill rows and return (row, info) pairs."""

    def __init__(self, env_fns: Sequence[Callable], progress: Any):
        self.env_fns, self.envs, self.progress = env_fns, [], progress  # `progress[0]`: the environment that is at work

    def constructor(self, indices: Sequence[int], num_envs: int, path: str, infos: str) -> list:
        for index, env_fn in enumerate(self.env_fns):
            self.progress[0] = index
            self.envs.append(env := env_fn())  # first, so that it is closed also if no adapter takes it
            adapter = GymnasiumPufferEnv if isinstance(env, gymnasium.Env) else PettingZooPufferEnv
            self.envs[index] = env if isinstance(env, adapter) else adapter(env)
        env, count, self.all_infos = self.envs[0], self.envs[0].num_agents, infos == "all"
        own = slice(indices[0] * count, (indices[-1] + 1) * count)
        self.rows = _map_rows(path, num_envs * count, env.observation_space, env.action_space, own)
        self.is_team, self.is_discrete = adapter is PettingZooPufferEnv, isinstance(env.action_space, spaces.Discrete)
        self.known = env.action_layout.valid if self.is_discrete and not self.is_team else ()  # they need no decoding
        self.slices = [slice(row, row + count) for row in range(0, len(self.envs) * count, count)]
        return [CloudpickleWrapper(self.describe(env)) for env in self.envs]

    def describe(self, env: Any) -> tuple:
        paths = [leaf.path for leaf in env.layout._leaves + env.action_layout._leaves]  # spaces are equal in any order
        kind, agents = ("a team", env.possible_agents) if isinstance(env, PettingZooPufferEnv) else ("one agent", ())
        alike = kind, env.layout.space, env.observation_space, env.action_space, env.num_agents, paths
        return alike, agents, getattr(env, "metadata", {}), getattr(env, "render_mode", None)

    def reset(self, seeds: Sequence[int | None], options: dict | None) -> list:
        rows, self.turns = self.rows, []
        rows.rewards[:], rows.terminations[:], rows.truncations[:] = 0, False, False
        for index, (env, agents) in enumerate(zip(self.envs, self.slices)):  # here, where all are known to be alike
            where, is_patched = agents if self.is_team else index, vars(env).keys() & {"step", "observation"}
            row = rows.observations[where, ...]  # an array even if it has no dimensions
            space = batch_space(env.observation_space, env.num_agents) if self.is_team else env.observation_space
            turn = env, lambda action: action, (fill := Layout(space).writer(row))
            if type(env) is GymnasiumPufferEnv and not is_patched:  # its step is taken apart: 2.5 us less of its time
                turn = env.env, env.action_layout.unflatten, env.layout.writer(row)
            elif type(env) is PettingZooPufferEnv and not is_patched:
                turn = SimpleNamespace(step=env._play), lambda actions: actions, env.writer(row)
            self.turns.append((*turn, where, fill))  # which takes what a reset returns
        return [said for index, seed in enumerate(seeds) for said in self._begin(index, seed, options).items()]

    def _begin(self, index: int, seed: int | None = None, options: dict | None = None) -> dict[int, dict]:
        self.progress[0], where = index, self.slices[index]
        observation, info = self.envs[index].reset(seed=seed, options=options)
        self.turns[index][-1](observation)
        self.rows.masks[where] = self.envs[index].masks
        return self._by_row(index, info) if self.all_infos else {}

    def _by_row(self, index: int, info: dict) -> dict[int, dict]:
        infos = [info.get(agent) for agent in self.envs[index].possible_agents] if self.is_team else [info]
        return {row: copy.deepcopy(info) for row, info in enumerate(infos, self.slices[index].start) if info}

    def step(self) -> list:
        rows, progress, is_team, all_infos, known = self.rows, self.progress, self.is_team, self.all_infos, self.known
        rewards, said = rows.rewards if is_team else rows.rewards.data, []
        rows.terminations.fill(False)
        rows.truncations.fill(False)
        actions = rows.actions.tolist() if self.is_discrete else rows.actions.copy()  # an adapter may keep its own
        for index, (env, decode, write, where, _) in enumerate(self.turns):
            progress[0], action = index, actions[where]
            action = known[action] if action in known else decode(action)
            observation, reward, terminated, truncated, info = env.step(action)
            write(observation)
            rewards[where] = reward if is_team or reward.__class__ is float else _scalar(reward)
            if is_team:
                rows.masks[where], over = self.envs[index].masks, self.envs[index].episode_over
                has_ended = over or True in terminated or True in truncated
            else:
                has_ended = terminated or truncated
            if has_ended:
                rows.terminations[where], rows.truncations[where] = terminated, truncated
                said += self._tell(index, info)
            elif info and all_infos:
                said += self._by_row(index, info).items()
        return said

    def _tell(self, index: int, info: dict) -> list:
        """Start the next episode if this one is over; returns what infos there are of ends, and of steps if wanted."""
        rows, where, env, infos = self.rows, self.slices[index], self.envs[index], self._by_row(index, info)
        ended = np.flatnonzero(rows.terminations[where] | rows.truncations[where]) + where.start
        finals = {row: {"final_info": infos.pop(row, {})} for row in ended.tolist()}
        if not self.is_team or env.episode_over:
            last, acted = rows.observations[where].copy(), env.masks
            infos = self._begin(index)
            for row, observation, has_acted in zip(range(where.start, where.stop), last, acted):
                if rows.masks[row] and row in finals:  # its row shows the new episode, so the old one's end goes here
                    finals[row]["final_obs"] = observation
                elif has_acted and not rows.masks[row]:  # is not in the new episode, so its row may show the old one
                    rows.observations[row], rows.masks[row] = observation, True
        return [*finals.items(), *(infos.items() if self.all_infos else ())]

    def call(self, arguments: Sequence[tuple[tuple, dict]], name: str) -> list:
        results = []
        for index, (env, (args, kwargs)) in enumerate(zip(self.envs, arguments)):
            self.progress[0] = index
            found = env.get_wrapper_attr(name)
            results.append(found(*args, **kwargs) if callable(found) else found)
        return results

    def close(self, **_: Any) -> None:
        while self.envs:
            with contextlib.suppress(Exception):
                self.envs.pop().close()


class Serial(gymnasium.vector.VectorEnv, contextlib.AbstractContextManager):
    """Steps all environments one after another in this process: for debugging, and for environments of a few us.

    `env_fns`, `zero_copy` and `infos` are as in `Multiprocessing`. What an environment raises comes through as it is.
    """

    def __getstate__(self) -> dict:
        raise TypeError(f"{type(self).__name__} shares the memory of its rows, so it cannot be copied or pickled")

    def __init__(self, env_fns: Sequence[Callable], zero_copy: bool = True, infos: str = "final"):
        self._shard = _Shard(env_fns, [0])
        self.envs, self.close_extras = self._shard.envs, self._shard.close  # what `close` calls
        self._divide(env_fns, 1, None, zero_copy, infos)
        self._construct(infos)

    def _divide(self, env_fns: Any, num_workers: Any, batch_size: Any, zero_copy: bool, infos: str) -> None:
        """Check the arguments, and divide the environments among workers, and the workers among batches."""
        if not isinstance(env_fns, Sequence) or not env_fns or not all(map(callable, env_fns)):
            raise TypeError(f"env_fns: expected a list of functions that return environments, got {env_fns!r:.80}")
        if infos not in ("final", "all"):
            raise ValueError(f"infos: expected 'final' or 'all', got {infos!r}")
        num_envs = len(env_fns)
        if num_workers is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            usable = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # torchrun's ranks share them
            num_workers = max(count for count in range(1, usable + 1) if num_envs % count == 0)
        num_workers = operator.index(num_workers)  # NumPy's integers would do arithmetic with lists
        if num_workers < 1 or num_envs % num_workers:
            raise ValueError(f"num_workers: expected a divisor of num_envs={num_envs}, got {num_workers}")
        per_worker, batch_size = num_envs // num_workers, operator.index(num_envs if batch_size is None else batch_size)
        if not 0 < batch_size <= num_envs or batch_size % per_worker or (zero_copy and num_envs % batch_size):
            expected = f"a multiple of the {per_worker} environments a worker has, which divides num_envs={num_envs}"
            raise ValueError(f"batch_size: expected {expected} unless zero_copy=False, got {batch_size}")
        self.num_envs, self.num_workers, self.batch_size, self.zero_copy = num_envs, num_workers, batch_size, zero_copy
        # A batch is made of groups of workers: one group of all (sync), one of neighbors (first-ready, zero-copy), or
        # several of one worker each (first-ready, gathered). Whatever the strategy, `recv` does the same.
        size = batch_size // per_worker if zero_copy or batch_size == num_envs else 1
        self._per_worker, self._group_size, self._groups_per_batch = per_worker, size, batch_size // per_worker // size
        self._finished, self._ready, self._busy = [0] * (num_workers // size), deque(), []
        self._replies, self._said = [()] * num_workers, [()] * num_workers  # to commands; to steps and resets
        self._expected = "async_reset"

    def _construct(self, infos: str) -> None:
        memfd = hasattr(os, "memfd_create")  # memory without a name, so that none can be left behind
        try:
            with os.fdopen(os.memfd_create("rows"), "r+b") if memfd else tempfile.NamedTemporaryFile() as file:
                path = f"/proc/{os.getpid()}/fd/{file.fileno()}" if memfd else file.name
                described = self._command("constructor", range(self.num_envs), self.num_envs, path, infos)
                self._describe(path, [one.fn for one in described])
        except BaseException:
            self.close()
            raise

    def _describe(self, path: str, described: list[tuple]) -> None:
        first, agents, metadata, self.render_mode = described[0]
        for other, names, *_ in described:
            has_same = {*names} == {*agents}  # teams may have names of their own, but the same names in the same order
            for got, expected in [*zip(other, first), (names, agents if has_same else names)]:
                if got != expected:
                    raise ValueError(f"environments must be alike, got {got} after {expected}")
        self.metadata = {**metadata, "autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
        _, space, self.single_observation_space, self.single_action_space, per_env, _ = first
        self.layout = Layout(space)
        self.num_agents, self.agents_per_batch = self.num_envs * per_env, self.batch_size * per_env
        self.observation_space = batch_space(self.single_observation_space, self.agents_per_batch)
        self.action_space = batch_space(self.single_action_space, self.agents_per_batch)
        self._infos = gymnasium.vector.VectorEnv()  # batches infos in gymnasium's own way, over the rows of a batch
        self._infos.num_envs, self._rows_per_worker = self.agents_per_batch, self._per_worker * per_env
        rows = _map_rows(path, self.num_agents, self.single_observation_space, self.single_action_space)
        rows.agent_ids, self._actions, self._groups = np.arange(self.num_agents), rows.actions, []
        for first in range(0, self.num_workers, self._group_size):
            where = slice(first * self._rows_per_worker, (first + self._group_size) * self._rows_per_worker)
            fields = [getattr(rows, name)[where] for name in Batch._fields if name != "infos"]
            self._groups.append((range(first, first + self._group_size), where, fields))

    def reset(self, *, seed: int | Sequence[int | None] | None = None, options: dict | None = None) -> tuple:
        """`async_reset` and `recv`: returns observations `(agents_per_batch, *flat_space.shape)` and infos."""
        self.async_reset(seed, options)
        batch = self.recv()
        return batch.observations, batch.infos

    def step(self, actions: Any) -> tuple:
        """`send` and `recv`: returns observations, rewards, terminations, truncations and infos."""
        self.send(actions)
        return self.recv()[:5]

    def async_reset(self, seed: int | Sequence[int | None] | None = None, options: dict | None = None) -> None:
        """Reset all, once steps under way have ended: environment i with the seed `seed + i`, or a list's i-th."""
        if "reset_mask" in (options or ()):
            raise ValueError("options: no reset_mask, as environments whose episode ends are reset in the same step")
        if np.ndim(seed) == 0:
            seed = [None if seed is None else operator.index(seed) + index for index in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise ValueError(f"seed: expected an int or a list of {self.num_envs}, one an environment, got {len(seed)}")
        self._command("reset", [None if one is None else operator.index(one) for one in seed], options)
        self._expected = "recv"

    def send(self, actions: Any) -> None:
        """Step the environments of the last batch with `actions`, `(agents_per_batch, *single_action_space.shape)`."""
        self._check("send")
        actions, space = np.asarray(actions), self.action_space
        fits = actions.shape == space.shape and actions.dtype.kind in "biuf"
        if fits and actions.dtype != space.dtype and space.dtype.kind != "f":  # floats may be rounded, integers not
            fits = actions.dtype.kind != "f" and (actions.astype(space.dtype) == actions).all()
        if not fits:
            raise APIUsageError(f"need actions {space.shape} {space.dtype}, got {actions.shape} {actions.dtype}")
        self._actions[self._where], self._expected = actions, "async_reset"  # unless all goes well
        for worker in self._workers:
            self._request(worker, "step")
        self._expected = "recv"

    def recv(self, timeout: float | None = None) -> Batch:
        """Return the batch that is ready first, `agents_per_batch` rows.

        Raises TimeoutError after `timeout` seconds, losing nothing, and WorkerError when an environment failed or died.
        """
        self._check("recv")
        self._wait(self._groups_per_batch, timeout)
        self._expected = "async_reset"  # unless all goes well
        groups = [self._groups[self._ready.popleft()] for _ in range(self._groups_per_batch)]
        self._workers, self._where, fields = groups[0]
        if not self.zero_copy:
            self._workers = [worker for workers, _, _ in groups for worker in workers]
            fields = [np.concatenate(parts) for parts in zip(*[fields for _, _, fields in groups])]
            self._where = fields[4]
        infos: dict = {}
        for position, worker in enumerate(self._workers):
            for row, info in self._said[worker]:
                infos = self._infos._add_info(infos, info, position * self._rows_per_worker + row)
        (*arrays, agent_ids, masks), self._expected = fields, "send"
        self.agent_ids, self.masks = agent_ids.copy(), masks.copy()  # so that a learner may write into them
        return Batch(*arrays, infos, self.agent_ids, self.masks)

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple:
        """Call a method of every environment, or read an attribute, the adapter's first; errors leave all alive."""
        return tuple(self._command("call", [(args, kwargs)] * self.num_envs, name))

    get_attr, render = call, partialmethod(call, "render")

    def set_attr(self, name: str, values: Any) -> None:
        """Set an attribute of every environment to one value, or to its own of a list."""
        values = list(values) if isinstance(values, (list, tuple)) else [values] * self.num_envs
        if len(values) != self.num_envs:
            raise ValueError(f"values: expected one, or a list of {self.num_envs}, got {len(values)}")
        self._command("call", [((name, value), {}) for value in values], "set_wrapper_attr")

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _check(self, call: str) -> None:
        if self.closed or (call in ("send", "recv") and call != self._expected):
            due = f"{self._expected}() is due; then recv and send take turns"
            raise APIUsageError(f"{call}() out of order: {'the vectorizer is closed' if self.closed else due}")

    def _command(self, name: str, per_env: Sequence, *shared: Any) -> list:
        """Once all workers are free, have each do something with its environments; returns the results of all."""
        self._check(name)
        self._wait()
        if name == "reset":
            self._finished, self._expected = [0] * len(self._finished), "async_reset"  # first, for who is interrupted
            self._ready.clear()  # drops the results of steps that were under way
        for worker in range(self.num_workers):
            self._request(worker, name, per_env[worker * self._per_worker :][: self._per_worker], *shared)
        if name == "reset":
            return []
        self._wait()
        for failure in (reply for reply in self._replies if isinstance(reply, WorkerError)):
            raise failure
        return [result for own in self._replies for result in own]

    def _finish(self, worker: int, request: str, reply: Any) -> None:
        if request in ("step", "reset"):
            self._said[worker], group = reply, worker // self._group_size
            self._finished[group] += 1
            if self._finished[group] % self._group_size == 0:
                self._ready.append(group)  # first come, first served, so no group starves
        else:
            self._replies[worker] = reply

    def _request(self, worker: int, name: str, *arguments: Any) -> None:
        self._finish(worker, name, getattr(self._shard, name)(*arguments))

    def _wait(self, needed: int = sys.maxsize, timeout: float | None = None) -> None:
        """Nothing to wait for: requests are carried out at once."""


class _Line:
    """What a worker and its parent share: a flag in a cache line of its own, a pipe, and a bell (a semaphore) for each.

    First the rows are written, then the flag, then the bell is rung; the other side sees the flag, takes a ring, and
    only then reads the rows. On x86 the flag would do, but a weakly ordered CPU (ARM, POWER) needs a store-release and
    a load-acquire, which the semaphore is; not where two workers reply at once and the parent takes the other's ring:
    there, that this one's is nanoseconds behind its flag has to do. No ring gets lost, so whoever stops spinning may
    sleep.
    """

    def __init__(self, control: Any, index: int, connection: Any, worker_bell: Any, parent_bell: Any):
        line = np.frombuffer(control, np.uint8)[index * CACHE_LINE : (index + 1) * CACHE_LINE]
        self.flag, self.progress = line[:1].data, line[8:16].view(np.int64).data  # which environment is at work
        self.index, self.connection, self.request = index, connection, "constructor"
        self.worker_bell, self.parent_bell, self.waited = worker_bell, parent_bell, 0.0

    def publish(self, flag: int, bell: Any, message: bytes = b"") -> None:
        self.flag[0] = flag
        bell.release()  # 0.1 us where nobody sleeps
        if message:  # last, so that one larger than the pipe finds its reader
            with contextlib.suppress(ConnectionError):  # the other side is dead, which each notices elsewhere
                self.connection.send_bytes(message)

    def next_request(self) -> bytes | None:
        """As a worker, wait until the parent asks for something; None when it closes: a ring without a flag."""
        start = time.perf_counter()
        deadline = start + SPIN_SECONDS * (self.waited < SPIN_SECONDS)
        while self.flag[0] < STEP and time.perf_counter() < deadline:
            _yield()
        self.worker_bell.acquire()
        self.waited = time.perf_counter() - start
        return self.connection.recv_bytes() if self.flag[0] == COMMAND else b"" if self.flag[0] == STEP else None


def _worker(is_main: bool, env_fns: CloudpickleWrapper, *line_arguments: Any) -> None:
    """Serve the parent's requests until it closes or is gone."""
    parent, starter = multiprocessing.parent_process(), os.getppid()

    def die_with_parent() -> None:  # even if an environment hangs
        while parent.is_alive() and os.getppid() == starter:  # the first stays true while another fork of it lives
            parent.join(1.0)
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()
    if is_main and hasattr(ctypes.CDLL(None), "prctl"):  # that thread never runs while C code holds the GIL
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: when the thread that started this worker ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes its workers
    signal.signal(signal.SIGTERM, lambda *_: None)  # so is this; SIG_IGN would pass to programs that environments run
    os.register_at_fork(after_in_child=partial(signal.signal, signal.SIGTERM, signal.SIG_DFL))  # as this would to forks
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
    # Every worker has one core, not all of them
    for name, limit in ("torch", "set_num_threads"), ("cv2", "setNumThreads"), ("threadpoolctl", "threadpool_limits"):
        with contextlib.suppress(Exception):  # not installed, broken, or a torch that nothing here has imported yet
            getattr(sys.modules[name] if name == "torch" else __import__(name), limit)(1)
    np.random.seed()  # a fork starts with its parent's random state; Python's own generator sees to that itself
    line = _Line(*line_arguments)
    with contextlib.suppress(EOFError, OSError), contextlib.closing(_Shard(env_fns.fn, line.progress)) as shard:
        for request in iter(line.next_request, None):  # an EOFError: the parent is gone
            try:
                name, arguments = pickle.loads(request) if request else ("step", ())
                if name == "reset" and arguments[0][0] is not None:  # for environments that use the global generators
                    random.seed(arguments[0][0]), np.random.seed(arguments[0][0] % 2**32)
                reply = getattr(shard, name)(*arguments)
                message = pickle.dumps((None, reply)) if reply else b""
            except BaseException:  # SystemExit too: whatever an environment raises is the parent's to report
                message = pickle.dumps((traceback.format_exc(), None))
            line.publish(MESSAGE if message else DONE, line.parent_bell, message)


def _shut_down(lines: list[_Line], seconds: float, warns: bool) -> None:
    """Ask the workers to close and wait; kill those that do not."""
    for line in lines:
        line.worker_bell.release(), line.worker_bell.release()  # one may be for a request that Ctrl-C left without
        line.connection.close()
    running, deadline = [line.process for line in lines if line.process.is_alive()], time.perf_counter() + seconds
    try:
        while any(process.is_alive() for process in running) and time.perf_counter() < deadline:
            time.sleep(SPIN_SECONDS)  # `join` would also wait for forks that an environment leaves behind
    finally:  # also on Ctrl-C, or Python would wait for ever for one that hangs
        for process in running:
            if warns and process.is_alive():
                gymnasium.logger.warn(f"{process.name} did not close in {seconds:g} s, is killed; see close(timeout=)")
            process.kill(), process.join(1.0)  # nothing to one that has ended


class Multiprocessing(Serial):
    """Steps environments in worker processes that write their rows straight into shared memory.

    With `batch_size < num_envs` it is an asynchronous pool: `recv` returns the environments that are ready first, and
    `send` sets them to work again while others are still busy. A constructor that fails raises WorkerError.
    `close(timeout=None, terminate=False)` gives workers so many seconds, or CLOSE_SECONDS, then warns and kills.

    Args:
        env_fns: functions that return a gymnasium.Env or a PettingZoo ParallelEnv, adapted here if they are not yet.
        num_workers: processes, a divisor of `num_envs`; by default the largest up to the number of usable cores, of
            which torchrun's ranks have a share each.
        batch_size: environments a `recv`, a multiple of those that a worker has; by default all.
        zero_copy: views of the first complete block of neighboring workers, valid until the next `send` of the same
            environments; if False, copies from whichever workers are ready first.
        context: start method of multiprocessing (fork, forkserver, spawn); by default Python's own default.
        infos: "final" for the infos of episodes' last steps only, "all" for every step's, as gymnasium has it.
    """

    def __init__(self, env_fns: Sequence[Callable], num_workers: int | None = None, batch_size: int | None = None,
                 zero_copy: bool = True, context: str | None = None, infos: str = "final"):
        self._lines, self._looked, self._waited = [], time.perf_counter(), 0.0
        limit = {"seconds": CLOSE_SECONDS, "warns": True}
        shut_down = multiprocessing.util.Finalize(self, _shut_down, [self._lines], limit, exitpriority=1)

        def close_extras(timeout: float | None = None, terminate: bool = False) -> None:  # also at this process's end
            seconds = CLOSE_SECONDS if timeout is None else timeout
            limit.update(seconds=0.0 if terminate else seconds, warns=not terminate)
            shut_down()

        self.close_extras = close_extras
        self._divide(env_fns, num_workers, batch_size, zero_copy, infos)
        context, is_main = multiprocessing.get_context(context), threading.current_thread() is threading.main_thread()
        control, self._bell = context.RawArray("B", CACHE_LINE * self.num_workers), context.Semaphore(0)
        for worker in range(self.num_workers):
            connection, child = context.Pipe()
            multiprocessing.util.register_after_fork(connection, type(connection).close)  # or forks would keep it open
            line = _Line(control, worker, connection, context.Semaphore(0), self._bell)
            own_fns = CloudpickleWrapper(env_fns[worker * self._per_worker :][: self._per_worker])
            arguments = (is_main, own_fns, control, worker, child, line.worker_bell, self._bell)
            line.process = context.Process(target=_worker, args=arguments)  # no daemon, so it may start processes
            self._lines.append(line)
            line.process.start()
            child.close()
        self._construct(infos)

    def _request(self, worker: int, name: str, *arguments: Any) -> None:
        message, line = b"" if name == "step" else pickle.dumps((name, arguments)), self._lines[worker]
        if line.request == "call" and line in self._busy:  # one that Ctrl-C or an unpicklable argument cut short
            self._wait()
        try:
            self._busy.append(line)
            line.request = name
            line.publish(COMMAND if message else STEP, line.worker_bell, message)
        except BaseException:  # Ctrl-C: the worker might wait for its ring or for the rest of the message for ever
            self.close()
            raise

    def _wait(self, needed: int = sys.maxsize, timeout: float | None = None) -> None:
        """Collect replies until so many groups are ready, or no worker is busy: yield, then block (SPIN_SECONDS)."""
        now, start, has_ring = time.perf_counter(), time.perf_counter(), False
        while True:
            if now - self._looked > BLOCK_SECONDS:
                self._looked = now
                for line in self._lines:  # also those that nobody waits for
                    if not line.process.is_alive() and line.flag[0] != MESSAGE:  # which would say more
                        self._fail(line)
            for line in [line for line in self._busy if line.flag[0] < STEP]:
                if not has_ring:  # takes this reply's; not for ever, as Ctrl-C may have swallowed it
                    self._bell.acquire(True, BLOCK_SECONDS)
                has_ring = False  # the one that ended the sleep below counts for one reply
                self._collect(line)
            now = time.perf_counter()
            if not self._busy or len(self._ready) >= needed:
                self._waited = now - start
                return
            left = BLOCK_SECONDS if timeout is None else start + timeout - now
            if left <= 0:
                raise TimeoutError(f"waited {timeout:.3g} s for workers {[line.index for line in self._busy]}")
            if max(self._waited, now - start) < SPIN_SECONDS:
                _yield()
            else:
                has_ring = self._bell.acquire(True, min(left, BLOCK_SECONDS))

    def _collect(self, line: _Line) -> None:
        try:
            failure, reply = line.connection.recv() if line.flag[0] == MESSAGE else (None, ())
            line.flag[0] = DONE  # so that, whatever interrupts the next request, nobody waits for a second message
            self._busy.remove(line)
            if failure is None or line.request == "call":  # whose failure `_command` raises once all have answered
                return self._finish(line.index, line.request, self._error(line, failure) if failure else reply)
        except (EOFError, OSError):
            failure = None
        except BaseException:  # Ctrl-C, perhaps within a message, or one that cannot be unpickled: there is no way on
            self.close()
            raise
        self._fail(line, failure)

    def _fail(self, line: _Line, cause: str | None = None) -> None:
        """Raise a WorkerError; without a `cause`, because the process is dead."""
        if cause is None:
            line.process.join(1.0)
            code, killed = line.process.exitcode or 0, {-one: f"killed by {one.name}" for one in signal.Signals}
            cause = killed.get(code, f"the process exited with code {code}")
            if line.request == "constructor" and code == 1:
                cause += "; under spawn and forkserver, a script needs `if __name__ == '__main__':` around what it runs"
        _shut_down(self._lines, 0.3, warns=False)  # fast: whoever gets the error should not have to wait for it
        self.closed = True
        raise self._error(line, cause)

    def _error(self, line: _Line, cause: str) -> WorkerError:
        return WorkerError(line.index * self._per_worker + line.progress[0], line.index, line.request, cause)
