"""Who steps what: the cases, and how each vectorizer is opened at its best settings."""

import itertools
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import gymnasium
import numpy as np

import puffer_core
from benchmarks import environments, records

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SAME_STEP = gymnasium.vector.AutoresetMode.SAME_STEP.value


# -------------------------------------------------------------------------------------------------------------- cases


class Environment(NamedTuple):
    """A function that makes one, and what has to be known before there is one."""

    title: str
    make: Callable
    num_actions: int
    sizes: tuple[int, ...] = (8, 64)
    num_agents: int = 1
    seconds: float = 0.005  # roughly what constructing one and its first reset take, for the time left


class Case(NamedTuple):
    """So many environments of a kind; `workers`: the counts of a sweep."""

    environment: Environment
    num_envs: int
    workers: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        """What a heading says."""
        return f"{self.environment.title}, {self.num_envs} envs" + ", by workers" * bool(self.workers)

    @property
    def env_fns(self) -> list[Callable]:
        """What vectorizers take."""
        return [self.environment.make] * self.num_envs

    def actions(self, rows: int | None = None, dtype: type = np.int64) -> Any:
        """Endless rows of actions, the same for every contender; first-ready ones take the first `rows` of each."""
        shape = (1009, self.num_envs * self.environment.num_agents)
        table = np.random.default_rng(1).integers(self.environment.num_actions, size=shape, dtype=dtype)
        return itertools.cycle([row[:rows].copy() for row in table])


ENVIRONMENTS = {
    "noop": Environment("No-op", environments.NoOp, 4),
    "cartpole": Environment("CartPole", environments.cartpole, 2),
    "spin": Environment("100 us", environments.Spin, 4),
    "spin-spread": Environment("100 us, 100 % spread", partial(environments.Spin, spread=True), 4),
    "spin-reset": Environment("100 us, slow resets", partial(environments.Spin, slow_reset=True), 4),
    "minihack": Environment("MiniHack River", environments.minihack, 8, sizes=(8, 48), seconds=0.02),
    "breakout": Environment("Breakout", environments.breakout, 4, seconds=0.5),
    "spread": Environment("simple_spread, 3 agents", environments.spread, 5, num_agents=3),
}
SWEEP = (1, 2, 4, 8, 16)
CASES = {
    **{f"{name}-{size}": Case(one, size) for name, one in ENVIRONMENTS.items() for size in one.sizes},
    **{f"workers-{name}": Case(ENVIRONMENTS[name], 16, SWEEP) for name in ("spin", "breakout")},
}


# --------------------------------------------------------------------------------------------------------- contenders


class Opened(NamedTuple):
    """A contender at work: one `call` steps `rows` agents once, or as often as makes up as many."""

    call: Callable
    rows: int
    close: Callable


def _stepped(case: Case, envs: Any, dtype: type = np.int64) -> Opened:
    actions = case.actions(dtype=dtype)
    return Opened(lambda: envs.step(next(actions)), case.num_envs * case.environment.num_agents, envs.close)


def _puffer(backend: str, case: Case, **settings: Any) -> Opened:
    envs = getattr(puffer_core, backend)(case.env_fns, **settings)
    envs.async_reset(seed=1)
    actions, unflatten = case.actions(envs.agents_per_batch), envs.layout.unflatten
    if "batch_size" in settings:

        def call() -> None:
            unflatten(envs.recv().observations)
            envs.send(next(actions))
    else:
        envs.recv()

        def call() -> None:  # most rivals return structured observations, so unpacking them belongs to the work
            unflatten(envs.step(next(actions))[0])

    return Opened(call, envs.agents_per_batch, envs.close)


def _gymnasium(vectorizer: str, case: Case, **settings: Any) -> Opened:
    envs = getattr(gymnasium.vector, vectorizer)(case.env_fns, **settings)
    envs.reset(seed=1)
    return _stepped(case, envs)


def _sb3(vectorizer: str, case: Case, **settings: Any) -> Opened:
    from stable_baselines3.common import vec_env

    envs = getattr(vec_env, vectorizer)(case.env_fns, **settings)
    envs.seed(1)
    envs.reset()
    return _stepped(case, envs)


def _supersuit(case: Case, num_cpus: int) -> Opened:
    import supersuit

    one = supersuit.pettingzoo_env_to_vec_env_v1(case.environment.make())
    envs = supersuit.concat_vec_envs_v1(one, case.num_envs, num_cpus, base_class="gymnasium")
    envs.reset(seed=1)
    return _stepped(case, envs)


