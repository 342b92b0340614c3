"""What goes wrong in a worker is told quickly and in full, nothing is left behind, and idle processes keep quiet."""

import collections
import contextlib
import functools
import gc
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import types
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from running import heed_ctrl_c

import puffer_core
from puffer_core import APIUsageError, Multiprocessing, Serial, WorkerError
from tests.envs import Counter, Crashing, Leaving, Marker, Napping, NoOp, SlowToClose, Stubborn, Threads

ROOT = Path(puffer_core.__file__).parent
pytestmark = [
    pytest.mark.alone,
    pytest.mark.timeout(60),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc"),
]
patient = functools.partial(Counter, 1000)


def stat(pid):
    """Fields of /proc/<pid>/stat from the state on, or None when the process is gone or only waits to be reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields


def await_end(pids, seconds):
    """Wait until processes are gone; returns those that are not in time."""
    deadline = time.perf_counter() + seconds
    while (alive := [pid for pid in pids if stat(pid)]) and time.perf_counter() < deadline:
        time.sleep(0.02)
    return alive


def named_memory(pid):
    """The files in shared memory that a process maps and that have a name, which could outlive it."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {Path(line.split()[5]) for line in maps if "/dev/shm/" in line and not line.endswith("(deleted)")}


scripts_started = []


@pytest.fixture(autouse=True)
def no_worker_is_left():
    yield
    while scripts_started:  # whatever a failed test left running would slow down all that comes after it
        with contextlib.suppress(ProcessLookupError):
            os.killpg(scripts_started.pop().pid, signal.SIGKILL)
    assert multiprocessing.active_children() == []


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


class Forking(NoOp):
    """Leaves a process behind, and says more than a pipe holds."""

    def reset(self, **arguments):
        if os.fork() == 0:
            time.sleep(30), os._exit(0)
        return super().reset(**arguments)

    def step(self, action):
        return *super().step(action)[:4], {"more than a pipe holds": bytes(2**20)}


# -------------------------------------------------------------------------------------------------------- worker errors

CAUSES = {
    "raise": r"ZeroDivisionError: the {where} divides by zero",
    "exit": r"exitcode=3",
    "kill": r"SIGKILL",
    "leave": r"SystemExit: the environment leaves",
}


def fail(env_fns, phase, **options):
    """Run into the failure; returns the error and the seconds until it was told."""
    start = time.perf_counter()
    try:
        envs = Multiprocessing(env_fns, **options)
    except WorkerError as error:
        return error, time.perf_counter() - start
    with envs:
        start = time.perf_counter()
        try:
            envs.async_reset(seed=1)
            envs.recv()
            assert phase != "reset"
            start = time.perf_counter()
            while time.perf_counter() < start + 3:  # the failure comes within the first few steps
                envs.send(np.zeros(envs.agents_per_batch, int))
                envs.recv()
        except WorkerError as error:
            seconds = time.perf_counter() - start
            assert multiprocessing.active_children() == []
            for call in (envs.reset, envs.recv, lambda: envs.send(np.zeros(envs.agents_per_batch, int))):
                with pytest.raises(APIUsageError, match="closed"):
                    call()
            envs.close()
            return error, seconds
    raise AssertionError("nothing failed")


def check(error, seconds, where, how, env_index, worker):
    message = str(error)
    assert seconds < 2, message
    assert (error.env_index, error.worker, error.phase) == (env_index, worker, where), message
    assert f"environment {env_index}" in message and f"worker {worker}" in message and where in message
    assert re.search(CAUSES[how].format(where=where), message), message
    assert str(pickle.loads(pickle.dumps(error))) == message
    if how == "raise":
        assert "Traceback" in message and "envs.py" in message


@pytest.mark.parametrize("how", CAUSES)
@pytest.mark.parametrize("where", ["constructor", "reset", "step"])
def test_a_failure_names_env_worker_phase_and_cause(where, how):
    env_fns = [patient] * 2 + [patient, functools.partial(Crashing, where, how, after=4 * (where == "step"))]
    check(*fail(env_fns, where, num_workers=2), where, how, env_index=3, worker=1)


