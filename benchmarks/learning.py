"""What demo.py learns and how soon, on tasks of many kinds; curves and speeds are from the runs' own TensorBoard logs.

    python -m benchmarks.learning                       # about 20 minutes; writes benchmarks/results/learning.json
    python -m benchmarks.learning --tasks "CartPole*"   # this one alone; writes nothing
    python -m benchmarks.learning --tasks "Pong*" --seeds 1 --results benchmarks/results/mine  # with a GPU

Runs come one after another, as each takes the whole machine. A run ends when the mean return of its last 100 episodes
reaches the goal, or with its last step. Its seconds are those of the clock since the command was given. Six tasks teach
nothing: their steps take 5 ms on average with a spread of 100 %, and it is the speed that matters. Pong and Breakout
are left out where there is no GPU.
"""

import fnmatch
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from rich.progress import track
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import records

POINTS = 60  # of a curve, at most


class Task(NamedTuple):
    """Flags of demo.py, the mean return that ends a run, if any does, and whether it takes too long without a GPU."""

    flags: str
    goal: float | None = None
    is_for_gpus: bool = False


TEAM = "--num-envs 16 --num-steps 25 --learning-rate 1e-3 --gamma 0.95"
RECALL = "--env-id tests.envs:Recall --num-steps 64 --hidden-size 32 --learning-rate 5e-3"
POOL = "--num-steps 32 --no-clip-vloss --no-zero-copy --num-workers"
PONG = f"{POOL} 32 --num-envs 64 --env-batch-size 32 --update-epochs 8 --learning-rate 1.5e-3 --clip-coef 0.2"
BREAKOUT = f"{POOL} 64 --num-envs 256 --env-batch-size 128 --num-minibatches 8 --learning-rate 1e-3"
STEPS = "--num-steps 32 --total-timesteps 8192 --env-id benchmarks.environments"
IN_STEP = "--num-envs 16 --num-workers 16"
FIRST_READY = f"{IN_STEP} --env-batch-size 8 --no-zero-copy"
TASKS = {
    "CartPole": Task("--env-id CartPole-v1 --total-timesteps 500000", 475),
    "Pendulum": Task("--env-id Pendulum-v1 --gamma 0.9 --total-timesteps 500000", -250),
    "MiniHack Room 5x5": Task("--env-id MiniHack-Room-5x5-v0 --total-timesteps 100000", 0.95),
    "simple_spread, 3 agents": Task(f"--env-id pettingzoo:mpe2.simple_spread_v3 {TEAM} --total-timesteps 300000"),
    "Recall, LSTM": Task(f"{RECALL} --use-lstm --total-timesteps 50000", 0.95),
    "Recall, no memory": Task(f"{RECALL} --total-timesteps 50000", 0.95),
    "Steps that wait, 8 in step": Task(f"{STEPS}:waiting --num-envs 8 --num-workers 8"),
    "Steps that wait, 16 in step": Task(f"{STEPS}:waiting {IN_STEP}"),
    "Steps that wait, first 8 of 16": Task(f"{STEPS}:waiting {FIRST_READY}"),
    "Steps that work, 8 in step": Task(f"{STEPS}:working --num-envs 8 --num-workers 8"),
    "Steps that work, 16 in step": Task(f"{STEPS}:working {IN_STEP}"),
    "Steps that work, first 8 of 16": Task(f"{STEPS}:working {FIRST_READY}"),
    "Pong": Task(
        f"--env-id PongNoFrameskip-v4 {PONG} --ent-coef 0.005 --total-timesteps 1500000", 20, is_for_gpus=True
    ),
    "Breakout": Task(f"--env-id BreakoutNoFrameskip-v4 {BREAKOUT} --total-timesteps 5200000", 400, is_for_gpus=True),
}


@dataclass
class Args:
    """Train demo.py on tasks of many kinds."""

    tasks: tuple[str, ...] = ("*",)
    """tasks to learn, wildcards allowed; unless all are, nothing is written but where --results says"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of the runs of each"""
    results: Path | None = None
    """where the JSON file goes; by default benchmarks/results"""


def learn(task: Task, seed: int) -> dict[str, Any]:
    """Run demo.py; returns its curve as (step, seconds, mean return) and the last point of it."""
    flags = [*task.flags.split(), "--seed", str(seed), "--quiet"]
    flags += [] if task.goal is None else ["--target-return", str(task.goal)]
    with tempfile.TemporaryDirectory() as folder:
        paths = os.pathsep.join([str(records.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-W", "ignore", str(records.ROOT / "demo.py"), *flags]
        start, environment = time.time(), {**os.environ, "PYTHONPATH": paths}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["it ended early"])[-1])
        return logged(Path(folder), start, seed)


def logged(folder: Path, start: float, seed: int) -> dict[str, Any]:
    """Read the log of a run that was started at a time since the epoch, in seconds."""
    (events,) = folder.rglob("events.out.tfevents*")
    log = EventAccumulator(str(events)).Reload()
    curve = [
        (event.step, round(event.wall_time - start, 1), float(f"{event.value:.4g}"))
        for event in log.Scalars("charts/episodic_return")
    ]
    thinned = [curve[round(index * (len(curve) - 1) / (POINTS - 1))] for index in range(POINTS)]
    speeds = [event.value for event in log.Scalars("charts/SPS")]
    sps = float(f"{statistics.median(speeds[1:] or speeds):.4g}")  # the first has the start-up in it
    return {"seed": seed, "curve": list(dict.fromkeys(thinned)), "end": curve[-1], "sps": sps}


def record(name: str, task: Task, runs: list[dict], error: str | None) -> dict[str, Any]:
    """Return what goes into the file about a task; its samples are the mean returns at the ends of its runs."""
    who = {"contender": name, "library": None, "version": records.version(None), "settings": {"flags": task.flags}}
    final = records.summary([run["end"][2] for run in runs])
    return {"case": "learning", **who, "goal": task.goal, "error": error, **final, "runs": runs}


def main() -> None:
    """Learn what the flags say."""
    args = tyro.cli(Args)
    for pattern in args.tasks:
        if not fnmatch.filter(TASKS, pattern):
            raise SystemExit(f"--tasks {pattern}: expected some of {', '.join(map(shlex.quote, TASKS))}")
    names = [name for name in TASKS if any(fnmatch.fnmatchcase(name, pattern) for pattern in args.tasks)]
    names = [name for name in names if torch.cuda.is_available() or not TASKS[name].is_for_gpus]
    if not names:
        raise SystemExit(f"--tasks {' '.join(args.tasks)}: expected a GPU on this machine")
    source, found, errors = records.provenance(), {name: [] for name in names}, dict.fromkeys(names)
    plan = [(name, seed) for seed in args.seeds for name in names]
    for name, seed in track(plan, description="learning", disable=not sys.stdout.isatty()):
        if not errors[name]:
            try:
                found[name].append(learn(TASKS[name], seed))
                step, seconds, mean = found[name][-1]["end"]
                print(f"  {name}, seed {seed}: {mean:.4g} at step {step:,} after {seconds:.0f} s", flush=True)
            except RuntimeError as error:
                errors[name], found[name] = f"failed: {error}", []
                print(f"  {name}, seed {seed}: {errors[name]}", flush=True)
    if args.tasks == ("*",) or args.results:
        head = {"benchmark": "learning", "unit": "mean return of the last 100 episodes", "rounds": len(args.seeds)}
        entries = [record(name, TASKS[name], found[name], errors[name]) for name in names]
        records.write("learning", {**head, "turn": "a run", **source, "records": entries}, args.results)


if __name__ == "__main__":
    main()
