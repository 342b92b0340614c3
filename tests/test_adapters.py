"""Single environments and teams behind flat spaces: rows, masks, actions and episode statistics."""

import copy
import functools
import inspect
import pickle
import types
from time import perf_counter

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from mpe2 import simple_spread_v3

from puffer_core import EpisodeStats, GymnasiumPufferEnv, Layout, PettingZooPufferEnv, Serial
from tests.envs import Actor, ArrayReward, Counter, Nested, Recycling, Team, total


def flat_row(env, agent, observation):
    return Layout(env.observation_space(agent)).flatten(observation)


# ------------------------------------------------------------------------------------------------------------ gymnasium


def test_a_gymnasium_env_gets_flat_spaces_and_keeps_its_trajectory():
    plain, env = Nested(), GymnasiumPufferEnv(Nested())
    assert isinstance(env, gymnasium.Env) and env.num_agents == 1
    assert env.observation_space is env.single_observation_space and env.action_space is env.single_action_space
    assert env.observation_space == env.layout.flat_space and env.layout.space == Nested.observation_space
    assert env.action_space.nvec.tolist() == [3, 2, 2, 2, 4]
    (expected, _), (flat, info) = plain.reset(seed=5), env.reset(seed=5)
    assert np.array_equal(flat, env.layout.flatten(expected)) and info == {}
    env.action_space.seed(2)
    for _ in range(4):
        action = env.action_space.sample()
        tree = {"move": int(action[0]) - 1, "rest": (action[1:3].astype(np.int8), action[3:])}
        (expected, *rest), (flat, *flat_rest) = plain.step(tree), env.step(action)
        assert env.observation_space.contains(flat) and np.array_equal(flat, env.layout.flatten(expected))
        assert rest == flat_rest


def test_what_an_env_returned_stays_although_it_recycles_its_arrays():
    env = GymnasiumPufferEnv(Recycling())
    first, _ = env.reset()
    before = first.copy()
    env.step(0)
    assert np.array_equal(first, before)


def test_gymnasium_can_check_it():
    env = GymnasiumPufferEnv(gymnasium.make("Blackjack-v1"))
    check_env(env, skip_render_check=True)


ACTION_SPACES = [
    spaces.Discrete(4),
    spaces.Discrete(3, start=-7),
    spaces.Discrete(100_000, start=-7),
    spaces.MultiDiscrete([2, 5, 3]),
    spaces.MultiDiscrete([[2, 5], [3, 4]], start=[[1, 2], [-3, 4]]),
    spaces.MultiBinary(4),
    spaces.MultiBinary((2, 2)),
    spaces.Box(-1, 1, (3,)),
    spaces.Box(-2, 2, (2, 2), np.float64),
    spaces.Dict({"a": spaces.Discrete(3, start=5), "b": spaces.Tuple([spaces.MultiBinary(2), spaces.Discrete(2)])}),
    spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Box(0, 9, (), np.int32)}),
]


@pytest.mark.parametrize("space", ACTION_SPACES, ids=str)
def test_every_flat_action_is_one_that_the_env_accepts(space):
    env = GymnasiumPufferEnv(Actor(space))
    env.reset()
    env.action_space.seed(1)
    for _ in range(20):
        flat = env.action_space.sample()
        reward = env.step(flat)[1]  # the environment checks it
        assert reward == pytest.approx(total(env.action_layout.unflatten(flat)))


@pytest.mark.parametrize("count", [5, 5000])
def test_discrete_actions_of_any_dtype_reach_the_environment(count):
    has_dtypes = "dtype" in inspect.signature(spaces.Discrete).parameters  # since gymnasium 1.3
    for options in ({}, {"start": -2}, *[{"dtype": dtype} for dtype in (np.int16, np.uint32) if has_dtypes]):
        space = spaces.Discrete(count, **options)
        with Serial([functools.partial(Actor, space)]) as envs:
            envs.reset(seed=1)
            for _ in range(20):
                envs.step(envs.action_space.sample())  # the environment checks it
            last = np.array([space.start + count - 1], space.dtype)
            envs.step(last)
            with pytest.raises(ValueError, match="expected an action in"):
                envs.step(last + 1)


def test_seeds_options_and_attributes_reach_the_inner_env():
    env = GymnasiumPufferEnv(Counter(length=2, ends="truncate"))
    observation, info = env.reset(seed=11, options={"level": 3})
    assert observation[0] == 11 and info == {"began": 0, "level": 3}
    assert env.step(4)[1:] == (1.5, False, False, {"steps": 1})
    assert env.step(2)[1:] == (2.25, False, True, {"steps": 2})
    assert env.get_wrapper_attr("plus")(1) == 12


