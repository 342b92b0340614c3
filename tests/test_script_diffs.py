"""Every script is its base plus one named change: this reads the scripts as text and holds them to it.

`python tests/test_script_diffs.py --update` writes the diffs under tests/diffs/ anew. They leave out line numbers, so
an edit that goes into all scripts alike does not touch them, and one that goes into a single script shows in review.
"""

import ast
import difflib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "diffs"

# base, variant, and how many lines may at most be removed and added, the header included
RUNGS = (
    ("vanilla_ppo_atari.py", "ppo_atari.py", 2, 2),
    ("ppo_atari.py", "large_ppo_atari.py", 2, 2),
    ("vanilla_ppo_atari.py", "ppo_atari_envpool.py", 45, 60),
    ("vanilla_ppo_atari.py", "puffer_ppo_atari.py", 3, 8),
    ("puffer_ppo_atari.py", "large_puffer_ppo_atari.py", 3, 3),
    ("vanilla_ppo_atari.py", "ppo_minihack.py", 30, 45),
    ("ppo_minihack.py", "puffer_ppo_minihack.py", 3, 7),
    ("puffer_ppo_minihack.py", "puffer_vec_ppo_minihack.py", 4, 7),
)
SCRIPTS = sorted({script for base, variant, *_ in RUNGS for script in (base, variant)})
ATARI_SCRIPTS = [script for script in SCRIPTS if script.endswith("ppo_atari.py")]
ROOT_SCRIPT = "vanilla_ppo_atari.py"
BASELINES = (
    *("vanilla_ppo_atari.py", "ppo_atari.py", "large_ppo_atari.py", "ppo_atari_envpool.py"),
    "ppo_minihack.py",
)

DEFINITIONS = ["Args", "make_env", "layer_init", "Agent"]
OWN_ARGS = ("env_id", "num_envs", "num_workers")  # the arguments that a rung may change
LACKS = {"ppo_atari_envpool.py": ("make_env", "capture_video")}  # EnvPool makes its environments itself, all at once
FROZEN_FROM = "        # Generalized advantage estimation"

each_rung = pytest.mark.parametrize("base, variant, max_removed, max_added", RUNGS, ids=lambda value: str(value))
each_script = pytest.mark.parametrize("script", SCRIPTS)


def read(script: str) -> str:
    return (ROOT / script).read_text()


def hunks(base: str, variant: str) -> list[tuple[list[str], list[str]]]:
    """The removed and the added lines of every place where two scripts differ."""
    old, new = read(base).splitlines(), read(variant).splitlines()
    opcodes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return [(old[i1:i2], new[j1:j2]) for tag, i1, i2, j1, j2 in opcodes if tag != "equal"]


def counts(base: str, variant: str) -> tuple[int, int]:
    removed, added = zip(*hunks(base, variant))
    return sum(map(len, removed)), sum(map(len, added))


def zero_context_diff(base: str, variant: str) -> str:
    lines = [f"--- {base}", f"+++ {variant}"]
    for removed, added in hunks(base, variant):
        lines += ["@@", *("-" + line for line in removed), *("+" + line for line in added)]
    return "\n".join(lines) + "\n"


def golden_file(base: str, variant: str) -> Path:
    return GOLDEN / f"{base.removesuffix('.py')}--{variant.removesuffix('.py')}.diff"


def source_of(script: str, name: str) -> str:
    text = read(script)
    node = next(node for node in ast.parse(text).body if getattr(node, "name", None) == name)
    return ast.get_source_segment(text, node)


def shared_args(script: str, lacking: tuple[str, ...] = ()) -> list[str]:
    """The fields of Args with their help strings, less those that a rung may change or a script lacks."""
    text = read(script)
    body = next(node for node in ast.parse(text).body if getattr(node, "name", None) == "Args").body
    fields = [node for node in body if isinstance(node, ast.AnnAssign)]
    helps = [node for node in body if isinstance(node, ast.Expr)]
    assert [node.lineno + 1 for node in fields] == [node.lineno for node in helps], "a help string under each field"
    shared = [pair for pair in zip(fields, helps) if pair[0].target.id not in (*OWN_ARGS, *lacking)]
    return [ast.get_source_segment(text, node) for pair in shared for node in pair]


def imported_modules(script: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(read(script))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}


def bare(lines: list[str]) -> str:
    """What is left of some lines without comments, blanks, trailing commas and the choice of quotes."""
    code = "".join(re.sub(r"(^|\s)#.*", "", line) for line in lines)
    return re.sub(r",(?=[)\]}])", "", re.sub(r"\s", "", code).replace("'", '"'))


