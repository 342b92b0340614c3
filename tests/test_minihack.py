"""The MiniHack scripts on the real game: where the first one stops and why, seeds, network, video, what they refuse."""

import functools
import json
import re
import runpy
import subprocess
import sys
import tomllib

import cv2
import gymnasium
import numpy as np
import pytest
import torch
from nle import nethack
from running import BATCH, ROOM, ROOT, TINY, environment, run

PLAIN, EMULATED, VECTORIZED = "ppo_minihack.py", "puffer_ppo_minihack.py", "puffer_vec_ppo_minihack.py"
KEYS = ("glyphs", "chars", "colors", "specials", "blstats", "message", "tty_chars", "tty_colors", "tty_cursor")


@functools.cache
def names_of(script: str) -> dict:
    """What a script defines above its main block."""
    return runpy.run_path(str(ROOT / script))


def make(script: str, env_id: str = ROOM[1]) -> gymnasium.Env:
    return names_of(script)["make_env"](env_id, 0, False, "run")()


@pytest.fixture(scope="module")
def both():
    """The same two games as a Dict of arrays and as rows, and an agent for each, of equal weights."""
    vectors, observations, agents = [], [], []
    torch.set_num_threads(1)
    for script in (PLAIN, EMULATED):
        make_env, agent_class = names_of(script)["make_env"], names_of(script)["Agent"]
        vectors.append(gymnasium.vector.SyncVectorEnv([make_env("MiniHack-River-v0", 0, False, "run")] * 2))
        observations.append(vectors[-1].reset(seed=1)[0])
        torch.manual_seed(1)
        agents.append(agent_class(vectors[-1]))
    yield observations, agents
    for vector in vectors:
        vector.close()


# ------------------------------------------------------------------------------------------------- without emulation


def test_without_emulation_the_storage_line_fails_and_no_other():
    done = run(PLAIN, *TINY, *ROOM)
    assert done.returncode == 1 and not done.stdout
    *_, error = done.stderr.splitlines()
    ((line_number, place),) = re.findall(r'File ".*/ppo_minihack\.py", line (\d+), in (.*)', done.stderr)
    line = (ROOT / PLAIN).read_text().splitlines()[int(line_number) - 1].strip()
    assert (
        line == "obs = torch.zeros(steps + obs_space.shape, dtype=getattr(torch, obs_space.dtype.name), device=device)"
    )
    assert line in (ROOT / "vanilla_ppo_atari.py").read_text()
    assert place == "<module>" and done.stderr.count("File ") == 1
    assert error == 'TypeError: can only concatenate tuple (not "NoneType") to tuple'


def test_that_is_because_observations_are_a_dict():
    env = make(PLAIN)
    assert sorted(env.observation_space) == sorted(KEYS)
    assert env.observation_space.shape is None
    env.close()


# ------------------------------------------------------------------------------------------------------------- seeds


def games(script: str, seed: int | None, steps: int = 250) -> list:
    """All that is seen under one sequence of actions, over several games."""
    env, actions = make(script), np.random.default_rng(7)
    observation, _ = env.reset(seed=seed)
    seen, ends = [copies(observation)], 0
    for _ in range(steps):
        observation, reward, terminated, truncated, _ = env.step(int(actions.integers(env.action_space.n)))
        seen.append((copies(observation), reward, terminated, truncated))
        if terminated or truncated:
            ends += 1
            seen.append(copies(env.reset()[0]))
    env.close()
    assert ends >= 2
    return seen


def copies(observation) -> list[bytes]:
    return [
        np.asarray(part).tobytes()
        for part in (observation.values() if isinstance(observation, dict) else [observation])
    ]


@pytest.mark.parametrize("script", [PLAIN, EMULATED])
def test_a_seed_repeats_all_games_and_another_gives_others(script):
    assert games(script, 1) == games(script, 1)
    assert games(script, 1)[0] != games(script, 2)[0]
    assert games(script, None)[0] != games(script, None)[0]


def test_every_game_of_a_seed_is_another():
    env = make(PLAIN, "MiniHack-Room-Random-15x15-v0")
    first, *others = [copies(env.reset(seed=seed)[0]) for seed in (1, None, None, 1)]
    assert first == others[2] and first != others[0] != others[1]
    env.close()


# ----------------------------------------------------------------------------------------------------------- network


def test_the_network_sees_the_same_through_flat_rows(both):
    (tree, rows), (plain, emulated) = both
    tree, rows = {key: torch.as_tensor(value) for key, value in tree.items()}, torch.as_tensor(rows)
    assert rows.dtype == torch.uint8 and rows.shape == (2, emulated.layout.dtype.itemsize)
    action = torch.tensor([0, 5])
    expected, got = plain.get_action_and_value(tree, action), emulated.get_action_and_value(rows, action)
    assert [part.shape for part in got] == [(2,), (2,), (2,), (2, 1)]
    assert all(map(torch.equal, expected, got))
    assert torch.equal(plain.get_value(tree), expected[3])
    sampled = emulated.get_action_and_value(rows.repeat(100, 1))[0]
    assert sampled.unique().tolist() == list(range(emulated.actor.out_features))  # an untrained policy tries them all


