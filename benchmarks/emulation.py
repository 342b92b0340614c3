"""How long it takes to flatten an observation and to unpack it again, against gymnasium and against bare numpy.

    python -m benchmarks.emulation            # about a minute; writes benchmarks/results/emulation.json
    python -m benchmarks.emulation --quick    # a few seconds

All contenders of a case run in this process and take turns: A B C A B C. "Bare" is the limit: code written by hand for
the one space, that assigns leaf by leaf into views bound beforehand, or slices at offsets known beforehand.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from gymnasium import spaces
from rich.progress import track

from benchmarks import environments, records
from puffer_core import Layout

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
    results: Path = records.RESULTS
    """where the JSON file goes"""


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
        "MiniHack, new arrays": (env.observation_space, fresh),
        "MiniHack, arrays filled anew": (env.observation_space, fresh[:1] * SAMPLES),
        "Blackjack": (blackjack, [blackjack.sample() for _ in range(SAMPLES)]),
    }


def bare_flatten(layout: Layout, row: np.ndarray) -> Callable:
    """Return leaf by leaf assignment into views that are bound to one row."""
    struct = row.view(layout.dtype)[0]
    if isinstance(layout.space, spaces.Dict):
        pairs = [(key, struct[key]) for key in layout.dtype.names]
    else:
        pairs = [(index, row.view(layout.dtype)[name]) for index, name in enumerate(layout.dtype.names)]

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
    """Read every leaf, as a network would: a compiled function that only makes views would do nothing at all."""
    leaves = tree.values() if isinstance(tree, dict) else tree
    return sum(leaf.float().reshape(BATCH, -1).sum(1) for leaf in leaves)


def cases() -> dict[str, dict[str, Callable]]:
    """Return contenders by case; each is a function without arguments."""
    found = {}
    for name, (space, samples) in observations().items():
        layout, turn = Layout(space), cycle(samples).__next__
        row, rows = layout.flatten(samples[0]), np.array([layout.flatten(samples[i % SAMPLES]) for i in range(BATCH)])
        out, bare = np.zeros_like(row), bare_flatten(layout, np.zeros_like(row))
        found[f"flatten, {name}"] = {
            "bare numpy": lambda bare=bare, turn=turn: bare(turn()),
            "Puffer": lambda layout=layout, turn=turn, out=out: layout.flatten(turn(), out),
            "gymnasium": lambda space=space, turn=turn: spaces.flatten(space, turn()),
        }
        if "filled anew" in name:
            continue  # a row does not tell
        flat, unflatten = spaces.flatten(space, samples[0]), bare_unflatten(layout, np.dtype)
        found[f"unflatten, {name.partition(',')[0]}, one row"] = {
            "bare numpy": lambda unflatten=unflatten, row=row: unflatten(row),
            "Puffer": lambda layout=layout, row=row: layout.unflatten(row),
            "gymnasium": lambda space=space, flat=flat: spaces.unflatten(space, flat),
        }
        batch, slices = torch.as_tensor(rows), bare_unflatten(layout, lambda dtype: getattr(torch, dtype))
        assert torch.equal(total(slices(batch)), total(layout.unflatten(batch)))
        read = {
            "bare torch": lambda batch, slices=slices: total(slices(batch)),
            "Puffer": lambda batch, layout=layout: total(layout.unflatten(batch)),
        }
        compiled = {name: torch.compile(function, fullgraph=True) for name, function in read.items()}
        for mode, functions in (("eager", read), ("compiled", compiled)):
            calls = {name: lambda function=function, batch=batch: function(batch) for name, function in functions.items()}
            found[f"unflatten and read, {name.partition(',')[0]}, {BATCH} rows, torch {mode}"] = calls
    return found


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
    head = {"benchmark": "emulation", "unit": "microseconds a call", "rounds": args.rounds, "seconds": seconds}
    records.write(args.results / "emulation.json", {**head, **source, "records": entries})


if __name__ == "__main__":
    main()
