"""The benchmarks measure what they say, and the pages and charts are what the committed JSON gives."""

import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import time
from importlib import metadata

import cv2
import numpy as np
import psutil
import pytest
import torch
from running import ROOT, environment

from benchmarks import charts, emulation, learning, records, report, training, vectorization
from benchmarks.contenders import CASES, CONTENDERS, CORES, Case, Environment
from benchmarks.environments import NoOp, Spin

ROUNDS = 2
RIVALS = {contender.library for contender in CONTENDERS.values() if contender.library}


def run(module: str, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{module}", *flags]
    variables = environment(CUDA_VISIBLE_DEVICES="")
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=115)


def is_installed(library: str) -> bool:
    try:
        return bool(metadata.version(library))
    except metadata.PackageNotFoundError:
        return False


# -------------------------------------------------------------------------------------------------------- measurement


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A whole case, measured in small turns."""
    folder = tmp_path_factory.mktemp("results")
    turns = ("--rounds", str(ROUNDS), "--seconds", "0.02")
    done = run("vectorization", "--cases", "noop-8", *turns, "--results", str(folder))
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "vectorization-noop-8.json").read_text()), folder


def test_a_file_says_where_it_comes_from(measured):
    _, result, _ = measured
    assert (result["case"], result["num_envs"], result["rounds"]) == ("noop-8", 8, ROUNDS)
    assert result["command"].startswith("python -W ignore -m benchmarks.vectorization --cases noop-8")
    assert result["hardware"]["cores"] == CORES and result["hardware"]["cpu"] and result["hardware"]["memory_gib"] > 0
    assert result["libraries"]["gymnasium"] == metadata.version("gymnasium")
    assert all(result[key] for key in ("date", "os", "python", "commit", "turn", "unit", "title"))


def test_every_row_has_its_samples(measured):
    _, result, _ = measured
    assert [record["contender"] for record in result["records"]] == [
        name for name, contender in CONTENDERS.items() if contender.choices(CASES["noop-8"])
    ]
    for record in [record for record in result["records"] if not record["error"]]:
        assert len(record["samples"]) == ROUNDS and all(sample > 0 for sample in record["samples"])
        assert record["median"] == pytest.approx(statistics.median(record["samples"]), rel=1e-3)
        assert record["spread"] == [min(record["samples"]), max(record["samples"])]
        assert record["cpu_seconds_per_million_steps"] >= 0
        assert record["settings"] in CONTENDERS[record["contender"]].settings(CASES["noop-8"])
        assert record["version"] == records.version(record["library"])


def test_contenders_take_turns(measured):
    _, result, _ = measured
    started = [record["started"] for record in result["records"] if not record["error"]]
    assert len(started) > 5
    in_order = [row[turn] for turn in range(ROUNDS) for row in started]
    assert in_order == sorted(in_order)


def test_a_missing_rival_is_a_row(measured):
    """PufferLib's pins keep it out of requirements.txt, so here is one that is really missing."""
    stdout, result, folder = measured
    missing = {record["contender"] for record in result["records"] if record["error"] == "not installed"}
    assert missing == {
        record["contender"] for record in result["records"] if record["library"] and not is_installed(record["library"])
    }
    for name in missing:
        assert f"{name:36} not installed" in stdout
        assert f"| {name} | not installed |" in report.vectorization(result)
    charts.environment(folder / "charts" / "noop.png", [result])
    assert cv2.imread(str(folder / "charts" / "noop.png")) is not None


def test_lines_are_plain_where_there_is_no_terminal(measured):
    stdout, result, _ = measured
    assert "\x1b" not in stdout and len(stdout.splitlines()) == 2 + len(result["records"])


