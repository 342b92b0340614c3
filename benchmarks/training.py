"""How fast each script trains, end to end, and where its time goes: environments, inference, update.

    python -m benchmarks.training            # about 7 minutes; writes benchmarks/results/training.json
    python -m benchmarks.training --quick    # two iterations of a few steps

All scripts run side by side and take turns, an iteration of PPO each: A B C A B C. The others wait at their next step
of the environments meanwhile, which costs nothing. The scripts are those of the ladders and demo.py, as they are: only
`step` of the vectorizers is timed, from outside, or what lies between `send` and the end of `recv`. Between two steps
lies inference; the longest pause of an iteration is the update and one more inference.
"""

import contextlib
import json
import os
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.progress import Progress

from benchmarks import records

SCRIPTS = {  # with flags, and the library that steps the environments, if it is not this project
    "vanilla_ppo_atari.py": "gymnasium",
    "ppo_atari.py": "gymnasium",
    "large_ppo_atari.py": "gymnasium",
    "puffer_ppo_atari.py": None,
    "large_puffer_ppo_atari.py": None,
    "ppo_atari_envpool.py": "envpool",
    "demo.py": None,
    "demo.py --precision bf16": None,
    "puffer_ppo_minihack.py": "gymnasium",
    "puffer_vec_ppo_minihack.py": None,
}
SAYS = "ITERATION "  # how a line starts that a script's process sends


@dataclass
class Args:
    """Measure the scripts' training speed."""

    scripts: tuple[str, ...] = tuple(SCRIPTS)
    """scripts to measure; unless all are, nothing is written: ratios are of one run"""
    rounds: int = 5
    """iterations that each script is measured for, after one to warm up"""
    num_steps: int = 128
    """steps of each environment an iteration, by default as many as the scripts themselves have"""
    quick: bool = False
    """2 rounds of 8 steps"""
    results: Path | None = None
    """where the JSON file goes; by default benchmarks/results, and with --quick nowhere"""


def trace(script: str, num_steps: int) -> None:
    """Run a script in this process; before every iteration, say how the last one's time went and wait for a line."""
    import gymnasium

    import puffer_core

    spans: list[tuple[float, float]] = []  # of the steps since the last iteration began
    steps, start = -1, 0.0

    def before(actions: Any, *partial: Any) -> None:
        nonlocal steps, start
        steps += not partial  # EnvPool's script has ended environments reset by an extra, partial step
        if not partial and steps % num_steps == 0:
            last = split(spans, time.perf_counter(), num_steps * len(actions)) if spans else None
            print(SAYS + json.dumps(last), flush=True)
            if not sys.stdin.readline():  # nobody listens any more
                os.killpg(0, signal.SIGKILL)
            spans[:] = [(time.perf_counter(),) * 2]
        start = time.perf_counter()

    def after() -> None:
        if steps >= 0:  # not what a reset brings
            spans.append((start, time.perf_counter()))

    def wrap(owner: Any, first: str = "step", last: str = "step") -> None:
        begin = getattr(owner, first)

        def begun(envs: Any, *arguments: Any) -> Any:
            before(*arguments)
            return begin(envs, *arguments)

        setattr(owner, first, begun)
        finish = getattr(owner, last)

        def finished(envs: Any, *arguments: Any) -> Any:
            result = finish(envs, *arguments)
            after()
            return result

        setattr(owner, last, finished)

    wrap(gymnasium.vector.SyncVectorEnv)
    wrap(gymnasium.vector.AsyncVectorEnv)
    wrap(puffer_core.Serial, "send", "recv")
    if "envpool" in script:
        from envpool.python.envpool import EnvPoolMixin

        wrap(EnvPoolMixin)
    runpy.run_path(str(records.ROOT / script), run_name="__main__")


def split(spans: list[tuple[float, float]], end: float, rows: int) -> dict[str, float]:
    """Return an iteration's seconds by what they went to."""
    stepping = sum(stop - start for start, stop in spans)
    pauses = sorted(after - before for (_, before), (after, _) in zip(spans, [*spans[1:], (end, end)]))
    update = max(0.0, pauses[-1] - statistics.median(pauses))
    seconds = end - spans[0][0]
    inference = seconds - stepping - update
    return {"rows": rows, "seconds": seconds, "env": stepping, "inference": inference, "update": update}


