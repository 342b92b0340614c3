"""Make every environment look like Atari, and step many of them fast. For Linux and macOS.

Read on: layouts (flatten), adapters (around one environment), vectorizers (around many). In use:
    import gymnasium, puffer_core
    if __name__ == "__main__":
        with puffer_core.Multiprocessing([lambda: gymnasium.make("Blackjack-v1")] * 8) as envs:  # observes Tuples
            observations, infos = envs.reset(seed=1)                    # one flat row per environment
            for _ in range(100):
                observations, rewards, terminations, truncations, infos = envs.step(envs.action_space.sample())
                player_sum, dealer_card, usable_ace = envs.layout.unflatten(observations)  # views, not copies
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

# A worker's flag is one byte in shared memory: the parent writes a request, the worker overwrites it with a status, and
# who has no turn only reads, so no lock is needed. MESSAGE and COMMAND: more comes through the pipe. The order is rows,
# flag, then a ring of a bell (a semaphore); who sees the flag takes a ring, and only then reads. On x86 the flag would
# do, but a weakly ordered CPU (ARM, POWER) needs the bell's release and acquire. As workers share the parent's, it may
# take another worker's ring; that this worker's own is nanoseconds behind has to do.
DONE, MESSAGE, STEP, COMMAND = range(4)
SPIN_SECONDS = 1e-3  # who waits yields for so long and then blocks, or blocks at once if the last wait took longer
BLOCK_SECONDS = 0.1  # a blocked process looks around this often even if nobody wakes it
CLOSE_SECONDS = 10.0  # what workers get to close their environments, unless `close` says otherwise, before a kill
_strays = []  # what workers that Ctrl-C hid amid their fork look at until they end; nobody else may get this memory
_yield = getattr(os, "sched_yield", lambda: time.sleep(0))  # 0.6 us; on Linux, sleep(0) would take 50 to 90 us


class APIUsageError(RuntimeError):
    """A call out of order or on a closed vectorizer, or actions of the wrong shape or dtype."""


class WorkerError(RuntimeError):
    """A worker failed: `env_index`, `worker`, `phase` and `cause`, its own traceback or what killed it, say more."""


# ------------------------------------------------------------------------------------------------------------ layouts

# A space that holds no others: bytes `start:stop` of a row; `bounds` holds its lowest and its highest values, flat.
Leaf = namedtuple("Leaf", "path space dtype shape start stop bounds")


def _plan(space: spaces.Space, path: str) -> tuple[np.dtype, list[Leaf], Callable, Callable]:
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
    return struct, leaves, read, build  # read: from a sample to its leaves' values; build: from an iterator of them


def _cast(leaf: Leaf, value: Any) -> np.ndarray:
    array = np.asarray(value, order="C")  # which is the value itself, if it can be
    if array.shape == leaf.shape and array.dtype.kind in "biuf":
        cast = array if array.dtype == leaf.bounds.dtype else array.astype(leaf.dtype)
        if cast is array or cast.dtype.kind == "f" or np.array_equal(cast, array):  # an integer leaf takes no others
            return cast
    raise ValueError(f"{leaf.path}: need {leaf.shape} {leaf.dtype}, got {array.shape} {array.dtype} {value!r:.60}")


class Layout(gymnasium.utils.EzPickle):
    """How a structured observation lies in one flat row. TypeError, with its path: a leaf that has no fixed size.

    A plain Box passes through unchanged. Others become rows `(n,)`: leaves of one dtype keep it, mixed ones become the
    bytes of an aligned struct. `dtype` is the numpy dtype of one row, `flat_space` its Box.
    """

    def __init__(self, space: spaces.Space):
        super().__init__(space)  # pickled as the space
        self.space, (self.dtype, self._leaves, self._read, self._build) = space, _plan(space, "observation")
        low, high = np.concatenate([leaf.bounds for leaf in self._leaves], axis=1)
        if len({leaf.dtype for leaf in self._leaves}) > 1:
            low, high = np.zeros(self.dtype.itemsize, np.uint8), np.full(self.dtype.itemsize, 255, np.uint8)
        self.flat_space = space if isinstance(space, spaces.Box) else spaces.Box(low, high, dtype=low.dtype.type)
        self._flat_dtype, self._out, self._scratch = low.dtype.name, None, np.zeros(self.flat_space.shape, low.dtype)

    def flatten(self, sample: Any, out: np.ndarray | None = None) -> np.ndarray:
        """Copy a sample into a flat row, `out` or a new one; ValueError: a wrong key, shape or value, by its path."""
        row = self._scratch if out is None else out
        if row is not self._out:  # the last one, to which `_write` is bound
            self._out, self._write = row, self.writer(row)
        return self._write(sample).copy() if out is None else self._write(sample)

    def writer(self, row: np.ndarray) -> Callable[[Any], np.ndarray]:
        """Return a `flatten` that is bound to one row, for a row that is filled again and again."""
        flat, leaves, read, is_not = self.flat_space, self._leaves, self._read, operator.is_not
        if (row.shape, row.dtype) != (flat.shape, flat.dtype) or not row.flags.c_contiguous:
            raise ValueError(f"out: expected contiguous {flat}, got {row.dtype} of shape {row.shape} {row.strides}")
        vector, target = row.data, row.reshape(-1).view(np.uint8).data
        def write_box(value: Any) -> np.ndarray:
            try:
                vector[:] = value  # 0.15 us; compares shape and dtype itself, and takes vectors only
            except (NotImplementedError, TypeError, ValueError):
                row[...] = _cast(leaves[0], value)  # 2.5 us for four frames, where a join takes 7
            return row
        ends = [*[leaf.start for leaf in leaves[1:]], row.nbytes]  # of the padding behind each leaf
        chunks = [b""] * 2 * len(leaves)  # of a row: the leaves' arrays, each followed by its padding
        chunks[1::2] = [bytes(end - leaf.stop) for leaf, end in zip(leaves, ends)]
        known, describe = [(leaf.bounds.dtype, leaf.shape) for leaf in leaves], operator.attrgetter("dtype", "shape")
        arrays, views = leaves, []  # at first something that is in no sample
        def write(sample: Any) -> np.ndarray:
            nonlocal arrays, views  # of the last sample, held so that `is` can be trusted
            values = read(sample)
            try:
                if any(map(is_not, values, arrays)):
                    arrays, views, chunks[::2] = leaves, [], values
                    if list(map(describe, values)) != known:  # 1.4 us for NetHack's nine
                        raise TypeError
                elif not views:  # arrays that are refilled need no second check, nor numpy's part in a join
                    views = [view for view in map(memoryview, chunks) if view.nbytes]
                target[:] = b"".join(views or chunks)  # TypeError, too, where an array is not contiguous
                arrays = values
            except (AttributeError, TypeError):  # numbers, lists, and other arrays than these
                chunks[::2] = [_cast(*pair) for pair in zip(leaves, values)]
                target[:] = b"".join(chunks)
            return row
        return write_box if flat is self.space else write

    def unflatten(self, flat: Any) -> Any:
        """See rows `(*batch, *flat_space.shape)` as nested views `(*batch, *leaf.shape)`; ValueError: not such rows."""
        if isinstance(self.space, spaces.Box):
            return flat
        named = str if isinstance(flat, np.ndarray) else partial(getattr, sys.modules["torch"])  # a dtype by its name
        if flat.dtype != named(self._flat_dtype) or flat.shape[-1] != self.flat_space.shape[0]:
            raise ValueError(f"need rows of {self.flat_space}, uncast, got {flat.dtype} {tuple(flat.shape)}")
        batch, row = flat.shape[:-1], flat.view(named("uint8"))
        parts = [(leaf, row[..., leaf.start : leaf.stop]) for leaf in self._leaves]
        return self._build(iter([part.view(named(leaf.dtype)).reshape(batch + leaf.shape) for leaf, part in parts]))


class ActionLayout(gymnasium.utils.EzPickle):
    """How an action of any space lies in one flat row that a policy can sample: a sample of `flat_space`.

    Discrete, MultiDiscrete and Box pass through. Nested Box leaves become one float Box, other leaves one MultiDiscrete
    that counts from 0, whatever their `start`. TypeError: a mix of both, or a leaf that has no fixed size, by its path.
    """

    def __init__(self, space: spaces.Space):
        super().__init__(space)
        self.space, (_, self._leaves, _, self._build) = space, _plan(space, "action")
        are_boxes = {leaf.path: isinstance(leaf.space, spaces.Box) for leaf in self._leaves}
        if len(set(are_boxes.values())) > 1:
            raise TypeError(f"Box leaves (True) and others cannot be mixed in one flat action: {are_boxes}")
        self._bounds = low, high = np.concatenate([leaf.bounds for leaf in self._leaves], axis=1)
        self._ends, self._start = np.cumsum([leaf.bounds.shape[1] for leaf in self._leaves])[:-1], 0
        numbers = range(space.start, space.start + space.n) if isinstance(space, spaces.Discrete) else ()
        self.valid = {number: space.dtype.type(number) for number in numbers[: 2**12]}  # as `sample` has them
        if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete, spaces.Box)):
            self.flat_space = space
        elif all(are_boxes.values()):
            self.flat_space = spaces.Box(low.astype(np.float32), high.astype(np.float32))
        else:
            self._start, self.flat_space = low, spaces.MultiDiscrete(high.astype(np.int64) - low.astype(np.int64) + 1)

    def unflatten(self, flat: Any) -> Any:
        """Return a sample of the space, Box values clipped and rounded; ValueError: wrong shape, NaN, out of range."""
        if flat.__class__ in (int, np.int64) and flat in self.valid:
            return self.valid[flat]  # 0.1 us, where what follows takes 8
        flat, space, is_box = np.asarray(flat), self.flat_space, isinstance(self.flat_space, spaces.Box)
        fits = not np.isnan(flat).any() if is_box else flat.dtype.kind in "biu" and flat.astype(space.dtype) in space
        if flat.shape != space.shape or not fits or not (is_box or (flat.astype(space.dtype) == flat).all()):  # wrapped
            raise ValueError(f"expected an action in {space}, got {flat}")
        values, samples = flat.ravel().clip(*self._bounds) if is_box else flat.ravel() + self._start, []
        for leaf, part in zip(self._leaves, np.split(values, self._ends)):
            value = (np.rint(part) if part.dtype.kind == "f" != leaf.bounds.dtype.kind else part).astype(leaf.dtype)
            value = np.where(part < leaf.bounds[1], value, leaf.bounds[1]).reshape(leaf.shape)  # 2**63 is no int64
            samples.append(value if is_box else value[()])  # a Discrete's is a scalar
        return self._build(iter(samples))


# ----------------------------------------------------------------------------------------------------------- adapters

class GymnasiumPufferEnv(gymnasium.Wrapper, gymnasium.utils.RecordConstructorArgs):
    """A Gymnasium environment with flat observations and flat actions.

    This adapter and the next have `layout` and `action_layout`; flat `observation_space` and `action_space` of one
    agent (also as `single_...`); `num_agents` rows; bool `masks`, False where the last call had nothing for an agent.
    """

    def __init__(self, env: gymnasium.Env):
        gymnasium.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self.layout, self.action_layout = Layout(env.observation_space), ActionLayout(env.action_space)
        self.observation_space = self.single_observation_space = self.layout.flat_space
        self.action_space = self.single_action_space = self.action_layout.flat_space
        self.num_agents, self.masks, self.set_wrapper_attr = 1, np.ones(1, bool), env.set_wrapper_attr
        self._begin, self._rows, self._shape = env.reset, self.layout, self.observation_space.shape

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Reset; returns the flat observation, or rows of them, and the info."""
        sample, info = self._begin(seed=seed, options=options)
        return self._rows.flatten(sample).reshape(self._shape), info

    def step(self, action: Any) -> tuple:
        """Step with a flat action, or rows of them; returns what a step returns, flat or in rows."""
        sample, *rest = self._play(action)
        return self._rows.flatten(sample).reshape(self._shape), *rest

    def _play(self, action: Any) -> tuple:
        return self.env.step(self.action_layout.unflatten(action))