def test_a_part_of_the_contenders_writes_only_where_it_is_told_to(tmp_path):
    flags = ("--cases", "noop-8", "--contenders", "1 bare*", "--rounds", "1", "--seconds", "0.02")
    committed = {path: path.stat().st_mtime_ns for path in records.RESULTS.iterdir()}
    for further in ((), ("--results", str(tmp_path))):
        done = run("vectorization", *flags, *further)
        assert done.returncode == 0 and "1 bare process" in done.stdout, done.stderr
    assert {path: path.stat().st_mtime_ns for path in records.RESULTS.iterdir()} == committed
    assert [path.name for path in tmp_path.iterdir()] == ["vectorization-noop-8.json"]


def test_a_quick_look_writes_only_where_it_is_told_to(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path / "committed")
    records.write("case", {"records": []}, None, quick=True)
    records.write("case", {"records": []}, tmp_path / "asked for", quick=True)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*")] == ["asked for/case.json"]
    records.write("case", {"records": []}, None)
    assert (tmp_path / "committed" / "case.json").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--cases", "noop-9"), "--cases noop-9: expected some of noop-8, noop-64, "),
        (("--contenders", "Gym"), "--contenders Gym: expected some of puffer_core Serial, "),
        (("--rounds", "0"), "--rounds 0: expected more than 0"),
        (("--tasks", "Chess"), "--tasks Chess: expected some of CartPole, "),
        (("--tasks", "Pong"), "--tasks Pong: expected a GPU"),
    ],
)
def test_a_wrong_flag_is_told_in_a_line(flags, message):
    done = run("learning" if "--tasks" in flags else "vectorization", *flags)
    assert done.returncode == 1 and done.stderr.startswith(message) and done.stderr.count("\n") == 1


@pytest.mark.parametrize("quick, most", [(True, 120), (False, 35 * 60)])
def test_the_plan_fits_the_time(quick, most):
    args = vectorization.Args(quick=quick)
    plan = vectorization.plan_of(args)
    assert sum(map(len, plan.values())) > (50 if quick else 150)
    assert 10 < vectorization.planned_seconds(plan, args.rounds, args.seconds) < most


def test_turns_are_interleaved():
    rows = [vectorization.Row(name, None, [{}]) for name in "ABC"]
    rows[1].error = "failed"
    assert [row.name for row in vectorization.turns(rows, 2)] == ["A", "C", "A", "C"]


def test_who_is_not_at_work_is_stopped():
    host = vectorization.Host("noop-8", "1 bare process", [{}], 0.01)
    try:
        assert host.answer() == {}
        process = psutil.Process(host.process.pid)

        def is_stopped() -> bool:
            deadline = time.monotonic() + 10
            while process.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
                time.sleep(0.01)
            return process.status() == psutil.STATUS_STOPPED

        assert is_stopped()
        before = process.cpu_times()
        time.sleep(0.3)
        assert process.cpu_times() == before
        host.ask(0.05)
        steps, seconds, _ = host.answer()
        assert steps % 100 == 0 and steps > 0 and seconds >= 0.05
        assert is_stopped()
    finally:
        host.close()
    assert not process.is_running()


def test_a_killed_benchmark_leaves_no_processes():
    flags = ["--cases", "noop-8", "--contenders", "puffer_core sync", "Gymnasium Async*", "--rounds", "10000"]
    main = psutil.Popen([sys.executable, "-m", "benchmarks.vectorization", *flags], cwd=ROOT, stdout=subprocess.DEVNULL)
    expected, deadline, processes = 2 + 1 + 8, time.monotonic() + 60, []  # hosts, and as few workers as they may have
    while len(processes) < expected and time.monotonic() < deadline:
        time.sleep(0.1)
        processes = main.children(recursive=True)
    time.sleep(0.5)  # turns are being taken
    assert len(main.children(recursive=True)) >= expected
    main.kill()
    main.wait()
    assert not psutil.wait_procs(processes, timeout=20)[1]


class Counted(NoOp):
    """Counts the steps of all its kind, in whichever process."""

    steps = multiprocessing.Value("q")

    def step(self, action):
        with self.steps.get_lock():
            self.steps.value += 1
        return super().step(action)