# -------------------------------------------------------------------------------------------------------------- teams

STATES = st.sampled_from("++++TX..")


def scripts(agents=3):
    """Draw an episode: its reset has somebody who lives, and it goes on while somebody does."""

    def cut(steps):
        ends = [number for number, step in enumerate(steps) if "+" not in step]
        return (*steps[: ends[0] + 1],) if ends else (*steps, "X" * agents)

    step = st.lists(STATES, min_size=agents, max_size=agents).map("".join)
    start = st.lists(st.sampled_from("+++."), min_size=agents, max_size=agents).map("".join).filter(lambda s: "+" in s)
    return st.tuples(start, st.lists(step, min_size=1, max_size=8)).map(lambda pair: cut((pair[0], *pair[1])))


def told(script, time):
    """Return the states at one step: who is not there at a team's last step, and was alive before, is gone for good."""
    is_last = time and "+" not in script[time]
    return ["T" if is_last and (was, now) == ("+", ".") else now for was, now in zip(script[time - 1], script[time])]


def expect(env, script, episode, time):
    """Work out by hand what the adapter has to say at one step of a script."""
    observations = np.zeros((len(script[0]), *env.observation_space.shape), env.observation_space.dtype)
    for row, state in enumerate(script[time]):
        if state != ".":
            sample = {"id": np.uint8(row + 1), "time": np.array([episode, time], np.int32)}
            observations[row] = env.layout.flatten(sample)
    states, present = np.array(told(script, time)), np.array(list(script[time])) != "."
    rewards = np.where(present, 10.0 * np.arange(1, len(states) + 1) + time, 0.0)
    return observations, rewards * (time > 0), states == "T", states == "X", present


@settings(max_examples=60, deadline=None, derandomize=True)
@given(episodes=st.lists(scripts(), min_size=1, max_size=3))
def test_rows_and_masks_follow_agents_that_come_and_go(episodes):
    env = PettingZooPufferEnv(Team(episodes))
    assert env.num_agents == 3 and env.observation_space is env.single_observation_space
    assert env.observation_space.shape == (12,) and env.action_space == spaces.Discrete(3, start=1)
    assert not env.masks.any() and env.episode_over  # nobody is there yet
    for episode, script in enumerate(episodes):
        observations, infos = env.reset(seed=episode)
        expected = expect(env, script, episode, 0)
        assert np.array_equal(observations, expected[0]) and np.array_equal(env.masks, expected[4])
        assert env.env.seed == episode and set(infos) == {f"agent_{row}" for row in np.flatnonzero(env.masks)}
        for time in range(1, len(script)):
            *results, infos = env.step(np.array([1, 2, 3]))
            expected = expect(env, script, episode, time)
            for got, wanted in zip((*results, env.masks), expected):
                assert np.array_equal(got, wanted) and got.dtype == wanted.dtype
            assert infos == {f"agent_{row}": {"time": time} for row in np.flatnonzero(env.masks)}


class Chase(Team):
    """Ends for all as soon as one is caught, and tells nobody else: a habit of PettingZoo environments."""

    def step(self, actions):
        observations, rewards, terminations, truncations, infos = super().step(actions)
        if any(terminations.values()):
            self.agents = []
        return observations, rewards, terminations, truncations, infos


@pytest.mark.parametrize("end, ended, cut", [("T++", [True, True, True], [False, False, False]),
                                             ("TX.", [True, False, True], [False, True, False])])  # fmt: skip
def test_who_is_not_told_of_a_teams_end_has_ended_with_it(end, ended, cut):
    env = PettingZooPufferEnv(Chase([("+++", "+++", end)]))
    env.reset()
    assert not np.any(env.step(np.ones(3, int))[2:4]) and not env.episode_over
    _, _, terminations, truncations, _ = env.step(np.ones(3, int))
    assert env.episode_over and terminations.tolist() == ended and truncations.tolist() == cut


def test_attributes_are_set_on_the_env_itself():
    env = PettingZooPufferEnv(Team())
    env.set_wrapper_attr("scripts", scripts := [("+++", "X" * 3)])
    assert env.env.scripts is scripts and env.get_wrapper_attr("scripts") is scripts
    env.reset()
    assert env.step(np.ones(3, int))[3].all()


