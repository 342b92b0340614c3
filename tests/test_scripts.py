"""Every script through its real command line: what it prints, logs and leaves, and what it says of wrong flags."""

import itertools
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from running import BATCH, NUM_ENVS, ROOT, TINY, UPDATES, environment, heed_ctrl_c, run, tiny_run

import vanilla_ppo_atari

SCRIPTS = (
    "vanilla_ppo_atari.py",
    "ppo_atari.py",
    "large_ppo_atari.py",
    "ppo_atari_envpool.py",
    "puffer_ppo_atari.py",
    "large_puffer_ppo_atari.py",
    "puffer_ppo_minihack.py",
    "puffer_vec_ppo_minihack.py",
)
TAGS = {
    *("charts/episodic_return", "charts/episodic_length", "charts/learning_rate", "charts/SPS"),
    *("losses/value_loss", "losses/policy_loss", "losses/entropy", "losses/old_approx_kl", "losses/approx_kl"),
    *("losses/clipfrac", "losses/explained_variance"),
}
BANNER = re.compile(r"A\.L\.E: .*\n\[Powered by Stella\]\n")  # the emulator greets on stderr

each_script = pytest.mark.parametrize("script", SCRIPTS)


@each_script
def test_it_runs_prints_and_logs(script):
    done = tiny_run(script)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.lines("SPS: ")) == UPDATES
    assert re.fullmatch(r"global_step=\d+, episodic_return=-?\d+\.\d+", done.lines("global_step=")[0])
    events = done.events()
    assert set(events.Tags()["scalars"]) == TAGS
    rates = [event.value for event in events.Scalars("charts/learning_rate")]
    assert rates == pytest.approx([2.5e-4 * (1 - update / UPDATES) for update in range(UPDATES)])
    assert events.Tags()["tensors"] == ["hyperparameters/text_summary"]
    (text,) = events.Tensors("hyperparameters/text_summary")
    assert f"|num_envs|{NUM_ENVS}|" in text.tensor_proto.string_val[0].decode()
    assert f"|batch_size|{BATCH}|" in text.tensor_proto.string_val[0].decode()


def ppo_losses(new, logprobs, advantages, value, values, returns, clip=0.1, norm_adv=True, clip_vloss=True):
    """The losses of policy and values, written out plainly from Schulman et al. 2017; tensors of one shape."""
    if norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    ratio = (new - logprobs).exp()
    bounded = torch.where(advantages > 0, ratio.clamp(max=1 + clip), ratio.clamp(min=1 - clip))
    errors = (value - returns).square()
    if clip_vloss:
        errors = errors.maximum((value.clamp(values - clip, values + clip) - returns).square())
    return -(advantages * bounded).mean(), 0.5 * errors.mean()


