"""How long it takes to flatten an observation and to unpack it again, and what that adds to a step of the game.

    python -m benchmarks.emulation            # about a minute; writes benchmarks/results/emulation.json
    python -m benchmarks.emulation --quick    # a few seconds

All contenders of a case run in this process and take turns: A B C A B C. "Bare" is the limit: code written by hand for
the one space, that assigns leaf by leaf into views bound beforehand, or slices at offsets known beforehand. Torch
unpacks a batch of rows and reads every leaf, since a compiled function that only makes views does nothing. Steps are
those of one and the same game, by itself and as a worker steps it: with the action looked up, and the row written.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
import tyro
from gymnasium import spaces
from rich.progress import track

from benchmarks import environments, records
from puffer_core import GymnasiumPufferEnv, Layout

BATCH = 64  # rows that a policy unpacks at once
SAMPLES = 64  # different observations, one after another


@dataclass
class Args:
    """Measure emulation."""

    rounds: int = 15
    """turns that each contender gets"""
    seconds: float = 0.15
    """length of a turn, after a warm-up"""
    quick: bool = False
    """turns of 0.01 seconds"""
    results: Path | None = None
    """where the JSON file goes; by default benchmarks/results, and with --quick nowhere"""


def observations() -> dict[str, tuple[spaces.Space, list]]:
    """Return spaces with samples, which may be the same arrays again and again: NetHack fills its own anew."""
    env = environments.minihack()
    seen = [env.reset(seed=1)[0]]
    for action in np.random.default_rng(1).integers(8, size=SAMPLES - 1):
        observation, _, terminated, truncated, _ = env.step(int(action))
        seen.append(env.reset()[0] if terminated or truncated else observation)
    fresh = [{key: value.copy() for key, value in observation.items()} for observation in seen]
    blackjack = spaces.Tuple([spaces.Discrete(32), spaces.Discrete(11), spaces.Discrete(2)])
    blackjack.seed(1)
    return {
        "MiniHack": (env.observation_space, fresh),
        "Blackjack": (blackjack, [blackjack.sample() for _ in range(SAMPLES)]),
        "MiniHack, same arrays": (env.observation_space, fresh[:1] * SAMPLES),
    }


def bare_flatten(layout: Layout, row: np.ndarray) -> Callable:
    """Return leaf by leaf assignment into views that are bound to one row."""
    keys = layout.space.keys() if isinstance(layout.space, spaces.Dict) else range(len(layout.space))
    pairs = [(key, row.view(layout.dtype)[name]) for key, name in zip(keys, layout.dtype.names)]

    def flatten(sample: Any) -> None:
        for key, view in pairs:
            view[...] = sample[key]

    return flatten


def bare_unflatten(layout: Layout, named: Callable) -> Callable:
    """Return slicing at known offsets, for numpy or torch."""
    fields = layout.dtype.fields.items()
    parts = [(key, at, at + one.itemsize, named(one.base.name), one.shape) for key, (one, at) in fields]

    def unflatten(flat: Any) -> dict:
        row = flat.view(named("uint8"))
        return {key: row[..., a:b].view(dtype).reshape(flat.shape[:-1] + shape) for key, a, b, dtype, shape in parts}

    return unflatten


def total(tree: Any) -> torch.Tensor:
    """Read every leaf, as a network would."""
    leaves = tree.values() if isinstance(tree, dict) else tree
    return sum(leaf.float().reshape(BATCH, -1).sum(1) for leaf in leaves)


def cases() -> dict[str, dict[str, Callable]]:
    """Return contenders by case; each is a function without arguments."""
    found = {case: calls for name, seen in observations().items() for case, calls in of(name, *seen)}
    games = {"MiniHack": environments.bare_minihack(), "NetHackWrapper": environments.minihack()}
    return found | {f"step, {name}": steps(env) for name, env in games.items()}


def steps(env: gymnasium.Env) -> dict[str, Callable]:
    """Return steps of one game: by itself, and with what emulation adds to it in a worker."""
    adapter = GymnasiumPufferEnv(env)
    row, _ = adapter.reset(seed=1)
    write, known = adapter.layout.writer(row), adapter.action_layout.valid
    turn = cycle(np.random.default_rng(1).integers(len(known), size=997).tolist()).__next__

    def bare() -> None:
        _, _, terminated, truncated, _ = env.step(turn())
        if terminated or truncated:
            env.reset()

    def emulated() -> None:
        observation, _, terminated, truncated, _ = env.step(known[turn()])
        write(observation)
        if terminated or truncated:
            env.reset()

    return {"bare game": bare, "puffer_core": emulated}


def of(name: str, space: spaces.Space, samples: list) -> Iterator[tuple[str, dict[str, Callable]]]:
    """Yield the cases of one space."""
    layout, turn = Layout(space), cycle(samples).__next__
    row = layout.flatten(samples[0])
    out, bare = np.zeros_like(row), bare_flatten(layout, np.zeros_like(row))
    calls = {"bare numpy": lambda: bare(turn()), "puffer_core": lambda: layout.flatten(turn(), out)}
    yield f"flatten, {name}", {**calls, "gymnasium": lambda: spaces.flatten(space, turn())}
    if samples[0] is samples[1]:
        return  # the way back is the same
    flat, slices = spaces.flatten(space, samples[0]), bare_unflatten(layout, np.dtype)
    calls = {"bare numpy": lambda: slices(row), "puffer_core": lambda: layout.unflatten(row)}
    yield f"unflatten, {name}", {**calls, "gymnasium": lambda: spaces.unflatten(space, flat)}
    rows, sliced = torch.as_tensor(np.array([row] * BATCH)), bare_unflatten(layout, partial(getattr, torch))
    read = {"bare torch": lambda rows: total(sliced(rows)), "puffer_core": lambda rows: total(layout.unflatten(rows))}
    compiled = {who: torch.compile(function, fullgraph=True) for who, function in read.items()}
    for mode, functions in (("", read), (" compiled", compiled)):
        yield f"torch{mode}, {name}", {who: partial(one, rows) for who, one in functions.items()}


def microseconds(call: Callable, seconds: float) -> float:
    """Return what a call takes on average, over so many seconds."""
    now, calls, chunk = time.perf_counter, 0, 10
    start = now()
    while (last := now()) < start + seconds:
        for _ in range(chunk):
            call()
        calls += chunk
    return (last - start) / calls * 1e6


def main() -> None:
    """Measure what the flags say."""
    args = tyro.cli(Args)
    warnings.simplefilter("ignore")  # of libraries, when they are imported
    torch.set_num_threads(1)
    seconds, source, entries = 0.01 if args.quick else args.seconds, records.provenance(), []
    for case, calls in track(cases().items(), description="emulation"):
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            microseconds(call, seconds)
        for _ in range(args.rounds):
            for name, call in calls.items():
                samples[name].append(microseconds(call, seconds))
        for name in calls:
            library = {"gymnasium": "gymnasium"}.get(name)
            found = {"contender": name, "library": library, "settings": {}, "version": records.version(library)}
            entries.append({"case": case, **found, **records.summary(samples[name])})
            print(f"  {case}: {name} {entries[-1]['median']:.2f} us", flush=True)
    head = {"benchmark": "emulation", "unit": "microseconds a call", "rounds": args.rounds, "turn": f"{seconds:g} s"}
    records.write("emulation", {**head, **source, "records": entries}, args.results, args.quick)


if __name__ == "__main__":
    main()
