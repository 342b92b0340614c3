"""Writes the results into BENCHMARKS.md and README.md, and draws all charts, from the JSON files alone.

    python -m benchmarks.report

Nothing is measured here and no number is typed in: the same JSON gives the same pages, which a test holds them to.
"""

import itertools
import json
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import tyro

from benchmarks import charts
from benchmarks.charts import OURS, color, limit, short, span
from benchmarks.contenders import ENVIRONMENTS
from benchmarks.records import RESULTS, ROOT, label

PAGES = {"BENCHMARKS.md": "results", "README.md": "speed"}  # and the name of the section that is written
CHARTS = "benchmarks/charts"
Record = dict[str, Any]


def load(folder: Path) -> dict[str, Record]:
    """Return a folder's results by file name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def by_environment(found: dict[str, Record]) -> dict[str, list[Record]]:
    """Return the vectorizers' results by environment, the fewest environments first."""
    cases = {name: [f"vectorization-{name}-{size}" for size in one.sizes] for name, one in ENVIRONMENTS.items()}
    return {name: own for name, files in cases.items() if (own := [found[file] for file in files if file in found])}


def sweeps(found: dict[str, Record]) -> dict[str, Record]:
    """Return the results by number of workers."""
    return {name: found[name] for name in found if name.startswith("vectorization-workers")}


def places(folder: Path) -> Iterator[tuple[str, dict[str, Record]]]:
    """Yield the results of this machine, and those of others, which have folders of their own."""
    for place in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
        yield str(Path(CHARTS) / place.relative_to(folder)), load(place)


# ------------------------------------------------------------------------------------------------------------- tables


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown, the first column to the left and the others to the right."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *[[*row, *[""] * (len(heads) - len(row))] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(result: Record) -> str:
    """Return what it ran on."""
    hardware = result["hardware"]
    return f"{hardware['cores']} cores, {hardware['cpu']}" + (f", {hardware['gpu']}" if "gpu" in hardware else "")


def source(result: Record) -> str:
    """Return where a table comes from."""
    hardware = result["hardware"]
    return (
        f"`{result['command']}`: {machine(result)}, {hardware['memory_gib']} GiB, "
        f"{result['os']}, Python {result['python']}, commit {result['commit']}, {result['date'][:10]}; "
        f"{result['rounds']} turn{'s' * (result['rounds'] > 1)} of {result['turn']}."
    )


def ratio(ours: Record | None, theirs: Record | None) -> str:
    """Return how many times one median is the other, bold below 1; a ~ says that turns do not agree on who is ahead."""
    if not ours or not theirs:
        return ""
    over = ours["median"] / theirs["median"]
    pairs = list(itertools.product(ours["samples"], theirs["samples"]))
    wins, losses = sum(one > other for one, other in pairs), sum(one < other for one, other in pairs)
    agree = max(wins, losses) >= 0.9 * len(pairs)
    text = f"{'' if agree else '~'}{over:.{2 if over < 10 else 0}f}"
    return f"**{text}**" if over < 1 else text


def share(part: float | None, whole: float | None) -> str:
    """Return a percentage."""
    return f"{100 * part / whole:.{0 if part > whole / 10 else 1}f} %" if part and whole else ""


def spread(record: Record, form: str) -> list[str]:
    """Return the median, and the least and the largest sample."""
    return [f"{record['median']:{form}}", span(record["spread"], form)]


def vectorization(result: Record) -> str:
    """Return a case's table."""
    ours: dict[tuple, list[Record]] = {}  # by kind; in a sweep, by kind and number of workers too
    for record in result["records"]:
        if color(record) == OURS and record["median"] and "infos" not in record["contender"]:
            for key in {(record["kind"], record["workers"]), (record["kind"], None)}:
                ours.setdefault(key, []).append(record)
    fair = min if result["case"].startswith("workers") else max
    rows = []
    for record in result["records"]:
        if not record["median"]:
            rows.append([label(record), record["error"]])
            continue
        like = fair(ours.get((record["kind"], record["workers"]), []), key=itemgetter("median"), default=None)
        compared = "" if color(record) == OURS else ratio(like, record)
        of_limit, cpu = share(record["median"], limit(result)), record["cpu_seconds_per_million_steps"]
        rows.append([label(record), *spread(record, ",.0f"), of_limit, compared, f"{cpu:,.4g}"])
    return table(("", "steps/s", "least to largest", "of the limit", "ours ÷ it", "CPU s a million"), rows)


def emulation(result: Record) -> str:
    """Return the table of flattening and unpacking."""
    ours = {record["case"]: record for record in result["records"] if color(record) == OURS}
    rows = []
    for record in result["records"]:
        compared = "" if color(record) == OURS else ratio(record, ours[record["case"]])
        rows.append([f"{record['case']}: {record['contender']}", *spread(record, ".2f"), compared])
    return table(("", "us a call", "least to largest", "it ÷ ours"), rows)


def training(result: Record) -> str:
    """Return the table of the scripts."""
    rows = []
    for record in result["records"]:
        row, parts = [f"`{record['contender']}`"], record["microseconds_per_step"]
        if record["median"]:
            shares = [share(parts[part], sum(parts.values())) for part in charts.PARTS]
            row += [*spread(record, ",.0f"), str(record["settings"]["num_envs"]), *shares]
        rows.append(row if record["median"] else [*row, record["error"]])
    return table(("", "steps/s", "least to largest", "envs", *charts.PARTS), rows)


