"""Whatever goes into a flat row comes out again, bit for bit, or is refused with the path of what does not fit."""

import copy
import itertools
import pickle
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import puffer_core
from puffer_core import ActionLayout, Layout
from tests.envs import MINIHACK_SPACE

ROOT = Path(puffer_core.__file__).parent
INTEGERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
FLOATS = ["float16", "float32", "float64"]
SHAPES = [(), (1,), (2,), (3,), (5,), (7,), (2, 3), (1, 3, 1), (0,), (2, 0)]

settings.register_profile("layouts", deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
settings.load_profile("layouts")
pytestmark = pytest.mark.filterwarnings("ignore:.*Casting input x to numpy array")


# ------------------------------------------------------------------------------------------------------------- random


def boxes(dtypes=("bool", *INTEGERS, *FLOATS), shapes=SHAPES):
    def build(dtype, shape, low, size):
        low = 0 if dtype in ("bool", *INTEGERS[1::2]) else low
        return spaces.Box(low, 1 if dtype == "bool" else low + size, shape, np.dtype(dtype).type)

    sizes = st.integers(1, 90)
    return st.builds(build, st.sampled_from(dtypes), st.sampled_from(shapes), st.integers(-30, 30), sizes)


def multi_discretes():
    def build(nvec, shaped, start):
        nvec = np.array(nvec).reshape(2, -1) if shaped and len(nvec) % 2 == 0 else np.array(nvec)
        return spaces.MultiDiscrete(nvec, start=np.full(nvec.shape, start))

    return st.builds(build, st.lists(st.integers(1, 6), min_size=1, max_size=4), st.booleans(), st.integers(-5, 5))


DISCRETES = st.one_of(
    st.builds(lambda n, start: spaces.Discrete(n, start=start), st.integers(1, 9), st.integers(-9, 9)),
    multi_discretes(),
    st.builds(spaces.MultiBinary, st.sampled_from([1, 3, (2, 2)])),
)


def nested(leaves, max_leaves=7):
    keys = st.text("abcxyz_ .0", min_size=1, max_size=4)

    def branch(children):
        dicts = st.dictionaries(keys, children, min_size=1, max_size=4).map(spaces.Dict)
        return dicts | st.lists(children, min_size=1, max_size=4).map(spaces.Tuple)

    return branch(st.recursive(leaves, branch, max_leaves=max_leaves))


SPACES = nested(boxes() | DISCRETES)


def leaves_of(space, tree, path=()):
    """Pair every leaf of a space with its value, in the order of the space."""
    if isinstance(space, spaces.Dict):
        assert isinstance(tree, dict) and list(tree) == list(space)
        return [leaf for key, child in space.items() for leaf in leaves_of(child, tree[key], (*path, key))]
    if isinstance(space, spaces.Tuple):
        assert isinstance(tree, tuple) and len(tree) == len(space)
        return [leaf for index, child in enumerate(space) for leaf in leaves_of(child, tree[index], (*path, index))]
    return [(path, space, tree)]


def replace_leaves(space, values):
    """Build a sample of a space from its leaves' values, taken in order from an iterator."""
    if isinstance(space, spaces.Dict):
        return {key: replace_leaves(child, values) for key, child in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple([replace_leaves(child, values) for child in space])
    return next(values)


def random_sample(space, rng):
    """Draw any bit patterns that the dtypes can hold, NaN payloads and negative zeros included."""

    def draw(leaf):
        count = int(np.prod(leaf.shape))
        raw = rng.integers(0, 2 if leaf.dtype == np.bool_ else 256, count * leaf.dtype.itemsize, np.uint8)
        return raw.view(leaf.dtype).reshape(leaf.shape)

    return replace_leaves(space, iter([draw(leaf) for _, leaf, _ in leaves_of(space, dict_or_tuple(space))]))


def dict_or_tuple(space):
    """Return a tree of the space's form, with None for leaves."""
    if isinstance(space, spaces.Dict):
        return {key: dict_or_tuple(child) for key, child in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple([dict_or_tuple(child) for child in space])
    return None


def struct_of(layout, sample):
    """Write a sample through numpy's own structured dtype: the independent reference for every byte of a row."""
    row = np.zeros((), layout.dtype)

    def write(space, value, target):
        children = space.items() if isinstance(space, spaces.Dict) else enumerate(space)
        for name, (key, child) in zip(target.dtype.names, children):
            if isinstance(child, (spaces.Dict, spaces.Tuple)):
                write(child, value[key], target[name])
            else:
                target[name][...] = value[key]

    write(layout.space, sample, row)
    return np.frombuffer(row.tobytes(), np.uint8)


def raw(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def same_bits(left, right):
    left, right = np.asarray(left), np.asarray(right)
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


seeds = st.integers(0, 2**32 - 1)
batches = st.sampled_from([(), (1,), (3,), (2, 3), (2, 1, 2), (0,)])


@settings(max_examples=80)
@given(space=SPACES, seed=seeds)
def test_samples_round_trip_and_lie_in_the_flat_space(space, seed):
    layout = Layout(space)
    space.seed(seed)
    for _ in range(3):
        sample = space.sample()
        flat = layout.flatten(sample)
        assert layout.flat_space.contains(flat)
        back = layout.unflatten(flat)
        for (path, leaf, value), (_, _, twin) in zip(leaves_of(space, sample), leaves_of(space, back)):
            assert same_bits(np.asarray(value, leaf.dtype), twin), path


@settings(max_examples=80)
@given(space=SPACES, seed=seeds, batch=batches)
def test_batches_of_any_bits_round_trip_in_numpy_without_a_copy(space, seed, batch):
    layout, rng = Layout(space), np.random.default_rng(seed)
    samples = [random_sample(space, rng) for _ in range(int(np.prod(batch)))]
    rows = np.zeros((len(samples), *layout.flat_space.shape), layout.flat_space.dtype)
    for row, sample in zip(rows, samples):
        layout.flatten(sample, row)
    flat = rows.reshape(*batch, *layout.flat_space.shape)
    views = leaves_of(space, layout.unflatten(flat))
    for number, (path, leaf, view) in enumerate(views):
        assert view.shape == (*batch, *leaf.shape) and view.dtype == leaf.dtype, path
        assert view.size == 0 or np.shares_memory(view, rows), path
        for index, sample in zip(np.ndindex(*batch), samples):
            assert same_bits(view[index], leaves_of(space, sample)[number][2]), path


@settings(max_examples=60)
@given(space=SPACES, seed=seeds, batch=batches.filter(lambda batch: 0 not in batch))
def test_batches_of_any_bits_round_trip_in_torch_without_a_copy(space, seed, batch):
    layout, rng = Layout(space), np.random.default_rng(seed)
    samples = [random_sample(space, rng) for _ in range(int(np.prod(batch)))]
    rows = np.zeros((len(samples), *layout.flat_space.shape), layout.flat_space.dtype)
    for row, sample in zip(rows, samples):
        row[...] = layout.flatten(sample)
    flat = torch.from_numpy(rows).reshape(*batch, *layout.flat_space.shape)
    start, end = flat.data_ptr(), flat.data_ptr() + rows.nbytes
    for number, (path, leaf, view) in enumerate(leaves_of(space, layout.unflatten(flat))):
        assert tuple(view.shape) == (*batch, *leaf.shape) and view.numpy().dtype == leaf.dtype, path
        assert view.numel() == 0 or start <= view.data_ptr() < end, path
        for index, sample in zip(np.ndindex(*batch), samples):
            assert same_bits(view[index].numpy(), leaves_of(space, sample)[number][2]), path


@settings(max_examples=80)
@given(space=SPACES, seed=seeds)
def test_bytes_lie_where_numpy_puts_them_and_padding_is_zero(space, seed):
    layout = Layout(space)
    assert layout.dtype.isalignedstruct
    sample = random_sample(space, np.random.default_rng(seed))
    out = np.frombuffer(bytearray(b"\xaa" * layout.dtype.itemsize), layout.flat_space.dtype)
    assert layout.flatten(sample, out) is out
    assert raw(out).tobytes() == struct_of(layout, sample).tobytes()

    def check(space, dtype, tree, start):
        children = space.items() if isinstance(space, spaces.Dict) else enumerate(space)
        for name, (key, child) in zip(dtype.names, children):
            field, offset = dtype.fields[name][:2]
            if isinstance(child, (spaces.Dict, spaces.Tuple)):
                check(child, field, tree[key], start + offset)
            elif tree[key].size:
                assert tree[key].__array_interface__["data"][0] == start + offset, name

    check(space, layout.dtype, layout.unflatten(out), out.__array_interface__["data"][0])


@settings(max_examples=40)
@given(
    dtype=st.sampled_from(["bool", *INTEGERS, *FLOATS]),
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4),
)
def test_leaves_of_one_dtype_keep_it(dtype, shapes):
    space = spaces.Tuple([spaces.Box(0, 1, shape, np.dtype(dtype).type) for shape in shapes])
    layout = Layout(space)
    assert layout.flat_space.dtype == dtype
    assert layout.flat_space.shape == (sum(int(np.prod(shape)) for shape in shapes),)


CHANGES = ["refill", "replace", "replace one", "strided", "transposed", "cast", "list", "read-only", "slice"]


def changed(change, old, new, chosen):
    """Change one leaf of a sample, whose value is `old`: in place, or to the bits of `new` in one form or another."""
    if change == "refill" and isinstance(old, np.ndarray) and old.flags.writeable:
        old[...] = new
    if change == "slice" and isinstance(old, np.ndarray):
        return old[...]
    if change == "strided" and new.ndim:
        wide = np.zeros((*new.shape[:-1], new.shape[-1] * 2), new.dtype)
        wide[..., ::2] = new
        return wide[..., ::2]
    if change == "read-only":
        new.flags.writeable = False
        return new
    forms = {
        "replace": lambda: new,
        "replace one": lambda: new if chosen else old,
        "transposed": lambda: np.asfortranarray(new) if chosen and new.ndim else old,
        "cast": lambda: (new % 50).astype(np.float64) if chosen and new.dtype.kind in "iu" else old,
        "list": lambda: new.tolist() if chosen and new.dtype.kind in "biu" and new.size else old,
    }
    return forms.get(change, lambda: old)()


@settings(max_examples=80)
@given(space=SPACES, seed=seeds, changes=st.lists(st.sampled_from(CHANGES), min_size=3, max_size=14))
def test_refilled_and_replaced_arrays_never_leave_stale_bytes(space, seed, changes):
    """A sequence of samples whose arrays live on, change in place, or make way for others, into two rows in turn."""
    layout, rng = Layout(space), np.random.default_rng(seed)
    rows = [np.zeros(layout.flat_space.shape, layout.flat_space.dtype) for _ in range(2)]
    writers = [layout.writer(row) for row in rows]
    values = [value for _, _, value in leaves_of(space, random_sample(space, rng))]
    for turn, change in enumerate(changes * 2):
        fresh = [value for _, _, value in leaves_of(space, random_sample(space, rng))]
        chosen = int(rng.integers(len(values)))
        values = [changed(change, *pair, index == chosen) for index, pair in enumerate(zip(values, fresh))]
        sample = replace_leaves(space, iter(values))
        expected = struct_of(layout, sample).tobytes()
        for _ in range(2 if turn % 3 else 1):
            assert raw(writers[turn % 2](sample)).tobytes() == expected, change
            assert raw(layout.flatten(sample)).tobytes() == expected, change
            assert raw(layout.flatten(sample, rows[turn % 2])).tobytes() == expected, change


# ----------------------------------------------------------------------------------------------------------- refusals

SMALL = spaces.Dict(
    {"a": spaces.Box(0, 9, (2, 3), np.int32), "b": spaces.Dict({"c": spaces.Discrete(4), "d": spaces.Box(0, 1, (2,))})}
)


def small(**changes):
    sample = {"a": np.ones((2, 3), np.int32), "b": {"c": np.array(2), "d": np.ones(2, np.float32)}}
    for key, value in changes.items():
        (sample["b"] if key in "cd" else sample)[key] = value
    return sample


def without(*path):
    sample = small()
    target = sample["b"] if len(path) == 2 else sample
    del target[path[-1]]
    return sample


BAD_SAMPLES = {
    "no key": (without("a"), "'a'"),
    "no nested key": (without("b", "d"), r"\['b'\].*'d'"),
    "another key": (small(e=1), "'e'"),
    "a nested key too many": (small(b={"c": 1, "d": np.ones(2, np.float32), "f": 0}), r"\['b'\].*'f'"),
    "another key instead": ({"a": np.ones((2, 3), np.int32), "B": small()["b"]}, "'B'"),
    "transposed": (small(a=np.ones((3, 2), np.int32)), r"\['a'\].*\(2, 3\).*\(3, 2\)"),
    "too long": (small(d=np.ones(3, np.float32)), r"\['b'\]\['d'\]"),
    "broadcastable": (small(a=np.ones((1, 3), np.int32)), r"\['a'\]"),
    "a scalar for an array": (small(a=1), r"\['a'\]"),
    "an array for a scalar": (small(c=np.array([2])), r"\['b'\]\['c'\]"),
    "None": (small(a=None), r"\['a'\]"),
    "None for a dict": (small(b=None), r"\['b'\]"),
    "None for all": (None, "observation"),
    "text": (small(c="up"), r"\['b'\]\['c'\]"),
    "ragged": (small(a=[[1, 2, 3], [4]]), "inhomogeneous"),  # as numpy says it
    "too large": (small(a=np.full((2, 3), 2**40)), r"\['a'\]"),
    "a fraction": (small(c=1.5), r"\['b'\]\['c'\]"),
    "NaN for an integer": (small(c=np.nan), r"\['b'\]\['c'\]"),
    "a tuple for a dict": (small(b=(2, np.ones(2, np.float32))), r"\['b'\]"),
    "a complex number": (small(c=2 + 1j), r"\['b'\]\['c'\]"),
    "complex numbers for floats": (small(d=np.full(2, 1j)), r"\['b'\]\['d'\]"),
    "numbers as text": (small(d=np.array(["1", "2"])), r"\['b'\]\['d'\]"),
}


@pytest.mark.filterwarnings("ignore:invalid value")  # of the cast
@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_a_sample_that_does_not_fit_is_refused_with_its_path(name):
    sample, message = BAD_SAMPLES[name]
    layout = Layout(SMALL)
    for flatten in (layout.flatten, layout.writer(np.zeros(layout.flat_space.shape, layout.flat_space.dtype))):
        for _ in range(3):  # the same arrays again are no better
            with pytest.raises(ValueError, match=message):
                flatten(sample)
        assert raw(flatten(small())).tobytes() == struct_of(layout, small()).tobytes()


def test_an_array_that_was_fine_once_is_checked_again_when_it_is_not():
    layout = Layout(SMALL)
    write = layout.writer(np.zeros(layout.flat_space.shape, layout.flat_space.dtype))
    sample = small()
    for _ in range(3):
        write(sample)
    for bad, message in [(small(a=np.ones((3, 2), np.int32)), r"\['a'\]"), (small(a=sample["a"], e=0), "'e'")]:
        for _ in range(3):
            with pytest.raises(ValueError, match=message):
                write(bad)
    sample["a"] += 1
    assert raw(write(sample)).tobytes() == struct_of(layout, sample).tobytes()


def test_tuples_of_another_length_are_refused():
    layout = Layout(spaces.Tuple([spaces.Discrete(2), spaces.Discrete(3)]))
    for sample in [(1,), (1, 1, 1), (), None, 5]:
        with pytest.raises(ValueError, match="observation"):
            layout.flatten(sample)


@pytest.mark.parametrize(
    "out", [np.zeros(3, np.uint8), np.zeros(64, np.uint8), np.zeros(40, np.float32), np.zeros(80, np.uint8)[::2]]
)
def test_an_unfit_out_is_refused(out):
    layout = Layout(SMALL)
    assert layout.dtype.itemsize == 40
    with pytest.raises(ValueError, match="40"):
        layout.flatten(small(), out)


UNSUPPORTED = {
    "Text": spaces.Text(5),
    "Sequence": spaces.Sequence(spaces.Discrete(3)),
    "Graph": spaces.Graph(spaces.Box(0, 1, (2,)), None),
    "OneOf": spaces.OneOf([spaces.Discrete(2), spaces.Box(0, 1, (2,))]),
    "Box": spaces.Box(0, 1, (2,), np.dtype(np.float32).newbyteorder()),  # its bytes lie the other way round
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_spaces_that_cannot_be_flat_are_refused_with_their_path(name):
    bad = UNSUPPORTED[name]
    nested = spaces.Dict({"x": spaces.Discrete(2), "y": spaces.Tuple([spaces.Discrete(2), bad])})
    for build in (Layout, ActionLayout):
        with pytest.raises(TypeError, match=rf"\['y'\]\[1\].*{name}"):
            build(nested)
        with pytest.raises(TypeError, match=name):
            build(bad)


# ------------------------------------------------------------------------------------------------ what must not change


@pytest.mark.parametrize("space", [spaces.Box(0, 255, (4, 84, 84), np.uint8), spaces.Box(-1, 1, (), np.float32)])
def test_a_plain_box_passes_through(space):
    layout = Layout(space)
    assert layout.flat_space == space and layout.dtype.itemsize == int(np.prod(space.shape)) * space.dtype.itemsize
    space.seed(1)
    sample = space.sample()
    flat = layout.flatten(sample)
    assert same_bits(flat, np.asarray(sample)) and layout.unflatten(flat) is flat
    assert not np.shares_memory(flat, sample)
    tensor = torch.zeros(3, *space.shape)
    assert layout.unflatten(tensor) is tensor


@pytest.mark.parametrize(
    "space", [spaces.Discrete(5, start=-2), spaces.MultiDiscrete([[3, 4], [5, 6]]), spaces.MultiBinary((2, 3))]
)
def test_a_lone_leaf_becomes_a_row(space):
    layout = Layout(space)
    space.seed(1)
    for sample in [space.sample() for _ in range(5)]:
        flat = layout.flatten(sample)
        assert flat.shape == (int(np.prod(space.shape)),) and layout.flat_space.contains(flat)
        assert same_bits(layout.unflatten(flat), np.asarray(sample, space.dtype))


def box(dtype, *shape):
    return spaces.Box(0, 1, shape, np.dtype(dtype).type)


PADDED = {  # spaces in whose rows numpy leaves gaps, and where their leaves start
    "a struct that ends in padding": ({"in": {"x": box("f4"), "y": box("u1")}, "z": box("u1", 2)}, [0, 4, 8]),
    "a wide struct after a byte": (
        {"p": box("u1"), "q": {"i": box("f8"), "j": box("u1")}, "r": box("i2", 3)},
        [0, 8, 16, 24],
    ),
    "a byte, a nest, a byte": ({"x": box("u1"), "xn": {"b": box("i4"), "c": box("u1")}, "z": box("u1")}, [0, 4, 8, 12]),
    "a byte before a word": ({"n": {"a": box("u1"), "b": box("i4")}, "z": box("u1")}, [0, 4, 8]),
}


@pytest.mark.parametrize("name", PADDED)
def test_leaves_after_padding_are_found_again(name):
    tree, starts = PADDED[name]
    space = spaces.Dict({key: spaces.Dict(value) if isinstance(value, dict) else value for key, value in tree.items()})
    layout, rng = Layout(space), np.random.default_rng(0)
    assert layout.flat_space.dtype == np.uint8 and layout.flat_space.shape == (layout.dtype.itemsize,)
    sample = random_sample(space, rng)
    flat = layout.flatten(sample)
    for library_flat in (flat, torch.from_numpy(flat)):
        views = leaves_of(space, layout.unflatten(library_flat))
        address = flat.__array_interface__["data"][0]
        assert [np.asarray(view).__array_interface__["data"][0] - address for _, _, view in views] == starts
        for (path, _, value), (_, _, view) in zip(leaves_of(space, sample), views):
            assert same_bits(np.asarray(view), value), path


def test_rows_that_were_cast_are_refused_with_a_hint():
    layout = Layout(SMALL)
    for flat in (torch.zeros(3, 40), torch.zeros(3, 39, dtype=torch.uint8), np.zeros((3, 40), np.float32)):
        with pytest.raises(ValueError, match=r"\(40,\), uint8\), uncast, got"):
            layout.unflatten(flat)


def test_what_flatten_returned_is_not_overwritten_by_the_next():
    layout = Layout(SMALL)
    first = layout.flatten(small(c=1))
    before = first.copy()
    layout.flatten(small(c=3))
    assert np.array_equal(first, before)


def test_equal_dtypes_of_other_names_will_do():
    layout = Layout(spaces.Box(-9, 9, (3,), np.int64))
    assert layout.flatten(np.arange(3, dtype=np.longlong)).tolist() == [0, 1, 2]
    assert layout.flatten(np.arange(3)[::-1]).tolist() == [2, 1, 0]
    nested = Layout(spaces.Dict({"a": spaces.Box(-9, 9, (2,)), "b": spaces.Discrete(9)}))
    rounded = nested.unflatten(nested.flatten({"a": [0.1, 1 / 3], "b": 5.0}))  # floats are, integers must be exact
    assert rounded["a"].tolist() == np.array([0.1, 1 / 3], np.float32).tolist() and rounded["b"] == 5


def test_layouts_can_be_pickled_and_copied():
    """As the networks that hold them are."""
    space = spaces.Dict(a=spaces.Discrete(3, start=-1), b=spaces.MultiBinary(2))
    for layout in (copy.deepcopy(Layout(space)), pickle.loads(pickle.dumps(Layout(space)))):
        assert layout.space == space and layout.flat_space == Layout(space).flat_space
    nested = ActionLayout(space)
    for layout in (copy.deepcopy(nested), pickle.loads(pickle.dumps(nested))):
        assert layout.flat_space == nested.flat_space and layout.unflatten([2, 0, 1])["a"] == 1


def test_the_order_of_a_samples_keys_does_not_matter():
    layout = Layout(SMALL)
    turned = dict(reversed([(key, value) for key, value in small(c=3).items()]))
    assert np.array_equal(layout.flatten(turned), layout.flatten(small(c=3)))


def test_importing_the_core_loads_no_torch_and_prints_nothing():
    code = "import sys, puffer_core; print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.stdout, done.stderr.strip()) == ("", "False")


# -------------------------------------------------------------------------------------------------------------- torch


def test_unflatten_compiles_to_one_graph_and_hardly_recompiles():
    import torch._dynamo.testing

    more = {"alive": spaces.MultiBinary(3), "done": box("bool", 1), "speed": box("f4", 2)}
    space = spaces.Dict(MINIHACK_SPACE.spaces | more)
    layout, counter = Layout(space), torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    weights = torch.linspace(-1, 1, 27)

    def features(flat):
        tree = layout.unflatten(flat)
        first = tree["glyphs"].float().mean((1, 2)) + tree["blstats"].float() @ weights + tree["speed"].sum(1)
        return first + tree["done"].float().squeeze(1) + tree["alive"].float().sum(1), tree

    compiled = torch.compile(features, fullgraph=True, backend=counter)
    space.seed(3)
    for size in (1, 8, 64):
        flat = torch.from_numpy(np.stack([layout.flatten(space.sample()) for _ in range(size)]))
        (expected, tree), (got, twin) = features(flat), compiled(flat)
        assert torch.allclose(expected, got)
        assert all(torch.equal(tree[key], twin[key]) and tree[key].dtype == twin[key].dtype for key in space)
    assert counter.frame_count <= 2  # one compilation, and one more for batches of any size


# ------------------------------------------------------------------------------------------------------------ actions


def check_actions(space, seed):
    layout = ActionLayout(space)
    layout.flat_space.seed(seed)
    for _ in range(5):
        flat = layout.flat_space.sample()
        action = layout.unflatten(flat)
        assert space.contains(action), (flat, action)
        yield layout, flat, action


@settings(max_examples=80)
@given(space=nested(DISCRETES) | DISCRETES, seed=seeds)
def test_discrete_actions_are_contained_and_cover_their_space(space, seed):
    for layout, flat, action in check_actions(space, seed):
        if not isinstance(space, spaces.Discrete):
            assert isinstance(layout.flat_space, spaces.MultiDiscrete)
        if not isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):  # those pass through
            parts = [np.ravel(value - getattr(leaf, "start", 0)) for _, leaf, value in leaves_of(space, action)]
            assert np.concatenate(parts).tolist() == flat.tolist()


@settings(max_examples=80)
@given(space=nested(boxes(shapes=SHAPES[:-2])), seed=seeds)
def test_box_actions_are_contained(space, seed):
    for layout, _, _ in check_actions(space, seed):
        assert isinstance(layout.flat_space, spaces.Box) and layout.flat_space.dtype.kind == "f"
        for extreme in (layout.flat_space.low, layout.flat_space.high, layout.flat_space.high + 1e6):
            assert space.contains(action := layout.unflatten(extreme))
            assert all(isinstance(value, np.ndarray) for *_, value in leaves_of(space, action))  # also of shape ()


WHOLE_RANGE = ["int32", "int64", "uint64", "float16", "float32", "float64"]


@pytest.mark.parametrize("dtype", WHOLE_RANGE)
def test_box_actions_are_contained_up_to_the_limits_of_their_dtype(dtype):
    limits = np.finfo(dtype) if dtype.startswith("f") else np.iinfo(dtype)
    space = spaces.Dict({"a": spaces.Box(0, limits.max, (2,), np.dtype(dtype).type), "b": box("float32")})
    layout = ActionLayout(space)
    for flat in (layout.flat_space.low, layout.flat_space.high):
        assert space.contains(layout.unflatten(flat)), layout.unflatten(flat)
    assert (layout.unflatten(layout.flat_space.high)["a"] == limits.max).all()


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_large_integer_actions_are_not_rounded(dtype):
    space = spaces.Box(np.iinfo(dtype).min, np.iinfo(dtype).max, (4,), np.dtype(dtype).type)
    action = np.array([np.iinfo(dtype).min, 3, 2**62 + 1, np.iinfo(dtype).max], dtype)
    assert ActionLayout(space).unflatten(action).tolist() == action.tolist()


PLAIN = [spaces.Discrete(4, start=2), spaces.MultiDiscrete([2, 3]), spaces.Box(-1, 1, (3,)), box("float64", 2, 2)]


@pytest.mark.parametrize("space", PLAIN)
def test_plain_actions_pass_through(space):
    layout = ActionLayout(space)
    assert layout.flat_space == space
    space.seed(1)
    for action in [space.sample() for _ in range(5)]:
        assert np.array_equal(layout.unflatten(action), action) and space.contains(layout.unflatten(action))


def test_mixed_actions_are_refused_with_both_leaves():
    space = spaces.Dict({"gas": spaces.Box(0, 1, (1,)), "gear": spaces.Tuple([spaces.Discrete(3)])})
    with pytest.raises(TypeError, match=r"\['gas'\].*\['gear'\]\[0\]"):
        ActionLayout(space)


NESTED_ACTIONS = spaces.Tuple([spaces.Discrete(3, start=-1), spaces.MultiBinary(2)])


@pytest.mark.parametrize(
    "space, flat",
    [
        (spaces.Discrete(3), 3),
        (spaces.Discrete(3), -1),
        (spaces.Discrete(3, start=2), 1),
        (spaces.MultiDiscrete([2, 3]), [1, 3]),
        (spaces.MultiDiscrete([2, 3]), [1, 1, 1]),
        (spaces.MultiDiscrete([2, 3], dtype=np.uint8), [257, 0]),
        (spaces.MultiDiscrete([2, 3], dtype=np.int8), [-255, 0]),
        (NESTED_ACTIONS, [3, 0, 0]),
        (NESTED_ACTIONS, [-1, 0, 0]),
        (NESTED_ACTIONS, [0, 2, 0]),
        (NESTED_ACTIONS, [0, 1]),
        (spaces.Box(-1, 1, (2,)), [np.nan, 0]),
        (spaces.Box(-1, 1, (2,)), [0.0, 0.0, 0.0]),
        (spaces.Tuple([spaces.Box(-1, 1, (2,))]), [0.0, np.nan]),
    ],
)
def test_actions_out_of_range_are_refused(space, flat):
    with pytest.raises(ValueError, match="expected"):
        ActionLayout(space).unflatten(np.array(flat))


def test_continuous_actions_are_clipped_and_integers_rounded():
    space = spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Box(0, 9, (2,), np.int32)})
    action = ActionLayout(space).unflatten(np.array([-7.0, 0.25, 3.6, 99.0]))
    assert action["a"].tolist() == [-1.0, 0.25] and action["b"].tolist() == [4, 9]
    assert ActionLayout(spaces.Box(-1, 1, (2,))).unflatten(np.array([5.0, -5.0])).tolist() == [1.0, -1.0]


# -------------------------------------------------------------------------------------------------------------- speed


def best(*functions, rounds=60, calls=40):
    """Fastest seconds a call, of functions that run in turns: the figure that a busy machine disturbs least."""
    times = [[] for _ in functions]
    for _ in range(rounds):
        for function, spent in zip(functions, times):
            start = time.perf_counter()
            for _ in itertools.repeat(None, calls):
                function()
            spent.append((time.perf_counter() - start) / calls)
    return [min(spent) for spent in times]


@pytest.mark.alone
def test_flattening_costs_about_as_much_as_bare_assignments():
    """Refilled arrays take 0.9 and new ones 1.3 times as long (benchmarks/emulation.py); a loop over leaves takes 3."""
    layout = Layout(MINIHACK_SPACE)
    MINIHACK_SPACE.seed(1)
    sample = MINIHACK_SPACE.sample()
    row = np.zeros(layout.flat_space.shape, np.uint8)
    write = layout.writer(row)
    pairs = [(view, sample[key]) for key, view in layout.unflatten(np.zeros_like(row)).items()]

    def assign():
        for view, value in pairs:
            view[...] = value

    ours, bare = best(lambda: write(sample), assign)
    (gym,) = best(lambda: gymnasium.spaces.flatten(MINIHACK_SPACE, sample), rounds=15, calls=10)
    print(f"\nflatten {ours * 1e6:.2f} us, nine assignments {bare * 1e6:.2f} us, gymnasium {gym * 1e6:.1f} us")
    assert ours <= 2 * bare and gym >= 4 * ours  # wide enough for any machine; the benchmark publishes the ratios
    assert raw(row).tobytes() == struct_of(layout, sample).tobytes()
