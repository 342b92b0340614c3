"""ppo_atari_envpool.py beside the real EnvPool: it trains on every step of the games and on nothing else.

What really happened is told by bare emulators. They play EnvPool's games along, held to it by the console's memory,
which EnvPool's infos hold after every step; so the tests know what a reset did, and which actions had an effect.
"""

import json
import re
import subprocess
import sys

import ale_py
import cv2
import envpool
import numpy as np
import pytest
from ale_py.roms import get_rom_path
from running import ROOT, environment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# EnvPool's name and ALE's, seed, number of environments, number of steps
GALAXIAN = ("Galaxian-v5", "galaxian", 2, 2, 256)  # with this seed, hits of dozens of points before a game is over
ROAD_RUNNER = ("RoadRunner-v5", "road_runner", 31, 4, 130)  # with this seed, a game ends in the last frame of a reset
SHORT = [("Galaxian-v5", "galaxian", seed, 2, 30) for seed in (2, 3)]
ROLLOUTS = [GALAXIAN, ROAD_RUNNER, *SHORT]


def flags(game: str, rom: str, seed: int, num_envs: int, num_steps: int) -> str:
    sizes = f"--num-envs {num_envs} --num-steps {num_steps} --total-timesteps {num_envs * num_steps}"
    return f"--env-id {game} --seed {seed} {sizes} --num-minibatches 1 --update-epochs 1 --no-cuda"


WRONG = {
    "--env-id Brekout-v5": "--env-id Brekout-v5: expected an Atari id of EnvPool, as Breakout-v5; Brekout-v5 is not",
    "--env-id CartPole-v1": "--env-id CartPole-v1: expected an Atari id of EnvPool, as Breakout-v5; ",
    "--env-id BreakoutNoFrameskip-v4": "--env-id BreakoutNoFrameskip-v4: expected an Atari id of EnvPool",
    "--seed 2147483648": "--seed 2147483648: expected at least 0 and below 2**31",
}

# Runs the script under several command lines, each in a folder of its own, and at last as if EnvPool were not there.
# Prints how each ended; one that went well leaves its rollout, and what it printed.
DRIVER = """
import contextlib, io, json, os, runpy, sys
import numpy as np

script, *command_lines = sys.argv[1:]
for index, flags in enumerate([*command_lines, "missing"]):
    if flags == "missing":
        sys.modules["envpool"], flags = None, ""
    os.mkdir(str(index))
    os.chdir(str(index))
    sys.argv, end, printed = [script, *flags.split()], None, io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            found = runpy.run_path(script, run_name="__main__")
        names = ("obs", "actions", "rewards", "dones", "next_done", "b_obs", "b_advantages")
        np.savez("rollout.npz", printed=printed.getvalue(), **{name: found[name].numpy() for name in names})
    except SystemExit as exit:
        end = exit.code
    os.chdir("..")
    print(json.dumps(end))
"""


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    """The folder of the runs, and how each ended."""
    folder = tmp_path_factory.mktemp("driver")
    command_lines = [*[flags(*sizes) for sizes in ROLLOUTS], *WRONG]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(ROOT / "ppo_atari_envpool.py"), *command_lines],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    return folder, [json.loads(line) for line in done.stdout.splitlines()]


def rollout(driven, index: int) -> dict:
    with np.load(driven[0] / str(index) / "rollout.npz") as arrays:
        return dict(arrays)


