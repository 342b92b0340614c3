"""Serial and Multiprocessing say the same, in every way of receiving, and what they say can be worked out by hand."""

import collections
import functools
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from mpe2 import simple_spread_v3

import puffer_core
from puffer_core import (
    APIUsageError,
    EpisodeStats,
    GymnasiumPufferEnv,
    Multiprocessing,
    Serial,
    WorkerError,
)
from tests.envs import (
    Actor,
    ArrayReward,
    BigInfo,
    Counter,
    CounterTeam,
    Crashing,
    GlobalRandom,
    Halting,
    Marker,
    Napping,
    Nested,
    NoOp,
    Observer,
    Recycling,
    Silent,
    Team,
    Written,
)
from tests.test_adapters import told

ROOT = Path(puffer_core.__file__).parent
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def no_worker_is_left():
    yield
    assert multiprocessing.active_children() == []


def plain(value):
    """Turn arrays into lists, so that results can be compared, and a failure be read."""
    if isinstance(value, dict):
        return {key: plain(child) for key, child in value.items()}
    value = value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def info_of(infos, row):
    """Take the info of one row out of gymnasium's dict of arrays and masks."""
    own = {}
    for key, value in infos.items():
        if not key.startswith("_") and (f"_{key}" not in infos or infos[f"_{key}"][row]):
            own[key] = info_of(value, row) if isinstance(value, dict) else plain(value[row])
    return own


def scripted(rows, steps):
    return (np.asarray(rows) * 7 + np.asarray(steps) * 3) % 5


def trajectories(envs, steps, action=scripted, seed=1):
    """Run until every row has made `steps` steps; returns what each row saw, cut to the same length."""
    seen, counts = collections.defaultdict(list), np.zeros(envs.num_agents, int)
    envs.async_reset(seed=seed)
    while True:
        batch = envs.recv()
        assert len(set(batch.agent_ids.tolist())) == len(batch.agent_ids) == envs.agents_per_batch
        for position, row in enumerate(batch.agent_ids.tolist()):
            fields = [plain(field[position]) for field in (*batch[:4], batch.masks)]
            seen[row].append((*fields, info_of(batch.infos, position)))
        if all(len(seen[row]) > steps for row in range(envs.num_agents)):
            return {row: seen[row][: steps + 1] for row in sorted(seen)}
        ids = batch.agent_ids.copy()
        envs.send(action(ids, counts[ids]))
        counts[ids] += 1


STRATEGIES = {
    "sync, a worker an env": {"num_workers": 4},
    "sync, two workers": {"num_workers": 2},
    "sync, one worker": {"num_workers": 1},
    "sync, copies": {"num_workers": 2, "zero_copy": False},
    "first ready, views of single workers": {"num_workers": 4, "batch_size": 1},
    "first ready, views of pairs of workers": {"num_workers": 4, "batch_size": 2},
    "first ready, views of one of two workers": {"num_workers": 2, "batch_size": 2},
    "first ready, gathered": {"num_workers": 4, "batch_size": 2, "zero_copy": False},
    "first ready, three gathered": {"num_workers": 4, "batch_size": 3, "zero_copy": False},
}

counters = [functools.partial(Counter, [3, 1, 2], ends, delay) for ends, delay in
            [("terminate", 0.0), ("truncate", 0.002), ("both", 0.0), ("terminate", 0.001)]]  # fmt: skip
teams = [functools.partial(Team, [("++.", "+T.", "+.+", "X.T"), (".++", "+++", "XT+", "..X")])] * 4


# ------------------------------------------------------------------------------------------------------- one behaviour


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_multiprocessing_equals_serial(strategy):
    infos = "final" if "single" in strategy or "pairs" in strategy else "all"
    expected = trajectories(Serial(counters, infos=infos), 14)
    with Multiprocessing(counters, infos=infos, **STRATEGIES[strategy]) as envs:
        assert trajectories(envs, 14) == expected


def one_to_three(rows, steps):
    return 1 + scripted(rows, steps) % 3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_multiprocessing_equals_serial_for_teams(strategy):
    expected = trajectories(Serial(teams, infos="all"), 9, one_to_three)
    with Multiprocessing(teams, infos="all", **STRATEGIES[strategy]) as envs:
        assert trajectories(envs, 9, one_to_three) == expected


def nested_actions(rows, steps):
    return (np.asarray(rows)[:, None] * 5 + np.asarray(steps)[:, None] * 3 + np.arange(5)) % [3, 2, 2, 2, 4]


@pytest.mark.parametrize("strategy", ["sync, two workers", "first ready, views of one of two workers"])
@pytest.mark.parametrize("make", [Nested, Recycling, ArrayReward])
def test_multiprocessing_equals_serial_for_awkward_envs(make, strategy):
    action = {Nested: nested_actions, Recycling: lambda rows, steps: scripted(rows, steps) % 2}.get(make, scripted)
    expected = trajectories(Serial([make] * 4, infos="all"), 10, action)
    with Multiprocessing([make] * 4, infos="all", **STRATEGIES[strategy]) as envs:
        assert trajectories(envs, 10, action) == expected


OBSERVED = [
    spaces.Box(-1, 1, (), np.float32),
    spaces.Box(0, 1, (3,), np.dtype(bool).type),
    spaces.Box(-1, 1, (3, 2), np.float16),
    spaces.Discrete(5, start=-2),
    spaces.MultiBinary(4),
    spaces.Tuple([spaces.Discrete(3), spaces.Box(0, 1, (), np.float64), spaces.MultiDiscrete([[2, 3]])]),
]


@pytest.mark.parametrize("space", OBSERVED, ids=str)
def test_any_observation_comes_back_as_it_was(space):
    env_fns, plain_env = [functools.partial(Observer, space)] * 2, Observer(space)
    for envs in (Serial(env_fns), Multiprocessing(env_fns, num_workers=2)):
        with envs:
            observations, _ = envs.reset(seed=[4, 4])
            sample, _ = plain_env.reset(seed=4)
            for _ in range(3):
                assert envs.observation_space.contains(observations)
                tree = envs.layout.unflatten(observations)
                for row in range(2):
                    for value, twin in zip(*[part if isinstance(part, tuple) else (part,) for part in (sample, tree)]):
                        assert np.array_equal(twin[row].reshape(np.shape(value)), value)
                observations, sample = envs.step(np.zeros(2, int))[0], plain_env.step(0)[0]


def cart_pole():
    return gymnasium.wrappers.RecordEpisodeStatistics(gymnasium.make("CartPole-v1", max_episode_steps=25))


def without_times(infos):
    infos = {key: without_times(value) if isinstance(value, dict) else plain(value) for key, value in infos.items()}
    return {key: value for key, value in infos.items() if key not in ("t", "_t")}


@pytest.mark.parametrize("backend", [Serial, functools.partial(Multiprocessing, num_workers=2)])
def test_results_are_those_of_gymnasiums_sync_vector_env(backend):
    theirs = SyncVectorEnv([cart_pole] * 4, autoreset_mode=AutoresetMode.SAME_STEP)
    with backend([cart_pole] * 4, infos="all") as ours:
        assert ours.observation_space == theirs.observation_space and ours.action_space == theirs.action_space
        assert ours.single_action_space == theirs.single_action_space and ours.num_envs == 4
        rng, terminated, truncated = np.random.default_rng(0), 0, 0
        results = [envs.reset(seed=3) for envs in (theirs, ours)]
        for _ in range(120):
            (*expected, expected_infos), (*got, infos) = results
            for array, twin in zip(expected, got):
                assert np.array_equal(array, twin) and array.dtype == twin.dtype
            assert without_times(expected_infos) == without_times(infos)
            actions = rng.integers(2, size=4)
            results = [envs.step(actions) for envs in (theirs, ours)]
            terminated, truncated = terminated + results[1][2].sum(), truncated + results[1][3].sum()
        assert terminated > 5 and truncated > 3
    theirs.close()


