"""ppo_atari_envpool.py beside the real EnvPool: it trains on every step of the games and on nothing else."""

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

NUM_ENVS, NUM_STEPS, SHORT = 4, 240, 40
ROLLOUT, SHORT_ROLLOUT = [
    f"--num-envs {NUM_ENVS} --num-steps {steps} --total-timesteps {NUM_ENVS * steps} "
    "--num-minibatches 1 --update-epochs 1 --no-cuda"
    for steps in (NUM_STEPS, SHORT)
]
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
        names = ("obs", "actions", "rewards", "dones", "next_obs", "next_done", "b_obs", "b_advantages")
        np.savez("rollout.npz", printed=printed.getvalue(), **{name: found[name].numpy() for name in names})
    except SystemExit as exit:
        end = exit.code
    os.chdir("..")
    print(json.dumps(end))
"""


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    """The folder of the runs, and how each ended: a rollout, its start again, with another seed, with wrong flags."""
    folder = tmp_path_factory.mktemp("driver")
    command_lines = [ROLLOUT, SHORT_ROLLOUT, SHORT_ROLLOUT + " --seed 2", *WRONG]
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


def make_pool(num_envs: int, seed: int):
    return envpool.make("Breakout-v5", "gymnasium", num_envs=num_envs, seed=seed, episodic_life=True, reward_clip=True)


def score_on_screen(ram: np.ndarray) -> int:
    """Breakout keeps the score in decimal digits: see BreakoutSettings::step in ALE's src/ale/games/supported."""
    return int(f"{ram[76] & 15:x}{ram[77]:02x}")


def test_envpool_ignores_the_action_after_an_end():
    """Two pools whose actions differ in just these steps stay alike; where they differ elsewhere, they do not."""
    one, other, rng = make_pool(NUM_ENVS, 1), make_pool(NUM_ENVS, 1), np.random.default_rng(1)
    observations, infos = one.reset()
    other.reset()
    ended, resets = np.zeros(NUM_ENVS, bool), 0
    for _ in range(250):
        actions, elapsed = rng.integers(4, size=NUM_ENVS), infos["elapsed_step"]
        observations, rewards, terminations, truncations, infos = one.step(actions)
        others = other.step(np.where(ended, (actions + 1) % 4, actions))
        for ours, theirs in zip((observations, rewards, terminations, truncations, infos["ram"]), others):
            assert np.array_equal(ours, theirs["ram"] if isinstance(theirs, dict) else theirs)
        assert np.all(infos["elapsed_step"][~ended] == elapsed[~ended] + 1)
        assert np.all((infos["elapsed_step"] == elapsed)[ended] | (infos["elapsed_step"] == 0)[ended])
        assert not rewards[ended].any() and not (terminations | truncations)[ended].any()
        resets += ended.sum()
        ended = terminations | truncations
    assert resets > 20
    for _ in range(20):
        last, others = one.step(np.full(NUM_ENVS, 2))[0], other.step(np.full(NUM_ENVS, 3))[0]
    assert not np.array_equal(last, others)


@pytest.fixture(scope="module")
def real_games(driven):
    """What EnvPool shows when it plays the actions of the script's rollout and resets in its own way.

    Returns the rows of each environment's real steps, the games that ended in one, and the number of ignored actions.
    """
    actions, pool = rollout(driven, 0)["actions"], make_pool(NUM_ENVS, 1)
    observations, infos = pool.reset()
    rows, games, ignored = [[] for _ in range(NUM_ENVS)], [], 0
    starts, ended = np.zeros(NUM_ENVS, int), np.zeros(NUM_ENVS, bool)
    while min(map(len, rows)) < NUM_STEPS:
        taken, before = [len(own) for own in rows], observations
        chosen = [actions[min(step, NUM_STEPS - 1), idx] for idx, step in enumerate(taken)]
        observations, rewards, terminations, truncations, infos = pool.step(np.where(ended, 0, chosen))
        for idx in np.flatnonzero(~ended):
            rows[idx].append((before[idx], rewards[idx], terminations[idx] or truncations[idx]))
            if infos["lives"][idx] == 0:
                games.append((taken[idx], idx, score_on_screen(infos["ram"][idx]), taken[idx] + 1 - starts[idx]))
                starts[idx] = taken[idx] + 1
        ignored += ended.sum()
        ended = terminations | truncations
    games = sorted(game for game in games if game[0] < NUM_STEPS)
    return [own[:NUM_STEPS] for own in rows], games, ignored


