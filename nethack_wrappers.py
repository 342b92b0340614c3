"""One wrapper for the games of NLE and MiniHack: seeds them, leaves out work that nobody sees, and draws them."""

import _ctypes
import ctypes
import mmap
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import gymnasium
from nle import nethack
from nle.env.base import NLE
from nle.env.tasks import NetHackChallenge
from nle.nethack.nethack import DLPATH

SCREEN_KEYS = ("tty_chars", "tty_colors", "tty_cursor")
# What a step is made of, and the modules whose methods are known here
METHODS = ("step", "_is_episode_end", "_reward_fn", "_get_time_penalty", "_get_observation", "_get_information")
MODULES = ("minihack.base", "nle.env.base", "nle.env.tasks")
LIBRARY = os.open(DLPATH, os.O_RDONLY)  # held, as an upgrade may replace the file while games run
GAMES = weakref.WeakSet()  # of this process
MAP_FIXED = 16  # Linux's: in place of what is mapped there
_map = ctypes.CDLL(None).mmap  # Python's own does not let us say where
_map.restype, _map.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)


class NetHackWrapper(gymnasium.Wrapper):
    """NetHack, seeded and drawn as other environments are, without work that nobody sees.

    At every step MiniHack has the game describe all 1,659 places of the map in words, and copies these 133 kB and all
    else twice, for the rewards of a few tasks. Where neither the observation space nor a reward manager nor a method of
    the task may read that, it is left out: a step of MiniHack-River takes less than half as long. Observations, rewards
    and ends are the same, unless making the words changes the game: within 600 random steps it did so for one of eight
    seeds in River-MonsterLava and in CorridorBattle, for none in River. For MiniHack's `get_screen_description` and the
    like, or for exactly its games, ask for the words: `gymnasium.make(..., observation_keys=(...,
    "screen_descriptions"))`. Tasks of your own that define more than a constructor are left as they are. On Linux, from
    four games in a process on, all run the same copy of NetHack's code, which makes many faster.

    Raises:
        TypeError: the environment is none of NLE's or MiniHack's, or one that must not be seeded.
        RuntimeError: the environment has been reset before.
    """

    def __init__(self, env: gymnasium.Env):
        """See the class."""
        if not isinstance(env.unwrapped, NLE):
            raise TypeError(f"NetHackWrapper needs an environment of NLE or MiniHack, got {env}")
        if isinstance(env.unwrapped, NetHackChallenge):
            raise TypeError(f"NetHackWrapper seeds every game, which NetHack's Challenge forbids, got {env}")
        super().__init__(env)
        GAMES.add(self)
        self._code = None if sys.platform == "linux" else ()  # start, size, offset of what is shared; None: not known
        self.metadata, self._frame = {**env.metadata, "render_fps": 5}, None  # NLE says 42: too quick to follow
        nle, game = env.unwrapped, env.unwrapped.nethack
        # Other methods may read anything: KeyRoom's `step` the words, Sokoban's reward the map before the step.
        kinds = type(nle).__mro__[: type(nle).__mro__.index(NLE)]
        foreign = [kind for kind in kinds if not kind.__module__.startswith(("minihack.", "nle."))]
        is_foreign = any(not name.startswith("__") for kind in foreign for name in vars(kind))
        own = {name for name in METHODS if getattr(type(nle), name, NLE).__module__ not in MODULES}
        if is_foreign or "step" in own or getattr(nle, "reward_manager", None) is not None:
            return
        if not any(key.startswith("screen_descriptions") for key in nle.observation_space):
            buffers = {key: buffer for key, buffer in game._obs_buffers.items() if key != "screen_descriptions"}
            game._pynethack.set_buffers(**buffers)  # all that the game fills
            game._obs = tuple(buffers.get(key, game._obs_buffers[key][:0]) for key in nle._observation_keys)
        if not own:
            self._leave_out_copies(nle, game._obs)

    @staticmethod
    def _leave_out_copies(nle: NLE, arrays: tuple) -> None:
        """Before a step, NLE copies all arrays, one by one, and its rewards compare two of them."""
        compared, tell = (nle._blstats_index, nle._internal_index), type(nle)._get_information
        before = [array if index in compared else [] for index, array in enumerate(arrays)]
        weak = weakref.ref(nle)  # a game that refers to itself would not close when nobody else does

        def step_with_two(action: int) -> tuple:
            (nle := weak()).last_observation = before
            try:
                return NLE.step(nle, action)  # MiniHack's own copies all once more, for the reward manager
            finally:
                nle.last_observation = arrays

        def ask_at_the_end(status: NLE.StepStatus) -> dict:  # 2.4 us; while a game goes on, NLE tells of the last one
            return tell(weak(), status) if status else {"end_status": status, "is_ascended": False}

        nle.step, nle._get_information = step_with_two, ask_at_the_end
        if not any("crop" in key or "pixel" in key for key in nle.observation_space):
            observation = nle._get_observation(arrays)  # the same arrays after every step
            nle._get_observation = lambda _: dict(observation)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Start a game; a seed determines it and all games until the next seed, unless MiniHack's `seeds` are set."""
        gymnasium.Env.reset(self.unwrapped, seed=seed)
        self.unwrapped.seed(*self.np_random.integers(2**63, size=2).tolist())
        result = self.env.reset(options=options)
        if self._code != () and len(GAMES) > 3:  # one alone gains nothing, and its reset takes a tenth longer
            self._share_code()
        return result

    def _share_code(self) -> None:
        """Have the game run the code of NLE's library, not of its own copy: many in turn are 1.1 to 1.3 times as fast.

        NetHack's state is in its library's variables, so NLE loads a copy for every game, and anew at every reset. The
        variables are the game's own, but with code of its own, too, only a few games fit into a core's caches.
        """
        game = self.unwrapped.nethack
        handle = _ctypes.dlopen(game.dlpath, os.RTLD_NOLOAD | os.RTLD_LAZY)  # what the game has loaded
        base = ctypes.c_size_t.from_address(handle).value  # its address comes first in a `struct link_map`
        _ctypes.dlclose(handle)
        if self._code is None:  # found once, as to read what is mapped takes a fifth of a reset
            self._code = ()
            inode = f" {os.fstat(game._dl.fileno()).st_ino} "
            for line in Path("/proc/self/maps").read_text().splitlines():
                if inode in line and " r-xp " in line and "/memfd:nle.so" in line:
                    area, _, offset, *_ = line.split()
                    (start, end), offset = [int(part, 16) for part in area.split("-")], int(offset, 16)
                    if ctypes.string_at(start, end - start) == os.pread(LIBRARY, end - start, offset):
                        self._code = start - base, end - start, offset
        if self._code:
            start, size, offset = self._code
            protection, flags = mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_PRIVATE | MAP_FIXED
            _map(base + start, size, protection, flags, LIBRARY, offset)

    def render(self) -> Any:
        """Draw the game: as an array of its own ("pixel"), or as the terminal's text in colors ("ansi")."""
        if self.render_mode == "ansi" and set(SCREEN_KEYS) <= set(self.unwrapped._observation_keys):
            seen = dict(zip(self.unwrapped._observation_keys, self.unwrapped.last_observation))
            return nethack.tty_render(*[seen[key] for key in SCREEN_KEYS]).strip("\n")
        frame = self.env.render()
        if self.render_mode == "pixel" and frame.any():  # a game that is over is black: its last picture stays
            self._frame = frame.copy()  # as NLE draws all its frames into one array
        return frame if self._frame is None else self._frame
