"""demo.py under torchrun: ranks stay alike, learn as one would, and end together."""

import os
import re
import subprocess
import sys
import time

import torch
from running import ROOT, environment
from test_scripts import running_in_group

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def launch(directory, *command):
    process = subprocess.Popen(
        command,
        cwd=directory,
        env=environment(PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}", TMPDIR=str(directory)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        return process, *process.communicate(timeout=110)
    finally:
        process.kill()


def test_ranks_have_equal_weights_after_every_update(tmp_path):
    process, stdout, stderr = launch(
        tmp_path, *TORCHRUN, str(ROOT / "tests" / "ranks.py"), "equal_weights", str(tmp_path)
    )
    assert process.returncode == 0, stderr
    assert stdout.count("equal") == 2


def test_two_ranks_learn_as_one_does_from_the_same_data(tmp_path):
    process, _, stderr = launch(tmp_path, sys.executable, str(ROOT / "tests" / "ranks.py"), "record", str(tmp_path))
    assert process.returncode == 0, stderr
    weights = [record["after"] for record in torch.load(tmp_path / "records.pt", weights_only=True)]
    assert not torch.allclose(weights[0], weights[-1], rtol=1e-3)
    process, stdout, stderr = launch(tmp_path, *TORCHRUN, str(ROOT / "tests" / "ranks.py"), "replay", str(tmp_path))
    assert process.returncode == 0, stderr
    assert stdout.count("like one") == 2 * len(weights)


def test_a_killed_rank_ends_the_others_with_an_error(tmp_path):
    start = time.monotonic()
    process, _, stderr = launch(tmp_path, *TORCHRUN, str(ROOT / "tests" / "ranks.py"), "die", str(tmp_path))
    assert process.returncode != 0 and "SIGKILL" in stderr
    assert time.monotonic() - start < 60
    assert not running_in_group(process.pid)


def test_torchrun_trains_logs_once_and_saves(tmp_path):
    flags = ("--env-id", "CartPole-v1", "--num-envs", "4", "--num-steps", "16", "--total-timesteps", "512", "--no-cuda")
    process, stdout, stderr = launch(tmp_path, *TORCHRUN, str(ROOT / "demo.py"), *flags, "--num-workers", "1")
    assert process.returncode == 0, stderr
    assert len(re.findall(r"^CartPole-v1 \(discrete\): ", stdout, re.MULTILINE)) == 1
    assert len(list(tmp_path.glob("runs/*"))) == 1
    entropies = [float(entropy) for entropy in re.findall(r" entropy=([\d.]+)", stdout)]
    assert 0.6 < entropies[0] < 0.7  # of all ranks together: a policy of two actions begins at log 2
    assert "Warning" not in stderr.replace("OMP_NUM_THREADS", ""), stderr
    (path,) = tmp_path.glob("runs/*/checkpoint.pt")
    contents = torch.load(path, weights_only=True)
    assert contents["iteration"] == 4 and contents["global_step"] == 2 * 4 * 64
