"""AtariWrapper on the real games: equal to gymnasium's chain frame by frame, and honest about whole games."""

import itertools
import pickle
import time

import cv2
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation, RecordVideo, TimeLimit

from atari_wrappers import AtariWrapper

BREAKOUT = "BreakoutNoFrameskip-v4"


@pytest.fixture(scope="module")
def breakout():
    """One game for the tests that begin with a seeded reset: loading one takes 0.1 s."""
    return AtariWrapper(gym.make(BREAKOUT))


class RawScore(gym.Wrapper):
    """Innermost in the reference: sums what the emulator pays, from one emulator reset to the next."""

    def reset(self, **kwargs):
        self.score = 0.0
        return self.env.reset(**kwargs)

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.score += reward
        return observation, reward, terminated, truncated, info


class LifeAndFire(gym.Wrapper):
    """Between AtariPreprocessing and FrameStackObservation: what `reset` means for lives, and the FIRE that follows.

    AtariPreprocessing ends an episode with each life already; this adds when its `reset` must not reach the game.
    """

    def __init__(self, env):
        super().__init__(env)
        self.start_action = int(env.unwrapped.get_action_meanings()[1] == "FIRE")
        self.goes_on = False
        self.game_starts = 0

    def reset(self, *, seed=None, options=None):
        if self.goes_on and seed is None:
            self.goes_on = False
            observation, _, _, truncated, info = self.env.step(self.start_action)
            if not (truncated or self.unwrapped.ale.game_over()):
                return observation, info
        self.goes_on = False
        self.game_starts += 1
        self.length = 0
        observation, info = self.env.reset(seed=seed, options=options)
        if self.start_action:
            observation, _, _, _, info = self.env.step(self.start_action)
        return observation, info

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.length += 1
        self.game_ended = truncated or self.unwrapped.ale.game_over()
        self.goes_on = terminated and not self.game_ended
        return observation, reward, terminated, truncated, info


class Reference:
    """Gymnasium's own chain, with handles on the layers that know the truth."""

    def __init__(self, env_id, noop_max=30, **kwargs):
        self.raw = RawScore(gym.make(env_id, disable_env_checker=True, **kwargs))
        self.lives = LifeAndFire(AtariPreprocessing(self.raw, noop_max=noop_max, terminal_on_life_loss=True))
        self.env = FrameStackObservation(self.lives, 4)


def follow(env_id, num_steps, seed=3, noop_max=30, reset_every=None, **kwargs):
    """Plays wrapper and reference side by side with one stream of actions, compares all, counts what was met."""
    env = AtariWrapper(gym.make(env_id, **kwargs), noop_max)
    reference = Reference(env_id, noop_max, **kwargs)
    rng = np.random.default_rng(seed)
    met = {"lives lost": 0, "games over": 0, "truncations": 0, "rewards": 0, "statistics": 0}

    def reset(seed=None):
        observation, info = env.reset(seed=seed)
        expected, expected_info = reference.env.reset(seed=seed)
        np.testing.assert_array_equal(observation, expected)
        assert info["lives"] == expected_info["lives"]

    reset(seed)
    for step in range(num_steps):
        action = rng.integers(env.action_space.n)
        observation, reward, terminated, truncated, info = env.step(action)
        expected, expected_reward, *expected_ends, expected_info = reference.env.step(action)
        np.testing.assert_array_equal(observation, expected, err_msg=f"step {step}")
        assert observation in env.observation_space
        assert type(reward) is float and reward == np.sign(expected_reward)
        assert type(terminated) is bool and type(truncated) is bool
        assert [terminated, truncated] == expected_ends
        assert info["lives"] == expected_info["lives"]
        assert ("episode" in info) == reference.lives.game_ended
        if "episode" in info:
            assert info["episode"]["r"] == reference.raw.score
            assert info["episode"]["l"] == reference.lives.length
            assert info["episode"]["t"] > 0

        met["lives lost"] += reference.lives.goes_on
        met["games over"] += terminated and reference.lives.game_ended
        met["truncations"] += truncated
        met["rewards"] += reward != 0
        met["statistics"] += "episode" in info
        if terminated or truncated or (reset_every and step % reset_every == reset_every - 1):
            # A seed now and then, to meet every kind of ending; it loads the game anew, which takes 0.1 s.
            reset(seed=step if rng.random() < 0.04 else None)
    met["games"] = reference.lives.game_starts
    return met


