"""How many agent steps a second every vectorizer gives: same environments, same actions, side by side.

    python -m benchmarks.vectorization                    # all cases, about 30 minutes
    python -m benchmarks.vectorization --quick            # some cases for a short while each, at most 2 minutes
    python -m benchmarks.vectorization --cases "noop-*"   # these anew; the files of the others stay as they are

Each contender of a case has a process of its own, its host, that opens it at its best settings. All are warmed up, and
then take turns: A B C A B C. Whoever is not at work is stopped (SIGSTOP) with all its workers, so none takes time from
another. Every case ends with a file benchmarks/results/vectorization-CASE.json that holds every sample.
"""

import contextlib
import fnmatch
import importlib
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import records
from benchmarks.contenders import CASES, CONTENDERS, CORES, Case, Contender, Opened

QUICK = ("noop-64", "cartpole-8", "spin-spread-8", "minihack-8", "breakout-8", "spread-8", "workers-spin")
PRELOAD = ("stable_baselines3", "minihack", "mpe2.simple_spread_v3", "atari_wrappers")  # once, not in every host
TRIALS = 3  # of each of the settings that may be best
ANSWER_SECONDS = 300.0  # a host that says nothing for so long has failed


@dataclass
class Args:
    """Measure vectorizers side by side."""

    cases: tuple[str, ...] = ()
    """cases to measure, wildcards allowed; by default all"""
    contenders: tuple[str, ...] = ("*",)
    """contenders to measure, wildcards allowed; unless all are, nothing is written but where --results says"""
    rounds: int = 5
    """turns that each contender gets"""
    seconds: float = 0.3
    """length of a turn, after a warm-up of a quarter of it"""
    quick: bool = False
    """turns of 0.05 seconds, no trials of which settings are best, and a few cases unless you name others"""
    results: Path | None = None
    """where the JSON files go; by default benchmarks/results, and with --quick nowhere"""


@dataclass
class Row:
    """One contender in one case: what was tried, and what came of it."""

    name: str
    workers: int | None
    choices: list[dict]
    settings: dict = field(default_factory=dict)
    samples: list[float] = field(default_factory=list)
    started: list[float] = field(default_factory=list)
    steps: int = 0
    cpu_seconds: float = 0.0
    error: str | None = None
    hosts: list["Host"] = field(default_factory=list)

    @property
    def contender(self) -> Contender:
        """Look itself up."""
        return CONTENDERS[self.name]


# -------------------------------------------------------------------------------------------------------- measurement


def measure(opened: Opened, seconds: float) -> tuple[int, float]:
    """Call again and again for so long; returns the steps done and the seconds that they took."""
    call, calls, now = opened.call, 0, time.perf_counter
    start = now()
    end = start + seconds
    while (last := now()) < end:
        call()
        calls += 1
    return calls * opened.rows, last - start


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    """Return the processor time that living processes have used so far, all threads included."""
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def open_best(case: Case, contender: Contender, choices: list[dict], seconds: float) -> tuple[dict, Opened]:
    """Open a contender with the settings that are fastest in short, interleaved trials; the others are stopped."""
    if len(choices) == 1:
        return choices[0], contender.open(case, **choices[0])
    opened, workers, trials, known = [], [], [[] for _ in choices], set()
    for settings in choices:
        opened.append(contender.open(case, **settings))
        workers.append(set(psutil.Process().children(recursive=True)) - known)
        known |= workers[-1]
        each(workers[-1], "suspend")
    for _ in range(TRIALS):
        for one, own, rates in zip(opened, workers, trials):
            each(own, "resume")
            measure(one, seconds / 8)
            steps, elapsed = measure(one, seconds / 2)
            rates.append(steps / elapsed)
            each(own, "suspend")
    each(known, "resume")
    best = max(range(len(opened)), key=lambda index: statistics.median(trials[index]))
    for index in set(range(len(opened))) - {best}:
        opened[index].close()
    return choices[best], opened[best]