@pytest.mark.parametrize("backend", [Serial, functools.partial(Multiprocessing, num_workers=2)])
def test_gymnasiums_vector_wrappers_work_on_top(backend):
    wrapper, make = gymnasium.wrappers.vector.RecordEpisodeStatistics, functools.partial(gymnasium.make, "CartPole-v1")
    theirs = wrapper(SyncVectorEnv([make] * 4, autoreset_mode=AutoresetMode.SAME_STEP))
    ours = wrapper(backend([make] * 4))
    rng, episodes = np.random.default_rng(0), 0
    assert np.array_equal(theirs.reset(seed=3)[0], ours.reset(seed=3)[0])
    for _ in range(60):
        actions = rng.integers(2, size=4)
        expected, got = theirs.step(actions)[4], ours.step(actions)[4]
        assert ("episode" in expected) == ("episode" in got)
        if "episode" in expected:
            episodes += 1
            assert without_times(expected["episode"]) == without_times(got["episode"])
    assert episodes > 2
    ours.close(), theirs.close()


BACKENDS = {
    "Serial": Serial,
    "Multiprocessing": functools.partial(Multiprocessing, num_workers=2),
    "copies": functools.partial(Multiprocessing, num_workers=2, zero_copy=False),
}
backends = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


# ---------------------------------------------------------------------------------------------------- ends of episodes


@backends
@pytest.mark.parametrize("ends", ["terminate", "truncate", "both"])
def test_the_row_of_a_last_step_is_the_next_episodes_first_observation(backend, ends):
    with backend([lambda: Counter(2, ends), lambda: Counter(3, ends)]) as envs:
        assert envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
        observations, infos = envs.reset(seed=5)
        assert observations[:, :4].tolist() == [[5, 0, 0, 0], [6, 0, 0, 0]] and infos == {}
        #           rows: seed, episode, step, total    final_obs of the row that ended         rewards
        table = [
            ([[5, 0, 1, 4], [6, 0, 1, 1]], None, [1.5, 1.125]),
            ([[5, 1, 0, 0], [6, 0, 2, 2]], (0, [5, 0, 2, 8]), [2.5, 2.125]),
            ([[5, 1, 1, 4], [6, 1, 0, 0]], (1, [6, 0, 3, 3]), [1.5, 3.125]),
            ([[5, 2, 0, 0], [6, 1, 1, 1]], (0, [5, 1, 2, 8]), [2.5, 1.125]),
        ]
        for rows, final, wanted in table:
            observations, rewards, terminations, truncations, infos = envs.step(np.array([4, 1]))
            over = [final is not None and final[0] == row for row in range(2)]
            assert observations[:, :4].tolist() == rows and rewards.tolist() == wanted
            assert terminations.tolist() == [ends != "truncate" and end for end in over]
            assert truncations.tolist() == [ends != "terminate" and end for end in over]
            if final is None:
                assert infos == {}
                continue
            row, last = final
            assert set(infos) == {"final_obs", "_final_obs", "final_info", "_final_info"}
            assert infos["_final_obs"].tolist() == infos["_final_info"].tolist() == over
            assert infos["final_obs"][row][:4].tolist() == last and infos["final_obs"][1 - row] is None
            assert info_of(infos, row)["final_info"] == {"steps": last[2]}


@backends
@pytest.mark.parametrize("infos", ["final", "all"])
def test_last_things_survive_an_env_that_recycles_its_arrays(backend, infos):
    with backend([Recycling, Recycling], infos=infos) as envs:
        envs.reset()
        for _ in range(2):
            envs.step(np.zeros(2, int))
        observations, _, terminations, _, said = envs.step(np.zeros(2, int))
        assert terminations.all()
        for row in range(2):
            assert envs.layout.unflatten(observations)["a"][row].tolist() == [10] * 3
            last, info = envs.layout.unflatten(said["final_obs"][row]), info_of(said, row)
            assert last["a"].tolist() == [13] * 3 and last["b"].tolist() == [13] * 2
            assert info["final_info"] == {"steps": 3, "trace": [13, 13]}
            assert infos == "final" or (info["steps"], info["trace"]) == (0, [10, 10])


@backends
def test_infos_that_environments_share_are_as_each_left_them(backend):
    class Sharing(Counter):
        said = {}

        def step(self, action):
            self.said["seed"] = self.seed
            return *super().step(action)[:4], self.said

    with backend([Sharing] * 4, infos="all") as envs:
        envs.reset(seed=3)
        assert envs.step(np.zeros(4, int))[4]["seed"].tolist() == [3, 4, 5, 6]


@backends
def test_infos_say_nothing_but_the_last_in_final_mode(backend):
    with backend([functools.partial(Counter, 3)] * 2, infos="final") as envs:
        said = [envs.reset()[1]] + [envs.step(np.zeros(2, int))[4] for _ in range(6)]
        assert [bool(infos) for infos in said] == [False, False, False, True, False, False, True]


@backends
def test_infos_say_nothing_but_the_episode_in_episode_mode(backend):
    env_fns = [lambda: puffer_core.EpisodeStats(Counter(2)), functools.partial(Counter, 2)]
    with backend(env_fns, infos="episode") as envs:
        envs.reset(), envs.step(np.zeros(2, int))
        first, second = [info_of(infos, row) for infos in [envs.step(np.zeros(2, int))[4]] for row in range(2)]
        assert (first["final_info"]["episode"]["l"], list(first["final_info"])) == (2, ["episode"])
        assert second.get("final_info", {}) == {} and second["final_obs"][2] == 2


@backends
def test_an_agent_that_sees_nothing_at_the_end_has_no_last_observation(backend):
    with backend([Halting] * 2, infos="episode") as envs:
        envs.reset(seed=1), envs.step(np.ones(6, int))
        infos = envs.step(np.ones(6, int))[4]
        assert infos["_final_obs"].all() and envs.masks.all()  # the next episode has begun
        assert [seen is None for seen in infos["final_obs"]] == [True, True, False] * 2
        assert envs.layout.unflatten(infos["final_obs"][2])["time"].tolist() == [0, 2]


@backends
def test_infos_of_every_step_come_in_all_mode(backend):
    with backend([functools.partial(Counter, 2), functools.partial(Counter, 3)], infos="all") as envs:
        _, infos = envs.reset(options={"level": 4})
        assert [info_of(infos, row) for row in range(2)] == [{"began": 0, "level": 4}] * 2
        infos = envs.step(np.zeros(2, int))[4]
        assert [info_of(infos, row) for row in range(2)] == [{"steps": 1}] * 2
        first, second = [info_of(infos, row) for infos in [envs.step(np.zeros(2, int))[4]] for row in range(2)]
        assert first.pop("final_obs")[2] == 2
        assert (first, second) == ({"final_info": {"steps": 2}, "began": 1}, {"steps": 2})


@backends
def test_nothing_from_before_a_reset_comes_after_it(backend):
    with backend([functools.partial(Counter, 1, "both")] * 2) as envs:
        envs.async_reset(seed=0)
        for turn in range(30):
            batch = envs.recv()
            assert batch.infos == {} and not batch.rewards.any()
            assert not batch.terminations.any() and not batch.truncations.any()
            assert batch.observations[:, [0, 2]].tolist() == [[turn, 0], [turn + 1, 0]]
            envs.send(np.zeros(2, int))  # every step ends an episode, with an info
            if turn % 3 == 1:
                assert envs.recv().infos["_final_obs"].all()
            envs.async_reset(seed=turn + 1)


def test_episode_statistics_are_the_same_everywhere():
    env_fns = [lambda: EpisodeStats(Counter([3, 2]))] * 2
    for backend in BACKENDS.values():
        with backend(env_fns) as envs:
            envs.reset()
            stats = []
            for _ in range(5):
                infos = envs.step(np.array([0, 4]))[4]
                stats += [info_of(infos, row)["final_info"]["episode"] for row in range(2) if infos]
            assert [(stat["r"], stat["l"], stat["steps"]) for stat in stats] == [
                (6, 3, 6),
                (7.5, 3, 6),
                (3, 2, 3),
                (4, 2, 3),
            ]