@pytest.mark.parametrize("flags", ["", "--no-norm-adv --no-clip-vloss"])
def test_an_update_is_what_the_formulas_of_ppo_say(flags, tmp_path, monkeypatch):
    """Three steps on one whole batch of the real game, played and worked out anew; all scripts' updates are the same
    lines (test_script_diffs.py)."""
    monkeypatch.chdir(tmp_path)
    size, clip = "--num-envs 2 --num-steps 64 --total-timesteps 128 --num-minibatches 1 --update-epochs 3", 0.003
    monkeypatch.setattr(sys, "argv", ["", *size.split(), *flags.split(), "--no-cuda", "--clip-coef", str(clip)])
    torch.set_num_threads(1)
    ran = types.SimpleNamespace(**runpy.run_path(str(ROOT / "vanilla_ppo_atari.py"), run_name="__main__"))

    # The agent that it began with plays the same games
    functions = [vanilla_ppo_atari.make_env("BreakoutNoFrameskip-v4", index, False, "") for index in range(2)]
    envs = SyncVectorEnv(functions, autoreset_mode=AutoresetMode.SAME_STEP)
    torch.manual_seed(1)
    agent = vanilla_ppo_atari.Agent(envs)
    observations, rewards, ends = [torch.as_tensor(envs.reset(seed=1)[0])], [], []
    for actions in ran.actions:
        observation, reward, terminations, truncations, _ = envs.step(actions.numpy())
        observations.append(torch.as_tensor(observation))
        rewards.append(torch.as_tensor(reward)), ends.append(torch.as_tensor(terminations | truncations))
    envs.close()
    *observations, last = torch.stack(observations)
    rewards, ends = torch.stack(rewards).float(), torch.stack(ends)
    assert rewards.any() and ends.any()
    with torch.no_grad():
        games, played = torch.cat(observations), ran.actions.flatten()
        _, logprobs, _, values = agent.get_action_and_value(games, played)
        following = torch.cat([values.view(64, 2), agent.get_value(last).view(1, 2)])

    # An advantage is a sum of errors, which fade with the time to them and end with the episode
    advantages = torch.zeros(64, 2)
    for env, begin in itertools.product(range(2), range(64)):
        for step in range(begin, 64):
            goes_on = not ends[step, env]
            error = rewards[step, env] + 0.99 * following[step + 1, env] * goes_on - following[step, env]
            advantages[begin, env] += (0.99 * 0.95) ** (step - begin) * error
            if not goes_on:
                break
    advantages, values = advantages.flatten(), values.flatten()
    returns, options = advantages + values, {"norm_adv": not flags, "clip_vloss": not flags}
    torch.testing.assert_close(ran.b_returns, returns, rtol=1e-4, atol=1e-5)

    optimizer, clipped = torch.optim.Adam(agent.parameters(), lr=2.5e-4, eps=1e-5), []
    for _ in range(3):
        _, new, entropy, value = agent.get_action_and_value(games, played)
        policy_loss, value_loss = ppo_losses(
            new, logprobs, advantages, value.flatten(), values, returns, clip, **options
        )
        optimizer.zero_grad()
        (policy_loss + 0.5 * value_loss - 0.01 * entropy.mean()).backward()
        torch.nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
        optimizer.step()
        clipped.append((((new - logprobs).exp() - 1).abs() > clip).float().mean().item())
    assert clipped[-1] > 0.2
    torch.testing.assert_close([ran.pg_loss, ran.v_loss, ran.entropy_loss], [policy_loss, value_loss, entropy.mean()])
    assert np.mean(ran.clipfracs) == pytest.approx(np.mean(clipped), abs=0.01)
    for weights, expected in zip(ran.agent.parameters(), agent.parameters(), strict=True):
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)


def test_steps_per_second_are_those_of_the_iteration():
    """A figure since the start would count the start-up, and be far from the time between two of them."""
    figures = tiny_run("vanilla_ppo_atari.py").events().Scalars("charts/SPS")
    for before, after in zip(figures, figures[1:]):
        assert BATCH / after.value == pytest.approx(after.wall_time - before.wall_time, rel=0.2, abs=0.1)


def test_video_and_weights_and_biases(tmp_path):
    folders = dict.fromkeys(("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"), str(tmp_path))
    done = run("puffer_ppo_atari.py", *TINY, "--capture-video", "--track", WANDB_MODE="offline", **folders)
    assert done.returncode == 0, done.stderr
    (record,) = done.directory.glob("wandb/offline-run-*/run-*.wandb")
    assert b"losses/value_loss" in record.read_bytes()
    videos = list(done.directory.glob("videos/*/*.mp4"))
    assert videos
    for video in videos:
        capture = cv2.VideoCapture(str(video))
        readable, frame = capture.read()
        assert readable and frame.shape == (210, 160, 3)
        assert capture.get(cv2.CAP_PROP_FRAME_COUNT) > 1


