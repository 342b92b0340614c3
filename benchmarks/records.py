"""What every result carries with it: where it comes from, its samples, and what becomes of them."""

import functools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LIBRARIES = (
    *("numpy", "gymnasium", "torch", "ale-py", "envpool", "nle", "minihack", "pettingzoo", "mpe2"),
    *("stable-baselines3", "supersuit", "pufferlib-core"),
)


def provenance() -> dict[str, Any]:
    """Return the command, date, hardware, system, versions and commit of this run."""
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "hardware": {
            "cpu": _cpu(),
            **_gpu(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        },
        "os": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "commit": commit(),
    }


def version(library: str | None) -> str | None:
    """Return the version of a package that is installed, None if none is; without a name, this project's commit."""
    if library is None:
        return commit()
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Return samples with their median and, as their spread, the least and the largest."""
    return {
        "samples": [float(f"{sample:.5g}") for sample in samples],
        "median": float(f"{statistics.median(samples):.5g}") if samples else None,
        "spread": [float(f"{end:.5g}") for end in (min(samples), max(samples))] if samples else None,
    }


def label(record: dict[str, Any]) -> str:
    """Return what a record is called, in a sweep with its number of workers."""
    workers = record.get("workers")
    return record["contender"] + (f", {workers} worker{'s' * (workers > 1)}" if workers else "")


def write(name: str, result: dict[str, Any], folder: Path | None, quick: bool = False) -> None:
    """Write a result, a record a line, so that a new measurement makes a short diff; a quick one only if asked to."""
    if quick and folder is None:
        return
    path = (folder or RESULTS) / f"{name}.json"
    records = ",\n".join("  " + json.dumps(record) for record in result["records"])
    head = json.dumps({key: value for key, value in result.items() if key != "records"}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head[:-2]},\n "records": [\n{records}\n ]\n}}\n')


def _cpu() -> str:
    lines = [[part.strip() for part in line.partition(":")] for line in _read("/proc/cpuinfo")]
    facts = {name: value for name, _, value in lines}
    name = facts.get("model name") or platform.processor() or platform.machine()  # which may leave much open
    return f"{name}, family {facts['cpu family']}, model {facts['model']}" if "cpu family" in facts else name


def _gpu() -> dict[str, str]:
    """Return the name of the first NVIDIA GPU, as the driver has it: asking torch would start CUDA in this process."""
    paths = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    models = [line.partition(":")[2].strip() for path in paths for line in _read(path) if line.startswith("Model:")]
    return {"gpu": models[0]} if models else {}


def _read(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


@functools.cache
def commit() -> str:
    """Return the commit, with a plus sign if code differs from it."""

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)

    name = git("rev-parse", "--short=10", "HEAD").stdout.strip()
    return name + "+" * bool(git("status", "--porcelain", "--", "*.py").stdout) if name else "unknown"