def _pufferlib(backend: str, case: Case, **settings: Any) -> Opened:
    import pufferlib.emulation
    import pufferlib.vector

    is_team = case.environment.num_agents > 1
    adapter = pufferlib.emulation.PettingZooPufferEnv if is_team else pufferlib.emulation.GymnasiumPufferEnv

    def make(**arguments: Any) -> Any:
        return adapter(env_creator=case.environment.make, **arguments)

    backend = getattr(pufferlib.vector, backend)
    envs = pufferlib.vector.make(make, backend=backend, num_envs=case.num_envs, **settings)
    envs.async_reset(1)
    if "batch_size" not in settings:
        envs.recv()
        return _stepped(case, envs, np.int32)
    rows = settings["batch_size"] * case.environment.num_agents
    actions = case.actions(rows, np.int32)

    def call() -> None:
        envs.recv()
        envs.send(next(actions))

    return Opened(call, rows, envs.close)


def _envpool(case: Case, **settings: Any) -> Opened:
    import envpool

    envs = envpool.make("Breakout-v5", "gymnasium", num_envs=case.num_envs, seed=1, **settings)
    if "batch_size" not in settings:
        envs.reset()
        return _stepped(case, envs, np.int32)
    envs.async_reset()
    actions = case.actions(settings["batch_size"], np.int32)
    return Opened(lambda: envs.send(next(actions), envs.recv()[4]["env_id"]), settings["batch_size"], envs.close)


def _ale(case: Case, **settings: Any) -> Opened:
    from ale_py.vector_env import AtariVectorEnv

    envs = AtariVectorEnv("breakout", case.num_envs, **settings)
    envs.reset(seed=1)
    if "batch_size" not in settings:
        return _stepped(case, envs)
    actions = case.actions(settings["batch_size"])
    envs.send(next(actions))

    def call() -> None:
        envs.recv()
        envs.send(next(actions))

    return Opened(call, settings["batch_size"], envs.close)


def _bare(case: Case) -> Opened:
    """Step one environment in a plain loop, a hundred steps a call."""
    env, num_agents = case.environment.make(), case.environment.num_agents
    env.reset(seed=1)
    step, reset, rows = env.step, env.reset, case._replace(num_envs=1).actions()  # the same, whatever the case's size
    actions = itertools.cycle([int(row[0]) for row in itertools.islice(rows, 1009)])
    if num_agents > 1:
        agents = env.possible_agents
        actions = itertools.cycle([dict(zip(agents, row.tolist())) for row in itertools.islice(rows, 1009)])

    def call() -> None:
        for action in itertools.islice(actions, 100):
            _, _, terminated, truncated, _ = step(action)
            if terminated or truncated:
                reset()

    def call_team() -> None:
        for action in itertools.islice(actions, 100):
            step(action)
            if not env.agents:
                reset()

    return Opened(call if num_agents == 1 else call_team, 100 * num_agents, env.close)


class Contender(NamedTuple):
    """How to open one.

    Args:
        kind: what it is fairly compared with.
        library: the package that has it, None for this project.
        open: takes a case and one of its settings.
        settings: returns those that may be best for a case, each of which is tried for a moment.
        where: tells the cases that it can step.
        workers: the setting that a sweep varies, if there is one.
        processes: how many of it run at once.
    """

    kind: str
    library: str | None
    open: Callable
    settings: Callable[[Case], list[dict]] = lambda case: [{}]
    where: Callable[[Case], bool] = lambda case: True
    workers: str = ""
    processes: int = 1

    def choices(self, case: Case) -> list[tuple[int | None, list[dict]]]:
        """Return the rows that this contender has in a case: a worker count (None outside sweeps), and settings."""
        if not self.where(case) or (case.workers and self.kind == "in process"):
            return []
        settings = self.settings(case)
        if not case.workers or not self.workers:
            return [(None, settings)]
        least = 2 if "batch_size" in settings[0] else 1  # with a single worker, nothing is ready first
        return [(count, [{**settings[0], self.workers: count}]) for count in case.workers if count >= least]

    def version(self) -> str | None:
        """Return the version that is installed, None if none is."""
        return records.version(self.library)


def _sync(case: Case, **settings: Any) -> list[dict]:
    """As many workers as there are cores, or the most below that split a case; or one, if that is quick to make.

    PufferLib (`overwork`) may always take one: by the sweeps, more of its workers are slower.
    """
    mosts = [CORES, 2 * CORES, 4 * CORES] if CORES > 4 else [CORES]  # on two cores more only lose, see the sweeps
    counts = [max(count for count in range(1, most + 1) if case.num_envs % count == 0) for most in mosts]
    counts += [1] if case.environment.seconds < 0.1 or "overwork" in settings else []
    return [{"num_workers": count, **settings} for count in dict.fromkeys(counts)]