class PettingZooPufferEnv:
    """A PettingZoo ParallelEnv as rows: row i is `possible_agents[i]`'s for ever, and zero while that has nothing.

    `step` takes a flat action a row, ignored where its agent is not alive; it returns rows, arrays of rewards,
    terminations and truncations, and infos by agent. TypeError: no ParallelEnv, or agents whose spaces differ.
    """

    reset, step = GymnasiumPufferEnv.reset, GymnasiumPufferEnv.step
    env, episode_over, has_ended = None, True, True  # until there is one: a copy that is being made asks for attributes

    def __init__(self, env: Any):
        if hasattr(env, "agent_iter") or not getattr(env, "possible_agents", ()):
            raise TypeError(f"need gymnasium.Env or ParallelEnv with possible_agents (see aec_to_parallel), got {env}")
        self.env, self.possible_agents, self.num_agents = env, list(env.possible_agents), len(env.possible_agents)
        pairs = [(env.observation_space(agent), env.action_space(agent)) for agent in self.possible_agents]
        if any(pair != pairs[0] for pair in pairs):
            raise TypeError(f"all agents must have the same spaces, got {dict(zip(self.possible_agents, pairs))}")
        self.layout, self.action_layout = Layout(pairs[0][0]), ActionLayout(pairs[0][1])
        self.observation_space = self.single_observation_space = self.layout.flat_space
        self.action_space = self.single_action_space = self.action_layout.flat_space
        self._rows = Layout(spaces.Tuple([pairs[0][0]] * self.num_agents))  # of the team, as one
        self._shape, self.masks = (self.num_agents, *self.observation_space.shape), np.zeros(self.num_agents, bool)
        self._nothing = self.layout.unflatten(np.zeros(self._shape[1:], self.observation_space.dtype))
        self.get_wrapper_attr = partial(getattr, self)  # these two are what a gymnasium.Env has
        self.set_wrapper_attr = partial(setattr, getattr(env, "unwrapped", env))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env if hasattr(self.env, name) else getattr(self.env, "unwrapped", None), name)

    def _begin(self, **arguments: Any) -> tuple:
        observations, infos = self.env.reset(**arguments)
        return self._sample(observations), infos

    def _play(self, actions: Sequence[Any]) -> tuple:
        agents, living, decode = self.possible_agents, set(self.env.agents), self.action_layout.unflatten
        played = {agent: decode(action) for agent, action in zip(agents, actions) if agent in living}
        observations, rewards, *flags, infos = self.env.step(played)
        ended, cut = [{agent for agent, flag in said.items() if flag} for said in flags]
        self.episode_over = ended | cut >= {*self.env.agents}
        ended |= living - cut if self.episode_over else ended  # for whom nobody told, it has ended too
        self.has_ended = bool(self.episode_over or ended or cut)
        rewards = np.array([np.asarray(rewards.get(agent, 0.0), float).item() for agent in agents])
        flags = [np.array([agent in those for agent in agents]) for those in (ended, cut)]
        return self._sample(observations), rewards, *flags, infos

    def _sample(self, observations: dict) -> list:
        self.masks[:] = [agent in observations for agent in self.possible_agents]
        return [observations.get(agent, self._nothing) for agent in self.possible_agents]


