"""One wrapper for the games of NLE and MiniHack: seeds them, leaves out work that nobody sees, and draws them."""

from typing import Any

import gymnasium
from nle import nethack
from nle.env.base import NLE
from nle.env.tasks import NetHackChallenge

SCREEN_KEYS = ("tty_chars", "tty_colors", "tty_cursor")


class NetHackWrapper(gymnasium.Wrapper):
    """NetHack, seeded and drawn as other environments are, without work that nobody sees.

    At every step MiniHack has the game describe all 1,659 places of the map in words, and copies these 133 kB twice,
    for the rewards of a few tasks. Where neither the observation space nor a reward manager nor a task's own `step` has
    them, they are left out: a step of MiniHack-River takes 0.6 times as long. Observations, rewards and ends are the
    same, but in games that describing itself changes: of 600 random steps, one seed in eight took another turn in
    River-MonsterLava and one in CorridorBattle, none in River. For MiniHack's `get_screen_description` and the like, or
    for exactly its games, ask for the words: `gymnasium.make(..., observation_keys=(..., "screen_descriptions"))`.

    Raises:
        TypeError: the environment is none of NLE's or MiniHack's, or one that must not be seeded.
    """

    def __init__(self, env: gymnasium.Env):
        """See the class."""
        if not isinstance(env.unwrapped, NLE):
            raise TypeError(f"NetHackWrapper needs an environment of NLE or MiniHack, got {env}")
        if isinstance(env.unwrapped, NetHackChallenge):
            raise TypeError(f"NetHackWrapper seeds every game, which NetHack's Challenge forbids, got {env}")
        super().__init__(env)
        self.metadata, self._frame = {**env.metadata, "render_fps": 5}, None  # NLE says 42: too quick to follow
        is_asked_for = any(key.startswith("screen_descriptions") for key in env.observation_space)
        # A task may look for words in a `step` of its own, as KeyRoom does.
        has_own_step = type(env.unwrapped).step.__module__ not in ("minihack.base", "nle.env.base")
        if not (is_asked_for or has_own_step) and getattr(env.unwrapped, "reward_manager", None) is None:
            game = env.unwrapped.nethack
            buffers = {key: buffer for key, buffer in game._obs_buffers.items() if key != "screen_descriptions"}
            game._pynethack.set_buffers(**buffers)  # all that the game fills
            game._obs = tuple(buffers.get(key, buffer[:0]) for key, buffer in game._obs_buffers.items())

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Start a game; all games from one seed to the next follow from it. NLE itself would ignore the seed."""
        gymnasium.Env.reset(self.unwrapped, seed=seed)
        self.unwrapped.seed(*self.np_random.integers(2**63, size=2).tolist())
        return self.env.reset(options=options)

    def render(self) -> Any:
        """Draw the game: as an array of its own ("pixel"), or as the terminal's text in colors ("ansi")."""
        if self.render_mode == "ansi":
            seen = dict(zip(self.unwrapped._observation_keys, self.unwrapped.last_observation))
            return nethack.tty_render(*[seen[key] for key in SCREEN_KEYS]).strip("\n")
        frame = self.env.render()
        if self.render_mode == "pixel" and frame.any():  # a game that is over is black: its last picture stays
            self._frame = frame.copy()  # as NLE draws all its frames into one array
        return frame if self._frame is None else self._frame