# ---- equal to gymnasium's chain ----


def test_breakout_equals_the_chain():
    met = follow(BREAKOUT, 1500)
    assert met["lives lost"] > 20 and met["games over"] >= 3 and met["rewards"] > 10
    assert met["statistics"] == met["games over"]


def test_pong_equals_the_chain():
    met = follow("PongNoFrameskip-v4", 450, noop_max=7, max_num_frames_per_episode=1200)
    assert met["rewards"] > 5 and met["truncations"] >= 1


def test_mspacman_without_fire_equals_the_chain():
    assert "FIRE" not in gym.make("MsPacmanNoFrameskip-v4").unwrapped.get_action_meanings()
    met = follow("MsPacmanNoFrameskip-v4", 600)
    assert met["lives lost"] >= 2 and met["games over"] >= 1 and met["rewards"] > 20


@pytest.mark.parametrize(("game", "height"), [("Riverraid", 210), ("Carnival", 214), ("AirRaid", 250)])
def test_scrolling_and_tall_screens_equal_the_chain(game, height):
    """All of Riverraid's screen moves; a screen of another height has no bands that shrink apart from one another."""
    assert gym.make(f"{game}NoFrameskip-v4").unwrapped.ale.getScreenDims()[0] == height
    assert follow(f"{game}NoFrameskip-v4", 120)["games"] >= 1


def test_bands_of_the_screen_shrink_as_all_of_it_would(breakout):
    """Whatever rectangle changes, and however little: no other test would meet each band at its borders."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        rows, columns = np.sort(rng.integers(0, (211, 161), (2, 2)), axis=0).T
        rectangle = breakout._newest[slice(*rows), slice(*columns)]
        rectangle[:] = rng.integers(0, 256, rectangle.shape)
        breakout._draw()
        expected = cv2.resize(breakout._newest, (84, 84), interpolation=cv2.INTER_AREA)
        np.testing.assert_array_equal(breakout._stack[-1], expected)


def test_v5_with_sticky_actions_equals_the_chain():
    met = follow("ALE/Breakout-v5", 150, frameskip=1)
    assert met["lives lost"] > 3


@pytest.mark.parametrize("env_id", [BREAKOUT, "FreewayNoFrameskip-v4"])
def test_reset_at_any_moment_equals_the_chain(env_id):
    """With FIRE and without: in Freeway one also sees the frame before it, free of what the last game left behind."""
    met = follow(env_id, 110, reset_every=11, noop_max=0)
    assert met["games"] >= 10


def test_frame_limit_equals_the_chain():
    """Each game starts with another number of no-op frames, so its last step is cut short at another frame."""
    met = follow(BREAKOUT, 280, max_num_frames_per_episode=140)
    assert met["truncations"] >= 7 and met["statistics"] == met["truncations"] + met["games over"]


def test_limit_within_the_start_equals_the_chain():
    """Twelve frames end the game while it waits with no-ops, while FIRE is held, or soon after."""
    met = follow(BREAKOUT, 12, max_num_frames_per_episode=12)
    assert met["truncations"] >= 6


def test_time_limit_counts_frames_as_before():
    """gymnasium's TimeLimit counts the steps of the raw environment, which are frames."""
    met = follow(BREAKOUT, 120, max_episode_steps=150)
    assert met["truncations"] >= 2


def test_lower_of_both_limits_counts():
    for own_limit, time_limit in ((90, 200), (200, 90), (0, 90)):
        env = AtariWrapper(gym.make(BREAKOUT, max_num_frames_per_episode=own_limit, max_episode_steps=time_limit))
        env.reset()
        ends = next(ends for _, _, *ends, _ in (env.step(0) for _ in itertools.count()) if any(ends))
        assert ends == [False, True] and env.unwrapped.ale.getEpisodeFrameNumber() == 90