# --------------------------------------------------------------------------------------------------------------- teams


def team_row(envs, row, episode, time):
    return envs.layout.flatten({"id": np.uint8(row + 1), "time": np.array([episode, time], np.int32)}).tolist()


def expect_team(envs, scripts, steps):
    """Work out what every recv has to say of a team, from its scripts."""
    episode, time, agents = 0, 0, len(scripts[0][0])
    zero = [0] * envs.single_observation_space.shape[0]

    def observed(script, time):
        return [team_row(envs, row, episode, time) if state != "." else zero for row, state in enumerate(script[time])]

    script = scripts[0]
    yield observed(script, 0), [0.0] * agents, [False] * agents, [False] * agents, [s != "." for s in script[0]], {}
    for _ in range(steps):
        time += 1
        states, rows, finals = told(script, time), observed(script, time), {}
        masks = [state != "." for state in script[time]]
        rewards = [10.0 * (row + 1) + time if mask else 0.0 for row, mask in enumerate(masks)]
        ended = (states, [state == "T" for state in states], [state == "X" for state in states])
        for row, state in enumerate(states):
            if state in "TX":
                finals[row] = {"final_info": {"time": time} if masks[row] else {}}
        if "+" not in states:
            episode, time = episode + 1, 0
            script = scripts[episode % len(scripts)]
            for row in finals:
                finals[row]["final_obs"] = rows[row] if any(rows[row]) else None
            rows, masks = observed(script, 0), [state != "." for state in script[0]]  # of the next episode already
        yield rows, rewards, *ended[1:], masks, finals


TEAM_SCRIPTS = {
    "absent at reset, dying, returning": [("++.", "+T.", "+.+", "+++", "X.T")],
    "all truncated at once": [("+++", "+++", "X" * 3)],
    "another set of agents in turn": [("++.", "+++", "XTX"), (".++", ".+T", ".X."), ("+..", "+..", "T..")],
    "one after the other": [("+++", "T++", ".X+", "..T")],
    "a last one who was not there before": [("+..", "..+", "TX.")],
    "nobody in every other episode": [("...", "..."), ("+++", "T+X", ".X.")],
}


@backends
@pytest.mark.parametrize("name", TEAM_SCRIPTS)
def test_what_is_said_of_a_team_can_be_worked_out_by_hand(backend, name):
    scripts = TEAM_SCRIPTS[name]
    with backend([functools.partial(Team, scripts)] * 2) as envs:
        assert (envs.num_envs, envs.num_agents, envs.agents_per_batch) == (2, 6, 6)
        envs.async_reset(seed=0)
        for rows, rewards, terminations, truncations, masks, finals in expect_team(envs, scripts, 12):
            batch = envs.recv()
            for start in (0, 3):
                own = slice(start, start + 3)
                assert batch.observations[own].tolist() == rows and batch.masks[own].tolist() == masks
                assert batch.rewards[own].tolist() == rewards
                assert batch.terminations[own].tolist() == terminations
                assert batch.truncations[own].tolist() == truncations
                assert [info_of(batch.infos, start + row) for row in range(3)] == [
                    finals.get(row, {}) for row in range(3)
                ]
            assert np.array_equal(batch.agent_ids, np.arange(6)) and np.array_equal(envs.masks, batch.masks)
            envs.send(np.full(6, 2))


@backends
def test_who_ends_without_a_last_observation_is_told_so_and_begins_anew(backend):
    #        episode, time, who is there, who has ended
    table = [(0, 0, [0, 1], []), (0, 1, [1], [0]), (1, 0, [0, 1], [1]), (2, 0, [0, 1], [0, 1])]
    with backend([functools.partial(Silent, [("++", "T+", ".T"), ("++", "TT")])] * 2) as envs:
        envs.async_reset(seed=0)
        for episode, time, present, ended in table:
            batch = envs.recv()
            rows = [team_row(envs, row, episode, time) if row in present else [0] * 12 for row in range(2)]
            assert batch.observations.tolist() == rows * 2
            # A row that shows the next episode already needs another word for the end.
            told = {"masks": present, "_final_info": ended, "_final_obs": ended if time == 0 else []}
            told |= {"terminations": ended, "truncations": []}
            for name, agents in told.items():
                found = getattr(batch, name, batch.infos.get(name, np.zeros(4, bool)))
                assert np.flatnonzero(found).tolist() == [*agents, *[2 + agent for agent in agents]], name
            for row in np.flatnonzero(batch.infos.get("_final_obs", [])):
                assert batch.infos["final_obs"][row] is None
            envs.send(np.array([1, 2, 1, 2]))


@backends
def test_a_team_of_box_observations_equals_single_envs(backend):
    with (
        backend([functools.partial(CounterTeam, 2)] * 2) as team,
        backend([functools.partial(Counter, [3, 2])] * 4) as alone,
    ):
        observations, expected = team.reset(seed=[3, 8])[0], alone.reset(seed=[3, 3, 8, 8])[0]
        for step in range(9):
            assert np.array_equal(observations, expected)
            actions = np.array([step, step, step, step]) % 5
            (observations, *results, infos), (expected, *wanted, wanted_infos) = team.step(actions), alone.step(actions)
            for got, want in zip(results, wanted):
                assert np.array_equal(got, want)
            assert [info_of(infos, row) for row in range(4)] == [info_of(wanted_infos, row) for row in range(4)]


@backends
def test_a_real_pettingzoo_env_steps_in_every_backend(backend):
    plain_env = simple_spread_v3.parallel_env(max_cycles=4)
    with backend([lambda: simple_spread_v3.parallel_env(max_cycles=4)] * 2) as envs:
        observations, _ = envs.reset(seed=[6, 6])
        expected, _ = plain_env.reset(seed=6)
        for step in range(4):
            assert np.array_equal(observations, list(expected.values()) * 2) and envs.masks.all()
            actions = np.array([1, 3, step] * 2)
            observations, rewards, terminations, truncations, infos = envs.step(actions)
            expected, wanted, *_ = plain_env.step(dict(zip(plain_env.possible_agents, actions[:3].tolist())))
            assert rewards.tolist() == list(wanted.values()) * 2
        assert truncations.all() and not terminations.any()
        assert np.array_equal(np.stack(infos["final_obs"]), list(expected.values()) * 2)


# --------------------------------------------------------------------------------------------------------------- seeds

seeded = [functools.partial(Counter, [2, 3])] * 4


@functools.lru_cache
def serial_seeded():
    return trajectories(Serial(seeded), 12, seed=40)


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_seeds_go_by_global_index_whatever_the_split(num_workers):
    with Multiprocessing(seeded, num_workers=num_workers) as envs:
        got = trajectories(envs, 12, seed=40)
    assert got == serial_seeded()
    assert [got[row][0][0][0] for row in range(4)] == [40, 41, 42, 43]
    draws = [tuple(step[0][4] for step in got[row]) for row in range(4)]
    assert len(set(draws)) == 4  # different environments, different dice, over several episodes


@pytest.mark.parametrize("context", ["forkserver", "spawn"])
def test_seeds_go_by_global_index_whatever_the_start_method(context):
    class Local(Counter):  # no worker can import this one
        pass

    for env_fns in (seeded, [lambda: Local([2, 3])] * 4):
        with Multiprocessing(env_fns, num_workers=2, context=context) as envs:
            assert trajectories(envs, 12, seed=40) == serial_seeded()


@pytest.mark.parametrize("backend", [BACKENDS["Serial"], BACKENDS["Multiprocessing"]])
@pytest.mark.parametrize("seed", [np.int64(7), (7, 8), [np.int64(7), np.int64(8)], np.array([7, 8])], ids=repr)
def test_seeds_may_be_numbers_or_lists_of_any_integer_type(backend, seed):
    with backend([Counter, Counter]) as envs:
        assert envs.reset(seed=seed)[0][:, 0].tolist() == [7, 8]