@pytest.mark.parametrize("where", ["constructor", "reset", "step"])
def test_a_failure_names_an_env_that_is_not_its_workers_last(where):
    env_fns = [patient, functools.partial(Crashing, where, after=4 * (where == "step")), patient]
    check(*fail(env_fns, where, num_workers=1), where, "raise", env_index=1, worker=0)


@pytest.mark.parametrize("context", ["forkserver", "spawn"])
@pytest.mark.parametrize("where, how", [("step", "raise"), ("constructor", "kill")])
def test_failures_are_told_under_every_start_method(context, where, how):
    env_fns = [functools.partial(Crashing, where, how), patient]
    error, seconds = fail(env_fns, where, num_workers=2, context=context)
    check(error, seconds if where == "step" else 0, where, how, env_index=0, worker=0)  # starting takes its time


@pytest.mark.parametrize("zero_copy", [True, False])
@pytest.mark.parametrize("how", ["raise", "exit", "kill"])
def test_failures_are_told_among_first_ready_batches(how, zero_copy):
    env_fns = [patient] * 3 + [functools.partial(Crashing, "step", how, after=3)]
    error, seconds = fail(env_fns, "step", num_workers=4, batch_size=2, zero_copy=zero_copy)
    check(error, seconds, "step", how, env_index=3, worker=3)


@pytest.mark.parametrize("how", ["raise", "exit", "kill"])
@pytest.mark.parametrize("where", ["constructor", "reset", "step"])
def test_failures_are_told_while_others_are_busy(where, how):
    hangs = functools.partial(Crashing, where, "hang")
    env_fns = [hangs, functools.partial(Crashing, where, how), hangs]
    check(*fail(env_fns, where, num_workers=3), where, how, env_index=1, worker=1)


def test_a_worker_that_is_killed_between_two_calls_is_missed_at_the_next():
    for pause in (0, 0.3):  # while it still spins, and when it sleeps
        with Multiprocessing([patient] * 4, num_workers=2) as envs:
            envs.reset()
            victim = next(pid for pid in envs.call("pid") if pid != envs.call("pid")[0])
            time.sleep(pause)
            os.kill(victim, signal.SIGKILL)
            start = time.perf_counter()
            with pytest.raises(WorkerError, match="worker 1.*SIGKILL"):
                for _ in range(3):
                    envs.step(np.zeros(4, int))
            assert time.perf_counter() - start < 2


@pytest.mark.parametrize("call", ["reset", "call"])
def test_a_worker_that_is_killed_between_two_calls_is_missed_by_messages_too(call):
    with Multiprocessing([patient] * 4, num_workers=2) as envs:
        envs.reset()
        envs._lines[1].process.kill(), envs._lines[1].process.join()
        with pytest.raises(WorkerError, match="worker 1.*SIGKILL"):
            envs.reset() if call == "reset" else envs.call("pid")


def test_a_worker_that_is_killed_within_a_message_is_told():
    class Talkative(NoOp):
        def step(self, action):
            return *super().step(action)[:4], {"more than a pipe holds": bytes(2**20)}

    with Multiprocessing([Talkative], num_workers=1, infos="all") as envs:
        envs.reset()
        assert len(envs.step(np.zeros(1, int))[4]["more than a pipe holds"][0]) == 2**20
        envs.send(np.zeros(1, int))
        while envs._lines[0].flag[0] != puffer_core.MESSAGE:
            time.sleep(0.01)
        os.kill(envs._lines[0].process.pid, signal.SIGKILL)
        start = time.perf_counter()
        with pytest.raises(WorkerError, match="it died: .*SIGKILL"):
            envs.recv()
        assert time.perf_counter() - start < 2


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_worker_whose_fork_lives_on_is_missed_too(context):
    """As the fork has the worker's end of the pipe, the parent would wait for the rest of a message for ever."""
    with Multiprocessing([Forking], num_workers=1, infos="all", context=context) as envs:
        envs.reset()
        envs.send(np.zeros(1, int))
        while envs._lines[0].flag[0] != puffer_core.MESSAGE:
            time.sleep(0.01)
        (fork,) = [int(pid) for pid in children(envs._lines[0].process.pid)]
        os.kill(envs._lines[0].process.pid, signal.SIGKILL)
        start = time.perf_counter()
        try:
            with pytest.raises(WorkerError, match="it died: .*SIGKILL"):
                envs.recv()
            assert time.perf_counter() - start < 2 and stat(fork)
        finally:
            os.kill(fork, signal.SIGKILL)