class Script:
    """A script that runs in a process of its own, an iteration whenever it is told to."""

    def __init__(self, name: str, num_steps: int):
        self.name, self.iterations, self.error = name, [], None
        script, *own = name.split()
        flags = ("--num-steps", str(num_steps), "--total-timesteps", str(10**9), *own)
        self.directory = tempfile.TemporaryDirectory()
        self.log = open(Path(self.directory.name) / "stderr", "w+")
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.training", "--trace", script, *flags],
            cwd=self.directory.name, env={**os.environ, "PYTHONPATH": str(records.ROOT)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, process_group=0,
        )  # fmt: skip

    def answer(self) -> dict | None:
        """Wait until the script comes to its next iteration, and return what it says of the last."""
        for line in self.process.stdout:
            if line.startswith(SAYS):
                return json.loads(line.removeprefix(SAYS))
        self.log.seek(0)
        self.error = "failed: " + (self.log.read().strip().splitlines() or ["it ended early"])[-1]
        return None

    def iterate(self) -> dict | None:
        """Let it do one iteration."""
        print(file=self.process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        """End it, and its workers with it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()
        self.directory.cleanup()


def record(name: str, script: Script | None, num_steps: int) -> dict[str, Any]:
    """Return what goes into the file about a script."""
    iterations = script.iterations[1:] if script else []  # the first is the warm-up
    speeds = records.summary([one["rows"] / one["seconds"] for one in iterations])
    settings: dict[str, Any] = {"num_steps": num_steps}
    parts: dict[str, float] = {}
    if iterations:
        settings["num_envs"] = iterations[0]["rows"] // num_steps
        for part in ("env", "inference", "update"):
            parts[part] = round(statistics.median(one[part] / one["rows"] for one in iterations) * 1e6, 1)
    error = script.error if script else "not in this checkout"
    who = {"contender": name, "library": SCRIPTS[name], "version": records.version(SCRIPTS[name])}
    return {"case": "training", **who, "settings": settings, "error": error, **speeds, "microseconds_per_step": parts}


def main() -> None:
    """Measure what the flags say."""
    args = tyro.cli(Args)
    rounds, num_steps = (2, 8) if args.quick else (args.rounds, args.num_steps)
    unknown = [name for name in args.scripts if name not in SCRIPTS]
    if unknown or rounds < 1 or num_steps < 2:
        raise SystemExit(f"--scripts {unknown} --rounds {rounds} --num-steps {num_steps}: expected some of "
                         f"{', '.join(SCRIPTS)}, at least 1 round and 2 steps")  # fmt: skip
    source, scripts = records.provenance(), {}
    try:
        with Progress(disable=not sys.stdout.isatty()) as progress:
            present = [name for name in args.scripts if (records.ROOT / name.split()[0]).exists()]
            task = progress.add_task("training", total=len(present) * (rounds + 2))
            for name in present:
                scripts[name] = Script(name, num_steps)
                scripts[name].answer()
                progress.advance(task)
            for _ in range(rounds + 1):
                for script in scripts.values():
                    if not script.error and (iteration := script.iterate()):
                        script.iterations.append(iteration)
                    progress.advance(task)
    finally:
        for script in scripts.values():
            script.close()
    entries = []
    for name in args.scripts:
        entries.append(record(name, scripts.get(name), num_steps))
        print(f"  {name:28} {entries[-1]['error'] or entries[-1]['median']} {entries[-1]['microseconds_per_step']}")
    if args.scripts == tuple(SCRIPTS):
        head = {"benchmark": "training", "unit": "environment steps per second", "rounds": rounds}
        head["turn"] = f"an iteration of {num_steps} steps"
        records.write("training", {**head, **source, "records": entries}, args.results, args.quick)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trace"]:
        _, _, name, *sys.argv[1:] = sys.argv
        trace(name, int(sys.argv[2]))
    else:
        main()
