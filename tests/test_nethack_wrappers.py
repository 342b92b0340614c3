"""The NetHack wrapper on the real games: what it leaves out changes nothing that anybody sees, and saves time."""

import copy
import gc
import os
import sys
import time
import weakref
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from minihack.envs.river import MiniHackRiver
from nle import nethack
from nle.nethack.nethack import DLPATH

import nethack_wrappers
from nethack_wrappers import NetHackWrapper

KEYS = ("glyphs", "chars", "colors", "specials", "blstats", "message", "tty_chars", "tty_colors", "tty_cursor")


class OnlySeeded(gymnasium.Wrapper):
    """Seeds as the wrapper does, and leaves nothing out."""

    def reset(self, *, seed=None, options=None):
        gymnasium.Env.reset(self.unwrapped, seed=seed)
        self.unwrapped.seed(*self.np_random.integers(2**63, size=2).tolist())
        return self.env.reset(options=options)


def make(wrapper, env_id, keys=KEYS, **settings):
    return wrapper(gymnasium.make(env_id, observation_keys=keys, fix_moon_phase=True, **settings))


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(got[key], expected[key], key)


TASKS = {
    "MiniHack-River-v0": KEYS,
    "MiniHack-Eat-v0": KEYS,  # rewards from what the screen says
    "MiniHack-Quest-Easy-v0": ("glyphs_crop", "chars_crop", "blstats"),
    "MiniHack-Room-5x5-v0": ("glyphs", "pixel"),
    "MiniHack-Room-Monster-5x5-v0": (*KEYS, "screen_descriptions"),
    "MiniHack-River-MonsterLava-v0": (*KEYS, "screen_descriptions"),  # as describing them changes these games
    "MiniHack-KeyRoom-S5-v0": KEYS,  # whose `step` looks for words
    "MiniHack-Sokoban1a-v1": KEYS,  # whose reward compares two maps
    "NetHackScore-v0": KEYS,
    "NetHackEat-v0": KEYS,
}
LONGER = ("MiniHack-Sokoban1a-v1", "NetHackScore-v0", "NetHackEat-v0")  # than 1,200 steps


@pytest.mark.parametrize("env_id", TASKS)
def test_games_are_those_of_the_bare_environment(env_id):
    ours, bare = make(NetHackWrapper, env_id, TASKS[env_id]), make(OnlySeeded, env_id, TASKS[env_id])
    assert ours.observation_space == bare.observation_space
    assert_same(ours.reset(seed=3)[0], bare.reset(seed=3)[0])
    rng, ends = np.random.default_rng(0), 0
    for _ in range(1200):
        action = int(rng.integers(ours.action_space.n))
        observation, *rest = ours.step(action)
        expected, *expected_rest = bare.step(action)
        assert_same(observation, expected)
        assert rest == expected_rest
        if rest[1] or rest[2]:
            ends += 1
            assert_same(ours.reset()[0], bare.reset()[0])
    assert ends >= 2 or env_id in LONGER
    ours.close(), bare.close()


def test_options_reach_the_game():
    class Asked(gymnasium.Wrapper):
        def reset(self, *, seed=None, options=None):
            self.asked = options
            return self.env.reset()

    env = make(lambda env: NetHackWrapper(Asked(env)), "MiniHack-River-v0")
    env.reset(seed=1, options={"level": 3})
    assert env.env.asked == {"level": 3}
    env.close()


@pytest.mark.parametrize(
    "env_id, keys, is_left_out",
    [
        ("MiniHack-River-v0", KEYS, True),
        ("MiniHack-River-v0", (*KEYS, "screen_descriptions"), False),
        ("MiniHack-River-v0", (*KEYS, "screen_descriptions_crop"), False),
        ("MiniHack-Eat-v0", KEYS, False),
    ],
)
def test_descriptions_are_left_out_where_nobody_reads_them(env_id, keys, is_left_out):
    env = make(NetHackWrapper, env_id, keys)
    env.reset(seed=1)
    env.step(0)
    seen = dict(zip(env.unwrapped._observation_keys, env.unwrapped.last_observation))
    assert (seen["screen_descriptions"].size == 0) == is_left_out
    assert seen["chars"].any() and (is_left_out or seen["screen_descriptions"].any())
    env.close()


@pytest.mark.alone
def test_steps_take_less_time():
    envs = [make(wrapper, "MiniHack-River-v0") for wrapper in (NetHackWrapper, OnlySeeded)]
    spent = np.zeros((30, 2))
    for env in envs:
        env.reset(seed=1)
    for turn in range(len(spent)):
        for index, env in enumerate(envs):
            start = time.process_time()
            for step in range(50):
                _, _, terminated, truncated, _ = env.step(step % 8)
                if terminated or truncated:
                    env.reset()
            spent[turn, index] = time.process_time() - start
    ours, bare = np.median(spent, axis=0)
    print(f"\na step takes {ours / 50 * 1e6:.0f} us, of the bare environment {bare / 50 * 1e6:.0f} us")
    assert ours < 0.6 * bare