def test_attributes_of_a_real_pettingzoo_env_can_be_set_and_read():
    env = PettingZooPufferEnv(simple_spread_v3.parallel_env())  # which is AEC, behind several wrappers
    env.set_wrapper_attr("max_cycles", 2)
    env.set_wrapper_attr("newcomer", 7)
    assert (env.get_wrapper_attr("max_cycles"), env.get_wrapper_attr("newcomer")) == (2, 7)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        env.get_wrapper_attr("nothing_like_it")
    env.reset(seed=1)
    assert not env.step(np.ones(3, int))[3].any() and env.step(np.ones(3, int))[3].all()


def test_actions_of_the_absent_are_not_looked_at():
    env = PettingZooPufferEnv(Team([("++.", "+T.", "+.+", "X" * 3)]))
    env.reset()
    env.step(np.array([1, 3, 99]))  # the team asserts that it gets the living agents' actions, no others
    env.step(np.array([2, 99, 99]))
    with pytest.raises(ValueError, match="99"):
        env.step(np.array([99, 1, 1]))


def test_agents_with_different_spaces_are_refused_by_name():
    class Unequal(Team):
        def action_space(self, agent):
            return spaces.Discrete(3 if agent == "agent_0" else 4)

    with pytest.raises(TypeError, match="agent_1"):
        PettingZooPufferEnv(Unequal())


def test_what_is_no_parallel_env_is_refused():
    nobody = types.SimpleNamespace(possible_agents=[], agents=[])
    for env in ({}, Counter(), simple_spread_v3.env(), nobody):  # the third takes turns
        with pytest.raises(TypeError, match="aec_to_parallel.*got "):
            PettingZooPufferEnv(env)


class Paid(Team):
    """Is paid in arrays of one element, as some environments do it."""

    def step(self, actions):
        observations, rewards, *rest = super().step(actions)
        return observations, {agent: np.array([reward]) for agent, reward in rewards.items()}, *rest


def test_teams_may_be_paid_in_arrays():
    env = PettingZooPufferEnv(Paid())
    env.reset()
    assert [env.step(np.ones(3, int))[1].tolist() for _ in range(2)] == [[11, 21, 0], [12, 0, 32]]


def test_a_copy_of_a_team_goes_its_own_way():
    env = PettingZooPufferEnv(Team([("+++", "+T.", "+.+", "X" * 3)]))
    before, _ = env.reset(seed=1)
    for copied in (copy.deepcopy(env), pickle.loads(pickle.dumps(env))):
        assert copied.masks.all() and copied.env is not env.env
        assert copied.step(np.array([1, 2, 3]))[2].tolist() == [False, True, False]
        copied.set_wrapper_attr("seed", 7)
        assert (copied.seed, copied.get_wrapper_attr("seed"), env.seed) == (7, 7, 1) and env.masks.all()
    assert np.array_equal(env.reset(seed=1)[0][:, 0], before[:, 0])
    with pytest.raises(AttributeError, match="seed"):
        PettingZooPufferEnv.__new__(PettingZooPufferEnv).seed  # noqa: B018


def test_a_real_pettingzoo_env_has_the_same_trajectory_behind_the_adapter():
    plain = simple_spread_v3.parallel_env(max_cycles=6)
    env = PettingZooPufferEnv(simple_spread_v3.parallel_env(max_cycles=6))
    agents, rng = env.possible_agents, np.random.default_rng(0)
    assert env.num_agents == 3 and env.observation_space == plain.observation_space("agent_0")
    for episode in range(2):
        (expected, _), (observations, _) = plain.reset(seed=episode), env.reset(seed=episode)
        assert np.array_equal(observations, [expected[agent] for agent in agents]) and env.masks.all()
        while plain.agents:
            actions = rng.integers(5, size=3)
            expected = plain.step(dict(zip(agents, actions.tolist())))
            results = env.step(actions)
            for got, wanted in zip(results[:4], expected):
                assert np.array_equal(got, [wanted[agent] for agent in agents])
        assert results[3].all() and not results[2].any()


# --------------------------------------------------------------------------------------------------------- statistics


class Informed(Counter):
    """Says something of every kind in its infos."""

    def reset(self, *, seed=None, options=None):
        self.level = options["level"]
        return super().reset(seed=seed)

    def step(self, action):
        *result, _ = super().step(action)
        kinds = {"gold": 2, "speed": np.float32(0.5), "hit": True, "name": "x", "map": np.ones(3), "none": None}
        return *result, kinds | ({"late": 7} if self.steps == 2 else {})


