"""Make every environment look like Atari, and step many of them fast.

Emulation flattens any structured observation to one flat row and any nested action to one MultiDiscrete or Box row.
Vectorization steps many environments in worker processes that write their rows straight into one shared buffer.

    import gymnasium, puffer_core

    if __name__ == "__main__":
        env_fns = [lambda: gymnasium.make("Blackjack-v1")] * 8          # observations are Tuples
        with puffer_core.Multiprocessing(env_fns, num_workers=2) as envs:
            observations, infos = envs.reset(seed=1)                    # one flat row per environment
            for _ in range(100):
                observations, rewards, terminations, truncations, infos = envs.step(envs.action_space.sample())
                player_sum, dealer_card, usable_ace = envs.layout.unflatten(observations)  # views, not copies

Read it from top to bottom: layouts, adapters, vectorizers. For Linux and macOS.
"""

import contextlib
import copy
import functools
import mmap
import multiprocessing
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
import weakref
from collections import deque, namedtuple
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from types import SimpleNamespace
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import CloudpickleWrapper, batch_space

# A worker's flag is one byte in shared memory. The parent writes a request, the worker overwrites it with a status;
# whoever's turn it is not only reads, so the byte needs no lock. MESSAGE: more comes through the pipe.
DONE, MESSAGE, STEP, COMMAND = range(4)
REQUESTS = (STEP, COMMAND)
CACHE_LINE = 64  # bytes; every worker's flag has a line of its own, so no two cores fight over one
SPIN_SECONDS = 1e-3  # wait by yielding for this long, then block: a learner needs the cores during its update
BLOCK_SECONDS = 0.1  # a blocked process looks around this often even if nobody wakes it
CLOSE_SECONDS = 3.0  # what workers get to close their environments before they are terminated, then killed


class APIUsageError(RuntimeError):
    """A call out of order or on a closed vectorizer, or actions of the wrong shape or dtype."""


class WorkerError(RuntimeError):
    """An environment or the worker process that runs it failed; `env_index`, `worker` and `phase` say where."""

    def __init__(self, env_index: int, worker: int, phase: str, cause: str):
        super().__init__(f"environment {env_index} (worker {worker}) failed in {phase}: {cause}")
        self.env_index, self.worker, self.phase, self.cause = env_index, worker, phase, cause


# ------------------------------------------------------------------------------------------------------------ layouts

# One leaf of a nested space: the bytes `start:stop` of a struct, seen as `dtype` (its name) and `shape`.
Leaf = namedtuple("Leaf", "path space dtype shape start stop")


def _map(tree: Any, function: Callable[[Leaf], Any]) -> Any:
    """Apply a function to every leaf of a tree of dicts and tuples."""
    if isinstance(tree, dict):
        return {key: _map(child, function) for key, child in tree.items()}
    if isinstance(tree, tuple) and not isinstance(tree, Leaf):
        return tuple([_map(child, function) for child in tree])
    return function(tree)


def _leaves(tree: Any) -> list:
    _map(tree, (leaves := []).append)
    return leaves


def _plan(space: spaces.Space, path: str) -> tuple[np.dtype, Any]:
    """The numpy dtype of a space (aligned structs for Dict and Tuple), and its leaves at the offsets that numpy chose."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)) and len(space):
        items = space.items() if isinstance(space, spaces.Dict) else enumerate(space)
        plans = {key: _plan(child, f"{path}[{key!r}]") for key, child in items}
        struct = np.dtype({"names": [*map(str, plans)], "formats": [plan[0] for plan in plans.values()]}, align=True)
        tree = {}
        for (key, (_, child)), name in zip(plans.items(), struct.names):
            by = struct.fields[name][1]
            tree[key] = _map(child, lambda leaf, by=by: leaf._replace(start=leaf.start + by, stop=leaf.stop + by))
        return struct, tree if isinstance(space, spaces.Dict) else tuple(tree.values())
    fits = isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary))
    if not fits or space.dtype.kind not in "biuf" or not space.dtype.isnative:
        expected = "Box, Discrete, MultiDiscrete or MultiBinary of bools, integers or floats, nested in Dict and Tuple"
        raise TypeError(f"{path} is {space!r:.80}, which cannot be flattened; expected {expected}")
    dtype = np.dtype((space.dtype, space.shape))
    return dtype, Leaf(path, space, space.dtype.name, space.shape, 0, dtype.itemsize)


def _bounds(leaves: list[Leaf]) -> list[np.ndarray]:
    """The lowest and the highest value of every element of all leaves, inclusive, as two flat arrays."""
    bounds = []
    for space in [leaf.space for leaf in leaves]:
        if isinstance(space, spaces.Box):
            bounds.append((space.low.ravel(), space.high.ravel()))
        else:
            low = np.ravel(np.zeros(space.shape, space.dtype) + getattr(space, "start", 0))
            count = 2 if isinstance(space, spaces.MultiBinary) else np.ravel(getattr(space, "nvec", getattr(space, "n", 0)))
            bounds.append((low, low + (count - 1)))
    return [np.concatenate(bound) for bound in zip(*bounds)]


def _reader(tree: Any, path: str) -> Callable[[Any], Sequence[Any]]:
    """Compile a function that returns a sample's leaves in order, and raises ValueError where its keys are others."""
    if isinstance(tree, Leaf):
        return lambda sample: (sample,)
    keys, count = list(tree) if isinstance(tree, dict) else list(range(len(tree))), len(tree)
    readers = [_reader(tree[key], f"{path}[{key!r}]") for key in keys]
    pick = lambda sample: [leaf for key, read in zip(keys, readers) for leaf in read(sample[key])]  # noqa: E731
    if count > 1 and all(isinstance(tree[key], Leaf) for key in keys):
        pick = operator.itemgetter(*keys)  # one C call: for NetHack's nine keys 0.2 us, against 1.1 us for the loop

    def read(sample: Any) -> Sequence[Any]:
        try:
            if len(sample) == count:
                return pick(sample)
        except (KeyError, IndexError, TypeError):
            pass
        got = list(sample) if isinstance(sample, dict) else f"{sample!r:.80}"
        raise ValueError(f"{path}: expected the keys {keys}, got {got}")

    return read