CASE = Case(Environment("Counted", Counted, 4), 8)


@pytest.mark.parametrize("name", [name for name, one in CONTENDERS.items() if one.choices(CASE) and one.version()])
def test_a_call_does_the_steps_that_are_counted(name):
    contender = CONTENDERS[name]
    opened = contender.open(CASE, **contender.settings(CASE)[0])
    try:
        before, calls = Counted.steps.value, 50
        for _ in range(calls):
            opened.call()
        in_flight = CASE.num_envs if contender.kind == "first-ready" else 0
        assert abs(Counted.steps.value - before - calls * opened.rows) <= in_flight
    finally:
        opened.close()


def test_spinning_takes_processor_time():
    env = Spin(spread=True)
    env.reset(seed=1)
    start, steps = time.thread_time(), 2000
    for _ in range(steps):
        env.step(0)
    times = np.array(env.times)
    assert (time.thread_time() - start) / steps == pytest.approx(times.mean(), rel=0.15)
    assert times.mean() == pytest.approx(100e-6, rel=0.1) and times.std() == pytest.approx(times.mean(), rel=0.1)


# ------------------------------------------------------------------------------------------------ emulation, training


@pytest.mark.parametrize("name", ["MiniHack", "Blackjack"])
def test_bare_numpy_and_torch_do_the_same_work(name):
    space, samples = emulation.observations()[name]
    layout = emulation.Layout(space)
    for sample in samples[:3]:
        row, bare = layout.flatten(sample), np.zeros_like(layout.flatten(sample))
        emulation.bare_flatten(layout, bare)(sample)
        np.testing.assert_array_equal(bare, row)
        ours, theirs = layout.unflatten(row), emulation.bare_unflatten(layout, np.dtype)(row)
        for mine, other in zip(ours.values() if isinstance(ours, dict) else ours, theirs.values()):
            np.testing.assert_array_equal(mine, other)
    rows = torch.as_tensor(np.array([layout.flatten(sample) for sample in samples]))
    sliced = emulation.bare_unflatten(layout, lambda dtype: getattr(torch, dtype))(rows)
    assert torch.equal(emulation.total(sliced), emulation.total(layout.unflatten(rows)))


def test_an_iteration_is_split():
    spans = [(0.0, 1.0), (1.5, 2.5), (3.0, 4.0)]  # three steps of 1 s, pauses of 0.5 s, and 6 s until the next step
    split = training.split(spans, 10.0, rows=24)
    assert split == {"rows": 24, "seconds": 10.0, "env": 3.0, "inference": 1.5, "update": 5.5}


@pytest.mark.parametrize("name", ["puffer_ppo_atari.py", "ppo_atari.py", "demo.py"])
def test_a_script_is_measured_from_outside(name):
    script = training.Script(name, num_steps=4)
    try:
        assert script.answer() is None and script.error is None
        for _ in range(2):
            iteration = script.iterate()
            assert iteration["rows"] == 4 * 8
            assert all(iteration[part] > 0 for part in charts.PARTS)
            assert sum(iteration[part] for part in charts.PARTS) == pytest.approx(iteration["seconds"])
    finally:
        script.close()


def test_a_script_that_fails_says_so(monkeypatch):
    monkeypatch.setenv("ALE_ROMS_DIR", "/nowhere")
    script = training.Script("vanilla_ppo_atari.py", num_steps=4)
    try:
        assert script.answer() is None and script.error.startswith("failed: --env-id BreakoutNoFrameskip-v4: ")
    finally:
        script.close()


# ----------------------------------------------------------------------------------------------------------- learning