def test_counts_may_be_numpys_and_seeds_have_to_be_integers():
    with Multiprocessing([Counter] * 4, num_workers=np.int64(2), batch_size=np.int64(2)) as envs:
        assert envs.num_workers == 2 and len(envs.reset(seed=1)[0]) == 2
        for seed in (7.0, [1, 2, 3.5, 4], "7"):
            with pytest.raises(TypeError, match="integer"):
                envs.reset(seed=seed)


def test_a_seed_of_a_small_integer_type_does_not_wrap():
    with Serial([Counter] * 2) as envs:
        assert envs.reset(seed=np.uint8(255))[0][:, 0].tolist() == [255, 256]


@backends
def test_a_list_of_seeds_gives_each_env_its_own_or_none(backend):
    with backend([Counter] * 4) as envs:
        assert envs.reset(seed=[5, None, 5, 9])[0][:, 0].tolist() == [5, -1, 5, 9]
        again = envs.reset(seed=[5, 6, 5, 9])[0]
        assert np.array_equal(again[0, [0, 4]], again[2, [0, 4]])
        for seed in ([1, 2, 3], [1, 2, 3, 4, 5]):
            with pytest.raises(ValueError, match="reset.* a list of 4"):
                envs.reset(seed=seed)


@backends
def test_the_same_seed_twice_gives_the_same_episodes(backend):
    with backend([Counter] * 2) as envs:
        runs = [[(step[0][0], *step[0][2:]) for step in trajectories(envs, 12, seed=3)[1]] for _ in range(2)]
    assert runs[0] == runs[1]  # but for the number of the episode


def test_seeds_may_be_larger_than_numpys_global_generator_takes():
    with Multiprocessing([Counter] * 2, num_workers=2) as envs:
        assert envs.reset(seed=2**32)[0][:, 0].tolist() == [2**32, 2**32 + 1]


def test_serials_copies_stay_as_they_were():
    with Serial([Counter] * 2, zero_copy=False) as envs:
        first, _ = envs.reset(seed=1)
        envs.step([1, 2])
        assert first[:, 2].tolist() == [0, 0]


def test_global_generators_repeat_with_the_seed_and_differ_between_workers():
    runs = []
    for seed in (5, 5, 6):
        with Multiprocessing([GlobalRandom] * 2, num_workers=2) as envs:
            observations = [envs.reset(seed=seed)[0].copy()]
            observations += [envs.step(np.zeros(2, int))[0].copy() for _ in range(5)]  # two more episodes
            runs.append(np.array(observations))
    assert np.array_equal(runs[0], runs[1]) and not np.array_equal(runs[0], runs[2])
    assert not (runs[0][:, 0] == runs[0][:, 1]).any()


def test_global_generators_differ_between_workers_without_a_seed_too():
    with Multiprocessing([GlobalRandom] * 2, num_workers=2, context="fork") as envs:
        observations = envs.reset()[0]
        assert not (observations[0] == observations[1]).any()


def test_the_parents_global_generators_are_left_alone():
    np.random.seed(3)
    expected = np.random.random(2)
    np.random.seed(3)
    with Multiprocessing([GlobalRandom] * 2, num_workers=2) as envs:
        envs.reset(seed=1)
    assert np.array_equal(np.random.random(2), expected)


# ---------------------------------------------------------------------------------------------------- views and copies


@pytest.mark.parametrize("batch_size", [None, 2])
def test_zero_copy_batches_are_views_of_one_memory(batch_size):
    with Multiprocessing([Counter] * 4, num_workers=2, batch_size=batch_size) as envs:
        envs.async_reset(seed=1)
        seen = {}
        for _ in range(8):
            batch = envs.recv()
            last = seen.setdefault(batch.agent_ids[0], batch)
            for name in ("observations", "rewards", "terminations", "truncations"):
                assert np.shares_memory(getattr(batch, name), getattr(last, name)), name
            envs.send(np.zeros(envs.agents_per_batch, int))


def test_a_view_lives_until_the_next_send_of_its_envs():
    with Multiprocessing([functools.partial(Counter, 50)] * 4, num_workers=2, batch_size=2) as envs:
        envs.async_reset(seed=1)
        first = second = envs.recv()
        while second.agent_ids[0] == first.agent_ids[0]:  # the same envs may be ready first once more
            envs.send(np.zeros(2, int))
            second = envs.recv()
        kept = second.observations.copy()
        time.sleep(0.02)  # in which the first two envs take the step that they were sent
        envs.call("plus", 1)  # nothing that is not a send changes it
        assert np.array_equal(second.observations, kept)
        envs.send(np.zeros(2, int))
        envs.call("plus", 1)  # once all have stepped
        assert not np.array_equal(second.observations, kept)


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"num_workers": 4, "batch_size": 2}])
def test_copies_stay_as_they_were(options):
    with Multiprocessing([Counter] * 4, zero_copy=False, **{"num_workers": 2, **options}) as envs:
        envs.async_reset(seed=1)
        kept = []
        for _ in range(12):
            batch = envs.recv()
            kept.append((batch, [np.array(field) for field in (*batch[:4], *batch[5:])]))
            envs.send(np.zeros(envs.agents_per_batch, int))
        for batch, fields in kept:
            for field, copy in zip((*batch[:4], *batch[5:]), fields):
                assert np.array_equal(field, copy)


@pytest.mark.parametrize("zero_copy", [True, False])
def test_agent_ids_of_a_batch_are_the_learners_own(zero_copy):
    with Multiprocessing([Counter] * 4, num_workers=4, batch_size=2, zero_copy=zero_copy) as envs:
        envs.async_reset(seed=1)
        total = np.zeros(4, int)
        for _ in range(8):
            batch = envs.recv()
            ids = batch.agent_ids.copy()
            total[ids] = np.where(batch.terminations, 0, total[ids])
            assert np.array_equal(batch.observations[:, 3], total[ids])
            batch.agent_ids[:] = 0
            total[ids] += [1, 2]
            envs.send(np.array([1, 2]))


def test_actions_are_taken_at_once():
    with Multiprocessing([functools.partial(Counter, 9, delay=0.02)] * 2, num_workers=2) as envs:
        envs.reset()
        actions = np.array([1, 2])
        envs.send(actions)
        actions[:] = 4
        assert envs.recv().observations[:, 3].tolist() == [1, 2]


# --------------------------------------------------------------------------------------------------------- first ready


@pytest.mark.alone
@pytest.mark.parametrize("zero_copy", [True, False])
def test_a_slow_env_holds_nobody_up(zero_copy):
    slow, fast = functools.partial(Counter, 1000, delay=2), functools.partial(Counter, 1000, delay=0.001)
    with Multiprocessing([slow, fast, fast, fast], num_workers=4, batch_size=2, zero_copy=zero_copy) as envs:
        envs.async_reset(seed=1)
        while 0 not in envs.recv().agent_ids:  # the reset is fast, so the slow one soon has its first turn
            envs.send(np.zeros(2, int))
        envs.send(np.zeros(2, int))
        start = time.perf_counter()
        for _ in range(40):
            batch = envs.recv()
            assert 0 not in batch.agent_ids
            envs.send(np.zeros(2, int))
        assert time.perf_counter() - start < 1.5


@pytest.mark.alone
@pytest.mark.parametrize("zero_copy", [True, False])
def test_first_come_first_served(zero_copy):
    """Not the lowest first, nor the last that came: whether the parent sees them come, or finds several waiting."""
    for _ in range(3):  # on a busy machine, one may be late
        with Multiprocessing([Napping] * 3, num_workers=3, batch_size=1, zero_copy=zero_copy) as envs:
            envs.async_reset(seed=[3, 2, 1])  # tenths of a second
            served = []
            for turn in range(6):
                time.sleep(1.0 if turn == 3 else 0.0)
                served.append(int(envs.recv().agent_ids[0]))
                envs.send(np.full(1, 4))
        if served == [2, 1, 0, 2, 1, 0]:
            return
    pytest.fail(f"served in the order {served}")


