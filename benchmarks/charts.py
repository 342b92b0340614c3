"""Draws the charts from what the JSON files hold, and from nothing else; `python -m benchmarks.report` calls it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from benchmarks.records import label

# Blue, two oranges, green, grey: told apart by every kind of color vision (Okabe and Ito, https://jfly.uni-koeln.de/color/)
OURS, ENVPOOL, ALE, PUFFERLIB, OTHERS, INK = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#9A9A9A", "#222222"
PARTS = {"env": OURS, "inference": "#56B4E9", "update": "#D5D5D5"}
STYLE = {
    **{"backend": "agg", "font.family": "DejaVu Sans", "font.size": 10, "savefig.dpi": 130, "ytick.left": False},
    **{"axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "text.color": INK},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.spines.bottom": False, "axes.edgecolor": INK},
}
STEPS = "Agent steps per second, higher is better"
Record = dict[str, Any]


def short(value: float) -> str:
    """Return a number as people say it: 1.83M, 20.3k, 940, 2.4."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def span(values: Sequence[float], form: str) -> str:
    """Return the least and the largest value, or the only one."""
    return " to ".join(dict.fromkeys(f"{end:{form}}" for end in (min(values), max(values))))


def limit(result: Record) -> float | None:
    """Return the number of cores times the speed of one bare process."""
    bare = [record["median"] for record in result["records"] if record["contender"] == "1 bare process"]
    return result["hardware"]["cores"] * bare[0] if bare and bare[0] else None


def color(record: Record) -> str:
    """Return a row's color: this project's, those of the two in C++, PufferLib's, or that of all others."""
    colors = {"puffer_core": OURS, "EnvPool": ENVPOOL, "ALE": ALE, "PufferLib": PUFFERLIB}
    return colors.get(record["contender"].split()[0], OTHERS)


def best(records: Sequence[Record]) -> list[Record]:
    """Return the fastest row of every vectorizer, this project's first; gymnasium's and SB3's two each count as two."""
    pools = {"EnvPool": "EnvPool (C++)", "ALE": "ALE vector (C++)"}
    found: dict[str, Record] = {}
    for record in sorted(records, key=lambda record: -(record["median"] or 0)):
        first = record["contender"].split()[0].strip(",")
        name = record["contender"] if first in ("Gymnasium", "SB3") else pools.get(first, first)
        if record["kind"] != "limit" and record["median"] and name not in found:
            found[name] = {**record, "contender": name, "mode": record["contender"].removeprefix(f"{first} ")}
    return sorted(found.values(), key=lambda record: color(record) != OURS)


def bars(axes: Any, rows: Sequence[Record], title: str, line: float | None = None, places: int = 0) -> None:
    """Draw a bar a record, first on top, with spread and value, and a dashed line for the limit if it is not far."""
    top = max([row["spread"][1] for row in rows if row["spread"]], default=1.0)
    is_near = line and line < 2.5 * top
    axes.set_xlim(0, 1.3 * max(top, line if is_near else 0))
    for place, row in enumerate(rows):
        axes.barh(place, row["median"] or 0, color=color(row), height=0.72)
        low, high = row["spread"] or (0, 0)
        axes.plot([low, high], [place, place], color=INK, linewidth=0.8)
        text = short(row["median"]) if row["median"] else row["error"].partition(":")[0]
        ink, weight = INK if row["median"] else OTHERS, "bold" if color(row) == OURS else "normal"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        _beside(axes, text, (high, place), color=ink, weight=weight, bbox=box, zorder=3)
    if is_near:
        axes.axvline(line, color=INK, linestyle="--", linewidth=1)
    if line:
        where = "dashed" if is_near else "off the chart"
        axes.set_xlabel(f"limit: {short(line)}, {where}", fontsize=8.5, loc="right")
    axes.set_yticks(range(len(rows)), [label(row) for row in rows])
    axes.set_ylim(max(places, len(rows)) - 0.45, -0.55)
    axes.set_xticks([])
    axes.set_title(title)


def _beside(axes: Any, text: str, at: tuple[float, float], **style: Any) -> None:
    axes.annotate(text, at, (5, 0), textcoords="offset points", va="center", fontsize=9, **style)


def panels(path: Path, what: str, titles: Sequence[str], columns: int, size: tuple, draw: Callable) -> None:
    """Write a chart of panels, each of which `draw` fills."""
    with plt.style.context("default"), plt.rc_context(STYLE):  # whatever a person, or an import, has set
        rows = -(-len(titles) // columns)
        figure, grid = plt.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False)
        for index, axes in enumerate(grid.flat):
            if index < len(titles):
                draw(axes, titles[index])
            else:
                axes.axis("off")
        figure.suptitle(what, x=0.01, horizontalalignment="left", fontsize=10.5)
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)


def speed(path: Path, results: Sequence[Record]) -> None:
    """Draw an environment a panel, every vectorizer at its best."""
    by_title = {result["title"]: result for result in results}
    rows = {title: best(result["records"]) for title, result in by_title.items()}
    places = max(map(len, rows.values()))

    def draw(axes: Any, title: str) -> None:
        bars(axes, rows[title], title, limit(by_title[title]), places)

    panels(path, STEPS, list(by_title), 2, (5, 0.6 + 0.25 * places), draw)