# ---- games and lives ----


def play_until_end(env, action=0):
    for length in itertools.count(1):
        observation, _, terminated, truncated, info = env.step(action)
        if terminated or truncated:
            return observation, terminated, truncated, info, length


def test_lost_life_keeps_the_game(breakout):
    env = breakout
    frame_number = env.unwrapped.ale.getEpisodeFrameNumber
    assert env.reset(seed=1)[1]["lives"] == 5
    lengths = []
    for lives_left in (4, 3, 2, 1, 0):
        _, terminated, truncated, info, length = play_until_end(env)
        lengths.append(length)
        assert terminated and not truncated and info["lives"] == lives_left
        assert ("episode" in info) == (lives_left == 0)
        frames_before = frame_number()
        observation, reset_info = env.reset()
        if lives_left:
            assert reset_info == {"lives": lives_left} and frame_number() == frames_before + 4
        assert (observation == observation[0]).all()  # the stack starts anew, with one frame four times
    assert info["episode"]["l"] == sum(lengths)
    assert reset_info == {"lives": 5} and frame_number() <= 30 + 4


def test_reset_in_the_middle_or_with_a_seed_starts_a_new_game(breakout):
    env = breakout
    env.reset(seed=1)
    play_until_end(env)
    assert env.reset(seed=1)[1]["lives"] == 5
    play_until_end(env)
    assert env.reset()[1]["lives"] == 4
    assert env.reset()[1]["lives"] == 5  # no life was lost since the last reset
    play_until_end(env)
    env.step(0)  # past the end of the life: allowed, the game goes on
    assert env.reset()[1]["lives"] == 5


def test_won_life_ends_nothing(breakout):
    """Breakout never gives lives away, so the test writes one into the console's memory."""
    breakout.reset(seed=1)
    play_until_end(breakout)
    breakout.reset()
    breakout.unwrapped.ale.setRAM(57, 5)
    _, _, terminated, truncated, info = breakout.step(0)
    assert info["lives"] == 5 and not terminated and not truncated
    _, terminated, _, info, _ = play_until_end(breakout)
    assert info["lives"] == 4 and terminated


def test_truncation_is_no_termination():
    env = AtariWrapper(gym.make("FreewayNoFrameskip-v4", max_num_frames_per_episode=1000))
    env.reset(seed=0)
    _, terminated, truncated, info, length = play_until_end(env, action=1)
    assert truncated is True and terminated is False
    assert info["episode"]["l"] == length and info["episode"]["r"] >= 1
    _, info = env.reset()
    assert "episode" not in info and env.unwrapped.ale.getEpisodeFrameNumber() <= 30


def test_game_that_ends_inside_reset_is_reported_once():
    """The frame limit falls within the four frames of the FIRE that should have begun the second life."""
    env = AtariWrapper(gym.make(BREAKOUT), noop_max=0)
    env.reset(seed=0)
    _, _, _, _, length = play_until_end(env)
    limit = env.unwrapped.ale.getEpisodeFrameNumber() + 2

    env = AtariWrapper(gym.make(BREAKOUT, max_num_frames_per_episode=limit), noop_max=0)
    env.reset(seed=0)
    _, terminated, truncated, info, _ = play_until_end(env)
    assert terminated and not truncated and "episode" not in info
    _, info = env.reset()
    assert info["episode"]["l"] == length and info["lives"] == 5
    assert env.unwrapped.ale.getEpisodeFrameNumber() == 4
    _, terminated, truncated, info, _ = play_until_end(env)
    assert terminated and "episode" not in info


def test_step_without_a_game_is_refused():
    env = AtariWrapper(gym.make(BREAKOUT, max_num_frames_per_episode=60))
    with pytest.raises(gym.error.ResetNeeded, match="reset"):
        env.step(0)
    env.reset(seed=0)
    play_until_end(env)
    with pytest.raises(gym.error.ResetNeeded, match="reset"):
        env.step(0)
    env.reset()
    env.step(0)