def test_who_ascended_is_asked_when_a_game_is_over(monkeypatch):
    env = NetHackWrapper(MiniHackRiver(observation_keys=KEYS, max_episode_steps=3))
    env.reset(seed=1)
    monkeypatch.setattr(env.unwrapped.nethack, "how_done", lambda: nethack.ASCENDED)
    told = [env.step(0)[4] for _ in range(3)]
    assert [info["is_ascended"] for info in told] == [False, False, True]
    assert [int(info["end_status"]) for info in told] == [0, 0, -1]
    env.close()


def has_code_of_its_own(env):
    inode = f" {os.fstat(env.unwrapped.nethack._dl.fileno()).st_ino} "
    return any(inode in line and "r-xp" in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every game keeps its code")
def test_games_of_a_process_run_the_same_code_but_no_other(monkeypatch, tmp_path):
    monkeypatch.setattr(nethack_wrappers, "GAMES", weakref.WeakSet())  # whatever other tests have left
    bare, *games = [make(wrapper, "MiniHack-River-v0") for wrapper in (OnlySeeded, *[NetHackWrapper] * 3)]
    first, _ = bare.reset(seed=2)
    for game in games:
        assert_same(game.reset(seed=2)[0], first)
        assert has_code_of_its_own(game)  # as they are few
    games.append(make(NetHackWrapper, "MiniHack-River-v0"))
    for _ in range(3):  # as the library is loaded anew at every reset
        for game in games:
            assert_same(game.reset(seed=2)[0], first)
            assert not has_code_of_its_own(game)
    upgraded = tmp_path / "libnethack.so"
    upgraded.write_bytes(bytes(os.stat(DLPATH).st_size))
    with upgraded.open("rb") as file:
        monkeypatch.setattr(nethack_wrappers, "LIBRARY", file.fileno())
        games.append(make(NetHackWrapper, "MiniHack-River-v0"))
        assert_same(games[-1].reset(seed=2)[0], first)
        assert has_code_of_its_own(games[-1]) and has_code_of_its_own(bare)
    for game in (bare, *games):
        game.close()


@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every game keeps its code")
def test_many_games_are_faster_with_the_same_code():
    games = [[make(NetHackWrapper, "MiniHack-River-v0") for _ in range(12)] for _ in range(2)]
    for game in games[1]:
        game._code = ()
    for game in (*games[0], *games[1]):
        game.reset(seed=1)
    assert [has_code_of_its_own(game) for game in (games[0][0], games[1][0])] == [False, True]
    spent = np.zeros((15, 2))
    for turn in range(len(spent)):
        for index in range(2):
            start = time.process_time()
            for step in range(10):  # fewer than end an episode
                for game in games[index]:
                    game.step(step % 8)
            spent[turn, index] = time.process_time() - start
    ratio = np.median(spent[:, 1] / spent[:, 0])
    print(f"\n12 games in turn are {ratio:.2f} times as fast with the same code")
    assert ratio > 1
    for game in (*games[0], *games[1]):
        game.close()


def test_frames_are_not_drawn_over():
    env = make(NetHackWrapper, "MiniHack-River-v0", render_mode="pixel")
    env.reset(seed=1)
    first = env.render()
    kept = first.copy()
    for action in range(8):
        env.step(action)
    np.testing.assert_array_equal(first, kept)
    assert (env.render() != first).any()
    env.close()


def test_a_game_that_is_over_stays_in_the_picture():
    env = make(NetHackWrapper, "MiniHack-Room-5x5-v0", render_mode="pixel")
    assert env.metadata["render_fps"] == 5
    env.reset(seed=1)
    rng, is_over = np.random.default_rng(0), False
    while not is_over:
        last = env.render()
        *_, terminated, truncated, _ = env.step(int(rng.integers(8)))
        is_over = terminated or truncated
    assert terminated and not env.env.render().any()  # NLE's own
    np.testing.assert_array_equal(env.render(), last)
    env.reset()
    assert (env.render() != last).any()
    env.close()


def test_the_terminal_is_drawn_in_colors():
    env = make(NetHackWrapper, "MiniHack-River-v0", render_mode="ansi")
    observation, _ = env.reset(seed=1)
    text = env.render()
    assert "\033[" in text and len(text.splitlines()) == len(observation["tty_chars"])
    env.close()


def test_the_game_refills_its_arrays():
    """With the wrapper as without: who keeps observations has to copy them."""
    env = make(NetHackWrapper, "MiniHack-River-v0")
    first, _ = env.reset(seed=1)
    kept = copy.deepcopy(first)
    second, *_ = env.step(0)
    assert all(first[key] is second[key] for key in KEYS)
    assert any((kept[key] != second[key]).any() for key in KEYS)
    second.clear()  # but the dict is whoever's who got it
    assert env.step(0)[0].keys() == set(KEYS)
    env.close()


def test_a_wrapper_inside_sees_the_whole_last_observation():
    """What NLE need not copy is left out of sight only while it steps."""

    class Explored(gymnasium.Wrapper):
        def step(self, action):
            before = self.count()
            observation, _, *rest = self.env.step(action)
            return observation, self.count() - before, *rest

        def count(self):
            nle = self.unwrapped
            return int((nle.last_observation[nle._observation_keys.index("chars")] != ord(" ")).sum())

    env = make(lambda env: NetHackWrapper(Explored(env)), "MiniHack-River-v0")
    seen = (env.reset(seed=1)[0]["chars"] != ord(" ")).sum()
    for action in range(8):
        observation, reward, *_ = env.step(action)
        assert reward == (observation["chars"] != ord(" ")).sum() - seen
        seen += reward
    env.close()


class Named(MiniHackRiver):
    """A task of one's own that defines no method: one of MiniHack's, with other settings."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, max_episode_steps=20, **kwargs)


class Moved(MiniHackRiver):
    """Rewards a cursor that moves, and tells how many glyphs differ from those before the step."""

    def _reward_fn(self, last_observation, action, observation, end_status):
        cursor = self._observation_keys.index("tty_cursor")
        return (last_observation[cursor] != observation[cursor]).any()

    def _get_information(self, end_status):
        changed = 0 if self._previous_obs is None else (self._previous_obs[0] != self.last_observation[0]).sum()
        return super()._get_information(end_status) | {"changed": changed}


class Wordy(MiniHackRiver):
    """Ends when the screen shows a boulder, by its words."""

    def _get_end_status(self, observation, done):
        return super()._get_end_status(observation, done or self.screen_contains("boulder"))


@pytest.mark.parametrize("task", [Named, Moved, Wordy])
def test_tasks_of_ones_own_read_what_they_like(task):
    ours, bare = (wrapper(task(observation_keys=KEYS, fix_moon_phase=True)) for wrapper in (NetHackWrapper, OnlySeeded))
    assert_same(ours.reset(seed=3)[0], bare.reset(seed=3)[0])
    for action in np.random.default_rng(0).integers(8, size=60).tolist():
        observation, *rest = ours.step(action)
        expected, *expected_rest = bare.step(action)
        assert_same(observation, expected)
        assert rest == expected_rest
        if rest[1] or rest[2]:
            assert_same(ours.reset()[0], bare.reset()[0])
    seen = dict(zip(ours.unwrapped._observation_keys, ours.unwrapped.last_observation))
    assert (seen["screen_descriptions"].size == 0) == (task is Named)
    ours.close(), bare.close()


def test_a_step_that_fails_leaves_the_game_to_look_at():
    env = make(NetHackWrapper, "MiniHack-River-v0", render_mode="ansi")
    env.reset(seed=1)
    before = env.render()
    with pytest.raises(IndexError):
        env.unwrapped.step(999)
    assert env.render() == before
    env.close()


def test_a_game_that_nobody_holds_is_gone():
    env = make(NetHackWrapper, "MiniHack-River-v0")
    env.reset(seed=1)
    env.step(0)
    gone = weakref.ref(env.unwrapped)
    gc.disable()
    try:
        del env
        assert gone() is None
    finally:
        gc.enable()


def test_words_are_kept_for_wrappers_inside_too():
    inner = gymnasium.make("MiniHack-River-v0", observation_keys=("chars", "screen_descriptions"))
    env = NetHackWrapper(gymnasium.wrappers.FilterObservation(inner, ["chars"]))
    env.reset(seed=1)
    seen = dict(zip(env.unwrapped._observation_keys, env.unwrapped.last_observation))
    assert seen["screen_descriptions"].any()
    env.close()


def test_any_keys_can_be_asked_for_and_drawn():
    env = make(NetHackWrapper, "NetHackScore-v0", ("chars", "chars", "colors", "blstats"), render_mode="ansi")
    observation, _ = env.reset(seed=1)
    assert observation["chars"].any() and "@" in env.render()
    env.step(0)
    env.close()


def test_other_environments_are_refused():
    with pytest.raises(TypeError, match="NetHackWrapper needs an environment of NLE or MiniHack, got .*CartPole"):
        NetHackWrapper(gymnasium.make("CartPole-v1"))


def test_a_game_that_must_not_be_seeded_is_refused():
    with pytest.raises(TypeError, match="seeds every game, which NetHack's Challenge forbids"):
        NetHackWrapper(gymnasium.make("NetHackChallenge-v0"))