@pytest.mark.parametrize(
    "options", [{"batch_size": 2}, {"batch_size": 1}, {"batch_size": 3, "zero_copy": False}], ids=str
)
@pytest.mark.alone
@pytest.mark.parametrize("delay", [0, 0.004])
def test_nobody_starves_and_equally_fast_envs_get_equal_turns(options, delay):
    make = functools.partial(Counter, 1000, delay=delay) if delay else NoOp
    for _ in range(3):  # a worker that loses its core to other programs has fewer turns, but not every time
        with Multiprocessing([make] * 6, num_workers=6, **options) as envs:
            envs.async_reset()
            turns, start = np.zeros(6, int), time.perf_counter()
            # Without a delay, it is the operating system that shares out the cores, in slices of some milliseconds.
            while turns.sum() < 300 * envs.batch_size or time.perf_counter() - start < 1.5:
                batch = envs.recv()
                turns[batch.agent_ids] += 1
                envs.send(np.zeros(envs.agents_per_batch, int))
        if turns.min() * (2 if delay else 10) >= turns.max():
            return
    pytest.fail(f"turns of equally fast environments: {turns}")


@pytest.mark.parametrize("zero_copy", [True, False])
def test_a_thousand_resets_in_mid_flight(zero_copy):
    rng = np.random.default_rng(0)
    with Multiprocessing([functools.partial(Counter, 2)] * 4, num_workers=4, batch_size=2, zero_copy=zero_copy) as envs:
        for turn in range(1000):
            envs.async_reset(seed=turn)
            fresh = set(range(4))
            for _ in range(int(rng.integers(0, 3))):
                batch = envs.recv()
                for position, row in enumerate(batch.agent_ids.tolist()):
                    assert batch.observations[position, 0] == turn + row
                    if row in fresh:  # its first since the reset, so nothing can have happened yet
                        assert batch.observations[position, 2] == 0 and batch.rewards[position] == 0
                        assert info_of(batch.infos, position) == {} and not batch.terminations[position]
                        fresh.remove(row)
                if rng.random() < 0.8:
                    envs.send(np.ones(2, int))
                else:
                    break


@pytest.mark.alone
def test_a_timeout_bounds_the_call_and_loses_nothing():
    with Multiprocessing([functools.partial(Counter, 5, delay=0.25)] * 2, num_workers=2) as envs:
        envs.reset(seed=1)
        for step in range(1, 4):
            envs.send(np.array([1, 2]))
            for timeout in (0, 0.05):
                start = time.perf_counter()
                with pytest.raises(TimeoutError):
                    envs.recv(timeout=timeout)
                assert timeout <= time.perf_counter() - start < timeout + 0.1
            batch = envs.recv(timeout=10)
            assert batch.observations[:, 2:4].tolist() == [[step, step], [step, 2 * step]]
        envs.send(np.array([1, 2]))
        with pytest.raises(TimeoutError):
            envs.recv(0.01)
        assert envs.reset(seed=7)[0][:, :3].tolist() == [[7, 1, 0], [8, 1, 0]]  # and what was under way is dropped


@pytest.mark.alone
def test_a_timeout_of_zero_polls():
    with Multiprocessing([functools.partial(Counter, 50, delay=0.02)] * 2, num_workers=2) as envs:
        envs.reset(seed=1)
        envs.send(np.array([1, 2]))
        polls, start = 0, time.perf_counter()
        while time.perf_counter() - start < 5:
            try:
                batch = envs.recv(timeout=0)
                break
            except TimeoutError:
                polls += 1
        assert polls > 3 and batch.observations[:, 3].tolist() == [1, 2]


# -------------------------------------------------------------------------------------------------------------- misuse


@backends
def test_calls_out_of_order_are_refused(backend):
    actions = np.zeros(2, int)
    with backend([functools.partial(Counter, 99)] * 2) as envs:
        for call in (lambda: envs.send(actions), envs.recv, lambda: envs.step(actions)):
            with pytest.raises(APIUsageError):
                call()
        envs.reset(seed=1)
        with pytest.raises(APIUsageError):
            envs.recv()
        envs.send(actions)
        with pytest.raises(APIUsageError):
            envs.send(actions)
        assert envs.recv().observations[:, 2].tolist() == [1, 1]
        with pytest.raises(APIUsageError):
            envs.recv()
        assert envs.step(actions)[0][:, 2].tolist() == [2, 2]
    for call in (lambda: envs.send(actions), envs.recv, envs.reset, envs.async_reset, lambda: envs.step(actions)):
        with pytest.raises(APIUsageError, match="closed"):
            call()
    for call in (lambda: envs.call("plus", 1), lambda: envs.get_attr("seed"), lambda: envs.set_attr("seed", 1)):
        with pytest.raises(APIUsageError, match="closed"):
            call()


BAD_ACTIONS = [np.zeros(3, int), np.zeros((2, 1), int), np.zeros(2), np.int64(0), np.zeros(0, int), None, ["a", "b"]]


@backends
def test_actions_of_another_shape_or_dtype_are_refused(backend):
    with backend([functools.partial(Counter, 99)] * 2) as envs:
        envs.reset(seed=1)
        for actions in BAD_ACTIONS:
            with pytest.raises(APIUsageError, match=r"\(2,\)"):
                envs.step(actions)
        assert envs.step([1, 2])[0][:, 2:4].tolist() == [[1, 1], [1, 2]]  # nothing was sent, and lists will do
        assert envs.step(np.array([1, 2], np.int32))[0][:, 3].tolist() == [2, 4]


@backends
@pytest.mark.parametrize(
    "space",
    [spaces.MultiDiscrete([3, 3], dtype=np.uint8), spaces.Box(0, 255, (2,), np.uint8), spaces.Box(0, 1, (2,), bool)],
)
def test_integers_will_do_for_unsigned_actions_where_they_fit(backend, space):
    with backend([lambda: Actor(space)] * 2) as envs:
        envs.reset()
        assert envs.step(np.array([[1, 0], [1, 1]]))[1].tolist() == [1, 2]
        for wrong in (np.array([[-1, 0], [1, 1]]), np.array([[256, 0], [1, 1]]), np.ones((2, 2))):
            with pytest.raises(APIUsageError, match=space.dtype.name):
                envs.step(wrong)
        assert envs.step(np.array([[0, 1], [0, 0]]))[1].tolist() == [1, 0]  # nothing wrong was sent


@backends
def test_actions_that_would_wrap_are_refused(backend):
    with backend([lambda: Actor(spaces.Box(-100, 100, (1,), np.int8))] * 2) as envs:
        envs.reset()
        with pytest.raises(APIUsageError, match="int8.*int64"):
            envs.step(np.array([[1], [300]]))
        assert envs.step(np.array([[1], [-50]]))[1].tolist() == [1, -50]  # wider integers will do where they fit


@backends
def test_after_a_reset_or_step_that_failed_a_reset_is_due(backend):
    with backend([functools.partial(Counter, 99)] * 2) as envs:
        for call in (envs.async_reset, lambda: envs.send(np.zeros(2, int))):
            envs.reset(seed=1)
            with mock.patch.object(envs, "_request", side_effect=ArithmeticError), pytest.raises(ArithmeticError):
                call()
            for refused in (envs.recv, lambda: envs.send(np.zeros(2, int))):
                with pytest.raises(APIUsageError, match=r"async_reset\(\) is due"):
                    refused()
        assert envs.reset(seed=3)[0][:, 0].tolist() == [3, 4]