def test_signals_without_a_name_are_told_too():
    class Shot(NoOp):
        def step(self, action):
            os.kill(os.getpid(), signal.SIGRTMIN + 6)

    with Multiprocessing([Shot], num_workers=1) as envs:
        envs.reset()
        with pytest.raises(WorkerError, match=f"exitcode=-{signal.SIGRTMIN + 6}"):
            envs.step(np.zeros(1, int))


def test_a_failing_autoreset_is_told():
    class OneEpisode(Counter):
        def reset(self, **arguments):
            if self.episode == 0:
                raise KeyError("no second episode")
            return super().reset(**arguments)

    with Multiprocessing([patient, lambda: OneEpisode(2)], num_workers=2) as envs:
        envs.reset()
        envs.step(np.zeros(2, int))
        with pytest.raises(WorkerError, match="(?s)environment 1 .*no second episode"):
            envs.step(np.zeros(2, int))


def test_a_wrong_observation_is_told_with_its_path():
    class Grows(NoOp):
        def step(self, action):
            return np.zeros(5, np.uint8), 0.0, False, False, {}

    for backend, error in ((Serial, ValueError), (functools.partial(Multiprocessing, num_workers=2), WorkerError)):
        with backend([NoOp, Grows]) as envs:
            envs.reset()
            with pytest.raises(error, match=r"(?s)observation.*\(4,\).*\(5,\)"):
                envs.step(np.zeros(2, int))


def test_serial_lets_exceptions_through_as_they_are():
    for where, after in (("constructor", 0), ("reset", 0), ("step", 2)):
        with pytest.raises(ZeroDivisionError, match=where):
            envs = Serial([patient, functools.partial(Crashing, where, after=after)])
            envs.reset()
            for _ in range(3):
                envs.step(np.zeros(2, int))


class Interrupted(collections.deque):
    """As if Ctrl-C came when the first item has just been taken."""

    def popleft(self):
        super().popleft()
        raise KeyboardInterrupt


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_recv_that_is_interrupted_with_a_batch_in_hand_asks_for_a_reset(batch_size):
    """As its environments are neither ready nor at work, they would otherwise wait for ever."""
    with Multiprocessing([patient] * 2, num_workers=2, batch_size=batch_size) as envs:
        envs.async_reset(seed=1)
        envs._ready = Interrupted()
        with pytest.raises(KeyboardInterrupt):
            envs.recv()
        for call in (envs.recv, lambda: envs.send(np.zeros(batch_size, int))):
            with pytest.raises(puffer_core.APIUsageError, match=r"async_reset\(\) is due"):
                call()
        envs._ready = collections.deque()
        assert envs.reset(seed=1)[0].shape == (batch_size, 5)


def test_a_recv_that_is_interrupted_can_be_called_again():
    with Multiprocessing([functools.partial(Counter, 99, delay=0.2)] * 2, num_workers=2) as envs:
        envs.reset()
        envs.send(np.zeros(2, int))
        before = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(ArithmeticError("tick")))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(ArithmeticError, match="tick"):
            envs.recv()
        signal.signal(signal.SIGALRM, before)
        assert envs.recv().observations[:, 2].tolist() == [1, 1]  # an exception from outside loses nothing


def test_after_ctrl_c_before_a_worker_is_rung_it_closes():
    envs = Multiprocessing([patient] * 2, num_workers=2)
    envs.reset()
    line, ring, rings = envs._lines[1], envs._lines[1].worker_bell.release, iter([False, True, True])

    def release():
        if not next(rings):
            raise KeyboardInterrupt
        ring()

    with mock.patch.object(line, "worker_bell") as bell, pytest.raises(KeyboardInterrupt):
        bell.release = release
        envs.send(envs.action_space.sample())
    assert envs.closed and line.process.exitcode == 0  # it was not killed, though its flag was set without a ring