class Layout:
    """How a structured observation lies in one flat row.

    A plain `Box` passes through unchanged. Every other space becomes a row of shape `(n,)`: leaves that share one dtype
    keep it, mixed leaves become the bytes of an aligned struct whose offsets are numpy's own (`dtype.fields`).
    Attributes: `space`; `dtype`, the numpy dtype of one row; `flat_space`, the Box of one row.

    Raises:
        TypeError: a leaf cannot be flattened (Text, Graph, Sequence, OneOf, object dtypes); the message names its path.
    """

    def __init__(self, space: spaces.Space):
        self.space, (self.dtype, self._tree) = space, _plan(space, "observation")
        dtypes = {leaf.space.dtype for leaf in _leaves(self._tree)}
        self._flat_dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.uint8)
        if isinstance(space, spaces.Box):
            self.flat_space = space
        elif dtypes:
            self.flat_space = spaces.Box(0, 255, (self.dtype.itemsize,), np.uint8)
        else:
            self.flat_space = spaces.Box(*_bounds(_leaves(self._tree)), dtype=self._flat_dtype.type)
        self._out = np.zeros(self.flat_space.shape, self._flat_dtype)
        self._write_out = self._write_scratch = self.writer(self._out)

    def flatten(self, sample: Any, out: np.ndarray | None = None) -> np.ndarray:
        """Copy a sample into one flat row: `out`, of `flat_space`'s shape and dtype, or a new one.

        Raises:
            ValueError: a missing or extra key, a wrong shape, or a value that its leaf's dtype cannot hold. Stale bytes
                never survive, and bytes of padding are zero.
        """
        if out is None:
            return self._write_scratch(sample).copy()
        if out is not self._out:
            self._out, self._write_out = out, self.writer(out)
        return self._write_out(sample)

    def writer(self, row: np.ndarray) -> Callable[[Any], np.ndarray]:
        """Return a `flatten` that is bound to one row, for a row that is filled again and again."""
        if row.shape != self.flat_space.shape or row.dtype != self._flat_dtype or not row.flags.c_contiguous:
            expected = f"a contiguous array of shape {self.flat_space.shape} and dtype {self._flat_dtype}"
            raise ValueError(f"out: expected {expected}, got shape {row.shape} and dtype {row.dtype}")
        return _writer(self._tree, row, _leaves(self.unflatten(row)))

    def unflatten(self, flat: Any) -> Any:
        """See flat rows, `(*batch, *flat_space.shape)` of a numpy array or torch tensor, as what they were made from.

        Returns nested dicts and tuples of views `(*batch, *leaf.shape)`, each in its leaf's dtype. For tensors this
        compiles with `torch.compile(fullgraph=True)`: it is nothing but slices and views at constant offsets.

        Raises:
            ValueError: rows of another length or dtype, such as bytes that were cast to float before.
        """
        if isinstance(self.space, spaces.Box):
            return flat
        if isinstance(flat, np.ndarray):
            library = np
        else:
            import torch as library
        size, dtype, unit = self.flat_space.shape[0], self._flat_dtype.name, self._flat_dtype.itemsize
        if flat.dtype != getattr(library, dtype) or flat.shape[-1] != size:
            got = f"shape {tuple(flat.shape)} and dtype {flat.dtype}"
            raise ValueError(f"expected rows of {size} {dtype}, as the environments returned them, got {got}")

        def view(leaf: Leaf) -> Any:
            elements = flat[..., leaf.start // unit : leaf.stop // unit].view(getattr(library, leaf.dtype))
            return elements.reshape(flat.shape[:-1] + leaf.shape)

        return _map(self._tree, view)


def _writer(tree: Any, row: np.ndarray, views: list[np.ndarray]) -> Callable[[Any], np.ndarray]:
    """Compile a function that flattens samples into one row, through views of the row's leaves.

    Environments that refill the same arrays at every step (NetHack does) are noticed: their bytes are joined in one go,
    with no second look at dtypes and shapes that cannot have changed. On a MiniHack observation, nine arrays and 12.6 kB,
    that takes 0.8 times as long as nine bare numpy assignments; copying with checks takes 1.6 times as long.
    """
    plan = [(view, view.shape, view.dtype, leaf) for view, leaf in zip(views, _leaves(tree))]
    starts, stops = [leaf.start for leaf in _leaves(tree)], [leaf.stop for leaf in _leaves(tree)]
    gaps = [bytes(start - stop) for stop, start in zip(stops, [*starts[1:], row.nbytes])]
    read, row_bytes = _reader(tree, "observation"), row.reshape(-1).view(np.uint8).data
    sources: Sequence[Any] = [row] * len(views)  # the leaves of the last sample, held so that `is` can be trusted
    chunks: list[Any] | None = None  # their bytes and the gaps between them, as live views; empty if they have none

    def assign(values: Sequence[Any]) -> np.ndarray:
        if any(gaps):
            row[...] = 0
        for (view, shape, dtype, leaf), value in zip(plan, values):
            if value.__class__ is not np.ndarray or value.shape != shape or value.dtype != dtype:
                value = _cast(leaf, value)
            view[...] = value
        return row

    def write(sample: Any) -> np.ndarray:
        nonlocal sources, chunks
        values = read(sample)
        for value, source in zip(values, sources):
            if value is not source:
                assign(values)  # which raises where they do not fit
                sources, chunks = values, None
                return row
        if chunks is None:
            plain = [value.__class__ is np.ndarray and value.flags.c_contiguous for value in values]
            exact = all(plain) and all(value.dtype == dtype for value, (_, _, dtype, _) in zip(values, plan))
            pairs = [(value.reshape(-1).view(np.uint8).data, gap) for value, gap in zip(values, gaps)] if exact else []
            chunks = [part for pair in pairs for part in pair if len(part)]
        if not chunks:
            return assign(values)
        row_bytes[:] = b"".join(chunks)
        return row

    def write_one(value: Any) -> np.ndarray:
        if value.__class__ is not np.ndarray or value.shape != shape or value.dtype is not dtype:
            value = _cast(tree, value)
        view[...] = value
        return row

    view, shape, dtype, _ = plan[0]
    return write_one if isinstance(tree, Leaf) else write


def _cast(leaf: Leaf, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.shape != leaf.shape or array.dtype.kind not in "biuf":
        raise ValueError(f"{leaf.path}: expected shape {leaf.shape} of {leaf.dtype}, got {array.shape} of {array.dtype}")
    with np.errstate(all="ignore"):
        cast = array.astype(leaf.dtype)
    if cast.dtype.kind != "f" and not np.array_equal(cast, array):
        raise ValueError(f"{leaf.path}: {leaf.dtype} cannot hold {value!r:.80}")
    return cast


class ActionLayout:
    """How an action of any space lies in one flat row that a policy can sample: a sample of `flat_space`.

    Discrete, MultiDiscrete and Box pass through. MultiBinary and nested discrete leaves become one MultiDiscrete that
    counts from 0, whatever a leaf's `start`; nested Box leaves become one float Box.

    Raises:
        TypeError: Box and discrete leaves are mixed, or a leaf has no fixed size; the message names the leaves.
    """

    def __init__(self, space: spaces.Space):
        self.space, self._tree = space, _plan(space, "action")[1]
        leaves = _leaves(self._tree)
        boxes = [leaf.path for leaf in leaves if isinstance(leaf.space, spaces.Box)]
        others = [leaf.path for leaf in leaves if leaf.path not in boxes]
        if boxes and others:
            raise TypeError(f"cannot mix the Box leaves {boxes} and the discrete leaves {others} in one flat action")
        self._low, self._high = _bounds(leaves)
        self._start, self._is_box, self._valid = np.zeros_like(self._low), bool(boxes), range(0)
        self._ends = np.cumsum([np.prod(leaf.shape, dtype=int) for leaf in leaves])[:-1]
        if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete, spaces.Box)):
            self.flat_space = space
            if isinstance(space, spaces.Discrete):
                self._valid = range(space.start, space.start + space.n)  # looking up an int takes 0.04 us
        elif boxes:
            dtype = np.result_type(np.float32, self._low)
            self.flat_space = spaces.Box(self._low.astype(dtype), self._high.astype(dtype), dtype=dtype.type)
        else:
            self._start, self._low, self._high = self._low, self._low * 0, self._high - self._low
            self.flat_space = spaces.MultiDiscrete(self._high.astype(np.int64) + 1)

    def unflatten(self, flat: Any) -> Any:
        """Turn one flat action into a sample that the environment's own `action_space.contains`.

        Continuous values are clipped to their bounds, as Gaussian policies need, and rounded for integer leaves.

        Raises:
            ValueError: a discrete value out of range, a NaN, or a wrong shape.
        """
        if flat.__class__ is int and flat in self._valid:
            return flat
        if isinstance(self.space, spaces.Discrete):
            if 0 <= (action := operator.index(flat)) - self.space.start < self.space.n:
                return action
            raise ValueError(f"expected an action in {self.space}, got {flat}")
        values = np.ravel(flat)
        if np.shape(flat) != self.flat_space.shape or not (self._is_box or self.flat_space.contains(np.asarray(flat))):
            raise ValueError(f"expected an action in {self.flat_space}, got {flat}")
        if np.isnan(values).any():
            raise ValueError(f"expected an action without NaN, got {flat}")
        parts = iter(np.split(np.clip(values, self._low, self._high) + self._start, self._ends))

        def take(leaf: Leaf) -> Any:
            part = next(parts).reshape(leaf.shape)
            part = (part if leaf.space.dtype.kind == "f" else np.rint(part)).astype(leaf.dtype)
            return int(part) if isinstance(leaf.space, spaces.Discrete) else part

        return _map(self._tree, take)