def test_a_run_ends_at_its_goal_and_gives_its_curve(tmp_path):
    task = learning.Task("--env-id CartPole-v1 --num-envs 4 --total-timesteps 40000", goal=60)
    run = learning.learn(task, seed=1)
    steps, seconds, means = zip(*run["curve"])
    assert steps == tuple(sorted(set(steps))) and seconds == tuple(sorted(seconds)) and seconds[0] > 0
    assert run["curve"][-1] == run["end"] and 2 < len(steps) <= learning.POINTS
    assert means[0] < 60 <= means[-1] and steps[-1] < 40000
    result = {"benchmark": "learning", "records": [learning.record("CartPole", task, [run], None)]}
    assert f"| 60 | {means[-1]:.4g} |" in report.learning(result)
    charts.learning(tmp_path / "learning.png", result)
    assert cv2.imread(str(tmp_path / "learning.png")) is not None


def test_a_run_that_fails_says_so():
    with pytest.raises(RuntimeError, match="--env-id Nothing-v0: "):
        learning.learn(learning.Task("--env-id Nothing-v0"), seed=1)


# --------------------------------------------------------------------------------------------------- pages and charts


@pytest.mark.parametrize("page, name", report.PAGES.items())
def test_the_pages_are_what_the_json_gives(page, name):
    text = (ROOT / page).read_text()
    assert report.put(text, name, getattr(report, name)()) == text, "make charts"


def test_the_charts_are_what_the_json_gives(tmp_path):
    report.draw(tmp_path)
    drawn = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png"))
    assert drawn == sorted(path.relative_to(ROOT / report.CHARTS) for path in (ROOT / report.CHARTS).rglob("*.png"))
    for name in drawn:
        now, committed = cv2.imread(str(tmp_path / name)), cv2.imread(str(ROOT / report.CHARTS / name))
        assert now.shape == committed.shape and cv2.absdiff(now, committed).mean() < 0.5, "make charts"


def test_another_number_gives_another_page_and_chart(tmp_path):
    folder = tmp_path / "results"
    shutil.copytree(records.RESULTS, folder)
    before, section, readme = report.load(folder), report.results(folder), report.speed(folder)
    name = next(name for name in before if name.startswith("vectorization-noop"))
    result = before[name]
    bare, *_ = [record for record in result["records"] if record["contender"] == "Gymnasium SyncVectorEnv"]
    bare["median"] = bare["spread"][1] = 123_456_789.0
    records.write(name, result, folder)
    assert report.load(folder) == before
    assert "123,456,789" not in section and "123,456,789" in report.results(folder)
    assert "123M" not in readme and "123M (**0.0" in report.speed(folder)
    charts.environment(tmp_path / "noop.png", report.by_environment(report.load(folder))["noop"])
    then, now = (cv2.imread(str(path / "noop.png")) for path in (ROOT / report.CHARTS, tmp_path))
    assert then.shape != now.shape or (then != now).any()


def test_a_ratio_that_turns_do_not_agree_on_is_marked():
    def summary(*samples):
        return records.summary(list(samples))

    ours = summary(10.0, 11.0, 12.0, 13.0, 14.0)
    assert report.ratio(ours, summary(5.0, 6.0, 6.0, 7.0, 9.0)) == "2.00"
    assert report.ratio(ours, summary(8.0, 9.0, 10.0, 12.5, 15.0)) == "~1.20"
    assert report.ratio(ours, summary(11.0, 12.0, 13.0, 14.0, 15.0)) == "**~0.92**"
    assert report.ratio(summary(1.0, 1.0, 1.0), summary(1.0, 1.0, 1.0)) == "~1.00"
    assert report.ratio(ours, summary(1.0, 1.0, 1.0, 1.0, 1.0)) == "12" and report.ratio(ours, None) == ""


def test_all_committed_results_have_their_origin():
    for name, result in report.load(records.RESULTS).items():
        assert {"command", "date", "hardware", "os", "python", "libraries", "commit", "rounds"} <= set(result), name
        assert result["rounds"] >= 2 and "/" not in result["command"].replace("benchmarks/", ""), name
        for record in result["records"]:
            assert len(record["samples"]) == (0 if record.get("error") else result["rounds"]), name