def test_after_a_send_that_is_interrupted_halfway_a_reset_waits_for_all():
    with Multiprocessing([Napping] * 2, num_workers=2) as envs:
        envs.reset(seed=[0, 0])
        request = envs._request
        with mock.patch.object(envs, "_request", side_effect=[request(0, "step"), KeyboardInterrupt]):
            with pytest.raises(KeyboardInterrupt):
                envs.send(np.zeros(2, int))
        assert envs.reset(seed=[0, 3])[0][:, 0].tolist() == [0, 3]  # the second takes 0.3 s


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_ctrl_c_within_the_constructor_leaves_no_worker(context):
    process = multiprocessing.get_context(context).Process
    start = process.start

    def interrupt(self):
        start(self)
        raise KeyboardInterrupt

    with mock.patch.object(process, "start", interrupt):
        try:
            Multiprocessing([NoOp] * 2, num_workers=2, context=context)
        except KeyboardInterrupt:
            pass  # with which the last reference to what was begun goes
    gc.collect()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("delay", [0.0, 0.1])
def test_a_worker_that_ctrl_c_hides_amid_its_fork_ends_and_disturbs_no_other(delay, monkeypatch):
    fork, hidden = os.fork, []

    def interrupted_fork():
        if (pid := fork()) == 0:
            time.sleep(delay)  # as on a busy machine
            return 0
        monkeypatch.undo(), hidden.append(pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fork", interrupted_fork)
    try:
        Multiprocessing([patient] * 2, num_workers=2, context="fork")
    except KeyboardInterrupt:
        pass  # with which the last reference to what was begun goes
    gc.collect()
    with Multiprocessing([patient] * 2, num_workers=2, context="fork") as envs:  # has its semaphores and flags
        envs.reset(seed=1)
        deadline, steps = time.perf_counter() + 2 * delay + 0.5, 0
        while time.perf_counter() < deadline:
            steps += 1
            assert envs.step(np.zeros(2, int))[0][:, 2].tolist() == [steps % 1000] * 2
    assert await_end(hidden, 5) == []
    os.waitpid(hidden[0], 0)


def test_an_error_keeps_no_memory():
    """Not even until the garbage collector comes, as rows may be large."""
    gc.disable()
    try:
        with pytest.raises(WorkerError), Multiprocessing([functools.partial(Crashing, "step")] * 2, 2) as envs:
            envs.reset()
            envs.step(np.zeros(2, int))
        rows = weakref.ref(envs)
        del envs
        assert rows() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("call", ["reset", "call"])
def test_after_ctrl_c_no_call_waits_for_ever(call):
    """Wherever it came: all goes on, or all is closed (where half a message is lost, or a ring)."""

    class Talkative(NoOp):
        def reset(self, **arguments):
            return super().reset(**arguments)[0], {"more than a pipe holds": bytes(300_000)}

        def answer(self, question):
            return question

    def tick(*_):
        raise KeyboardInterrupt

    envs, question, interrupts, closings = None, np.zeros(300_000, np.uint8), 0, 0
    generator, before, start = np.random.default_rng(1), signal.signal(signal.SIGALRM, tick), time.perf_counter()
    try:
        while time.perf_counter() < start + 6:
            if envs is None or envs.closed:
                envs = Multiprocessing([Talkative] * 4, num_workers=4, infos="all")
            try:
                signal.setitimer(signal.ITIMER_REAL, generator.uniform(1e-4, 2e-2))
                while True:
                    envs.reset() if call == "reset" else envs.call("answer", question)
            except KeyboardInterrupt:
                interrupts += 1
            closings += envs.closed
            envs.closed or envs.reset()  # which hangs if ever one is torn: the test's timeout ends that
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0), signal.signal(signal.SIGALRM, before)
        envs.close()
    assert interrupts > 5 and closings > 0


# -------------------------------------------------------------------------------------------------------------- closing


def events(path):
    return sorted(Path(path).read_text().splitlines())


def test_closing_is_idempotent_and_closes_every_env_once(tmp_path):
    path = str(tmp_path / "events")
    envs = Multiprocessing([functools.partial(Marker, path, name) for name in range(4)], num_workers=2)
    envs.close()  # before any reset
    envs.close()
    assert events(path) == [f"{event} {name}" for event in ("closed", "constructed") for name in range(4)]
    assert envs.closed