def test_reward_is_the_sign_and_the_score_is_not():
    """MsPacman pays 10 a pellet: clipped to 1.0 a step, kept whole in the statistics."""
    env = AtariWrapper(gym.make("MsPacmanNoFrameskip-v4", max_num_frames_per_episode=900))
    env.reset(seed=0)
    rewards, info = [], {}
    while "episode" not in info:
        _, reward, terminated, truncated, info = env.step(3)
        rewards.append(reward)
        if terminated or truncated:
            env.reset()
    assert set(rewards) == {0.0, 1.0}
    assert info["episode"]["r"] == 10 * sum(rewards)


# ---- seeds, aliases, spaces ----


def rollout(env, seed, num_steps=100):
    observations = [env.reset(seed=seed)[0]]
    rng = np.random.default_rng(0)
    for _ in range(num_steps):
        observation, _, terminated, truncated, _ = env.step(rng.integers(env.action_space.n))
        observations.append(observation)
        if terminated or truncated:
            observations.append(env.reset()[0])
    return np.stack(observations[:num_steps])


def test_seed_reproduces_and_another_differs(breakout):
    first, other = rollout(breakout, 7), rollout(breakout, 8)
    np.testing.assert_array_equal(first, rollout(breakout, 7))
    np.testing.assert_array_equal(first, rollout(AtariWrapper(gym.make(BREAKOUT)), 7))
    assert (first != other).any()


def test_observations_are_the_callers_own(breakout):
    spoiled, untouched = rollout_spoiling(breakout, True), rollout_spoiling(breakout, False)
    np.testing.assert_array_equal(spoiled, untouched)


def rollout_spoiling(env, spoil, num_steps=100):
    """Overwrites every observation once it was copied; keeps all, and checks that no two share memory."""
    copies, kept = [], []
    observation, _ = env.reset(seed=5)
    for _ in range(num_steps):
        assert observation.base is None and observation.flags.owndata and observation.flags.writeable
        assert not any(np.may_share_memory(observation, older) for older in kept)
        copies.append(observation.copy())
        kept.append(observation)
        if spoil:
            observation[:] = 77
        observation, _, terminated, truncated, _ = env.step(1)
        if terminated or truncated:
            observation, _ = env.reset()
    return np.stack(copies)


def test_spaces_and_stack_order(breakout):
    env = breakout
    assert env.observation_space == gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    assert env.action_space == gym.spaces.Discrete(4)
    before, _ = env.reset(seed=0)
    for _ in range(8):
        after, *_ = env.step(2)
        np.testing.assert_array_equal(after[:3], before[1:])  # newest last
        before = after


@pytest.mark.parametrize("vector", [gym.vector.SyncVectorEnv, gym.vector.AsyncVectorEnv])
def test_inside_gymnasiums_vector_envs(vector):
    """SAME_STEP autoreset calls `reset()` right after each lost life: whole games come out at the other end."""
    mode = gym.vector.AutoresetMode.SAME_STEP
    envs = vector([lambda: AtariWrapper(gym.make(BREAKOUT))] * 2, autoreset_mode=mode)
    envs.reset(seed=0)
    ends = games = 0
    while games < 2:
        *_, terminations, _, infos = envs.step(np.zeros(2, np.int64))
        ends += terminations.sum()
        games += infos.get("final_info", {}).get("_episode", np.zeros(2)).sum()
    envs.close()
    assert 5 * games <= ends <= 5 * games + 4


# ---- what is refused ----


@pytest.mark.parametrize(
    ("env_id", "kwargs", "said"),
    [
        ("ALE/Breakout-v5", {}, "frameskip=1, got 4"),
        ("Breakout-v4", {}, r"frameskip=1, got \(2, 5\)"),
        (BREAKOUT, {"obs_type": "ram"}, "obs_type='rgb', got 'ram'"),
        (BREAKOUT, {"continuous": True}, "continuous=False, got True"),
        (BREAKOUT, {"sound_obs": True}, "sound_obs=False, got True"),
    ],
)
def test_settings_refused(env_id, kwargs, said):
    with pytest.raises(ValueError, match=said) as error:
        AtariWrapper(gym.make(env_id, **kwargs))
    assert 'gymnasium.make("ALE/Breakout-v5", frameskip=1)' in str(error.value)  # how to mend it