@each_rung
def test_the_diff_is_the_reviewed_one(base, variant, max_removed, max_added):
    assert zero_context_diff(base, variant) == golden_file(base, variant).read_text(), (
        "if this change is meant: python tests/test_script_diffs.py --update, and look at git diff tests/diffs"
    )


def test_no_diff_is_left_over():
    assert sorted(GOLDEN.iterdir()) == sorted(golden_file(base, variant) for base, variant, *_ in RUNGS)


@each_rung
def test_the_diff_stays_within_its_budget(base, variant, max_removed, max_added):
    removed, added = counts(base, variant)
    assert 0 < removed <= max_removed and 0 < added <= max_added


@each_rung
def test_no_hunk_is_only_noise(base, variant, max_removed, max_added):
    for removed, added in hunks(base, variant)[1:]:
        assert bare(removed) != bare(added)


@each_rung
def test_line_1_names_the_base(base, variant, max_removed, max_added):
    assert read(variant).startswith(f'"""{base} + ')


def test_the_square_commutes():
    def changes(base, variant):
        return [hunk for hunk in hunks(base, variant)[1:] if "num_workers" not in str(hunk)]

    assert changes("ppo_atari.py", "large_ppo_atari.py") == changes("puffer_ppo_atari.py", "large_puffer_ppo_atari.py")
    assert changes("vanilla_ppo_atari.py", "large_ppo_atari.py")  # the comparison above is not one of nothing


def test_vectorization_is_the_same_change_on_both_ladders():
    def changed_lines(base, variant):
        return [line for removed, added in hunks(base, variant)[1:] for line in removed + added]

    def is_own(line):  # emulation brings the core in one rung, and where the layout lies depends on the vectorizer
        return "layout" in line or line in ("", "import puffer_core")

    atari = changed_lines("vanilla_ppo_atari.py", "puffer_ppo_atari.py")
    minihack = changed_lines("puffer_ppo_minihack.py", "puffer_vec_ppo_minihack.py")
    assert [line for line in minihack if not is_own(line)] == [line for line in atari if not is_own(line)]
    assert any("Multiprocessing" in line for line in minihack)


@each_script
def test_everything_from_the_advantages_on_is_frozen(script):
    text, root = read(script), read(ROOT_SCRIPT)
    assert text.count(FROZEN_FROM) == 1
    assert text[text.index(FROZEN_FROM) :] == root[root.index(FROZEN_FROM) :]


@each_script
def test_layer_init_and_args_are_frozen(script):
    assert source_of(script, "layer_init") == source_of(ROOT_SCRIPT, "layer_init")
    assert shared_args(script) == shared_args(ROOT_SCRIPT, LACKS.get(script, ()))


@pytest.mark.parametrize("script", ATARI_SCRIPTS)
def test_the_atari_scripts_share_environment_and_agent(script):
    for name in ("make_env", "Agent"):
        assert source_of(script, name) == source_of(ROOT_SCRIPT, name)


@each_script
def test_a_script_defines_four_names_and_a_main_block(script):
    *others, main = ast.parse(read(script)).body
    expected = [name for name in DEFINITIONS if name not in LACKS.get(script, ())]
    assert [node.name for node in others if isinstance(node, (ast.FunctionDef, ast.ClassDef))] == expected
    assert ast.unparse(main).startswith("if __name__ == '__main__':")


@each_script
def test_no_script_imports_another_and_baselines_not_the_core(script):
    modules = imported_modules(script)
    own = {path.stem for path in ROOT.glob("*.py")} - {"puffer_core", "atari_wrappers", "nethack_wrappers"}
    assert not modules & own
    assert ("puffer_core" in modules) == (script not in BASELINES)


@each_rung
def test_the_readme_tells_the_measured_counts(base, variant, max_removed, max_added):
    removed, added = counts(base, variant)
    rows = [line for line in read("README.md").splitlines() if line.startswith(f"| [`{variant}`]({variant}) |")]
    assert len(rows) == 1, f"one row of README.md's table is for {variant}"
    assert rows[0].startswith(f"| [`{variant}`]({variant}) | `{base}` | -{removed} +{added} | `python {variant}")


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        raise SystemExit("usage: python tests/test_script_diffs.py --update")
    GOLDEN.mkdir(exist_ok=True)
    for path in GOLDEN.glob("*.diff"):
        path.unlink()
    for base, variant, *_ in RUNGS:
        golden_file(base, variant).write_text(zero_context_diff(base, variant))
        print(f"{base} -> {variant}: -{{}} +{{}}".format(*counts(base, variant)))


@pytest.mark.parametrize("path, most", {"puffer_core.py": 700, "atari_wrappers.py": 150, "demo.py": 750}.items())
def test_files_keep_within_their_length(path, most):
    assert (ROOT / path).read_text().count("\n") <= most