# ----------------------------------------------------------------------------------------------------------- adapters


class GymnasiumPufferEnv(gymnasium.Wrapper):
    """A Gymnasium environment with flat observations and flat actions.

    Attributes: `layout`, `action_layout`; the flat `observation_space` and `action_space`, also with `single_` before
    their names; `num_agents`, which is 1; `masks`, which is True; `episode_over`.
    """

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        self.layout, self.action_layout = Layout(env.observation_space), ActionLayout(env.action_space)
        self.observation_space = self.single_observation_space = self.layout.flat_space
        self.action_space = self.single_action_space = self.action_layout.flat_space
        self.num_agents, self.masks, self.episode_over, self._flatten = 1, np.ones(1, bool), True, self.layout.flatten
        self._unflatten, self._step = self.action_layout.unflatten, env.step

    def bind(self, observations: np.ndarray) -> None:
        """From now on, write every observation into the one row of `observations`, and return that row."""
        self._flatten = self.layout.writer(observations[0, ...])

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Reset the environment; returns the flat observation and the info."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self._flatten(observation), info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Step with a flat action; returns the flat observation, reward, terminated, truncated and info."""
        observation, reward, terminated, truncated, info = self._step(self._unflatten(action))
        self.episode_over = terminated or truncated
        return self._flatten(observation), reward if reward.__class__ is float else _scalar(reward), terminated, truncated, info