def test_the_network_reads_map_surroundings_stats_and_message(both):
    """Each is changed alone, stats and glyphs beyond what a byte could hold."""
    (tree, _), (plain, _) = both
    tree = {key: torch.as_tensor(value[:1]) for key, value in tree.items()}
    column, row = tree["blstats"][0, [nethack.NLE_BL_X, nethack.NLE_BL_Y]].tolist()
    changes = {
        "first corner": ("glyphs", (0, 0, 0), nethack.GLYPH_CMAP_OFF + 256),
        "last corner": ("glyphs", (0, -1, -1), nethack.GLYPH_CMAP_OFF + 256),
        "near": ("glyphs", (0, row, column + 1), tree["glyphs"][0, row, column + 1] - 256),
        "gold": ("blstats", (0, nethack.NLE_BL_GOLD), tree["blstats"][0, nethack.NLE_BL_GOLD] + 256),
        "debt": ("blstats", (0, nethack.NLE_BL_SCORE), -1000),
        "message": ("message", (0, 0), ord("Y")),
    }
    with torch.no_grad():
        base = plain.features(tree)
        for name, (key, place, value) in changes.items():
            changed = tree[key].clone()
            changed[place] = value
            features = plain.features(tree | {key: changed})
            assert not torch.equal(features, base), name
            assert features.abs().max() < 100, name  # no number drowns the others


def test_the_network_finds_the_agent(both):
    """What it sees as the surroundings has the agent's own glyph in the middle."""
    (tree, _), (plain, _) = both
    seen = []
    handle = plain.glyphs.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    plain.features({key: torch.as_tensor(value) for key, value in tree.items()})
    handle.remove()
    (surroundings,) = [glyphs for glyphs in seen if glyphs.shape[1:] == (9, 9)]
    for index, near in enumerate(surroundings.numpy()):
        row, column = np.argwhere(tree["chars"][index] == ord("@"))[0]
        assert near[4, 4] == tree["glyphs"][index, row, column]
        assert (
            near[3, 4] == tree["glyphs"][index, row - 1, column]
            and near[4, 6] == tree["glyphs"][index, row, column + 2]
        )


def test_gradients_reach_every_parameter(both):
    (_, rows), (_, emulated) = both
    emulated.zero_grad()
    _, logprob, entropy, value = emulated.get_action_and_value(torch.as_tensor(rows), torch.tensor([0, 5]))
    (logprob.sum() + entropy.sum() + value.sum()).backward()
    assert {name for name, weight in emulated.named_parameters() if not weight.grad.any()} == set()


def test_the_network_compiles_to_one_graph(both):
    (_, rows), (_, emulated) = both
    arguments = torch.as_tensor(rows), torch.tensor([0, 5])
    compiled = torch.compile(emulated.get_action_and_value, fullgraph=True, backend="aot_eager")  # needs no C compiler
    for expected, got in zip(emulated.get_action_and_value(*arguments), compiled(*arguments)):
        torch.testing.assert_close(got, expected)


# ----------------------------------------------------------------------------------------------------------- scripts


def test_videos_show_the_tiles_in_motion():
    done = run(VECTORIZED, *TINY, *ROOM, "--total-timesteps", str(BATCH), "--capture-video")
    assert done.returncode == 0, done.stderr
    (video,) = done.directory.glob("videos/*/*-episode-0.mp4")
    capture, frames = cv2.VideoCapture(str(video)), []
    while (read := capture.read())[0]:
        frames.append(read[1])
    assert frames[0].shape == nethack.TILE_RENDER_SHAPE and len(frames) > 1
    assert max(np.abs(frame.astype(int) - frames[0]).max() for frame in frames) > 50


INSTALL = ": install the extra, pip install '.[minihack]'"
REFUSED = (
    (PLAIN, "minihack", "", INSTALL),
    (EMULATED, "minihack", "", INSTALL),
    (VECTORIZED, "minihack", "", INSTALL),
    (PLAIN, "nle", "", INSTALL),
    (EMULATED, "", "--env-id MiniHack-Rivr-v0", "--env-id MiniHack-Rivr-v0: Environment `MiniHack-Rivr` doesn't exist"),
    (VECTORIZED, "", "--env-id CartPole-v1", "--env-id CartPole-v1: "),
    (VECTORIZED, "", "--num-workers 3", "--num-workers 3: expected to divide --num-envs"),
)

# One process for all, as importing torch takes most of the time. What is None in sys.modules cannot be imported.
DRIVER = """
import json, multiprocessing.process, runpy, sys

for script, hidden, flags, _ in json.loads(sys.argv[1]):
    started = []
    start = multiprocessing.process.BaseProcess.start
    multiprocessing.process.BaseProcess.start = lambda process: (started.append(1), start(process))
    sys.argv, sys.modules[hidden] = [script, *flags.split()], None
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as exit:
        print("DRIVER", json.dumps([exit.code, len(started)]))
    multiprocessing.process.BaseProcess.start = start
    del sys.modules[hidden]
"""


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    directory = tmp_path_factory.mktemp("driver")
    cases = json.dumps([(str(ROOT / script), *rest) for script, *rest in REFUSED])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, cases],
        cwd=directory,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert not list(directory.iterdir())  # no logs
    return [json.loads(line.removeprefix("DRIVER ")) for line in done.stdout.splitlines() if line.startswith("DRIVER ")]


@pytest.mark.parametrize("index", range(len(REFUSED)), ids=[" ".join(case[:3]) for case in REFUSED])
def test_what_cannot_run_is_told_in_a_line_before_any_process_starts(endings, index):
    message, processes = endings[index]
    assert REFUSED[index][3] in message and "\n" not in message
    assert processes == 0


def test_the_extra_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {re.match("[a-z]+", requirement)[0] for requirement in extras["minihack"]} == {
        "minihack",
        "nle",
        "setuptools",
    }