@backends
@pytest.mark.parametrize("make", [None, 3, [3], ["CartPole-v1"], [], Counter, [Counter()]], ids=range(7))
def test_env_fns_that_are_no_functions_are_refused(backend, make, monkeypatch):
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    with pytest.raises((TypeError, ValueError, WorkerError)):
        backend(make)
    assert ignored == []  # nothing that is half built complains when it goes


@backends
def test_env_fns_that_return_something_else_are_refused(backend):
    with pytest.raises((TypeError, WorkerError), match="gymnasium.Env.*got {}"):
        backend([dict, dict])


DIVISIBILITY = [
    ({"num_workers": 4}, "num_workers"),
    ({"num_workers": 7}, "num_workers"),
    ({"num_workers": 0}, "num_workers"),
    ({"num_workers": -1}, "num_workers"),
    ({"num_workers": 6, "batch_size": 4}, "batch_size"),  # 6 is not a multiple of it, and views must not overlap
    ({"num_workers": 2, "batch_size": 2}, "batch_size"),  # less than what a worker has
    ({"num_workers": 2, "batch_size": 12}, "batch_size"),
    ({"num_workers": 2, "batch_size": 0}, "batch_size"),
    ({"num_workers": 3, "batch_size": 3, "zero_copy": False}, "batch_size"),
]


@pytest.mark.parametrize("options, name", DIVISIBILITY, ids=str)
def test_numbers_that_do_not_divide_are_refused_by_name(options, name, monkeypatch):
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    with pytest.raises(ValueError, match=name):
        Multiprocessing([Counter] * 6, **options)
    assert ignored == []


@backends
def test_no_environments_are_refused(backend):
    with pytest.raises(ValueError, match="num_workers: .*num_envs=0"):
        backend([])


@backends
def test_envs_that_are_not_alike_are_refused(backend):
    with pytest.raises((ValueError, WorkerError), match="alike"):
        backend([Counter, NoOp])
    with pytest.raises((ValueError, WorkerError), match="alike"):
        backend([Counter, Counter, Counter, NoOp])


class Numbers(NoOp):
    """Observes and takes integers of some dtype, which a MultiDiscrete's `repr` does not tell."""

    def __init__(self, observed, taken=np.int64):
        self.observation_space = spaces.MultiDiscrete([9, 9], dtype=observed)
        self.action_space = spaces.MultiDiscrete([9, 9], dtype=taken)


@backends
def test_envs_that_differ_in_a_dtype_alone_are_refused(backend):
    for other in ((np.int32, np.int64), (np.int64, np.int32)):
        with pytest.raises((ValueError, WorkerError), match="alike"):
            backend([functools.partial(Numbers, np.int64), functools.partial(Numbers, *other)])


class Named(Counter):
    """Has an attribute that its adapter has too."""

    layout = "easy"

    def told(self):
        return self.layout


@backends
def test_set_attr_reaches_the_env_past_its_adapter(backend):
    with backend([Named] * 2) as envs:
        envs.set_attr("layout", "hard")
        assert envs.call("told") == ("hard", "hard")


class Ordered(NoOp):
    """Has Dicts whose keys come in orders of their own, which a Dict's `==` does not look at."""

    def __init__(self, observed="ab", acted="ab"):
        self.observation_space = spaces.Dict([(key, spaces.Box(0, 9, (2,), np.uint8)) for key in observed])
        self.action_space = spaces.Dict([(key, spaces.Discrete(3)) for key in acted])


@backends
@pytest.mark.parametrize("orders", [("ba", "ab"), ("ab", "ba")])
def test_envs_whose_keys_come_in_another_order_are_refused(backend, orders):
    backend([functools.partial(Ordered, *orders)] * 2).close()
    with pytest.raises(ValueError, match="alike, got .*'b'.*'a'.* after .*'a'.*'b'"):
        backend([Ordered, functools.partial(Ordered, *orders)])


@backends
def test_teams_may_have_names_of_their_own(backend):
    def named(name):
        team = Team()
        team.possible_agents = [f"{name}_{number}" for number in range(3)]
        return team

    with backend([functools.partial(named, name) for name in "ab"], infos="all") as envs:
        assert envs.reset(seed=1)[1]["_began"].tolist() == [True, True, False] * 2
        assert envs.masks.tolist() == [True, True, False] * 2
        assert envs.step([1] * 6)[1].tolist() == [11, 21, 0] * 2


@backends
def test_who_ends_before_its_team_is_told_so_once(backend):
    with backend([functools.partial(Team, [("++", "T+", ".X")])] * 2, infos="all") as envs:
        envs.reset()
        said = [envs.step(np.ones(4, int))[4] for _ in range(2)]
        assert [info_of(said[0], row) for row in range(4)] == [{"final_info": {"time": 1}}, {"time": 1}] * 2
        assert [info_of(said[1], row).get("began") for row in range(4)] == [1] * 4


@backends
def test_options_reach_teams(backend):
    with backend([functools.partial(CounterTeam, 2)] * 2, infos="all") as envs:
        assert envs.reset(options={"level": 3})[1]["level"].tolist() == [3] * 4


class Lingering(Team):
    """Counts agents that have just ended among the living, until the next reset."""

    def step(self, actions):
        *results, infos = super().step(actions)
        self.agents = [agent for agent in self.possible_agents if agent in results[0]]
        return *results, infos


@backends
def test_a_team_is_over_when_all_have_ended_whoever_it_counts_among_the_living(backend):
    with backend([functools.partial(Lingering, [("++", "TX")])] * 2) as envs:
        envs.reset()
        for episode in (1, 2):
            observations, _, terminations, truncations, infos = envs.step(np.ones(4, int))
            assert terminations.tolist() == [True, False] * 2 and truncations.tolist() == [False, True] * 2
            assert infos["_final_obs"].all() and (envs.layout.unflatten(observations)["time"] == [episode, 0]).all()


@backends
def test_a_team_of_one_is_no_single_env(backend):
    alone = CounterTeam(1)
    assert alone.observation_space(0) == Counter.observation_space
    with pytest.raises(ValueError, match="alike, got PettingZooPufferEnv .* after GymnasiumPufferEnv"):
        backend([Counter, functools.partial(CounterTeam, 1)])


# ---------------------------------------------------------------------------------------------------- calls, attributes


@backends
def test_call_get_attr_and_set_attr(backend):
    with backend([lambda: gymnasium.wrappers.TimeLimit(Counter(99), 50)] * 4) as envs:
        envs.reset(seed=10)
        assert envs.call("plus", 5) == (15, 16, 17, 18)
        assert envs.call("plus", 5, scale=2) == (30, 32, 34, 36)
        assert envs.get_attr("seed") == (10, 11, 12, 13)
        envs.set_attr("tag", [1, 2, 3, 4])
        assert envs.get_attr("tag") == (1, 2, 3, 4)
        envs.set_attr("tag", (4, 3, 2, 1))
        assert envs.get_attr("tag") == (4, 3, 2, 1)
        envs.set_attr("tag", "same")
        assert envs.get_attr("tag") == ("same",) * 4
        envs.set_attr("seed", 20)
        assert envs.step(np.zeros(4, int))[0][:, 0].tolist() == [20] * 4  # the inner env itself was set
        with pytest.raises(ValueError, match="4"):
            envs.set_attr("tag", [1, 2, 3])


@backends
def test_envs_can_be_drawn(backend):
    with backend([functools.partial(Written, "ansi")] * 2) as envs:
        envs.reset(), envs.step([0, 0])
        assert envs.render_mode == "ansi" and envs.render() == ("step 1", "step 1")
        assert envs.metadata["render_fps"] == 5


class Running(Counter):
    """Says how its episode goes at every step, and at a reset."""

    def reset(self, **arguments):
        return super().reset(**arguments)[0], {"episode": {"l": 0}}

    def step(self, action):
        return *super().step(action)[:4], {"episode": {"l": self.steps}}