def environment(path: Path, results: Sequence[Record]) -> None:
    """Draw all rows of an environment, a panel a number of environments."""
    by_title = {result["title"]: result for result in results}

    def draw(axes: Any, title: str) -> None:
        rows = [record for record in by_title[title]["records"] if record["kind"] != "limit"]
        bars(axes, rows, title, limit(by_title[title]))

    panels(path, STEPS, list(by_title), len(by_title), (5.6, 0.9 + 0.27 * len(results[0]["records"])), draw)


def sweep(path: Path, result: Record) -> None:
    """Draw speed by number of workers, a line a contender; those that cannot choose are dotted across."""
    counts = sorted({record["workers"] for record in result["records"] if record["workers"]})
    lines: dict[str, list[Record]] = {}
    for record in result["records"]:
        if record["kind"] != "limit" and record["median"]:
            lines.setdefault(record["contender"], []).append(record)
    top = limit(result) or 0

    def draw(axes: Any, title: str) -> None:
        ends = [(top, "limit", INK)] if top else []
        axes.axhline(top, color=INK, linestyle="--", linewidth=1, xmax=0.955)
        for name, rows in lines.items():
            shade, chooses = color(rows[0]), rows[0]["workers"]
            fill = "white" if rows[0]["kind"] == "first-ready" else shade
            style = {"marker": "o", "markerfacecolor": fill} if chooses else {"linestyle": ":"}
            speeds = [row["median"] for row in rows] if chooses else [rows[0]["median"]] * len(counts)
            axes.plot(counts[-len(speeds) :], speeds, color=shade, linewidth=2.4 if shade == OURS else 1.4, **style)
            ends.append((speeds[-1], name, shade))
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_ylim(0, 1.1 * max(end for end, *_ in ends))
        axes.yaxis.set_major_formatter(lambda value, _: short(value))
        axes.set_xlabel("workers or threads; first-ready ones hollow")
        axes.set_title(title)
        height = -1.0
        for end, name, shade in sorted(ends):  # names beside their lines, none over another
            height = max(end, height + 0.06 * axes.get_ylim()[1])
            _beside(axes, name, (counts[-1] * 1.04, height), color=shade, weight="bold" if shade == OURS else "normal")

    panels(path, STEPS, [result["title"]], 1, (8, 4.2), draw)


def emulation(path: Path, result: Record) -> None:
    """Draw microseconds a call, a panel a case."""
    cases = list(dict.fromkeys(record["case"] for record in result["records"]))

    def draw(axes: Any, case: str) -> None:
        bars(axes, [record for record in result["records"] if record["case"] == case], case, places=3)

    panels(path, "Microseconds per call, lower is better", cases, 4, (3.4, 1.25), draw)


def training(path: Path, result: Record) -> None:
    """Draw where the time of a step goes, a bar a script."""
    rows = [record for record in result["records"] if record["median"]]

    def draw(axes: Any, title: str) -> None:
        for place, row in enumerate(rows):
            left = 0.0
            for part, shade in PARTS.items():
                width = row["microseconds_per_step"][part] / 1e3
                axes.barh(place, width, left=left, color=shade, height=0.72, label=part if not place else None)
                left += width
            _beside(axes, f"{short(row['median'])} steps/s", (left, place))
        axes.set_yticks(range(len(rows)), [row["contender"] for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.2 * axes.get_xlim()[1])
        axes.set_title(title, pad=12)
        axes.legend(ncols=3, frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 0.98), fontsize=9, borderpad=0)

    panels(path, "Milliseconds per training step, lower is better", [""], 1, (9, 1.2 + 0.34 * len(rows)), draw)


def learning(path: Path, result: Record) -> None:
    """Draw the mean return over steps, a panel a task, one line per seed, and dashed what ends a run."""
    learned = [record for record in result["records"] if record["runs"]]
    rewarded = [record for record in learned if any(mean for run in record["runs"] for *_, mean in run["curve"])]
    by_task = {record["contender"]: record for record in rewarded or learned}  # the others are there for their speed

    def draw(axes: Any, task: str) -> None:
        runs, goal = by_task[task]["runs"], by_task[task]["goal"]
        for run, style in zip(runs, ("-", "--", ":", "-.") * len(runs)):
            steps, _, means = zip(*run["curve"])
            axes.plot(steps, means, style, color=OURS, linewidth=1.4)
        if goal is not None:
            axes.axhline(goal, color=INK, linestyle="--", linewidth=0.8)
        seconds = [run["end"][1] for run in runs]
        axes.set_xlabel(f"steps; {span(seconds, '.0f')} seconds", fontsize=8.5, loc="right")
        axes.xaxis.set_major_formatter(lambda value, _: short(value) if value else "0")
        axes.set_title(task)

    what, columns = "Mean return of the last 100 episodes, one line per seed", min(3, len(by_task))
    panels(path, what, list(by_task), columns, (4, 2.6), draw)