@pytest.mark.parametrize("zero_copy", [True, False])
def test_closing_in_mid_step_lets_the_step_end_and_closes_every_env(tmp_path, zero_copy):
    path = str(tmp_path / "events")
    env_fns = [functools.partial(Marker, path, name, delay=0.3) for name in range(2)]
    with Multiprocessing(env_fns, num_workers=2, batch_size=1, zero_copy=zero_copy) as envs:
        envs.async_reset()
        envs.recv()
        envs.send(np.zeros(1, int))
        start = time.perf_counter()
    assert time.perf_counter() - start < 1.5
    assert events(path)[:2] == ["closed 0", "closed 1"] and len(events(path)) == 4


def test_one_env_that_cannot_close_does_not_keep_the_others_from_it(tmp_path):
    path = str(tmp_path / "events")

    class Clings(Counter):
        def close(self):
            raise OSError("no")

    for backend in (Serial, functools.partial(Multiprocessing, num_workers=1)):
        with backend([Clings, lambda: Marker(path, 1), Clings]) as envs:
            assert envs.num_envs == 3
    assert events(path) == ["closed 1"] * 2 + ["constructed 1"] * 2


def test_closing_ends_envs_that_hang_and_that_cannot_be_terminated():
    envs = Multiprocessing([functools.partial(Crashing, "step", "spin"), Stubborn], num_workers=2)
    envs.reset()
    pids = [process.pid for process in multiprocessing.active_children()]
    envs.send(np.zeros(2, int))
    start = time.perf_counter()
    envs.close(timeout=0.2)
    assert time.perf_counter() - start < 4 and await_end(pids, 0) == []


def test_closing_waits_for_no_message_that_nobody_reads(tmp_path):
    """Workers of a later fork hold no end of an earlier one's pipe, or its worker would never find it closed."""
    path = str(tmp_path / "events")

    class Talkative(Marker):
        def step(self, action):
            return *super().step(action)[:4], {"more than a pipe holds": bytes(2**20)}

    env_fns = [functools.partial(Talkative, path, name) for name in range(2)]
    envs = Multiprocessing(env_fns, num_workers=2, infos="all", context="fork")
    with Multiprocessing([NoOp], num_workers=1, context="fork"):
        envs.reset()
        envs.send(np.zeros(2, int))
        while any(line.flag[0] != puffer_core.MESSAGE for line in envs._lines):
            time.sleep(0.01)
        start = time.perf_counter()
        envs.close()
        seconds = time.perf_counter() - start
    assert seconds < 2 and [line.process.exitcode for line in envs._lines] == [0, 0]
    assert events(path)[:2] == ["closed 0", "closed 1"]


@pytest.mark.filterwarnings("error")  # whoever asks for it need not be told
def test_closing_at_once_waits_for_nobody():
    envs = Multiprocessing([Stubborn] * 2, num_workers=2)
    envs.reset()
    pids = [process.pid for process in multiprocessing.active_children()]
    envs.send(np.zeros(2, int))
    start = time.perf_counter()
    envs.close(terminate=True)
    assert time.perf_counter() - start < 2 and await_end(pids, 0) == []


def test_closing_waits_for_what_environments_save(tmp_path):
    path = str(tmp_path / "events")
    envs = Multiprocessing([functools.partial(SlowToClose, path, name) for name in range(8)], num_workers=2)
    envs.reset()
    envs.close()  # each worker has four, which take a second each
    assert events(path).count("closed 0") == 1 and sum(event.startswith("closed") for event in events(path)) == 8


def test_processes_that_environments_leave_behind_delay_nothing():
    envs = Multiprocessing([Leaving] * 4, num_workers=4)
    envs.reset()
    start = time.perf_counter()
    envs.close()
    assert time.perf_counter() - start < 1
    envs = Multiprocessing([Leaving] * 4, num_workers=4)
    envs.reset()
    os.kill(envs._lines[0].process.pid, signal.SIGKILL)
    start = time.perf_counter()
    with pytest.raises(WorkerError, match="it died: .*SIGKILL"):
        while True:
            envs.step(np.zeros(4, int))
    assert time.perf_counter() - start < 2


def test_a_forgotten_vectorizer_closes_its_envs(tmp_path):
    path = str(tmp_path / "events")
    envs = Multiprocessing([functools.partial(Marker, path, name) for name in range(2)], num_workers=2)
    envs.reset()
    del envs
    assert events(path)[:2] == ["closed 0", "closed 1"]