def each(processes: Iterable[psutil.Process], call: str) -> None:
    """Suspend or resume processes; some, such as the ones with which MiniHack makes its levels, are soon over."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            getattr(process, call)()


def serve(pipe: Any, main_end: Any, case_name: str, name: str, choices: list[dict], seconds: float) -> None:
    """Be a host: open a contender, then measure it for as long as the pipe says, whenever it does."""
    main_end.close()
    os.setpgid(0, 0)  # with its workers: they can be stopped together, and if the main process dies the system ends all
    multiprocessing.set_start_method("fork", force=True)  # of its workers, too: the quickest to start
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1), os.dup2(silence, 2)  # emulators greet; what goes wrong is sent
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(1)  # in every worker of every contender: cores are theirs, not a resize's
    try:
        settings, opened = open_best(CASES[case_name], CONTENDERS[name], choices, seconds)
        measure(opened, seconds)
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        pipe.send((None, settings))
        while True:
            seconds = pipe.recv()
            measure(opened, seconds / 4)
            before = cpu_seconds(processes)
            steps, elapsed = measure(opened, seconds)
            pipe.send((None, (steps, elapsed, cpu_seconds(processes) - before)))
    except EOFError:
        pass
    except BaseException:
        pipe.send((traceback.format_exc(), None))


class Host:
    """The main process's end of a host. It is stopped except while it opens or measures."""

    def __init__(self, *arguments: Any):
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.pipe, *arguments))
        self.process.start()
        theirs.close()

    def ask(self, seconds: float) -> None:
        """Wake the host and have it measure."""
        os.killpg(self.process.pid, signal.SIGCONT)
        self.pipe.send(seconds)

    def answer(self) -> Any:
        """Wait for what the host says, and stop it."""
        if not self.pipe.poll(ANSWER_SECONDS):
            raise RuntimeError(f"no answer in {ANSWER_SECONDS:.0f} s")
        failure, answer = self.pipe.recv()
        if failure:
            raise RuntimeError(failure)
        os.killpg(self.process.pid, signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """End the host and its workers at once: nothing of theirs is worth saving."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()


# --------------------------------------------------------------------------------------------------------------- plan


def rows_of(case: Case, names: Sequence[str]) -> list[Row]:
    """Return the rows of a case; a missing rival has one that says so."""
    rows = []
    for name in names:
        choices = CONTENDERS[name].choices(case)
        if CONTENDERS[name].version() is None:
            rows += [Row(name, None, [], error="not installed")] if choices else []
        else:
            rows += [Row(name, workers, settings) for workers, settings in choices]
    return rows


def turns(rows: Sequence[Row], rounds: int) -> Iterator[Row]:
    """Yield the rows that work, again and again: A B C A B C."""
    for _ in range(rounds):
        for row in rows:
            if not row.error:
                yield row


def opening_seconds(case: Case, row: Row, seconds: float) -> float:
    """Guess how long opening a row takes: constructing, trials of its settings and the warm-up."""
    at_once = {"limit": case.num_envs, "in process": 1}.get(row.contender.kind, CORES)
    constructing = len(row.choices) * case.num_envs / at_once * case.environment.seconds
    trials = TRIALS * 0.625 * seconds * len(row.choices) * (len(row.choices) > 1)
    return 0.2 + constructing + trials + seconds


def planned_seconds(plan: dict[str, list[Row]], rounds: int, seconds: float) -> float:
    """Guess how long a plan takes."""
    rows = [(CASES[name], row) for name, rows in plan.items() for row in rows if not row.error]
    return sum(opening_seconds(case, row, seconds) + rounds * 1.25 * seconds for case, row in rows)


def compare(name: str, rows: list[Row], rounds: int, seconds: float, spent: Callable[[float], None]) -> None:
    """Open all rows of a case, then let them take turns; `spent` hears how much of the planned time is over."""
    try:
        for row in turns(rows, 1):
            with failures_of(row):
                arguments = (name, row.name, row.choices, seconds)
                row.hosts = [Host(*arguments) for _ in range(row.contender.processes)]
                (row.settings, *_) = [host.answer() for host in row.hosts]
            spent(opening_seconds(CASES[name], row, seconds))
        start = time.perf_counter()
        for row in turns(rows, rounds):
            row.started.append(round(time.perf_counter() - start, 2))
            with failures_of(row):
                for host in row.hosts:
                    host.ask(seconds)
                answers = [host.answer() for host in row.hosts]
                row.samples.append(sum(steps / elapsed for steps, elapsed, _ in answers))
                row.steps += sum(steps for steps, *_ in answers)
                row.cpu_seconds += sum(cpu for *_, cpu in answers)
            spent(1.25 * seconds)
    finally:
        for host in [host for row in rows for host in row.hosts]:
            host.close()


@contextlib.contextmanager
def failures_of(row: Row) -> Iterator[None]:
    """Note what went wrong in a row, which then takes part no more, and go on with the others."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        row.error = f"failed: {str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)}"
        row.samples.clear()
        while row.hosts:
            row.hosts.pop().close()