class EpisodeStats(gymnasium.Wrapper):
    """Clears infos but for the "episode" of its last one: return `r`, length `l`, seconds `t`, and numbers' sums."""

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        """Reset the environment and the sums; the info is empty."""
        self._sums, self._start = Counter(), time.perf_counter()
        return self.env.reset(seed=seed, options=options)[0], {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict]:
        """Step the environment; the info is empty until the episode's last step."""
        *result, info = self.env.step(action)
        numbers = {key: float(one) for key, one in info.items() if isinstance(one, (int, float, np.number, np.bool_))}
        self._sums.update(numbers | {"r": np.asarray(result[1], float).item(), "l": 1})
        return *result, {"episode": {**self._sums, "t": time.perf_counter() - self._start}} if any(result[2:]) else {}


# -------------------------------------------------------------------------------------------------------- vectorizers

class Batch(namedtuple("Batch", "observations rewards terminations truncations infos agent_ids masks")):
    """What `recv` returns: arrays whose row i is about agent `agent_ids[i]`, and `infos` as gymnasium's vector dict.

    Where `infos["_final_obs"]` is set, an episode ended, and row and mask are the first of the next one; final_obs is
    None if nothing was seen. Who ended without it, as others of a team go on, keeps the row for this batch, no longer.
    """