def _first_ready(case: Case, *times: int, **settings: Any) -> list[dict]:
    """Batches of half a case, and as many times as many workers as there are cores, or the most below that split it."""
    most = [max(2, min(CORES * one, case.num_envs)) for one in times]
    counts = {max(count for count in range(2, one + 1, 2) if case.num_envs % count == 0) for one in most}
    return [{"batch_size": case.num_envs // 2, "num_workers": count, **settings} for count in sorted(counts)]


def _threads(*batch_sizes: int, **settings: Any) -> list[dict]:
    """C++ pools: one, two or four threads a core, or as many as they choose themselves (0), free or bound to cores."""
    threads = ((CORES, -1), (2 * CORES, -1), (4 * CORES, -1), (0, -1), (0, 0))
    pools = [{"num_threads": count, "thread_affinity_offset": offset, **settings} for count, offset in threads]
    return [{**pool, "batch_size": size} for size in batch_sizes for pool in pools] or pools


def _single(case: Case) -> bool:
    return case.environment.num_agents == 1


def _team(case: Case) -> bool:
    return case.environment.num_agents > 1


def _atari(case: Case) -> bool:
    return case.environment is ENVIRONMENTS["breakout"]


def _has_infos(case: Case) -> bool:
    return case.environment in (ENVIRONMENTS["minihack"], ENVIRONMENTS["breakout"]) and not case.workers


def _no_sweep(case: Case) -> bool:
    return not case.workers


GYMNASIUM = {"copy": False, "autoreset_mode": SAME_STEP}
ENVPOOL = {"episodic_life": True, "reward_clip": True, "noop_max": 30, "frame_skip": 4, "stack_num": 4}
ALE = {"episodic_life": True, "noop_max": 30, "frameskip": 4, "stack_num": 4, "autoreset_mode": SAME_STEP}

CONTENDERS = {
    "puffer_core Serial": Contender("in process", None, partial(_puffer, "Serial")),
    "puffer_core sync": Contender(
        "sync", None, partial(_puffer, "Multiprocessing"), _sync, workers="num_workers",
    ),
    "puffer_core sync, all infos": Contender(
        "sync", None, partial(_puffer, "Multiprocessing"), partial(_sync, infos="all"), _has_infos,
    ),
    "puffer_core first-ready": Contender(
        "first-ready", None, partial(_puffer, "Multiprocessing"),
        lambda case: _first_ready(case, 1, 2, zero_copy=True), workers="num_workers",
    ),
    "puffer_core first-ready, gathered": Contender(
        "first-ready", None, partial(_puffer, "Multiprocessing"),
        lambda case: _first_ready(case, 2, 4, zero_copy=False), _no_sweep,
    ),
    "Gymnasium SyncVectorEnv": Contender(
        "in process", "gymnasium", partial(_gymnasium, "SyncVectorEnv"), lambda case: [GYMNASIUM], _single,
    ),
    "Gymnasium AsyncVectorEnv": Contender(
        "sync", "gymnasium", partial(_gymnasium, "AsyncVectorEnv"),
        lambda case: [{**GYMNASIUM, "shared_memory": True}], _single,
    ),
    "SB3 DummyVecEnv": Contender("in process", "stable-baselines3", partial(_sb3, "DummyVecEnv"), where=_single),
    "SB3 SubprocVecEnv": Contender(
        "sync", "stable-baselines3", partial(_sb3, "SubprocVecEnv"), lambda case: [{"start_method": "fork"}], _single,
    ),
    "SuperSuit, in process": Contender("in process", "supersuit", _supersuit, lambda case: [{"num_cpus": 0}], _team),
    "SuperSuit": Contender("sync", "supersuit", _supersuit, lambda case: [{"num_cpus": max(2, CORES)}], _team),
    "EnvPool sync": Contender(
        "sync", "envpool", _envpool, lambda case: _threads(**ENVPOOL), _atari, "num_threads",
    ),
    "EnvPool async": Contender(
        "first-ready", "envpool", _envpool, lambda case: _threads(case.num_envs // 2, **ENVPOOL), _atari, "num_threads",
    ),
    "ALE vector sync": Contender("sync", "ale-py", _ale, lambda case: _threads(**ALE), _atari, "num_threads"),
    "ALE vector async": Contender(
        "first-ready", "ale-py", _ale,
        lambda case: _threads(case.num_envs // 2, case.num_envs // 4, **ALE), _atari, "num_threads",
    ),
    "PufferLib Serial": Contender("in process", "pufferlib-core", partial(_pufferlib, "Serial")),
    "PufferLib sync": Contender(
        "sync", "pufferlib-core", partial(_pufferlib, "Multiprocessing"), partial(_sync, overwork=True),
        workers="num_workers",
    ),
    "PufferLib first-ready": Contender(
        "first-ready", "pufferlib-core", partial(_pufferlib, "Multiprocessing"),
        lambda case: [
            {**settings, "sync_traj": in_turn}
            for settings in _first_ready(case, 1, overwork=True) for in_turn in (False, True)
        ],
        workers="num_workers",
    ),
    "1 bare process": Contender("limit", None, _bare),
    f"{CORES} bare processes": Contender("limit", None, _bare, processes=CORES),
}  # fmt: skip