@backends
def test_infos_of_episodes_come_at_their_ends(backend):
    with backend([functools.partial(Running, 2)] * 2, infos="episode") as envs:
        assert envs.reset()[1] == {} and envs.step([0, 0])[4] == {}
        infos = envs.step([0, 0])[4]
        assert "episode" not in infos and infos["final_info"]["episode"]["l"].tolist() == [2, 2]


@backends
def test_calls_may_come_while_steps_are_under_way(backend):
    with backend([functools.partial(Counter, 99, delay=0.01)] * 2) as envs:
        envs.reset(seed=1)
        for step in range(1, 6):
            envs.send(np.array([1, 2]))
            assert envs.call("plus", 1) == (2, 3)
            assert envs.recv().observations[:, 2:4].tolist() == [[step, step], [step, 2 * step]]


@backends
def test_a_call_that_fails_says_so(backend):
    with backend([functools.partial(Counter, 99)] * 2) as envs:
        envs.reset(seed=1)
        with pytest.raises((AttributeError, WorkerError), match="nothing_like_it"):
            envs.call("nothing_like_it")  # fails in all workers, and is told once
        assert envs.closed == isinstance(envs, Multiprocessing)  # as whatever fails in a worker


def test_a_call_that_fails_names_its_env():
    with Multiprocessing([functools.partial(Counter, 99)] * 4, num_workers=2) as envs:
        envs.reset(seed=1)
        envs.set_attr("seed", [1, 2, "no number", 4])
        with pytest.raises(WorkerError, match="environment 2 .*call") as caught:
            envs.call("plus", 1)
        assert (caught.value.env_index, caught.value.worker) == (2, 1)


@pytest.mark.parametrize("without", [0, 1, 3])
def test_a_missing_attribute_names_the_env_that_lacks_it(without):
    class Extra(Counter):
        extra = 1

    with Multiprocessing([Counter if at == without else Extra for at in range(4)], num_workers=1) as envs:
        with pytest.raises(WorkerError, match=f"environment {without} .*call.*"):
            envs.get_attr("extra")


def test_layouts_travel_between_processes():
    with Multiprocessing([Nested] * 2, num_workers=2) as envs:
        rows, _ = envs.reset(seed=1)
        layout = envs.get_attr("layout")[0]
        ours, theirs = envs.layout.unflatten(rows), layout.unflatten(rows)
        assert str(ours) == str(theirs) and layout.dtype == envs.layout.dtype


def test_a_team_needs_no_metadata(monkeypatch):
    monkeypatch.delattr(Team, "metadata")
    with Serial([Team]) as envs:
        assert envs.metadata == {"autoreset_mode": AutoresetMode.SAME_STEP}


class Missing:
    def __reduce__(self):
        return open, ("no such file",)


class Marked(Counter):
    def __init__(self, mark):
        super().__init__(99)
        self.mark = mark


class Unloadable:
    def __reduce__(self):
        return int, ("no number",)  # what unpickling calls


def test_an_argument_that_workers_cannot_unpickle_is_told():
    with Multiprocessing([functools.partial(Counter, 99)] * 4, num_workers=2) as envs:
        envs.reset(seed=1)
        with pytest.raises(WorkerError, match="(?s)call.*invalid literal"):
            envs.set_attr("tag", Unloadable())


def test_a_result_that_cannot_be_unpickled_closes_all():
    """As half of what the worker said is lost, the next call would wait for the rest."""
    for mark, error, match in ((Unloadable(), ValueError, "no number"), (Missing(), FileNotFoundError, "no such file")):
        env_fns = [functools.partial(Marked, mark), functools.partial(Marked, 1)]
        with Multiprocessing(env_fns, num_workers=2, context="fork") as envs:
            envs.reset(seed=1)
            with pytest.raises(error, match=match):
                envs.get_attr("mark")
            assert envs.closed


@pytest.mark.parametrize("cut_short", ["unpicklable", "interrupted"])
def test_a_call_that_is_cut_short_spoils_nothing(cut_short):
    with Multiprocessing([functools.partial(Counter, 99)] * 4, num_workers=4) as envs:
        envs.reset(seed=1)
        if cut_short == "unpicklable":
            with pytest.raises(TypeError, match="pickle"):
                envs.set_attr("tag", [1, 2, threading.Lock(), 4])
        else:
            waits = [None, KeyboardInterrupt]  # first for all to be free, then for their replies
            with mock.patch.object(envs, "_wait", side_effect=waits), pytest.raises(KeyboardInterrupt):
                envs.call("plus", 1)
        for step in (1, 2):
            assert envs.step(np.zeros(4, int))[0][:, [0, 2]].tolist() == [[seed, step] for seed in (1, 2, 3, 4)]
        assert envs.get_attr("seed") == (1, 2, 3, 4)


class Delta(puffer_core.GymnasiumPufferEnv):
    """Remembers its last action, and says how far the next one is from it."""

    last = np.zeros(3, np.float32)

    def step(self, action):
        *result, info = super().step(action)
        result[1], self.last = float(np.abs(action - self.last).sum()), action
        return *result, info


def test_an_adapter_of_ones_own_may_keep_its_actions():
    with Serial([lambda: Delta(Actor(spaces.Box(-9, 9, (3,))))]) as envs:
        envs.reset()
        rewards = [envs.step(np.full((1, 3), number, np.float32))[1].item() for number in range(4)]
        assert rewards == [0, 3, 3, 3]


def test_an_env_that_no_adapter_takes_is_closed():
    env = Actor(spaces.Text(3))
    with mock.patch.object(env, "close") as close, pytest.raises(TypeError, match="Text"):
        Serial([lambda: env])
    close.assert_called_once()


@backends
def test_teams_can_be_called(backend):
    with backend([Team] * 2) as envs:
        envs.reset(seed=4)
        assert envs.get_attr("seed") == (4, 5)
        envs.set_attr("seed", [8, 9])
        assert envs.get_attr("seed") == (8, 9)


# ------------------------------------------------------------------------------------------------------- construction


def test_names_and_spaces():
    with Multiprocessing([Nested] * 8, num_workers=4, batch_size=4) as envs:
        assert isinstance(envs, gymnasium.vector.VectorEnv)
        assert (envs.num_envs, envs.num_agents, envs.agents_per_batch, envs.batch_size, envs.num_workers) == (
            8,
            8,
            4,
            4,
            4,
        )
        assert envs.single_observation_space == envs.layout.flat_space and envs.layout.space == Nested.observation_space
        assert envs.observation_space.shape == (4, *envs.single_observation_space.shape)
        assert envs.action_space.shape == (4, 5)
        envs.async_reset()
        batch = envs.recv()
        assert batch._fields == (
            "observations", "rewards", "terminations", "truncations", "infos", "agent_ids", "masks"
        )  # fmt: skip
        assert envs.agent_ids is batch.agent_ids and envs.masks is batch.masks and batch.masks.all()
        assert batch.rewards.dtype == np.float64 and batch.terminations.dtype == batch.truncations.dtype == bool


def test_envs_that_are_adapted_already_are_taken_as_they_are():
    for make in (lambda: GymnasiumPufferEnv(Nested()), Nested):
        with Serial([make]) as envs:
            assert isinstance(envs.envs[0], GymnasiumPufferEnv) and isinstance(envs.envs[0].env, Nested)
            assert envs.reset(seed=1)[0].shape == (1, *envs.layout.flat_space.shape)


class Doubling(GymnasiumPufferEnv):
    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation + 1, 2 * reward, *rest


class Phases(gymnasium.Env):
    """Has a `step` for every phase of an episode."""

    observation_space, action_space = spaces.Box(0, 9, (1,), np.float32), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.step = self.first
        return np.zeros(1, np.float32), {}

    def first(self, action):
        self.step = self.second
        return np.ones(1, np.float32), 1.0, False, False, {}

    def second(self, action):
        return np.full(1, 2, np.float32), 2.0, True, False, {}


@backends
def test_an_env_may_change_its_step(backend):
    with backend([Phases] * 2) as envs:
        envs.reset(seed=1)
        assert [envs.step([0, 0])[1].tolist() for _ in range(4)] == [[1, 1], [2, 2]] * 2