WRONG = {
    "--num-envs 0": "--num-envs 0: expected at least 1",
    "--num-steps 0": "--num-steps 0: expected at least 1",
    "--update-epochs 0": "--update-epochs 0: expected at least 1",
    "--num-minibatches 3": "--num-minibatches 3: expected to divide --num-envs * --num-steps, 1024",
    "--num-minibatches 0": "--num-minibatches 0: expected to divide",
    "--total-timesteps 1000": "--total-timesteps 1000: expected at least --num-envs * --num-steps, 1024",
    "--num-envs 1 --num-steps 4": "--norm-adv True: expected minibatches of two steps or more",
    "--learning-rate nan": "--learning-rate nan: expected at least 0",
    "--max-grad-norm -0.5": "--max-grad-norm -0.5: expected at least 0",
    "--gamma 1.5": "--gamma 1.5: expected from 0 to 1",
    "--seed -1": "--seed -1: expected at least 0 and below 2**31",
    "--num-envs 6 --num-workers 4": "--num-workers 4: expected to divide --num-envs",
    "--num-workers -1": "--num-workers -1: expected to divide --num-envs",
    "--num-workers 16": "--num-workers 16: expected to divide --num-envs",
    "--env-id BrekoutNoFrameskip-v4": "--env-id BrekoutNoFrameskip-v4: Environment `BrekoutNoFrameskip` doesn't exist",
    "--env-id CartPole-v1": "--env-id CartPole-v1: ",
    "--env-id Breakout-v4": "--env-id Breakout-v4: ",
}

# Runs a script under several command lines in one process, as importing torch for each would take most of the time.
# Prints how each ended; of one that went well, the dtype of its storage.
DRIVER = """
import json, multiprocessing.process, runpy, sys

script, *command_lines = sys.argv[1:]
for flags in command_lines:
    started = []
    start = multiprocessing.process.BaseProcess.start
    multiprocessing.process.BaseProcess.start = lambda process: (started.append(1), start(process))
    sys.argv = [script, *flags.split()]
    try:
        end = str(runpy.run_path(script, run_name="__main__")["obs"].dtype)
    except SystemExit as exit:
        end = exit.code
    multiprocessing.process.BaseProcess.start = start
    print("DRIVER", json.dumps([end, len(started)]))
"""


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    right = " ".join([*TINY, "--num-workers", "2"])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(ROOT / "puffer_ppo_atari.py"), *WRONG, right],
        cwd=tmp_path_factory.mktemp("driver"),
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line.removeprefix("DRIVER ")) for line in done.stdout.splitlines() if line.startswith("DRIVER ")]


@pytest.mark.parametrize("flags", WRONG)
def test_a_wrong_argument_is_told_in_a_line_before_any_process_starts(endings, flags):
    message, processes = endings[list(WRONG).index(flags)]
    assert message.startswith(WRONG[flags]) and "\n" not in message
    assert processes == 0


def test_observations_are_stored_as_bytes(endings):
    assert endings[-1] == ["torch.uint8", 2]


def test_a_wrong_argument_ends_the_command():
    done = run("vanilla_ppo_atari.py", "--num-minibatches", "3")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == "--num-minibatches 3: expected to divide --num-envs * --num-steps, 1024\n"


def test_a_missing_rom_ends_the_command(tmp_path):
    done = run("puffer_ppo_atari.py", ALE_ROMS_DIR=str(tmp_path))
    assert done.returncode == 1
    said = BANNER.sub("", done.stderr)
    assert said.startswith("--env-id BreakoutNoFrameskip-v4: ") and "breakout.bin" in said and said.count("\n") == 1


def running_in_group(group: int) -> list[str]:
    """The living processes of a group; zombies are dead."""
    stats = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            stats.append(stat.read_text().rpartition(")"))
        except OSError:
            continue  # it has just ended
    return [name for name, _, rest in stats if int(rest.split()[2]) == group and rest.split()[0] not in "ZX"]


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks for processes in /proc")
@pytest.mark.parametrize("script", ["ppo_atari.py", "puffer_ppo_atari.py"])
def test_ctrl_c_leaves_nothing_behind(script, tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *TINY[:4], "--update-epochs", "1", "--no-cuda"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )
    try:
        assert any(line.startswith("SPS: ") for line in process.stdout)
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
        deadline = time.monotonic() + 3
        while running_in_group(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not running_in_group(process.pid)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in stderr
    if script != "ppo_atari.py":  # AsyncVectorEnv's own __del__ may add another
        assert stderr.count("Traceback") == 1
