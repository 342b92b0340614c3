"""demo_emulation.py for real, once through and once with a look around at each of its breakpoints.

The demo calls `stop` of this file where it has a `breakpoint()`, which PYTHONBREAKPOINT arranges.
"""

import ast
import linecache
import os
import re
import subprocess
import sys

import numpy as np
from running import ROOT


def run_demo(directory, **variables: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, str(ROOT / "demo_emulation.py")],
        cwd=directory,
        env={**os.environ, "COLUMNS": "80", "PYTHONPATH": str(ROOT / "tests"), **variables},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_it_runs_through(tmp_path):
    done = run_demo(tmp_path, PYTHONBREAKPOINT="0", FORCE_COLOR="")
    lines = done.stdout.splitlines()
    assert re.findall(r"(?m)^(\d)\. .* ─+$", done.stdout) == list("1234567")
    assert "\x1b" not in done.stdout and max(map(len, lines)) <= 80
    assert any(line.startswith("Dlvl:1 $:0 HP:") for line in lines) and done.stdout.count("@") == 6
    assert done.stdout.count(" True ") == 12 and "False" not in done.stdout
    assert "  observation_space  Box(0, 255, (12616,), uint8)" in lines
    assert "Traceback" not in done.stderr


def test_a_narrow_terminal_cuts_pictures_off(tmp_path):
    lines = run_demo(tmp_path, PYTHONBREAKPOINT="0", FORCE_COLOR="", COLUMNS="60").stdout.splitlines()
    assert max(map(len, lines)) <= 60
    rivers = [line for line in lines if re.fullmatch(r"[ .}`@]+", line) and "}" in line]
    assert {len(line) for line in rivers[-6:]} == {60}  # four of them side by side take 80


def test_q_quits_without_a_traceback(tmp_path):
    command = [sys.executable, str(ROOT / "demo_emulation.py")]
    done = subprocess.run(command, cwd=tmp_path, input="c\nq\n", capture_output=True, text=True, timeout=110)
    assert "(Pdb)" in done.stdout and "\n3. " not in done.stdout and "Traceback" not in done.stderr


def test_at_each_stop_is_what_the_text_says(tmp_path):
    done = run_demo(tmp_path, PYTHONBREAKPOINT="test_demo_emulation.stop", FORCE_COLOR="1", NO_COLOR="")
    assert [line for line in done.stdout.splitlines() if line.startswith("saw ")] == [f"saw {idea}" for idea in IDEAS]
    assert "\x1b[34m}" in done.stdout  # the river is blue


def stop() -> None:
    frame = sys._getframe(1)
    names = frame.f_globals
    (call,) = ast.parse(linecache.getline(frame.f_code.co_filename, frame.f_lineno - 1).strip()).body
    assert call.value.func.id == "look_at" and call.value.args
    for name in call.value.args:
        eval(name.value, names)
    idea, check = next(checks)
    check(**{name: names[name] for name in check.__code__.co_varnames[: check.__code__.co_argcount]})
    print("saw", idea, flush=True)


def raw_environment(env, raw):
    spaces = env.observation_space.spaces
    assert len(raw) == 9 and {name: array.shape for name, array in raw.items()} == {
        name: space.shape for name, space in spaces.items()
    }
    assert env.observation_space.shape is None


def emulated_environment(env, emulated, row):
    assert emulated.env is env and emulated.action_space == env.action_space
    assert emulated.observation_space.contains(row) and row.dtype == np.uint8


def layout(raw, row, places):
    for name, array in raw.items():
        start, end = map(int, places[name].split(":"))
        assert row[start:end].tobytes() == array.tobytes()


def observation(raw, flat, unflattened, equals_raw):
    assert flat.shape == (12616,)
    for name, array in raw.items():
        assert np.array_equal(unflattened[name], array) and unflattened[name].dtype == array.dtype
        assert np.shares_memory(unflattened[name], flat) and equals_raw[name]


def batch(raw, observations, batch, first_equals_raw):
    for name, array in raw.items():
        assert batch[name].shape == (4, *array.shape) and batch[name].dtype == array.dtype
        assert np.array_equal(batch[name][0], array) and first_equals_raw[name]
    assert len(np.unique(observations, axis=0)) == 4


def tensors(observations, batch, tensor, tensors, equals_batch):
    for name, array in batch.items():
        assert str(tensors[name].dtype) == f"torch.{array.dtype}"
        assert np.array_equal(tensors[name].numpy(), array) and equals_batch[name]
        assert np.shares_memory(tensors[name].numpy(), observations) and np.shares_memory(tensor.numpy(), observations)


def nested_action(action_space, action_layout, flat_action, nested_action):
    assert action_layout.flat_space.contains(flat_action) and action_space.contains(nested_action)
    assert flat_action.tolist() == [nested_action["move"], nested_action["times"] - 1, *nested_action["flags"]]


CHECKS = (raw_environment, emulated_environment, layout, observation, batch, tensors, nested_action)
IDEAS = [check.__name__ for check in CHECKS]
checks = iter(zip(IDEAS, CHECKS))