class PettingZooPufferEnv:
    """A PettingZoo ParallelEnv as a block of flat rows: row i belongs to `possible_agents[i]` for ever.

    Attributes: those of `GymnasiumPufferEnv`, for one agent; `num_agents`, the number of rows; `masks`, bool
    `(num_agents,)`, False where the last call returned nothing for an agent, whose row is then zero.
    """

    def __init__(self, env: Any):
        self.env, self.possible_agents, self.num_agents = env, list(env.possible_agents), len(env.possible_agents)
        first = self.possible_agents[0]
        for space in (env.observation_space, env.action_space):
            for agent in self.possible_agents:
                if space(agent) != space(first):
                    raise TypeError(f"all agents must have one space: {first} has {space(first)}, {agent} {space(agent)}")
        self.layout, self.action_layout = Layout(env.observation_space(first)), ActionLayout(env.action_space(first))
        self.observation_space = self.single_observation_space = self.layout.flat_space
        self.action_space = self.single_action_space = self.action_layout.flat_space
        self.masks, self.episode_over, self._writers = np.zeros(self.num_agents, bool), True, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["env"], name)

    def get_wrapper_attr(self, name: str) -> Any:
        """Read an attribute, of the environment unless the adapter has it."""
        return getattr(self, name)

    def set_wrapper_attr(self, name: str, value: Any) -> None:
        """Set an attribute of the environment."""
        setattr(self.env, name, value)

    def bind(self, observations: np.ndarray) -> None:
        """From now on, write observations into the rows of `observations`, and return that."""
        self._observations, self._writers = observations, [self.layout.writer(observations[row, ...]) for row in range(self.num_agents)]

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Reset the environment; returns observations `(num_agents, *flat)` and infos by agent."""
        observations, infos = self.env.reset(seed=seed, options=options)
        return self._observe(observations), infos

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        """Step with one flat action a row; those of agents that are not in `env.agents` are ignored.

        Returns observations `(num_agents, *flat)`, rewards (float64), terminations and truncations (bool)
        `(num_agents,)`, and infos by agent.
        """
        living, agents = set(self.env.agents), self.possible_agents
        actions = {agent: self.action_layout.unflatten(action) for agent, action in zip(agents, actions) if agent in living}
        observations, rewards, terminations, truncations, infos = self.env.step(actions)
        self.episode_over = all(terminations.get(agent) or truncations.get(agent) for agent in self.env.agents)
        ends = [np.array([bool(end.get(agent)) for agent in agents]) for end in (terminations, truncations)]
        return self._observe(observations), np.array([_scalar(rewards.get(agent, 0.0)) for agent in agents]), *ends, infos

    def _observe(self, observations: dict) -> np.ndarray:
        if self._writers is None:
            rows = np.zeros((self.num_agents, *self.observation_space.shape), self.observation_space.dtype)
        else:
            rows = self._observations
        self.masks = np.array([agent in observations for agent in self.possible_agents])
        for row, agent in enumerate(self.possible_agents):
            if agent not in observations:
                rows[row] = 0
            elif self._writers is None:
                self.layout.flatten(observations[agent], rows[row])
            else:
                self._writers[row](observations[agent])
        return rows


class EpisodeStats(gymnasium.Wrapper):
    """Drops the infos of single steps and sums an episode up in the info of its last step.

    `info["episode"]` then holds the return `r`, the length `l` in steps, the time `t` in seconds, and under its own key
    the sum of every number that the infos of the episode's steps held.
    """

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        """Reset the environment and the sums; the info is empty."""
        observation, _ = self.env.reset(seed=seed, options=options)
        self._start, self._length, self._return, self._sums = time.perf_counter(), 0, 0.0, {}
        return observation, {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict]:
        """Step the environment; the info is empty until the episode's last step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._length, self._return = self._length + 1, self._return + _scalar(reward)
        for key, value in info.items():
            if isinstance(value, (bool, int, float, np.number, np.bool_)):
                self._sums[key] = self._sums.get(key, 0) + value
        own = {"r": self._return, "l": self._length, "t": time.perf_counter() - self._start}
        return observation, reward, terminated, truncated, {"episode": self._sums | own} if terminated or truncated else {}


def _scalar(reward: Any) -> float:
    """Environments return rewards as floats, ints, numpy scalars or arrays of one element."""
    return reward if reward.__class__ is float else float(np.asarray(reward).item())


def _adapt(env: Any) -> GymnasiumPufferEnv | PettingZooPufferEnv:
    if isinstance(env, (GymnasiumPufferEnv, PettingZooPufferEnv)):
        return env
    if isinstance(env, gymnasium.Env):
        return GymnasiumPufferEnv(env)
    if hasattr(env, "possible_agents") and not hasattr(env, "agent_iter"):
        return PettingZooPufferEnv(env)
    hint = "pettingzoo.utils.aec_to_parallel converts a turn-based one"
    raise TypeError(f"env_fns must return a gymnasium.Env or a PettingZoo ParallelEnv, got {type(env).__name__} ({hint})")


# -------------------------------------------------------------------------------------------------------- vectorizers


def _allocate(num_rows: int, observation_space: spaces.Space, action_space: spaces.Space, file: Any = None) -> Any:
    """All that environments and learner exchange, a row an agent and every field contiguous, in a file or in memory."""
    fields = {"observations": (observation_space.dtype, (num_rows, *observation_space.shape))}
    fields["actions"] = (action_space.dtype, (num_rows, *action_space.shape))
    fields["rewards"] = (np.float64, (num_rows,))  # as in gymnasium
    fields |= dict.fromkeys(("terminations", "truncations", "masks"), (np.bool_, (num_rows,)))
    struct = np.dtype({"names": list(fields), "formats": list(fields.values())}, align=True)
    if file is not None:
        file.truncate(struct.itemsize)
    memory = mmap.mmap(-1 if file is None else file.fileno(), struct.itemsize)
    return SimpleNamespace(**{name: np.ndarray((), struct, memory)[name] for name in fields})


class Batch(NamedTuple):
    """What `recv` returns; row i of every field is about the agent `agent_ids[i]`.

    Where `infos["_final_obs"]` is set, an episode ended and the observation is already the first of the next one. An agent
    that ended without it keeps its last observation, and is absent (`masks` False, row zero) from the next batch on.
    """

    observations: np.ndarray
    rewards: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray
    infos: dict
    agent_ids: np.ndarray
    masks: np.ndarray