def _map_rows(path: str, num_rows: int, env: Any, own: slice = slice(None)) -> SimpleNamespace:
    observation, action = env.single_observation_space, env.single_action_space  # an agent has a row
    fields = [("observations", observation.dtype, observation.shape), ("actions", action.dtype, action.shape)]
    fields += [("rewards", float, ()), *[(name, bool, ()) for name in ("terminations", "truncations", "masks")]]
    struct = np.dtype([(name, dtype, (num_rows, *shape)) for name, dtype, shape in fields], align=True)
    memory = np.asarray(np.memmap(path, struct, "r+", shape=1))  # which makes the file large enough
    return SimpleNamespace(**{name: memory[name][0, own] for name in struct.names})


class _Shard:
    """The environments of one process, stepped in turn; `reset` and `step` fill rows and return (row, info) pairs."""

    def __init__(self, env_fns: Sequence[Callable], progress: Any):
        self.env_fns, self.envs, self.progress = env_fns, [], progress  # `progress[0]`: the environment that is at work

    def constructor(self, indices: Sequence[int], num_envs: int, path: str, infos: str) -> list:
        progress, self.all_infos = self.progress, {"episode": None, "final": False, "all": True}[infos]
        for progress[0], env_fn in enumerate(self.env_fns):
            self.envs.append(env := env_fn())  # first, so that it is closed also if no adapter takes it
            adapter = GymnasiumPufferEnv if isinstance(env, gymnasium.Env) else PettingZooPufferEnv
            self.envs[-1] = env = env if type(env) is adapter else adapter(env)  # an heir's `step` is not gone past
        self.is_team, count = adapter is PettingZooPufferEnv, env.num_agents
        self.rows = _map_rows(path, num_envs * count, env, slice(indices[0] * count, (indices[-1] + 1) * count))
        self.slices = [slice(row, row + count) for row in range(0, len(self.envs) * count, count)]
        return [(f"{type(env).__name__} of {env.num_agents}, {env.layout.space}, {env.action_layout.space}",
                 env.num_agents, env.layout.space, env.action_space, getattr(env, "metadata", {}),
                 getattr(env, "render_mode", None)) for env in self.envs]

    def reset(self, seeds: Sequence[int | None], options: dict | None) -> list:
        rows, self.turns = self.rows, []
        rows.rewards[:], rows.terminations[:], rows.truncations[:], rows.masks[:] = 0, False, False, True
        for env, where in zip(self.envs, self.slices):  # here, where all are known to be alike
            env.masks, own = rows.masks[where], rows.observations[where].reshape(env._rows.flat_space.shape)
            past = (SimpleNamespace(step=env._play), list) if self.is_team else (env.env, env.action_layout.unflatten)
            self.turns.append((*past, env._rows.writer(own), where if self.is_team else where.start))
        return [said for index, seed in enumerate(seeds) for said in self._begin(index, seed, options).items()]

    def _begin(self, index: int, seed: int | None = None, options: dict | None = None) -> dict[int, dict]:
        self.progress[0], (_, _, write, _) = index, self.turns[index]
        sample, info = self.envs[index]._begin(seed=seed, options=options)
        write(sample)
        return self._by_row(index, info) if self.all_infos else {}

    def _by_row(self, index: int, info: dict) -> dict[int, dict]:
        infos = [info.get(agent) or {} for agent in self.envs[index].possible_agents] if self.is_team else [info or {}]
        infos = [{key: one[key] for key in one if self.all_infos is not None or key == "episode"} for one in infos]
        return {row: copy.deepcopy(info) for row, info in enumerate(infos, self.slices[index].start) if info}

    def step(self) -> list:
        rows, progress, is_team, said = self.rows, self.progress, self.is_team, []
        rewards = rows.rewards if is_team else rows.rewards.data
        actions = rows.actions.tolist() if rows.actions.ndim == 1 else rows.actions
        rows.terminations[:], rows.truncations[:] = False, False
        for progress[0], (env, decode, write, where) in enumerate(self.turns):
            sample, reward, terminated, truncated, info = env.step(decode(actions[where]))
            write(sample)
            rewards[where] = reward if is_team or reward.__class__ is float else np.asarray(reward).item()
            if self.envs[progress[0]].has_ended if is_team else terminated or truncated:
                rows.terminations[where], rows.truncations[where] = terminated, truncated
                said += self._end(progress[0], info)
            elif info and self.all_infos:
                said += self._by_row(progress[0], info).items()
        return said

    def _end(self, index: int, info: dict) -> list:
        rows, where, infos = self.rows, self.slices[index], self._by_row(index, info)
        ended = np.flatnonzero(rows.terminations[where] | rows.truncations[where]) + where.start
        finals = {row: {"final_info": infos.pop(row, {})} for row in ended.tolist()}
        if not self.is_team or self.envs[index].episode_over:  # the next one begins
            last = [one if seen else None for one, seen in zip(rows.observations[where].copy(), rows.masks[where])]
            infos = self._begin(index)
            finals = {row: {**final, "final_obs": last[row - where.start]} for row, final in finals.items()}
        return [*finals.items(), *(infos.items() if self.all_infos else ())]

    def call(self, arguments: Sequence[tuple[tuple, dict]], name: str) -> list:
        results, progress = [], self.progress
        for progress[0], (env, (args, kwargs)) in enumerate(zip(self.envs, arguments)):
            found = env.get_wrapper_attr(name)
            results.append(found(*args, **kwargs) if callable(found) else found)
        return results

    def close(self, **_: Any) -> None:
        while self.envs:
            with contextlib.suppress(Exception):
                self.envs.pop().close()