class Console:
    """A bare emulator that plays along with one environment of a pool."""

    def __init__(self, rom: str):
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self.ale, self.waits = ale_py.ALEInterface(), []
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.ale.loadROM(get_rom_path(rom))
        self.actions = self.ale.getMinimalActionSet()

    def reset(self, ram: np.ndarray) -> bool:
        """Waits until one frame of FIRE leads to this memory; returns whether a game ended on the way, or before."""
        ended = self.ale.game_over()
        if ended:
            self.ale.reset_game()
        for waited in range(30):
            state = self.ale.cloneState()
            self.ale.act(ale_py.Action.FIRE)
            if np.array_equal(self.ale.getRAM(), ram):
                self.waits.append(waited)
                return ended or self.ale.game_over()
            self.ale.restoreState(state)
            self.ale.act(ale_py.Action.NOOP)
            if self.ale.game_over():
                self.ale.reset_game()
                ended = True
        raise AssertionError("no wait of up to 29 frames leads there")

    def step(self, action: int, ram: np.ndarray) -> int:
        """Plays four frames, fewer only if the game ends; keeps the screen and returns the reward."""
        reward = 0
        for _ in range(4):
            if not self.ale.game_over():
                screen, reward = self.ale.getScreenGrayscale(), reward + self.ale.act(self.actions[action])
        self.screen = np.maximum(screen, self.ale.getScreenGrayscale())
        assert np.array_equal(self.ale.getRAM(), ram)
        return reward


def make_pool(game: str, num_envs: int, seed: int):
    return envpool.make(game, "gymnasium", num_envs=num_envs, seed=seed, episodic_life=True, reward_clip=True)


def play(game: str, rom: str, seed: int, actions: np.ndarray) -> tuple[list, list, list]:
    """Plays rows of actions on EnvPool, which resets in its own way; an action that had no effect is played again.

    Returns each environment's real steps as (observation, reward, end of an episode), the games that ended as (step,
    environment, score, length), and for each row without effect whether the game was over before EnvPool told.
    """
    num_envs = actions.shape[1]
    pool, consoles = make_pool(game, num_envs, seed), [Console(rom) for _ in range(num_envs)]
    steps, games, ignored = [[] for _ in consoles], [], []
    scores, lengths, ended = np.zeros(num_envs, int), np.zeros(num_envs, int), np.zeros(num_envs, bool)
    observations, infos = pool.reset()
    for console, ram in zip(consoles, infos["ram"]):
        console.reset(ram)
    while min(map(len, steps)) < len(actions):
        before, turns = observations, [min(len(own), len(actions) - 1) for own in steps]
        observations, rewards, terminations, truncations, infos = pool.step(actions[turns, range(num_envs)])
        for idx, (console, ram) in enumerate(zip(consoles, infos["ram"])):
            if ended[idx] or console.ale.game_over():
                ignored.append(not ended[idx])
                game_over = ended[idx] and console.reset(ram)
            else:
                scores[idx] += console.step(actions[turns[idx], idx], ram)
                lengths[idx] += 1
                steps[idx].append((before[idx], rewards[idx], terminations[idx] or truncations[idx]))
                game_over = console.ale.game_over()
            if game_over and lengths[idx]:
                games.append((len(steps[idx]), idx, scores[idx], lengths[idx]))
                scores[idx] = lengths[idx] = 0
        ended = terminations | truncations
    games = [game for game in sorted(games) if game[0] <= len(actions)]
    return [own[: len(actions)] for own in steps], games, ignored


@pytest.fixture(scope="module", params=[GALAXIAN, ROAD_RUNNER], ids=lambda sizes: sizes[0])
def both(request, driven):
    """A rollout of the script and its folder, and the same actions as EnvPool plays them when nothing is done to it."""
    index = ROLLOUTS.index(request.param)
    ours = rollout(driven, index)
    return ours, driven[0] / str(index), play(*request.param[:3], ours["actions"])