class _Shard:
    """The environments of one process, stepped in turn. `reset` and `step` fill rows and return a list of (row, info)."""

    def __init__(self, env_fns: Sequence[Callable], first_env: int, infos: str, progress: Any):
        self.env_fns, self.first_env, self.all_infos, self.envs = env_fns, first_env, infos == "all", []
        self.progress = progress  # holds the index of the environment at work, for whoever has to explain a crash

    def constructor(self) -> tuple:
        for self.progress[0], env_fn in enumerate(self.env_fns, self.first_env):
            self.envs.append(_adapt(env_fn()))
            alike = [(env.layout.space, env.action_layout.space, env.num_agents) for env in (self.envs[-1], self.envs[0])]
            if alike[0] != alike[1]:
                raise ValueError(f"all environments must be alike: this one has {alike[0]}, the first {alike[1]}")
        return *alike[1], self.envs[0].metadata, getattr(self.envs[0], "render_mode", None)

    def bind(self, num_rows: int, path: str | None) -> Any:
        """Fill rows of a file that all workers map, or of memory that only this process has."""
        env, self.is_team = self.envs[0], isinstance(self.envs[0], PettingZooPufferEnv)
        with open(path, "r+b") if path else contextlib.nullcontext() as file:
            rows = _allocate(num_rows, env.single_observation_space, env.single_action_space, file)
        own = slice(self.first_env * env.num_agents, (self.first_env + len(self.envs)) * env.num_agents)
        self.rows = SimpleNamespace(**{name: field[own] for name, field in vars(rows).items()})
        self.slices = [slice(row, row + env.num_agents) for row in range(0, own.stop - own.start, env.num_agents)]
        self.places = self.slices if self.is_team else range(len(self.envs))
        self.is_discrete = isinstance(env.single_action_space, spaces.Discrete)
        for env, where in zip(self.envs, self.slices):
            env.bind(self.rows.observations[where])
        self.steps = [env.step for env in self.envs]
        return rows

    def reset(self, options: dict | None, seeds: Sequence[int | None]) -> list:
        rows = self.rows
        rows.rewards[:], rows.terminations[:], rows.truncations[:] = 0, False, False
        return [said for index, seed in enumerate(seeds) for said in self._reset(index, seed, options)]

    def _reset(self, index: int, seed: int | None = None, options: dict | None = None) -> list:
        self.progress[0] = self.first_env + index
        _, info = self.envs[index].reset(seed=seed, options=options)
        self.rows.masks[self.slices[index]] = self.envs[index].masks
        return self._by_row(index, info) if self.all_infos else []

    def step(self) -> list:
        progress, rows, said = self.progress, self.rows, []
        rewards, terminations, truncations = rows.rewards, rows.terminations, rows.truncations
        terminations.fill(False)
        truncations.fill(False)
        actions = rows.actions.tolist() if self.is_discrete else rows.actions
        for index, (step, where) in enumerate(zip(self.steps, self.places)):
            progress[0] = self.first_env + index
            _, rewards[where], terminated, truncated, info = step(actions[where])
            if self.is_team or terminated or truncated:
                terminations[where], truncations[where] = terminated, truncated
                said += self._tell(index, info)
            elif info and self.all_infos:
                said.append((index, info))
        return said

    def _tell(self, index: int, info: dict) -> list:
        """The infos of an environment's step; starts the next episode if this one is over."""
        rows, where, env, infos = self.rows, self.slices[index], self.envs[index], dict(self._by_row(index, info))
        rows.masks[where] = env.masks
        ended = np.flatnonzero(rows.terminations[where] | rows.truncations[where]) + where.start
        finals = {row: {"final_info": copy.deepcopy(infos.pop(row, {}))} for row in ended.tolist()}
        if env.episode_over:
            last, acted = rows.observations[where].copy(), env.masks.copy()
            infos = dict(self._reset(index))
            for row in (np.flatnonzero(acted) + where.start).tolist():
                if not rows.masks[row]:  # took part in the last step, but is not in the new episode
                    rows.observations[row], rows.masks[row] = last[row - where.start], True
                elif row in finals:
                    finals[row]["final_obs"] = last[row - where.start]
        return [*finals.items(), *(infos.items() if self.all_infos else ())]

    def _by_row(self, index: int, info: dict) -> list[tuple[int, dict]]:
        infos = [info.get(agent) for agent in self.envs[index].possible_agents] if self.is_team else [info]
        return [(self.slices[index].start + row, info) for row, info in enumerate(infos) if info]

    def call(self, name: str, arguments: list[tuple[tuple, dict]]) -> list:
        found = [env.get_wrapper_attr(name) for env in self.envs]
        return [each(*args, **kwargs) if callable(each) else each for each, (args, kwargs) in zip(found, arguments)]

    def close(self) -> None:
        while self.envs:
            with contextlib.suppress(Exception):
                self.envs.pop().close()