def learning(result: Record) -> str:
    """Return the table of what demo.py learns."""
    rows = []
    for record in result["records"]:
        row = [record["contender"], f"`{record['settings']['flags']}`"]
        if record["median"] is None:
            rows.append([*row, record["error"]])
            continue
        ends = sorted(run["end"][:2] for run in record["runs"])
        steps, seconds = zip(*ends)
        speed = statistics.median(run["sps"] for run in record["runs"])
        row += [f"{record['goal']:g}" if record["goal"] is not None else "", *spread(record, ".4g")]
        row += [span(steps, ","), span(seconds, ".0f"), f"{speed:,.0f}"]
        rows.append(row)
    heads = ("", "flags of `demo.py`", "goal", "mean return", "least to largest", "steps", "seconds", "steps/s")
    return table(heads, rows)


# -------------------------------------------------------------------------------------------------------------- pages


def results(folder: Path = RESULTS) -> str:
    """Return the section of BENCHMARKS.md."""
    parts = []
    for place, found in places(folder):
        machines = sorted(set(map(machine, found.values())))
        parts.append(f"## {' and '.join(machines)}")
        for name, own in by_environment(found).items():
            parts.append(f"### {ENVIRONMENTS[name].title}\n\n![{ENVIRONMENTS[name].title}]({place}/{name}.png)")
            parts += [f"**{one['num_envs']} environments**\n\n{vectorization(one)}\n\n{source(one)}" for one in own]
        others = {name: (one["title"], vectorization) for name, one in sweeps(found).items()}
        others |= {"emulation": ("Emulation", emulation), "training": ("Training", training)}
        others |= {"learning": ("Learning", learning)}
        for name in [name for name in others if name in found]:
            title, text = others[name][0], others[name][1](found[name])
            parts.append(f"### {title}\n\n![{title}]({place}/{name}.png)\n\n{text}\n\n{source(found[name])}")
    return "\n\n".join(parts)


def speed(folder: Path = RESULTS) -> str:
    """Return the README's section: every environment, with as many of it as were measured, and where ours is slower."""
    columns = {
        "Gymnasium Async": ("Gymnasium AsyncVectorEnv",),
        "Gymnasium Sync": ("Gymnasium SyncVectorEnv",),
        "SB3": ("SB3 SubprocVecEnv", "SB3 DummyVecEnv"),
        "PufferLib": ("PufferLib",),
        "SuperSuit": ("SuperSuit",),
        "EnvPool, ALE": ("EnvPool (C++)", "ALE vector (C++)"),
    }
    rows, found = [], by_environment(load(folder)).values()
    for result, is_largest in [(one, one is own[-1]) for own in found for one in own]:
        best = charts.best(result["records"])
        ours, theirs = best[0], [[one for one in best if one["contender"] in names] for names in columns.values()]
        cells = [max(own, key=itemgetter("median"), default=None) for own in theirs]
        texts = [f"{short(cell['median'])} ({ratio(ours, cell)}x)" if cell else "" for cell in cells]
        if is_largest or ours["median"] < max(cell["median"] for cell in cells if cell):
            name, of_limit = short(ours["median"]), share(ours["median"], limit(result))
            rows.append([result["title"], name, ours["mode"], of_limit, *texts])
    hardware, version = result["hardware"], result["libraries"]["pufferlib-core"]
    cores = hardware["cores"]
    text = f"""Rows are those of the most environments that were measured, and those where ours is behind. In
parentheses: ours divided by theirs, bold below 1; ~ is uncertain: fewer than nine in ten pairs of turns, one
of ours and one of theirs, agree on who is ahead. Every cell is a library's fastest mode at its best settings,
where BENCHMARKS.md compares mode with mode. Environments of "100 us" compute that long
a step; with a spread of 100 %, times are exponentially distributed; with slow resets, a step in 100 ends the
episode, and the reset takes as long as 100 steps. Of ours, `Serial` steps in this process and "sync" in
workers, all together; "first-ready" returns the half that is ready first, as blocks of neighbors or,
"gathered", from anywhere. If a step takes a few microseconds, workers gain little: try `Serial` too. The
limit is {cores} times one bare process. PufferLib is `pufferlib-core` {version}, a copy that others publish.
Measured on {cores} cores of {hardware['cpu']}; [BENCHMARKS.md](BENCHMARKS.md) has every row, spread and
command, and `make bench` measures anew."""
    return f"""![Agent steps per second by environment and vectorizer]({CHARTS}/speed.png)

{table(("agent steps a second", "ours", "its mode", "of the limit", *columns), rows)}

{textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)}"""


def draw(drawings: Path = ROOT / CHARTS, folder: Path = RESULTS) -> None:
    """Draw all charts."""
    charts.speed(drawings / "speed.png", [own[-1] for own in by_environment(load(folder)).values()])
    for place, found in places(folder):
        place = drawings / Path(place).relative_to(CHARTS)
        for name, own in by_environment(found).items():
            charts.environment(place / f"{name}.png", own)
        for name in sweeps(found):
            charts.sweep(place / f"{name}.png", found[name])
        for name in {"emulation", "training", "learning"} & set(found):
            getattr(charts, name)(place / f"{name}.png", found[name])


def put(text: str, name: str, section: str) -> str:
    """Return a page with what stands between a section's two comments replaced."""
    begin, end = f"<!-- {name}: written by `make charts` -->\n", f"<!-- end of {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"expected one line {begin.strip()} and one {end}")
    return f"{text.partition(begin)[0]}{begin}{section}\n{end}{text.partition(end)[2]}"


def main() -> None:
    """Write the tables of BENCHMARKS.md and README.md, and draw all charts, from the JSON files."""
    draw()
    for (page, name), section in zip(PAGES.items(), (results(), speed())):
        (ROOT / page).write_text(put((ROOT / page).read_text(), name, section))
    print(f"{', '.join(PAGES)} and {CHARTS} are up to date")


if __name__ == "__main__":
    tyro.cli(main)