def test_the_script_trains_on_all_real_steps_and_on_no_other(driven, real_games):
    rows, _, ignored = real_games
    ours = rollout(driven, 0)
    ends = np.concatenate([ours["dones"][1:], ours["next_done"][None]])
    assert ignored > 20
    for idx, own in enumerate(rows):
        observations, rewards, ended = zip(*own)
        assert np.array_equal(ours["obs"][:, idx], observations)
        assert np.array_equal(ours["rewards"][:, idx], rewards)
        assert np.array_equal(ends[:, idx], ended)
    assert np.array_equal(ours["b_obs"], ours["obs"].reshape(-1, 4, 84, 84))  # of which the update uses every row
    assert len(ours["b_advantages"]) == NUM_ENVS * NUM_STEPS


def test_returns_and_lengths_are_those_of_the_true_games(driven, real_games):
    _, games, _ = real_games
    assert len(games) > 2 and any(score for *_, score, _ in games)
    printed = str(rollout(driven, 0)["printed"])
    found = re.findall(r"global_step=(\d+), episodic_return=(\d+\.\d)\n", printed)
    assert found == [(str((step + 1) * NUM_ENVS), f"{score}.0") for step, _, score, _ in games]
    (log,) = (driven[0] / "0" / "runs").iterdir()
    lengths = EventAccumulator(str(log)).Reload().Scalars("charts/episodic_length")
    assert [event.value for event in lengths] == [length for *_, length in games]


def test_one_seed_gives_one_run(driven):
    first, again, other = [rollout(driven, index) for index in range(3)]
    for name in ("obs", "actions", "rewards", "dones"):
        assert np.array_equal(first[name][:SHORT], again[name])
        assert name in ("rewards", "dones") or not np.array_equal(again[name], other[name])


@pytest.mark.parametrize("flags", WRONG)
def test_a_wrong_argument_is_told_in_a_line(driven, flags):
    message = driven[1][3 + list(WRONG).index(flags)]
    assert message.startswith(WRONG[flags]) and "\n" not in message


def test_a_missing_envpool_is_told_in_a_line(driven):
    assert driven[1][-1] == "EnvPool is missing: pip install '.[envpool]' here, or pip install envpool"


def test_frames_are_the_wrappers_and_lives_differ_as_the_script_says():
    """Plays EnvPool's game again on a bare emulator, and compares the console's whole memory after every step."""
    pool, emulator, rng = make_pool(1, 3), ale_py.ALEInterface(), np.random.default_rng(1)
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    emulator.setFloat("repeat_action_probability", 0.0)
    emulator.loadROM(get_rom_path("breakout"))
    actions = emulator.getMinimalActionSet()

    def frames_waited(ram):
        """How many no-ops before one frame of FIRE lead to this memory."""
        start = emulator.cloneState()
        for count in range(30):
            emulator.restoreState(start)
            score = sum(emulator.act(action) for action in [actions[0]] * count + [actions[1]])
            if np.array_equal(emulator.getRAM(), ram):
                assert score == 0
                return count
        raise AssertionError("no number of no-ops leads there")

    observations, infos = pool.reset()
    waited = {"life": [], "game": [frames_waited(infos["ram"][0])]}
    for _ in range(500):
        action = rng.integers(4)
        observations, _, (ended,), _, infos = pool.step(np.array([action]))
        reward = 0
        for _ in range(4):
            if not emulator.game_over():
                before, reward = emulator.getScreenGrayscale(), reward + emulator.act(actions[action])
        screen = np.maximum(before, emulator.getScreenGrayscale())
        assert np.array_equal(infos["ram"][0], emulator.getRAM()) and infos["reward"][0] == reward
        frame = cv2.resize(screen, (84, 84), interpolation=cv2.INTER_AREA)
        assert emulator.game_over() or np.array_equal(observations[0, -1], frame)
        if ended:
            stack, is_game = observations[0], emulator.game_over()
            if is_game:
                emulator.reset_game()
            observations, _, _, _, infos = pool.step(np.array([0]))
            waited["game" if is_game else "life"].append(frames_waited(infos["ram"][0]))
            assert is_game or np.array_equal(observations[0, :-1], stack[1:])
    assert len(set(waited["life"])) > 5 and len(set(waited["game"])) > 1