def test_envpool_ignores_the_action_after_an_end():
    """Two pools whose actions differ in just these steps stay alike; where they differ elsewhere, they do not."""
    (one, other), rng = [make_pool("Breakout-v5", 4, 1) for _ in range(2)], np.random.default_rng(1)
    _, infos = one.reset()
    other.reset()
    ended, resets = np.zeros(4, bool), 0
    for _ in range(120):
        actions, elapsed = rng.integers(4, size=4), infos["elapsed_step"]
        *ours, infos = one.step(actions)
        *theirs, other_infos = other.step(np.where(ended, (actions + 1) % 4, actions))
        assert all(map(np.array_equal, [*ours, infos["ram"]], [*theirs, other_infos["ram"]]))
        _, rewards, terminations, truncations = ours
        assert np.all(infos["elapsed_step"][~ended] == elapsed[~ended] + 1)
        assert np.all(np.isin(infos["elapsed_step"][ended], [0, *elapsed[ended]]))
        assert not rewards[ended].any() and not (terminations | truncations)[ended].any()
        resets += ended.sum()
        ended = terminations | truncations
    assert resets > 5
    for _ in range(20):
        ours, theirs = one.step(np.full(4, 2))[0], other.step(np.full(4, 3))[0]
    assert not np.array_equal(ours, theirs)


def test_the_script_trains_on_all_real_steps_and_on_no_other(both):
    ours, _, (steps, _, ignored) = both
    ends = np.concatenate([ours["dones"][1:], ours["next_done"][None]])
    assert len(ignored) > 3
    for idx, own in enumerate(steps):
        observations, rewards, ended = zip(*own)
        assert np.array_equal(ours["obs"][:, idx], observations)
        assert np.array_equal(ours["rewards"][:, idx], rewards)
        assert np.array_equal(ends[:, idx], ended)
    assert np.array_equal(ours["b_obs"], np.concatenate(ours["obs"]))  # of which the update uses every row
    assert len(ours["b_advantages"]) == len(ours["b_obs"])


def test_returns_and_lengths_are_those_of_the_true_games(both):
    ours, folder, (_, games, ignored) = both
    assert games
    assert any(score for *_, score, _ in games) or any(ignored)  # Galaxian has the one, RoadRunner the other
    found = re.findall(r"global_step=(\d+), episodic_return=(\d+\.\d)\n", str(ours["printed"]))
    assert found == [(str(step * ours["actions"].shape[1]), f"{score}.0") for step, _, score, _ in games]
    (log,) = (folder / "runs").iterdir()
    lengths = EventAccumulator(str(log)).Reload().Scalars("charts/episodic_length")
    assert [event.value for event in lengths] == [length for *_, length in games]


def test_one_seed_gives_one_run(driven):
    first, _, again, other = [rollout(driven, index) for index in range(len(ROLLOUTS))]
    for name in ("obs", "actions", "rewards", "dones"):
        assert np.array_equal(first[name][: len(again[name])], again[name])
    assert not np.array_equal(again["obs"], other["obs"])


@pytest.mark.parametrize("flags", WRONG)
def test_a_wrong_argument_is_told_in_a_line(driven, flags):
    message = driven[1][len(ROLLOUTS) + list(WRONG).index(flags)]
    assert message.startswith(WRONG[flags]) and "\n" not in message


def test_a_missing_envpool_is_told_in_a_line(driven):
    message = driven[1][-1]
    assert message.endswith(": install the extra, pip install '.[envpool]'") and "\n" not in message


def test_frames_are_the_wrappers_and_lives_differ_as_the_script_says():
    pool, console, rng = make_pool("Breakout-v5", 1, 3), Console("breakout"), np.random.default_rng(1)
    _, infos = pool.reset()
    console.reset(infos["ram"][0])
    for _ in range(300):
        action = rng.integers(4, size=1)
        stacks, _, (ended,), _, infos = pool.step(action)
        console.step(action[0], infos["ram"][0])  # in which a lost life cuts nothing short
        game_over = console.ale.game_over()
        frame = cv2.resize(console.screen, (84, 84), interpolation=cv2.INTER_AREA)
        assert game_over or np.array_equal(stacks[0, -1], frame)
        if ended:
            new_stacks, _, _, _, infos = pool.step(action)
            console.reset(infos["ram"][0])
            assert game_over or np.array_equal(new_stacks[0, :-1], stacks[0, 1:])
    assert len(set(console.waits)) > 5