@backends
def test_what_an_adapter_of_ones_own_does_counts(backend):
    with backend([lambda: Doubling(Counter())] * 2) as envs:
        assert envs.reset(seed=4)[0][:, :3].tolist() == [[4, 0, 0], [5, 0, 0]]
        observations, rewards, *_ = envs.step([4, 0])
        assert observations[:, :3].tolist() == [[5, 1, 2], [6, 1, 2]] and rewards.tolist() == [3.0, 2.0]


class Typed(Counter):
    """Is of those that call `action.item()` or the like, as gymnasium's own classes let them."""

    def step(self, action):
        assert type(action) is np.int64
        return super().step(action.item())


@backends
def test_discrete_actions_are_of_the_type_that_gymnasium_has(backend):
    with backend([lambda: Typed(5)] * 2) as envs:
        envs.reset(seed=1)
        assert envs.step([3, 4])[0][:, 3].tolist() == [3, 4]
        with pytest.raises((ValueError, WorkerError), match="expected an action in Discrete"):
            envs.step([3, 5])


@pytest.mark.parametrize("backend", [Serial, Multiprocessing])
def test_an_argument_that_there_is_not_is_one_error_and_no_second(backend, monkeypatch):
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with pytest.raises(TypeError, match="unexpected keyword argument 'workers'"):
        backend([NoOp] * 2, workers=2)
    gc.collect()
    assert unraisable == []


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_every_env_is_constructed_once_and_closed_once(tmp_path, context):
    path = str(tmp_path / "events")
    env_fns = [functools.partial(Marker, path, name) for name in range(6)]
    with Multiprocessing(env_fns, num_workers=3, context=context) as envs:
        envs.reset()
        envs.step(np.zeros(6, int))
        assert envs.get_attr("made_by") == envs.call("pid") and os.getpid() not in envs.call("pid")
    events = sorted(Path(path).read_text().splitlines())
    assert events == [f"{event} {name}" for event in ("closed", "constructed") for name in range(6)]


def test_serial_constructs_and_closes_every_env_once(tmp_path):
    path = str(tmp_path / "events")
    with Serial([functools.partial(Marker, path, name) for name in range(3)]) as envs:
        envs.close()
    envs.close()
    events = sorted(Path(path).read_text().splitlines())
    assert events == [f"{event} {name}" for event in ("closed", "constructed") for name in range(3)]


@backends
def test_closing_takes_what_gymnasiums_own_takes(backend):
    envs = backend([Counter] * 2)
    envs.reset()
    envs.close(timeout=1, terminate=True)
    assert envs.closed and not multiprocessing.active_children()


@backends
def test_ctrl_c_in_a_reset_leaves_no_batch_to_receive(backend):
    class Interrupted(collections.deque):
        def clear(self):
            super().clear()
            raise KeyboardInterrupt

    with backend([Counter] * 2) as envs:
        envs.async_reset(seed=1)
        envs._ready = Interrupted(envs._ready)
        with pytest.raises(KeyboardInterrupt):
            envs.reset(seed=2)
        with pytest.raises(APIUsageError, match=r"async_reset\(\) is due"):
            envs.recv()
        envs._ready = collections.deque()
        assert envs.reset(seed=3)[0].shape == envs.observation_space.shape


@backends
def test_a_learner_may_write_into_ids_and_masks(backend):
    with backend([Counter] * 2) as envs:
        envs.reset()
        for batch in range(3):
            envs.send(np.zeros(2, int))
            *_, agent_ids, masks = envs.recv()
            assert agent_ids.tolist() == [0, 1] and masks.tolist() == [True, True], batch
            agent_ids[:], masks[:] = 7, False


def test_serial_closes_what_it_has_when_a_constructor_fails(tmp_path):
    path = str(tmp_path / "events")
    with pytest.raises(ZeroDivisionError, match="constructor"):
        Serial([functools.partial(Marker, path, 0), functools.partial(Crashing, "constructor")])
    assert Path(path).read_text().splitlines() == ["constructed 0", "closed 0"]


def test_envs_may_start_processes_of_their_own():
    class Starter(Counter):
        def start(self):
            process = multiprocessing.get_context("fork").Process(target=os.getpid)
            process.start()
            process.join()
            return process.exitcode

    with Multiprocessing([Starter] * 2, num_workers=2, context="fork") as envs:
        assert envs.call("start") == (0, 0)


@pytest.mark.alone
def test_what_envs_start_can_be_terminated():
    class Starter(Counter):
        def start(self):
            fork, ready = multiprocessing.get_context("fork"), multiprocessing.get_context("fork").Semaphore(0)
            forks = [fork.Process(target=lambda: (ready.release(), time.sleep(60)), daemon=True) for _ in range(2)]
            for process in forks:
                process.start(), ready.acquire()
            program = subprocess.Popen(["sleep", "60"])
            program.terminate(), forks[0].terminate(), forks[0].join(5)
            return program.wait(5), forks[0].exitcode  # multiprocessing itself terminates the other at the end

    with Multiprocessing([Starter], context="fork") as envs:
        assert envs.call("start") == ((-signal.SIGTERM, -signal.SIGTERM),)
        start = time.perf_counter()
    assert time.perf_counter() - start < 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity")
def test_the_default_number_of_workers_respects_affinity():
    code = """
import os
from puffer_core import Multiprocessing
from tests.envs import Counter
cores = sorted(os.sched_getaffinity(0))
for allowed, ranks in ((cores[:1], 1), (cores, 1), (cores, 2), (cores, 1000)):
    os.sched_setaffinity(0, allowed)
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)  # as torchrun sets it
    with Multiprocessing([Counter] * 12) as envs:
        print(max(1, len(allowed) // ranks), envs.num_workers)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    for line in done.stdout.splitlines():
        allowed, workers = map(int, line.split())
        assert workers == max(count for count in (1, 2, 3, 4, 6, 12) if count <= allowed)
    assert len(done.stdout.splitlines()) == 4, done.stderr


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_calls_that_only_linux_has_are_not_needed(context, tmp_path):
    """Rows then lie in a temporary file, which the vectorizer removes at once; waiting yields by `sleep(0)`."""
    path = tmp_path / "script.py"
    path.write_text(f"""
import ctypes, os
for name in ("memfd_create", "sched_yield", "sched_getaffinity"):
    delattr(os, name)
ctypes.CDLL = lambda name: object()  # without prctl
import numpy as np
from puffer_core import Multiprocessing, Serial
from tests.envs import Counter
if __name__ == "__main__":
    with Serial([Counter] * 4) as serial, Multiprocessing([Counter] * 4, num_workers=2, context="{context}") as envs:
        assert not os.listdir({str(tmp_path / "rows")!r})
        serial.reset(seed=1), envs.reset(seed=1)
        for step in range(50):
            results = [each.step(np.full(4, step % 5))[:4] for each in (serial, envs)]
            assert all((mine == yours).all() for mine, yours in zip(*results))
    print("equal")
""")
    (tmp_path / "rows").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "rows")}
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment)
    assert done.stdout == "equal\n" and not list((tmp_path / "rows").iterdir()), done.stderr


@pytest.mark.alone
@pytest.mark.parametrize("infos", ["final", "all"])
def test_infos_of_ten_megabytes_are_no_obstacle(infos):
    with Multiprocessing([functools.partial(BigInfo, 2)] * 2, num_workers=2, infos=infos) as envs:
        envs.reset()
        for step in range(1, 5):
            said = envs.step(np.zeros(2, int))[4]
            own = info_of(said, 1).get("final_info", info_of(said, 1))
            assert step % 2 and infos == "final" or own["big"] == bytes([2 - step % 2]) * 10_000_000
        envs.send(np.zeros(2, int))  # closing with such an info on its way must not hang either
        start = time.perf_counter()
    assert time.perf_counter() - start < 2
