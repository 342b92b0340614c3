"""README's examples run as they are written."""

import re
import subprocess
import sys

from running import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
FIRST_READY = """
import gymnasium, numpy, puffer_core
env_fns = [lambda: gymnasium.make("CartPole-v1")] * 8
policy = lambda observations: numpy.zeros(len(observations), int)
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_tests_it_names_exist():
    named = re.findall(r"\[`(\w+)`\]\((tests/\w+\.py)\)", (ROOT / "README.md").read_text())
    assert len(named) > 10
    assert [name for name, path in named if f"def test_{name}(" not in (ROOT / path).read_text()] == []


def test_the_numbers_on_the_first_screen_are_those_of_its_tables():
    text = (ROOT / "README.md").read_text()
    said = re.search(r"\[(\S+) times\]\(#speed\) as fast [^()]* on Breakout, (\S+) times on MiniHack", text).groups()
    for row, times in zip(("| Breakout, 64 envs", "| MiniHack River, 48 envs"), said):
        (line,) = [line for line in text.splitlines() if line.startswith(row)]
        over_async, over_sync = [float(cell) for cell in re.findall(r"\((?:~|\*)*([\d.]+)", line)[:2]]
        assert f"{min(over_async, over_sync):.1f}" == times
    added = re.search(r"(\d+) new\s+lines\s+for the vectorizer, (\d+) for emulation", text).groups()
    for script, count in zip(("puffer_ppo_atari.py", "puffer_ppo_minihack.py"), added):
        assert re.search(rf"^\| \[`{script}`\].* -\d+ \+{count} \|", text, re.MULTILINE)


def test_emulation():
    run(BLOCKS[0] + "\nassert player_sum.shape == () and row.shape == (3,)")


def test_vectorization():
    run(BLOCKS[1] + "\n    assert observations.shape == (8, 4)")


def test_first_ready():
    assert "while True:" in BLOCKS[2]
    loop = BLOCKS[2].replace("while True:", "for _ in range(50):")  # the example never ends
    run(FIRST_READY + loop + "\nassert observations.shape == (4, 4) and len(set(agent_ids)) == 4\nenvs.close()")


def test_your_own_gymnasium_environment():
    lines = BLOCKS[3].partition('if __name__ == "__main__":\n')[2].splitlines()
    assert len(lines) == 5  # as the heading says
    run(BLOCKS[3] + "        assert observations['view'].shape == (8, 2) and observations['place'].shape == (8,)")


def test_your_own_pettingzoo_environment():
    lines = BLOCKS[4].partition('if __name__ == "__main__":\n')[2].splitlines()
    assert len(lines) == 5
    run(BLOCKS[4] + "        assert observations.shape == rows.shape == (24, 18)")
