"""Emulation at breakpoints: NetHack's nine arrays become one row of bytes, and the same nine arrays again.

Run `python demo_emulation.py`. It stops after each of seven ideas, in Python's debugger: a name shows what it holds,
`c` goes on to the next stop, `q` quits. With PYTHONBREAKPOINT=0 in the environment it runs through.
"""

import bdb
import sys
import warnings
from functools import partial

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from puffer_core import ActionLayout, GymnasiumPufferEnv, Multiprocessing

warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # it is MiniHack that imports it
try:
    import minihack  # noqa: F401  makes its tasks known to gymnasium
except ImportError as error:
    raise SystemExit(f"{error}: install the extra, pip install '.[minihack]'") from None

KEYS = ("glyphs", "chars", "colors", "specials", "blstats", "message", "tty_chars", "tty_colors", "tty_cursor")

console = Console(highlight=False)


def make_env(seed):
    """Makes a task that repeats: MiniHack ignores the seed of reset, and NetHack heeds the moon's phase."""
    return gymnasium.make("MiniHack-River-v0", observation_keys=KEYS, seeds=[seed], fix_moon_phase=True)


def headline(text):
    """Starts an idea."""
    console.rule(f"[bold magenta]{text}", align="left", style="magenta")


def picture(chars, colors):
    """Draws characters in NetHack's colors, which are a terminal's, without blank lines."""
    styles = ["", *[f"color({color})" for color in range(1, 16)]]
    lines = [
        Text.assemble(*[(chr(char), styles[color % 16]) for char, color in zip(chars[line], colors[line])])
        for line in np.flatnonzero((chars != ord(" ")).any(axis=1))
    ]
    return Text("\n").join(lines)


def table(leaves, **columns):
    """Lists arrays or tensors by name; further columns are functions of the name."""
    titles = [column.replace("_", " ") for column in columns]
    rows = Table("name", "shape", "dtype", *titles, box=SIMPLE_HEAD, header_style="bold yellow", show_edge=False)
    for name, leaf in leaves.items():
        rows.add_row(name, str(tuple(leaf.shape)), str(leaf.dtype), *[str(cell(name)) for cell in columns.values()])
    return rows


def some(leaves):
    """Picks an int64, a uint8 and an int16 array."""
    return {name: leaves[name] for name in ("blstats", "chars", "glyphs")}


def look_at(*names):
    """Ends an idea: what is worth a look at its breakpoint."""
    console.print("\n[dim]Look at[/] " + "[dim],[/] ".join(f"[bold cyan]{name}[/]" for name in names) + "\n")


if __name__ == "__main__":
    tell = sys.excepthook
    sys.excepthook = lambda kind, *rest: kind is bdb.BdbQuit or tell(kind, *rest)  # q raises it, which is no error
    console.print("Seven stops in the debugger: a name shows what it holds, c goes on, q quits.\n")

    headline("1. A raw environment")
    env = make_env(seed=7)
    raw, info = env.reset()
    console.print(picture(raw["tty_chars"], raw["tty_colors"]), no_wrap=True, overflow="crop")
    console.print("\nYou are @, and boulders ` pushed into the river } make a way across.")
    console.print("What you see is two of the nine arrays that are one observation:\n")
    console.print(table(raw))
    console.print(f"\nStorage needs one shape, and env.observation_space.shape is {env.observation_space.shape}.")
    look_at("raw", 'raw["blstats"]', "env.observation_space")
    breakpoint()

    headline("2. The emulated environment")
    emulated = GymnasiumPufferEnv(env)
    row, info = emulated.reset()
    console.print("One wrapper, and an observation is one array, as it is in Atari:\n")
    console.print(f"  observation_space  {emulated.observation_space}")
    console.print(f"  action_space       {emulated.action_space}")
    console.print(f"  row                {row}")
    look_at("row", "emulated.observation_space", "emulated.action_space")
    breakpoint()

    headline("3. The layout: where each array lies in a row, and as what")
    layout = emulated.layout
    places = {name: f"{start}:{start + dtype.itemsize}" for name, (dtype, start) in layout.dtype.fields.items()}
    console.print(f"A row is what numpy calls an aligned struct, of {layout.dtype.itemsize} bytes:\n")
    console.print(table(layout.unflatten(row), bytes=places.get))
    look_at("layout.dtype", "layout.flat_space", "places")
    breakpoint()

    headline("4. An observation, flat and unflattened")
    flat = layout.flatten(raw)
    unflattened = layout.unflatten(flat)
    console.print(f"flat[:8] is {flat[:8]}, an int64: blstats[0] = {unflattened['blstats'][0]}, your column.")
    console.print("Unflattened, the arrays are views of the row, and what they were:\n")
    equals_raw = {name: np.array_equal(unflattened[name], raw[name]) for name in raw}
    shares_memory = {name: np.shares_memory(unflattened[name], flat) for name in raw}
    console.print(table(some(unflattened), equals_raw=equals_raw.get, shares_memory_with_flat=shares_memory.get))
    look_at("flat", "unflattened", 'unflattened["chars"]', "equals_raw")
    breakpoint()

    headline("5. A batch from a vectorizer")
    envs = Multiprocessing([partial(make_env, seed) for seed in (7, 8, 9, 10)], num_workers=2)
    observations, infos = envs.reset()
    batch = envs.layout.unflatten(observations)
    console.print(f"Four environments in two processes: {observations.shape} {observations.dtype}.")
    console.print("The same line unflattens them all, the one from above first:\n")
    first_equals_raw = {name: np.array_equal(batch[name][0], raw[name]) for name in raw}
    console.print(table(some(batch), first_equals_raw=first_equals_raw.get))
    river = slice(26, 46)  # columns of the map
    console.print()
    rivers = picture(np.hstack(batch["chars"][..., river]), np.hstack(batch["colors"][..., river]))
    console.print(rivers, no_wrap=True, overflow="crop")
    look_at("observations", "batch", 'batch["blstats"][:, :2]', "first_equals_raw")
    breakpoint()

    headline("6. The batch as tensors")
    tensor = torch.as_tensor(observations)
    tensors = envs.layout.unflatten(tensor)
    console.print("The same again, and this is the line in front of a network:\n")
    equals_batch = {name: np.array_equal(tensors[name], batch[name]) for name in batch}
    console.print(table(some(tensors), equals_batch=equals_batch.get))
    look_at("tensor", "tensors", 'tensors["blstats"].float()', "equals_batch")
    breakpoint()

    headline("7. Nested actions")
    action_space = spaces.Dict(move=spaces.Discrete(8), times=spaces.Discrete(20, start=1), flags=spaces.MultiBinary(2))
    action_layout = ActionLayout(action_space)
    flat_action = np.array([6, 13, 0, 1])
    nested_action = action_layout.unflatten(flat_action)
    console.print("Actions go the other way: a policy chooses a row, the environment gets a Dict.\n")
    console.print(f"  flat_space     {action_layout.flat_space}")
    console.print(f"  flat_action    {flat_action}")
    console.print(f"  nested_action  {nested_action}")
    look_at("action_space", "action_layout.flat_space", "flat_action", "nested_action")
    breakpoint()

    envs.close()
    env.close()