def test_episode_stats_come_once_an_episode_and_sum_the_infos():
    env = EpisodeStats(Informed(length=[3, 2], ends="truncate"))
    for episode, length in enumerate([3, 2, 3]):
        _, info = env.reset(seed=episode, options={"level": episode})
        assert info == {} and env.unwrapped.level == episode
        for step in range(1, length + 1):
            *_, truncated, info = env.step(4)
            assert (info == {}) == (step < length) == (not truncated)
        assert set(info) == {"episode"}
        stats = dict(info["episode"])
        assert 0 <= stats.pop("t") < 60
        expected = {"r": sum(range(1, length + 1)) + length / 2, "l": length}
        assert stats == expected | {"gold": 2 * length, "speed": length / 2, "hit": length, "late": 7}


class Odd(Counter):
    """Says the same number, of some type, at every step."""

    def __init__(self, number):
        super().__init__(length=2)
        self.number = number

    def step(self, action):
        *result, _ = super().step(action)
        return *result, {"score": self.number}


@pytest.mark.parametrize("numbers", [(np.bool_(True), True), (np.uint8(200), 200), (1, 0.25), (np.int8(-100), 2**40)])
def test_sums_of_infos_are_right_whatever_their_types(numbers):
    with Serial([lambda number=number: EpisodeStats(Odd(number)) for number in numbers]) as envs:
        envs.reset()
        envs.step([0, 0])
        infos = envs.step([0, 0])[4]
        assert infos["final_info"]["episode"]["score"].tolist() == [2 * float(number) for number in numbers]


def test_episode_stats_start_afresh_after_an_early_reset():
    env = EpisodeStats(Counter(length=3))
    env.reset()
    env.step(4)
    env.reset()
    for _ in range(3):
        info = env.step(0)[4]
    assert (info["episode"]["r"], info["episode"]["l"], info["episode"]["steps"]) == (6.0, 3, 6)


def test_episode_stats_take_rewards_in_arrays_and_leave_the_rest_alone():
    env = GymnasiumPufferEnv(EpisodeStats(ArrayReward(length=1)))
    env.reset(seed=2)
    observation, reward, terminated, truncated, info = env.step(4)
    assert observation[:4].tolist() == [2, 0, 1, 4] and np.asarray(reward).item() == 1.5
    assert bool(terminated) and not truncated and info["episode"]["r"] == 1.5


class TellsItself(ArrayReward):
    """Fills `info["episode"]` itself, as Stable-Baselines3's Monitor does, and not at every end in the same way."""

    def step(self, action):
        *result, info = super().step(action)
        return *result, info | {"episode": {"r": -1.0} if self.steps == 2 else 3}


def test_episode_stats_count_for_themselves_whatever_an_env_calls_episode():
    env = EpisodeStats(TellsItself(length=2))
    env.reset()
    assert env.step(0)[4] == {}
    episode = env.step(0)[4]["episode"]
    assert (episode["r"], episode["l"]) == (3.0, 2) and type(episode["r"]) is float


def test_a_copy_of_a_bound_env_leaves_the_rows_alone():
    """As a search that looks ahead makes it."""
    with Serial([lambda: Nested(length=100)] * 2) as envs:
        observations, _ = envs.reset(seed=1)
        before, copied = observations.copy(), copy.deepcopy(envs.envs[0])
        assert copied.layout is not envs.envs[0].layout and copied.unwrapped is not envs.envs[0].unwrapped
        for _ in range(3):
            ahead = copied.step(envs.single_action_space.sample())[0]
        assert copied.layout.unflatten(ahead)["inner"]["small"].tolist() == [3] * 3
        assert np.array_equal(observations, before)


def test_actions_that_are_no_integers_are_refused_where_integers_are_due():
    env = GymnasiumPufferEnv(Nested())
    env.reset()
    with pytest.raises(ValueError, match="expected an action in MultiDiscrete"):
        env.step([0.0, 1.0, 0.7, 1.0, 2.0])


class Calling(Counter):
    """Has infos of its own under the names of the statistics."""

    def step(self, action):
        return *super().step(action)[:4], {"r": 7, "l": 7, "t": 1e9}


def test_statistics_are_not_what_an_env_calls_so():
    env = EpisodeStats(Calling(length=2))
    env.reset(), env.step(0)
    episode = env.step(0)[4]["episode"]
    assert (episode["r"], episode["l"]) == (3.0, 2) and episode["t"] < 60


def test_seconds_are_those_of_one_episode():
    env = EpisodeStats(Counter(1, delay=0.1))
    for _ in range(2):
        start = perf_counter()
        env.reset()
        assert 0.1 <= env.step(0)[4]["episode"]["t"] <= perf_counter() - start