# ------------------------------------------------------------------------------------------------------------- output


def record(name: str, row: Row) -> dict[str, Any]:
    """Return what goes into the file about a row."""
    cpu = float(f"{row.cpu_seconds / row.steps * 1e6:.4g}") if row.samples else None
    return {
        "case": name,
        "contender": row.name,
        "kind": row.contender.kind,
        "library": row.contender.library,
        "version": row.contender.version(),
        "workers": row.workers,
        "settings": row.settings,
        "error": row.error,
        **records.summary(row.samples),
        "started": row.started,
        "cpu_seconds_per_million_steps": cpu,
    }


def line(entry: dict[str, Any]) -> str:
    """Return a record as a line to print."""
    name = records.label(entry)
    if entry["error"]:
        return f"  {name:36} {entry['error']}"
    low, high = entry["spread"]
    cpu = entry["cpu_seconds_per_million_steps"]
    return f"  {name:36} {entry['median']:>11,.0f} steps/s ({low:,.0f} to {high:,.0f}), {cpu:,.1f} CPU s a million"


def chosen(patterns: Sequence[str], names: Sequence[str], flag: str) -> list[str]:
    """Return the names that fit any pattern."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise SystemExit(f"{flag} {pattern}: expected some of {', '.join(names)}")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def plan_of(args: Args) -> dict[str, list[Row]]:
    """Return what to measure, and shorten the turns of a quick run."""
    for flag, value in (("--rounds", args.rounds), ("--seconds", args.seconds)):
        if value <= 0:
            raise SystemExit(f"{flag} {value}: expected more than 0")
    if args.quick:
        args.seconds, args.cases = 0.05, args.cases or QUICK
    cases = chosen(args.cases or ("*",), list(CASES), "--cases")
    contenders = chosen(args.contenders, list(CONTENDERS), "--contenders")
    plan = {name: rows_of(CASES[name], contenders) for name in cases}
    for row in [row for rows in plan.values() for row in rows] if args.quick else ():
        del row.choices[1:]
    return {name: rows for name, rows in plan.items() if rows}


def main() -> None:
    """Measure what the flags say."""
    args = tyro.cli(Args)
    warnings.simplefilter("ignore")  # of libraries, when they are imported
    plan, source = plan_of(args), records.provenance()
    total = planned_seconds(plan, args.rounds, args.seconds)
    print(f"{len(plan)} cases, about {total / 60:.0f} minutes")
    for module in PRELOAD:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    columns = (TextColumn("{task.description:16}"), BarColumn(None), TimeElapsedColumn(), TimeRemainingColumn())
    # Without a thread of its own: hosts are forks, and nothing should run beside the one that is measured.
    progress = Progress(*columns, auto_refresh=False, disable=not sys.stdout.isatty())
    with tempfile.TemporaryDirectory() as folder, progress:
        os.environ["TMPDIR"] = tempfile.tempdir = folder  # every NetHack that is killed leaves a directory
        task = progress.add_task("", total=total)
        for name, rows in plan.items():

            def spent(seconds: float, name: str = name) -> None:
                progress.update(task, advance=seconds, description=name, refresh=True)

            compare(name, rows, args.rounds, args.seconds, spent)
            entries = [record(name, row) for row in rows]
            print("\n".join([f"{name}: {CASES[name].title}", *map(line, entries)]), flush=True)
            if args.contenders == ("*",) or args.results:
                head = {"benchmark": "vectorization", "case": name, "title": CASES[name].title}
                head |= {"num_envs": CASES[name].num_envs, "unit": "agent steps per second"}
                head |= {"rounds": args.rounds, "turn": f"{args.seconds:g} s", **source, "records": entries}
                records.write(f"vectorization-{name}", head, args.results, args.quick)


if __name__ == "__main__":
    main()