class Serial(gymnasium.vector.VectorEnv, contextlib.AbstractContextManager):
    """Steps environments in turn in this process; the arguments mean what `Multiprocessing`'s do, errors are raw."""

    def __init__(self, env_fns: Sequence[Callable], zero_copy: bool = True, infos: str = "final"):
        self._divide(env_fns, 1, None, zero_copy)
        self._shard = _Shard(env_fns, [0])
        self.envs, self.close_extras = self._shard.envs, self._shard.close  # what `close` calls
        self._construct(infos)

    def _divide(self, env_fns: Any, num_workers: Any, batch_size: Any, zero_copy: bool) -> None:
        num_envs = len(env_fns)
        if num_workers is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            usable = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # torchrun's ranks share them
            num_workers = max(count for count in range(1, usable + 1) if num_envs % count == 0)
        if not 0 < num_workers <= num_envs or num_envs % num_workers:
            raise ValueError(f"num_workers: expected a divisor of num_envs={num_envs}, got {num_workers}")
        per_worker, batch_size = num_envs // num_workers, num_envs if batch_size is None else batch_size
        if not 0 < batch_size <= num_envs or batch_size % per_worker or (zero_copy and num_envs % batch_size):
            raise ValueError(f"batch_size: expected {per_worker} * n, with zero_copy {num_envs} / n, got {batch_size}")
        self.num_envs, self.num_workers, self.batch_size, self.zero_copy = num_envs, num_workers, batch_size, zero_copy
        # A batch is one group of workers, of all (sync) or of neighbors (zero-copy), or several of one each (gathered)
        size = batch_size // per_worker if zero_copy or batch_size == num_envs else 1
        self._per_worker, self._group_size, self._groups_per_batch = per_worker, size, batch_size // per_worker // size
        self._ready, self._busy, self._finished, self._replies = deque(), [], [0] * num_workers, [()] * num_workers

    def _construct(self, infos: str) -> None:
        self._expected, memfd = "async_reset", hasattr(os, "memfd_create")  # a file without a name to leave behind
        try:
            with os.fdopen(os.memfd_create("rows"), "r+b") if memfd else tempfile.NamedTemporaryFile() as file:
                path = f"/proc/{os.getpid()}/fd/{file.fileno()}" if memfd else file.name
                described = self._command("constructor", range(self.num_envs), self.num_envs, path, infos)
                first, per_env, space, self.single_action_space, metadata, self.render_mode = described[0]
                if others := [other[0] for other in described if other[:4] != described[0][:4]]:
                    raise ValueError(f"environments must be alike, got {others[0]} after {first}")
                self.layout = Layout(space)
                self.single_observation_space = self.layout.flat_space
                rows = _map_rows(path, self.num_envs * per_env, self)
        except BaseException:
            self.close()
            raise
        self.num_agents, self.agents_per_batch = self.num_envs * per_env, self.batch_size * per_env
        self.metadata = {**metadata, "autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
        self.observation_space = batch_space(self.single_observation_space, self.agents_per_batch)
        self.action_space = batch_space(self.single_action_space, self.agents_per_batch)
        self._infos = gymnasium.vector.VectorEnv()  # batches infos in gymnasium's own way, over the rows of a batch
        self._infos.num_envs, self._rows_per_worker = self.agents_per_batch, self._per_worker * per_env
        rows.agent_ids, self._actions, self._groups = np.arange(self.num_agents), rows.actions, []
        for first in range(0, self.num_workers, self._group_size):
            where = slice(first * self._rows_per_worker, (first + self._group_size) * self._rows_per_worker)
            fields = [getattr(rows, name)[where] for name in Batch._fields if name != "infos"]
            self._groups.append((list(range(first, first + self._group_size)), where, fields))

    def reset(self, *, seed: int | Sequence[int | None] | None = None, options: dict | None = None) -> tuple:
        """`async_reset` and `recv`: returns observations `(agents_per_batch, *flat_space.shape)` and infos."""
        self.async_reset(seed, options)
        return self.recv()[::4]

    def step(self, actions: Any) -> tuple:
        """`send` and `recv`: returns observations, rewards, terminations, truncations and infos."""
        self.send(actions)
        return self.recv()[:5]

    def async_reset(self, seed: int | Sequence[int | None] | None = None, options: dict | None = None) -> None:
        """Reset all, once steps under way have ended: environment i with the seed `seed + i`, or a list's i-th."""
        if np.ndim(seed) == 0:
            seed = [None if seed is None else operator.index(seed) + index for index in range(self.num_envs)]
        self._command("reset", [None if one is None else operator.index(one) for one in seed], options)
        self._expected = "recv"

    def send(self, actions: Any) -> None:
        """Step the environments of the last batch with `actions`, `(agents_per_batch, *single_action_space.shape)`."""
        self._check("send")
        actions, space = np.asarray(actions), self.action_space
        fits = actions.dtype == space.dtype or space.dtype.kind == "f" == actions.dtype.kind  # which may be rounded
        fits = fits or actions.dtype.kind in "biu" and (actions.astype(space.dtype) == actions).all()  # not these
        if actions.shape != space.shape or not fits:
            raise APIUsageError(f"need actions {space.shape} {space.dtype}, got {actions.shape} {actions.dtype}")
        self._actions[self._where], self._expected = actions, "async_reset"  # unless all goes well
        for worker in self._workers:
            self._request(worker, "step")
        self._expected = "recv"

    def recv(self, timeout: float | None = None) -> Batch:
        """Return the batch that is ready first, `agents_per_batch` rows; TimeoutError: not in time, nothing is lost."""
        self._check("recv")
        self._wait(self._groups_per_batch, np.inf if timeout is None else timeout)
        self._expected = "async_reset"  # unless all goes well
        ready = [self._ready.popleft() for _ in range(self._groups_per_batch)]
        (self._workers, self._where, fields), said = ready[0]
        if not self.zero_copy:
            self._workers, said = [sum(parts, []) for parts in zip(*[(group[0], said) for group, said in ready])]
            fields = [np.concatenate(parts) for parts in zip(*[group[2] for group, _ in ready])]
            self._where = fields[4]  # agent_ids
        infos, (*arrays, agent_ids, masks) = {}, fields
        for position, pairs in enumerate(said):
            for row, info in pairs:
                infos = self._infos._add_info(infos, info, position * self._rows_per_worker + row)
        self.agent_ids, self.masks, self._expected = agent_ids.copy(), masks.copy(), "send"  # a learner may write there
        return Batch(*arrays, infos, self.agent_ids, self.masks)

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple:
        """Call a method of every environment, or read an attribute, the adapter's first."""
        return tuple(self._command("call", [(args, kwargs)] * self.num_envs, name))

    get_attr, render = call, partialmethod(call, "render")

    def set_attr(self, name: str, values: Any) -> None:
        """Set an attribute of every environment to one value, or to its own of a list."""
        values = list(values) if isinstance(values, (list, tuple)) else [values] * self.num_envs
        self._command("call", [((name, value), {}) for value in values], "set_wrapper_attr")

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _check(self, call: str) -> None:
        if self.closed or (call in ("send", "recv") and call != self._expected):
            raise APIUsageError(f"{call}() out of turn: " + ("closed" if self.closed else f"{self._expected}() is due"))

    def _command(self, name: str, per_env: Sequence, *shared: Any) -> list:
        """Once all workers are free, have each do something with its environments; returns the results of all."""
        self._check(name)
        if len(per_env) != self.num_envs:
            raise ValueError(f"reset, set_attr: expected one for all, or a list of {self.num_envs}, got {len(per_env)}")
        self._wait()
        if name == "reset":
            self._finished, self._expected = [0] * len(self._finished), "async_reset"  # unless all goes well
            self._ready.clear()  # drops the results of steps that were under way
        for worker in range(self.num_workers):
            self._request(worker, name, per_env[worker * self._per_worker :][: self._per_worker], *shared)
        if name != "reset":  # whose results `recv` takes as they come
            self._wait()
        return [result for own in self._replies for result in own]

    def _finish(self, worker: int, request: str, reply: Any) -> None:
        group, size, self._replies[worker] = worker // self._group_size, self._group_size, reply
        if request in ("step", "reset"):
            self._finished[group] += 1
            if self._finished[group] % size == 0:  # first come, first served, so no group starves
                self._ready.append((self._groups[group], self._replies[group * size :][:size]))

    def _request(self, worker: int, name: str, *arguments: Any) -> None:
        self._finish(worker, name, getattr(self._shard, name)(*arguments))

    def _wait(self, needed: int = sys.maxsize, timeout: float = np.inf) -> None:
        """Nothing to wait for: requests are carried out at once."""


def _worker(env_fns: CloudpickleWrapper, line: SimpleNamespace, is_main: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # first, as Ctrl-C is for the parent, which then closes its workers
    libc, waited, flag = ctypes.CDLL(None), 0.0, memoryview(line.flag).cast("B")
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    if hasattr(libc, "prctl"):  # Linux; that thread ends a worker that hangs, unless C code holds the GIL
        libc.prctl(1, signal.SIGKILL * is_main)  # PR_SET_PDEATHSIG: when the thread that started this worker ends
        libc.sched_setscheduler(0, os.SCHED_BATCH, ctypes.byref(ctypes.c_int()))  # wakes without preempting its waker
    signal.signal(signal.SIGTERM, lambda *_: None)  # as is this; SIG_IGN would pass to programs that environments run
    # Forks would inherit this, and one that holds an end of the pipe would keep the parent from seeing this one die.
    os.register_at_fork(after_in_child=lambda: (signal.signal(signal.SIGTERM, signal.SIG_DFL), line.pipe.close()))
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
    for name, limit in ("torch", "set_num_threads"), ("cv2", "setNumThreads"), ("threadpoolctl", "threadpool_limits"):
        with contextlib.suppress(Exception):  # not installed, broken, or a torch that nothing here has imported yet
            getattr(sys.modules[name] if name == "torch" else __import__(name), limit)(1)
    np.random.seed()  # a fork starts with its parent's random state; Python's own generator sees to that itself
    with contextlib.suppress(OSError), contextlib.closing(_Shard(env_fns.fn, line.progress)) as shard:
        while True:
            start = time.perf_counter()
            while flag[0] < STEP and max(waited, time.perf_counter() - start) < SPIN_SECONDS:
                _yield()
            line.worker_bell.acquire()
            waited = time.perf_counter() - start
            if flag[0] < STEP:  # a ring without a flag: the parent closes
                break
            try:
                name, arguments = ("step", ()) if flag[0] == STEP else pickle.loads(line.pipe.recv_bytes())
                if name == "reset" and arguments[0][0] is not None:  # for environments that use the global generators
                    random.seed(arguments[0][0]), np.random.seed(arguments[0][0] % 2**32)
                reply = getattr(shard, name)(*arguments)
                message = pickle.dumps((None, reply)) if reply else b""
            except BaseException:  # SystemExit too: whatever an environment raises is the parent's to report
                message = pickle.dumps((traceback.format_exc(), None))
            flag[0] = MESSAGE if message else DONE
            line.parent_bell.release()  # 0.1 us where nobody sleeps
            if message:  # last, so that one larger than the pipe finds its reader
                line.pipe.send_bytes(message)


def _shut_down(lines: list[SimpleNamespace], timeout: float | None = None, terminate: bool = False) -> None:
    running = [line.process for line in lines if line.process.is_alive()]  # in a fork of the parent, this raises
    for line in lines:
        line.process.pid or _strays.append(line.flag)
        line.worker_bell.release(), line.worker_bell.release()  # one may be for a request that Ctrl-C left without
        line.connection.close()
    deadline = time.perf_counter() + (CLOSE_SECONDS if timeout is None else timeout) * (not terminate)
    try:
        while any(process.is_alive() for process in running) and time.perf_counter() < deadline:
            time.sleep(SPIN_SECONDS)  # `join` would also wait for forks that an environment leaves behind
    finally:  # also on Ctrl-C, or Python would wait for ever for one that hangs
        for process in running:
            process.kill(), process.join(1.0)  # nothing to one that has ended


class Multiprocessing(Serial):
    """Steps environments in worker processes that write their rows straight into shared memory.

    With `batch_size < num_envs`, `recv` returns the environments that are ready first, and `send` sets them to work
    again while others are busy. A failure closes all; Ctrl-C may. `close(timeout=CLOSE_SECONDS)` kills the slow ones.

    Args:
        env_fns: functions that return a gymnasium.Env or a PettingZoo ParallelEnv, adapted here if they are not yet.
        num_workers: processes, a divisor of `num_envs`; by default the largest up to the number of usable cores.
        batch_size: environments a `recv`, a multiple of those that a worker has; by default all.
        zero_copy: views of the first ready block of neighboring workers, until its next `send`; False: copies of any.
        context: start method of multiprocessing (fork, forkserver, spawn); by default Python's own default.
        infos: "final" for those of episodes' last steps, "episode" for this key of them, "all" for gymnasium's own way.
    """

    def __init__(self, env_fns: Sequence[Callable], num_workers: int | None = None, batch_size: int | None = None,
                 zero_copy: bool = True, context: str | None = None, infos: str = "final"):
        self._divide(env_fns, num_workers, batch_size, zero_copy)
        context, is_main = multiprocessing.get_context(context), threading.current_thread() is threading.main_thread()
        self._lines, self._bell, self._looked, self._waited = [], context.Semaphore(0), time.perf_counter(), 0.0
        self.close_extras = partial(_shut_down, self._lines)
        multiprocessing.util.Finalize(self, _shut_down, [self._lines], exitpriority=1)  # also at this process's end
        for worker in range(self.num_workers):
            line = SimpleNamespace(index=worker, worker_bell=context.Semaphore(0), parent_bell=self._bell)
            line.flag, line.progress = context.RawArray("B", 64), context.RawArray("q", 8)  # each with a cache line
            connection, line.pipe = context.Pipe()
            multiprocessing.util.register_after_fork(connection, type(connection).close)  # by workers made later
            own_fns = CloudpickleWrapper(env_fns[worker * self._per_worker :][: self._per_worker])
            line.process = context.Process(target=_worker, args=(own_fns, copy.copy(line), is_main))  # may start others
            line.connection, line.flag = connection, memoryview(line.flag).cast("B")  # which is read in half the time
            self._lines.append(line)  # before it starts, or after Ctrl-C nobody would close it
            line.process.start(), line.pipe.close()
        self._construct(infos)

    def _request(self, worker: int, name: str, *arguments: Any) -> None:
        message, line = b"" if name == "step" else pickle.dumps((name, arguments)), self._lines[worker]
        if worker in self._busy:  # with a call that Ctrl-C or an unpicklable argument cut short
            self._wait()
        try:
            line.request, line.flag[0] = name, COMMAND if message else STEP
            self._busy.append(worker)
            line.worker_bell.release()
            if message:
                with contextlib.suppress(ConnectionError):  # it is dead, which `_wait` notices
                    line.connection.send_bytes(message)
        except BaseException:  # Ctrl-C: the worker may wait for its ring, or the rest of a message, for ever
            self.close()
            raise

    def _wait(self, needed: int = sys.maxsize, timeout: float = np.inf) -> None:
        lines, start, has_ring = self._lines, time.perf_counter(), False
        while True:  # until so many groups are ready, or no worker is busy
            for line in [lines[worker] for worker in self._busy if lines[worker].flag[0] < STEP]:
                if not has_ring:  # takes this reply's; not for ever, as Ctrl-C may have swallowed it
                    self._bell.acquire(True, BLOCK_SECONDS)
                has_ring = False  # the one that ended the sleep below counts for one reply
                self._collect(line)
            now = time.perf_counter()
            if now - self._looked > BLOCK_SECONDS:
                self._looked = now  # also at those that nobody waits for, but for a MESSAGE, which says more
                for line in [line for line in lines if line.flag[0] != MESSAGE and not line.process.is_alive()]:
                    self._collect(line, is_dead=True)
            if not self._busy or len(self._ready) >= needed:
                self._waited = now - start
                return
            if now - start >= timeout:
                raise TimeoutError(f"waited {timeout:.3g} s for workers {self._busy}")
            if max(self._waited, now - start) < SPIN_SECONDS:
                _yield()
            else:
                has_ring = self._bell.acquire(True, min(start + timeout - now, BLOCK_SECONDS))

    def _collect(self, line: SimpleNamespace, is_dead: bool = False) -> None:
        try:
            cause, reply = line.connection.recv() if line.flag[0] == MESSAGE else (None, ())
            if not cause and not is_dead:
                self._busy.remove(line.index)
                return self._finish(line.index, line.request, reply)
        except BaseException as error:
            line.process.join(1.0 if isinstance(error, (EOFError, OSError)) else 0.0)  # did it die within the message?
            is_dead = not line.process.is_alive()
            if not is_dead:  # Ctrl-C within a message, or a reply that cannot be unpickled: there is no way on
                self.close()
                raise
        if is_dead:
            hint = "; under spawn and forkserver, a script needs `if __name__ == '__main__':` around what it runs"
            cause = f"it died: {line.process}" + hint * (line.request == "constructor" and line.process.exitcode == 1)
        self.close(timeout=0.3)  # fast: whoever gets the error should not have to wait for it
        index = line.index * self._per_worker + line.progress[0]
        errors = [WorkerError(f"environment {index} (worker {line.index}) failed in {line.request}: {cause}")]
        errors[0].env_index, errors[0].worker, errors[0].phase, errors[0].cause = index, line.index, line.request, cause
        raise errors.pop()  # or this frame and the error would hold each other, and with them the shared rows