# -------------------------------------------------------------------------------------------------------------- parents

SCRIPT = """
import multiprocessing, os, sys, time
import numpy as np
from puffer_core import Multiprocessing
from tests.envs import Counter, Crashing, Stubborn

def main():
    {setup}
    envs = Multiprocessing(env_fns, num_workers=2, context={context!r})
    envs.reset(seed=1)
    print(*[process.pid for process in multiprocessing.active_children()], flush=True)
    {body}

if __name__ == "__main__":
    main()
"""
COUNTERS = "env_fns = [lambda: Counter(1000)] * 2"
LOOP = "while True: envs.step(np.zeros(2, int))"


def start_script(tmp_path, body, setup=COUNTERS, context="fork"):
    """Start a script in a process group of its own; returns it, and the workers that it started."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(body=body, setup=setup, context=context))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    own = {"start_new_session": True, "preexec_fn": heed_ctrl_c}
    script = subprocess.Popen([sys.executable, path], cwd=ROOT, env=environment, **own, **pipes)
    scripts_started.append(script)
    workers = [int(pid) for pid in script.stdout.readline().split()]
    assert len(workers) == 2, script.communicate(timeout=5)[1]
    return script, workers


def hanging(how):
    return f"env_fns = [lambda: Crashing('step', {how!r})] * 2"


ORPHANS = {
    "stepping": (COUNTERS, LOOP, "fork"),
    "idle": (COUNTERS, "time.sleep(60)", "fork"),
    "hanging": (hanging("hang"), LOOP, "fork"),
    "locked up": (hanging("lock up"), LOOP, "fork"),
    "not to be terminated": ("env_fns = [Stubborn] * 2", LOOP, "fork"),
    "hanging, forkserver": (hanging("hang"), LOOP, "forkserver"),
    "idle, spawn": (COUNTERS, "time.sleep(60)", "spawn"),
}


def test_workers_die_with_a_parent_that_is_killed(tmp_path):
    scripts = {}
    for name, (setup, body, context) in ORPHANS.items():
        (tmp_path / name).mkdir()
        scripts[name] = start_script(tmp_path / name, body, setup, context)
    time.sleep(0.5)
    named = {}
    for name, (script, workers) in scripts.items():
        assert all(stat(pid) for pid in workers)
        named[name] = named_memory(script.pid).union(*map(named_memory, workers))
    # But for fork, a semaphore keeps its name while it is used; Python's resource tracker takes it away.
    assert not set().union(*[files for name, files in named.items() if ORPHANS[name][2] == "fork"])
    for script, _ in scripts.values():
        script.kill()
    deadline = time.perf_counter() + 3
    alive = {name: await_end(workers, deadline - time.perf_counter()) for name, (_, workers) in scripts.items()}
    for script, workers in scripts.values():
        for pid in await_end(workers, 0):
            os.kill(pid, signal.SIGKILL)
        script.communicate(timeout=10)
    assert not any(alive.values()), alive
    assert not [file for files in named.values() for file in files if file.exists()]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_outlive_the_thread_that_started_them(context):
    made = []
    thread = threading.Thread(target=lambda: made.append(Multiprocessing([patient] * 2, 2, context=context)))
    thread.start(), thread.join()
    with made[0] as envs:
        time.sleep(0.1)  # in which the kernel may tell them
        assert envs.reset(seed=1)[0][:, 0].tolist() == [1, 2]


def test_a_fork_of_the_parent_cannot_close_its_workers():
    with Multiprocessing([patient] * 2, num_workers=2) as envs:
        envs.reset(seed=1)
        if (fork := os.fork()) == 0:
            with contextlib.suppress(BaseException):
                envs.close(timeout=0)
            os._exit(0)
        os.waitpid(fork, 0)
        for step in (1, 2):
            assert envs.step(np.zeros(2, int))[0][:, [0, 2]].tolist() == [[1, step], [2, step]]


@pytest.mark.parametrize("setup, context", [(COUNTERS, "fork"), (hanging("hang"), "fork"), (COUNTERS, "spawn")])
def test_an_uncaught_exception_ends_the_program(tmp_path, setup, context):
    body = "envs.send(np.zeros(2, int)); raise ValueError('the learner fails')"
    setup = f"import puffer_core; puffer_core.CLOSE_SECONDS = 2.0; {setup}"
    script, workers = start_script(tmp_path, body, setup, context)
    start = time.perf_counter()
    _, errors = script.communicate(timeout=30)
    assert time.perf_counter() - start < 5 and script.returncode == 1
    assert errors.count("Traceback") == 1 and errors.strip().endswith("ValueError: the learner fails")
    assert "resource_tracker" not in errors and await_end(workers, 0) == []


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.parametrize("body", [LOOP, "time.sleep(60)"], ids=["stepping", "idle"])
def test_ctrl_c_gives_one_traceback(tmp_path, body, context):
    script, workers = start_script(tmp_path, body, context=context)
    time.sleep(0.3)
    os.killpg(script.pid, signal.SIGINT)  # as a terminal does it: to all of them
    start = time.perf_counter()
    _, errors = script.communicate(timeout=30)
    assert time.perf_counter() - start < 5 and script.returncode != 0
    assert errors.count("Traceback") == 1 and errors.strip().endswith("KeyboardInterrupt"), errors
    assert await_end(workers, 0) == []


def test_a_second_ctrl_c_ends_what_the_first_waits_for(tmp_path):
    script, workers = start_script(tmp_path, "envs.step(np.zeros(2, int))", hanging("hang"))
    for pause in (0.5, 1.0):
        time.sleep(pause)
        os.killpg(script.pid, signal.SIGINT)
    start = time.perf_counter()
    script.communicate(timeout=30)
    assert time.perf_counter() - start < 1.5 and script.returncode != 0 and await_end(workers, 0) == []


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_sigterm_to_all_leaves_the_parent_its_workers(tmp_path, context):
    setup = "import signal; told = []; signal.signal(signal.SIGTERM, lambda *_: told.append(1)); " + COUNTERS
    body = "while not told: envs.step(np.zeros(2, int))\n    print(envs.step(np.zeros(2, int))[0][:, 0], flush=True)"
    script, workers = start_script(tmp_path, body, setup, context)
    os.killpg(script.pid, signal.SIGTERM)  # as `timeout`, SLURM and torchrun do it
    output, errors = script.communicate(timeout=30)
    assert (script.returncode, output, errors) == (0, "[1 2]\n", "") and await_end(workers, 0) == []


@pytest.mark.parametrize("context", ["fork", "forkserver", "spawn"])
def test_a_program_may_end_without_closing(tmp_path, context):
    script, workers = start_script(tmp_path, "envs.step(np.zeros(2, int))", context=context)
    _, errors = script.communicate(timeout=30)
    assert (script.returncode, errors) == (0, "") and await_end(workers, 0) == []


def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    path = tmp_path / "script.py"
    code = "from puffer_core import Multiprocessing\nfrom tests.envs import Counter\n"
    path.write_text(code + "Multiprocessing([Counter] * 2, num_workers=2, context='spawn')\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=30, cwd=ROOT, env=environment)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "WorkerError" in last and "__main__" in last, done.stderr


# -------------------------------------------------------------------------------------------------------------- manners


def cpu_seconds(pid):
    fields = stat(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_idle_workers_rest_and_wake_quickly():
    """They rest from some milliseconds after a step on, and need no look at a clock to wake, as polling would."""
    with Multiprocessing([patient] * 2, num_workers=2) as envs:
        envs.reset()
        pids, tries = [process.pid for process in multiprocessing.active_children()], []
        for _ in range(3):
            envs.step(np.zeros(2, int))
            time.sleep(0.01)
            before = [cpu_seconds(pid) for pid in pids]
            time.sleep(2)
            busy, woken = max((cpu_seconds(pid) - was) / 2 for pid, was in zip(pids, before)), []
            for _ in range(15):
                time.sleep(0.02)
                start = time.perf_counter()
                envs.step(np.zeros(2, int))
                woken.append(time.perf_counter() - start)
            tries.append((busy, float(np.median(woken))))
            if min(busy for busy, _ in tries) < 0.02 and min(woken for _, woken in tries) < 0.003:
                return
    raise AssertionError(f"share of a core, seconds of a step after a pause: {tries}")


def test_whoever_waited_long_blocks_at_once():
    """A learner that takes 3 ms a step has the cores: its workers do not yield for a third of that."""
    with Multiprocessing([patient] * 2, num_workers=2) as envs:
        envs.reset()
        pids = [process.pid for process in multiprocessing.active_children()]
        for steps in (10, 300):  # the first few tell the workers how long waits are
            before = sum(map(cpu_seconds, pids))
            for _ in range(steps):
                time.sleep(3e-3)
                envs.step(np.zeros(2, int))
        busy = sum(map(cpu_seconds, pids)) - before
    assert busy < 0.5 * 300 * len(pids) * 1e-3, f"{busy} s for 300 steps of 2 workers"


def test_a_ring_that_comes_too_late_wakes_nobody_for_ever():
    """As of a worker that lost its core between flag and ring for so long that its reply was collected."""
    with Multiprocessing([functools.partial(Counter, 1000, delay=0.02)] * 2, num_workers=2) as envs:
        envs.reset(), envs.step(np.zeros(2, int))
        envs._bell.release()
        before = time.process_time()
        for _ in range(20):
            envs.step(np.zeros(2, int))
        assert time.process_time() - before < 0.5 * 20 * 0.02


def test_no_wake_up_is_lost():
    """Steps and pauses of about the time after which a waiter goes to sleep: whoever missed a ring would sleep on."""
    rng, late = np.random.default_rng(0), []
    make = functools.partial(Counter, 10_000, delay=puffer_core.SPIN_SECONDS)
    with Multiprocessing([make] * 2, num_workers=2) as envs:
        envs.reset()
        for _ in range(400):
            time.sleep(rng.random() * 2 * puffer_core.SPIN_SECONDS)
            start = time.perf_counter()
            envs.step(np.zeros(2, int))
            late.append(time.perf_counter() - start > 0.8 * puffer_core.BLOCK_SECONDS)
    assert sum(late) <= 2  # a busy machine may hold up one or two


def test_workers_that_wait_for_a_reset_rest_too():
    with Multiprocessing([patient] * 2, num_workers=2) as envs:
        assert envs.num_workers == 2
        pids = [process.pid for process in multiprocessing.active_children()]
        time.sleep(0.5)
        before = [cpu_seconds(pid) for pid in pids]
        time.sleep(1)
        assert max(cpu_seconds(pid) - was for pid, was in zip(pids, before)) <= 0.03


def test_a_parent_that_waits_for_slow_envs_rests():
    with Multiprocessing([functools.partial(Counter, 1000, delay=0.01)] * 2, num_workers=2) as envs:
        envs.reset()
        start, spent = time.perf_counter(), time.process_time()
        for _ in range(60):
            envs.step(np.zeros(2, int))
        share = (time.process_time() - spent) / (time.perf_counter() - start)
    assert share < 0.3


def test_a_library_that_is_broken_does_not_keep_workers_from_starting(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", types.ModuleType("cv2"))  # has no setNumThreads
    with Multiprocessing([patient] * 2, num_workers=2, context="fork") as envs:
        assert envs.reset()[0][:, 1].tolist() == [0, 0]


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="only Linux has it")
def test_workers_do_not_take_the_core_of_the_parent_that_wakes_them():
    before = os.sched_getscheduler(0)
    with Multiprocessing([patient] * 2, num_workers=2) as envs:
        envs.reset()
        assert [os.sched_getscheduler(line.process.pid) for line in envs._lines] == [os.SCHED_BATCH] * 2
    assert os.sched_getscheduler(0) == before


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_use_one_thread_and_the_parent_keeps_its_own(context):
    torch = pytest.importorskip("torch")
    cv2 = pytest.importorskip("cv2")
    before, environment = (torch.get_num_threads(), cv2.getNumThreads()), dict(os.environ)
    try:
        torch.set_num_threads(2), cv2.setNumThreads(2)
        with Multiprocessing([Threads], context=context) as envs:
            assert envs.call("threads") == ({"torch": 1, "cv2": 1, "OMP_NUM_THREADS": "1"},)
        assert (torch.get_num_threads(), cv2.getNumThreads()) == (2, 2) and dict(os.environ) == environment
    finally:
        torch.set_num_threads(before[0]), cv2.setNumThreads(before[1])