class _Vectorizer(gymnasium.vector.VectorEnv):
    """What both vectorizers share; they differ in how a worker gets a request, and in how to wait for its reply."""

    closed = True  # until there is something to close

    def _prepare(self, env_fns: Any, num_workers: int | None, batch_size: int | None, zero_copy: bool, infos: str) -> None:
        if not isinstance(env_fns, Sequence) or not env_fns or not all(map(callable, env_fns)):
            raise TypeError(f"env_fns: expected a list of functions that return environments, got {env_fns!r:.80}")
        if infos not in ("final", "all"):
            raise ValueError(f"infos: expected 'final' or 'all', got {infos!r}")
        num_envs = len(env_fns)
        if num_workers is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            num_workers = max(count for count in range(1, min(num_envs, cores) + 1) if num_envs % count == 0)
        if not 0 < num_workers <= num_envs or num_envs % num_workers:
            raise ValueError(f"num_workers: expected a divisor of num_envs={num_envs}, got {num_workers}")
        per_worker, batch_size = num_envs // num_workers, num_envs if batch_size is None else batch_size
        if not 0 < batch_size <= num_envs or batch_size % per_worker or (zero_copy and num_envs % batch_size):
            expected = f"a multiple of the {per_worker} environments a worker has, which divides num_envs={num_envs}"
            raise ValueError(f"batch_size: expected {expected} unless zero_copy=False, got {batch_size}")
        self.num_envs, self.num_workers, self.batch_size, self.zero_copy = num_envs, num_workers, batch_size, zero_copy
        # A batch is made of groups of workers: one group of all (sync), one of neighbours (first-ready, zero-copy), or
        # several of one worker each (first-ready, gathered). Whatever the strategy, `recv` does the same.
        self._group_size = batch_size // per_worker if zero_copy or batch_size == num_envs else 1
        self._groups_per_batch, self._per_worker = batch_size // per_worker // self._group_size, per_worker
        self.closed, self._missing, self._ready, self._busy = False, [0] * (num_workers // self._group_size), deque(), []
        self._replies, self._said = [None] * num_workers, [[]] * num_workers  # to commands; to steps and resets
        self._expected = "async_reset"

    def _describe(self, space: spaces.Space, action_space: spaces.Space, per_env: int, metadata: dict, render: Any) -> None:
        self.layout, self.render_mode = Layout(space), render
        self.metadata = {**metadata, "autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
        self.single_observation_space = self.layout.flat_space
        self.single_action_space = ActionLayout(action_space).flat_space
        self.num_agents, self.agents_per_batch = self.num_envs * per_env, self.batch_size * per_env
        self.observation_space = batch_space(self.single_observation_space, self.agents_per_batch)
        self.action_space = batch_space(self.single_action_space, self.agents_per_batch)
        self._rows_per_worker = self._per_worker * per_env
        self._infos = gymnasium.vector.VectorEnv()  # batches infos in gymnasium's own way, over the rows of a batch
        self._infos.num_envs = self.agents_per_batch

    def _adopt(self, rows: Any) -> None:
        self._rows, size, self._groups = rows, self._group_size * self._rows_per_worker, []
        fields = (rows.observations, rows.rewards, rows.terminations, rows.truncations, np.arange(self.num_agents), rows.masks)
        for group in range(len(self._missing)):
            workers, where = range(group * self._group_size, (group + 1) * self._group_size), slice(group * size, (group + 1) * size)
            self._groups.append((workers, where, [field[where] for field in fields]))

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
        """Reset all environments, whatever they are doing; results of steps under way are dropped.

        Environment i gets the seed `seed + i`, or `seed[i]` of a list; `options` are passed on to all.
        """
        if seed is None or isinstance(seed, (int, np.integer)):
            seed = [None if seed is None else int(seed) + index for index in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise ValueError(f"seed: expected an int or a list of {self.num_envs}, one an environment, got {len(seed)}")
        self._check("async_reset")
        self._wait(lambda: not self._busy)
        self._ready.clear()
        self._missing = [self._group_size] * len(self._missing)
        self._request_all("reset", options, per_env=[None if one is None else int(one) for one in seed])
        self._expected = "recv"

    def send(self, actions: Any) -> None:
        """Step the environments of the last batch with `actions`, `(agents_per_batch, *single_action_space.shape)`."""
        self._check("send")
        actions, dtype = np.asarray(actions), self.single_action_space.dtype
        expected = (self.agents_per_batch, *self.single_action_space.shape)
        if actions.shape != expected or (actions.dtype != dtype and not np.can_cast(actions.dtype, dtype, "same_kind")):
            raise APIUsageError(f"expected actions of shape {expected}, {dtype}, got {actions.shape}, {actions.dtype}")
        self._rows.actions[self._where], self._expected = actions, "recv"
        for worker in self._workers:
            self._missing[worker // self._group_size] += 1
            self._request(worker, "step")

    def recv(self, timeout: float | None = None) -> Batch:
        """Return the batch that is ready first; it has `agents_per_batch` rows.

        It waits for `timeout` seconds at most, then raises TimeoutError; nothing is lost: call `recv` again. A WorkerError
        tells that an environment failed, or its process died.
        """
        self._check("recv")
        self._wait(lambda: len(self._ready) >= self._groups_per_batch, timeout)
        self._expected, groups = "send", [self._groups[self._ready.popleft()] for _ in range(self._groups_per_batch)]
        self._workers, self._where, fields = groups[0]
        if len(groups) > 1:
            self._workers = [worker for workers, _, _ in groups for worker in workers]
            fields = [np.concatenate(parts) for parts in zip(*[fields for _, _, fields in groups])]
            self._where = fields[4]
        elif not self.zero_copy:
            fields = [field.copy() for field in fields]
        infos: dict = {}
        for position, worker in enumerate(self._workers):
            for row, info in self._said[worker]:
                infos = self._infos._add_info(infos, info, position * self._rows_per_worker + row)
        *arrays, self.agent_ids, self.masks = fields
        return Batch(*arrays, infos, self.agent_ids, self.masks)

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple:
        """Call a method of every environment, or read an attribute; returns one result an environment.

        Steps under way are awaited first. A WorkerError from here leaves the workers as they were.
        """
        results = self._command("call", name, per_env=[(args, kwargs)] * self.num_envs)
        return tuple([result for own in results for result in own])

    get_attr, render = call, functools.partialmethod(call, "render")

    def set_attr(self, name: str, values: Any) -> None:
        """Set an attribute of every environment to one value, or to its own of a list."""
        values = list(values) if isinstance(values, (list, tuple)) else [values] * self.num_envs
        if len(values) != self.num_envs:
            raise ValueError(f"values: expected one, or a list of {self.num_envs}, got {len(values)}")
        self._command("call", "set_wrapper_attr", per_env=[((name, value), {}) for value in values])

    def __enter__(self) -> "_Vectorizer":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _check(self, call: str) -> None:
        if self.closed or (call in ("send", "recv") and call != self._expected):
            due = "the vectorizer is closed" if self.closed else f"{self._expected}() is due; then recv and send take turns"
            raise APIUsageError(f"{call}() out of order: {due}")

    def _request_all(self, name: str, *shared: Any, per_env: list | None = None) -> None:
        self._check(name)
        self._wait(lambda: not self._busy)
        for worker in range(self.num_workers):
            own = () if per_env is None else (per_env[worker * self._per_worker :][: self._per_worker],)
            self._request(worker, name, *shared, *own)

    def _command(self, name: str, *shared: Any, per_env: list | None = None) -> list:
        """Have every worker do something other than a step, once it has time; returns the replies."""
        self._request_all(name, *shared, per_env=per_env)
        self._wait(lambda: not self._busy)
        return self._replies

    def _finish(self, worker: int, request: str, reply: Any) -> None:
        group = worker // self._group_size
        if request not in ("reset", "step"):
            self._replies[worker] = reply
            return
        self._said[worker], self._missing[group] = reply, self._missing[group] - 1
        if not self._missing[group]:
            self._ready.append(group)  # first come, first served, so no group starves


class Serial(_Vectorizer):
    """Steps all environments one after another in this process: for debugging, and for environments of a few us.

    Arguments are as in `Multiprocessing`. What an environment raises comes through as it is.
    """

    def __init__(self, env_fns: Sequence[Callable], zero_copy: bool = True, infos: str = "final"):
        self._prepare(env_fns, 1, None, zero_copy, infos)
        self._shard = _Shard(env_fns, 0, infos, [0])
        try:
            self._describe(*self._shard.constructor())
        except BaseException:
            self._shard.close()
            raise
        self._adopt(self._shard.bind(self.num_agents, None))
        self.envs = self._shard.envs

    def close(self, **kwargs: Any) -> None:
        """Close all environments."""
        self._shard.close()
        self.closed = True

    def _request(self, worker: int, name: str, *arguments: Any) -> None:
        self._finish(worker, name, getattr(self._shard, name)(*arguments))

    def _wait(self, ready: Callable[[], bool], timeout: float | None = None) -> None:
        """Nothing to wait for: requests are carried out at once."""


class _Line:
    """What a worker and its parent share: a cache line of flags, and a pipe.

    Publish order: each side writes its data (rows) first and then the flag; the other reads the flag and then the data.
    x86 shows the stores of a core to all others in order (TSO), so who sees the flag sees the data. A weakly ordered CPU
    (ARM, POWER) needs a store-release and a load-acquire of the flag, which Python cannot express.

    Sleeping: a waiter says that it sleeps, then looks at the flag once more; a publisher writes the flag, then looks
    whether the other side sleeps, and if so rings with an empty message. Both need the store to be visible before the
    load, which even x86 grants only across a fence: taking a lock is one. A ring lost elsewhere costs BLOCK_SECONDS.
    """

    fence = threading.Lock()

    def __init__(self, control: Any, index: int, connection: Any):
        line = np.frombuffer(control, np.uint8)[index * CACHE_LINE : (index + 1) * CACHE_LINE]
        self.flag, self.worker_sleeps, self.parent_sleeps = line[0:1].data, line[1:2].data, line[2:3].data
        self.progress, self.connection = line[8:16].view(np.int64).data, connection

    def publish(self, flag: int, sleeper: Any, message: bytes = b"") -> None:
        self.flag[0] = flag  # before the message, so that one larger than the pipe finds its reader
        with self.fence:
            pass
        if message or sleeper[0]:
            self.connection.send_bytes(message)

    def receive(self) -> Any:
        while not (message := self.connection.recv_bytes()):
            pass  # a ring that nobody waited for any more
        return pickle.loads(message)

    def await_request(self, closing: Any) -> bool:
        """As a worker, wait until the parent asks for something; False when it closes."""
        flag, deadline = self.flag, time.perf_counter() + SPIN_SECONDS
        while flag[0] not in REQUESTS:
            if time.perf_counter() < deadline:
                _yield()
                continue
            if closing[0]:
                return False
            self.worker_sleeps[0] = 1
            with self.fence:
                pass
            if flag[0] not in REQUESTS and self.connection.poll(BLOCK_SECONDS) and flag[0] != COMMAND:
                self.connection.recv_bytes()
            self.worker_sleeps[0] = 0
        return True


_yield = getattr(os, "sched_yield", lambda: time.sleep(0))  # 0.6 us; on Linux, sleep(0) would take 50 to 90 us


def _worker(connection: Any, control: Any, index: int, env_fns: Any, first_env: int, infos: str, inherited: list) -> None:
    """Serve the parent's requests until it closes or is gone."""
    for end in inherited:  # a fork has the parent's ends of the pipes too, which would keep them open
        end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _use_one_thread()
    random.seed(), np.random.seed()  # a fork starts with its parent's random state
    line, closing = _Line(control, index, connection), np.frombuffer(control, np.uint8)[-CACHE_LINE:].data
    shard = _Shard(env_fns.fn, first_env, infos, line.progress)
    try:
        while line.await_request(closing):
            name, arguments = ("step", ()) if line.flag[0] == STEP else line.receive()
            try:
                if name == "reset" and arguments[1][0] is not None:  # for environments that use the global generators
                    random.seed(arguments[1][0]), np.random.seed(arguments[1][0] % 2**32)
                reply = getattr(shard, name)(*arguments)
                reply = {"bind": None, "constructor": CloudpickleWrapper(reply)}.get(name, reply)
                message = pickle.dumps((None, reply)) if reply or name not in ("step", "reset") else b""
            except BaseException:  # SystemExit too: whatever an environment raises is the parent's to report
                message = pickle.dumps(((line.progress[0], name, traceback.format_exc()), None))
            line.publish(MESSAGE if message else DONE, line.parent_sleeps, message)
    except (EOFError, OSError):
        pass  # the parent closed its end
    finally:
        shard.close()


def _die_with_parent() -> None:
    """End this process when its parent is gone, even while an environment hangs: a thread that looks twice a second."""
    parent, pid = multiprocessing.parent_process(), os.getppid()
    while parent.is_alive() and os.getppid() == pid:
        time.sleep(0.5)
    os._exit(1)


def _use_one_thread() -> None:
    """Keep numerical libraries from starting a thread a core in every worker."""
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
    for library, limit in (("torch", "set_num_threads"), ("cv2", "setNumThreads"), ("threadpoolctl", "threadpool_limits")):
        if library in sys.modules or library != "torch":
            with contextlib.suppress(ImportError):
                getattr(__import__(library), limit)(1)


def _shut_down(pid: int, closing: Any, lines: list, processes: list, seconds: float = CLOSE_SECONDS) -> None:
    """Ask the workers to close and wait; terminate those that do not, then kill."""
    if os.getpid() != pid:
        return  # a forked child that inherited the vectorizer
    closing[0], deadline = 1, time.perf_counter() + seconds
    for line in lines:
        with contextlib.suppress(OSError):
            line.connection.send_bytes(b"")
        line.connection.close()
    for process in processes:
        process.join(max(0.0, deadline - time.perf_counter()))
    for force in ("terminate", "kill"):
        for process in [process for process in processes if process.exitcode is None]:
            getattr(process, force)()
            process.join(1.0)


class Multiprocessing(_Vectorizer):
    """Steps environments in worker processes that write their rows straight into shared memory.

    With `batch_size < num_envs` it is an asynchronous pool: `recv` returns the environments that are ready first, and
    `send` sets them to work again while others are still busy.

    Args:
        env_fns: functions that return a gymnasium.Env or a PettingZoo ParallelEnv, adapted here unless they are already.
        num_workers: processes, a divisor of `num_envs`; by default the largest that the usable cores allow.
        batch_size: environments a `recv`, a multiple of those that a worker has; by default all.
        zero_copy: `recv` returns the first complete block of neighbouring workers as views, valid until the next `send`
            of the same environments; otherwise it gathers copies from whichever workers are ready first.
        context: start method of multiprocessing (fork, forkserver, spawn); by default Python's own default.
        infos: "final" for the infos of episodes' last steps only, "all" for every step's, as gymnasium has it.
        daemon: as in gymnasium; False lets environments start processes of their own.

    Raises:
        WorkerError: an environment could not be constructed.
    """

    def __init__(self, env_fns: Sequence[Callable], num_workers: int | None = None, batch_size: int | None = None,
                 zero_copy: bool = True, context: str | None = None, infos: str = "final", daemon: bool = True):
        self._prepare(env_fns, num_workers, batch_size, zero_copy, infos)
        start, self._lines, self._processes = multiprocessing.get_context(context), [], []
        control = start.RawArray("B", CACHE_LINE * (self.num_workers + 1))
        closing, self._looked = np.frombuffer(control, np.uint8)[-CACHE_LINE:].data, time.perf_counter()
        self._requests = ["constructor"] * self.num_workers
        self._stop = weakref.finalize(self, _shut_down, os.getpid(), closing, self._lines, self._processes)
        for worker in range(self.num_workers):
            connection, child = start.Pipe()
            first_env = worker * self._per_worker
            own_fns = CloudpickleWrapper(env_fns[first_env : first_env + self._per_worker])
            self._lines.append(_Line(control, worker, connection))
            inherited = [line.connection for line in self._lines] if start.get_start_method() == "fork" else []
            arguments = (child, control, worker, own_fns, first_env, infos, inherited)
            process = start.Process(target=_worker, args=arguments, name=f"puffer-worker-{worker}", daemon=daemon)
            process.start()
            child.close()
            self._processes.append(process)
        try:
            first, *others = [reply.fn for reply in self._command("constructor")]
            for other in others:
                if other[:3] != first[:3]:
                    raise ValueError(f"all environments must be alike: one has {other[:3]}, the first has {first[:3]}")
            self._describe(*first)
            memfd = hasattr(os, "memfd_create")  # memory without a name, so that none can be left behind
            with os.fdopen(os.memfd_create("rows"), "r+b") if memfd else tempfile.NamedTemporaryFile() as file:
                self._adopt(_allocate(self.num_agents, self.single_observation_space, self.single_action_space, file))
                self._command("bind", self.num_agents, f"/proc/{os.getpid()}/fd/{file.fileno()}" if memfd else file.name)
        except BaseException:
            self.close()
            raise

    def close(self, **kwargs: Any) -> None:
        """Close all environments and end all workers; may be called at any time, and again."""
        self._stop()
        self.closed = True

    def _request(self, worker: int, name: str, *arguments: Any) -> None:
        line, self._requests[worker] = self._lines[worker], name
        flag, message = (STEP, b"") if name == "step" else (COMMAND, pickle.dumps((name, arguments)))
        self._busy.append(worker)
        try:
            line.publish(flag, line.worker_sleeps, message)
        except OSError:
            self._raise_death(worker)

    def _wait(self, ready: Callable[[], bool], timeout: float | None = None) -> None:
        """Collect replies until `ready()`: yield for SPIN_SECONDS, then block."""
        start = time.perf_counter()
        if start - self._looked > BLOCK_SECONDS:
            self._look(0.0)  # one may have died that nobody waits for
        while True:
            for worker in tuple(self._busy):
                if self._lines[worker].flag[0] not in REQUESTS:
                    self._busy.remove(worker)
                    self._finish(worker, self._requests[worker], self._take(worker))
            if ready():
                return
            waited = time.perf_counter() - start
            if timeout is not None and waited >= timeout:
                raise TimeoutError(f"waited {waited:.3g} s for workers {self._busy}")
            if waited < SPIN_SECONDS:
                _yield()
            else:
                self._look(BLOCK_SECONDS if timeout is None else min(timeout - waited, BLOCK_SECONDS))

    def _look(self, seconds: float) -> None:
        """Sleep until a busy worker rings or any worker dies."""
        lines = [self._lines[worker] for worker in self._busy]
        for line in lines:
            line.parent_sleeps[0] = 1
        with _Line.fence:
            finished = any(line.flag[0] not in REQUESTS for line in lines)
        handles = [*[line.connection for line in lines], *[process.sentinel for process in self._processes]]
        rung, self._looked = wait(handles, 0 if finished else seconds), time.perf_counter()
        for line in lines:
            line.parent_sleeps[0] = 0
            if line.connection in rung and line.flag[0] != MESSAGE:  # a MESSAGE is for `_take`, last words included
                with contextlib.suppress(EOFError, OSError):
                    line.connection.recv_bytes()
        for worker, process in enumerate(self._processes):
            if process.sentinel in rung and self._lines[worker].flag[0] != MESSAGE:
                self._raise_death(worker)

    def _take(self, worker: int) -> Any:
        """What a worker that has finished has to say."""
        line = self._lines[worker]
        if line.flag[0] == DONE:
            return []
        try:
            failure, reply = line.receive()
        except (EOFError, OSError):
            self._raise_death(worker)
        if failure is not None:
            self._fail(worker, *failure)
        return reply

    def _raise_death(self, worker: int) -> None:
        process, request = self._processes[worker], self._requests[worker]
        process.join(1.0)
        code = process.exitcode or 0
        cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        if request == "constructor" and code == 1:
            cause += "; under spawn and forkserver, a script needs `if __name__ == '__main__':` around what it runs"
        self._fail(worker, self._lines[worker].progress[0], request, f"the process {cause}")

    def _fail(self, worker: int, env_index: int, phase: str, cause: str) -> None:
        if phase != "call":  # close fast: whoever gets the error should not have to wait for it
            _shut_down(*self._stop.detach()[2], seconds=0.3)
            self.closed = True
        raise WorkerError(env_index, worker, phase, cause)