def test_other_environments_refused():
    with pytest.raises(TypeError, match="CartPoleEnv.*NoFrameskip"):
        AtariWrapper(gym.make("CartPole-v1"))
    with pytest.raises(TypeError, match="AtariPreprocessing"):
        AtariWrapper(AtariPreprocessing(gym.make(BREAKOUT)))
    with pytest.raises(TypeError, match="AtariWrapper"):
        AtariWrapper(AtariWrapper(gym.make(BREAKOUT)))
    with pytest.raises(TypeError, match="str"):
        AtariWrapper(BREAKOUT)
    with pytest.raises(ValueError, match="noop_max >= 0, got -1"):
        AtariWrapper(gym.make(BREAKOUT), noop_max=-1)


def test_accepted_around_the_emulator():
    for env in (
        gym.make(BREAKOUT, obs_type="grayscale"),
        gym.make(BREAKOUT, disable_env_checker=True),
        gym.make(BREAKOUT).unwrapped,
        TimeLimit(gym.make(BREAKOUT), 1000),
    ):
        assert AtariWrapper(env).reset()[0].shape == (4, 84, 84)


# ---- statistics ----


class Paying:
    """An emulator that pays for every frame, also for those of the no-op start."""

    def __init__(self, ale):
        self.ale = ale

    def __getattr__(self, name):
        return getattr(self.ale, name)

    def act(self, action):
        before = self.ale.getEpisodeFrameNumber()
        return self.ale.act(action) + self.ale.getEpisodeFrameNumber() - before


def test_the_score_counts_the_start_of_its_game_and_no_other():
    env = AtariWrapper(gym.make(BREAKOUT, max_num_frames_per_episode=12))
    env.unwrapped.ale = Paying(env.unwrapped.ale)
    for seed in range(8):
        env.reset(seed=seed)
        *_, info, _ = play_until_end(env)
        assert info["episode"]["r"] == env.unwrapped.ale.getEpisodeFrameNumber() == 12


def test_seconds_are_those_of_one_game():
    env = AtariWrapper(gym.make(BREAKOUT, max_num_frames_per_episode=60))
    for _ in range(2):
        start = time.perf_counter()
        env.reset()
        *_, info, _ = play_until_end(env)
        assert 0 < info["episode"]["t"] <= time.perf_counter() - start


# ---- video ----


@pytest.mark.filterwarnings("ignore:.*Overwriting existing videos")
def test_record_video_is_playable(tmp_path):
    raw = gym.make(BREAKOUT, render_mode="rgb_array")
    env = RecordVideo(AtariWrapper(raw), str(tmp_path), episode_trigger=lambda episode: episode == 0)
    env.reset(seed=0)
    first_screen = env.render()
    length = play_until_end(env, action=2)[-1]
    env.close()

    (path,) = tmp_path.glob("*.mp4")
    video = cv2.VideoCapture(str(path))
    frames = [frame for read, frame in iter(video.read, (False, None)) if read]
    assert video.get(cv2.CAP_PROP_FPS) == 15  # 60 frames a second on the console, one in four shown
    assert length <= len(frames) <= length + 1  # the encoder may drop the last one
    assert frames[0].shape == first_screen.shape == (210, 160, 3)
    assert np.abs(frames[0][..., ::-1].astype(int) - first_screen).mean() < 8  # lossy, yet the same picture
    assert any((frame != frames[0]).any() for frame in frames)


def test_pickled_wrapper_plays_on_from_a_reset(breakout):
    env = pickle.loads(pickle.dumps(breakout))
    np.testing.assert_array_equal(env.reset(seed=2)[0], breakout.reset(seed=2)[0])
