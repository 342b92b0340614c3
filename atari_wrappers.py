"""Atari preprocessing in one wrapper, bit-equal to gymnasium's usual chain of them and quicker.

    env = AtariWrapper(gymnasium.make("BreakoutNoFrameskip-v4"))
    observation, info = env.reset(seed=1)  # (4, 84, 84) uint8: the last four frames, newest last

A learner sees short episodes (a life each) and rewards of -1, 0 or 1. The score that people compare is the whole
game's, so the wrapper keeps that too: `info["episode"]` appears once a game, on its last step.
"""

import time

import cv2
import gymnasium
import numpy as np
from ale_py.env import AtariEnv  # importing ale_py also registers the Atari ids with gymnasium
from gymnasium.wrappers.common import OrderEnforcing, PassiveEnvChecker, TimeLimit

FRAME_SKIP, STACK_SIZE, SCREEN_SIZE = 4, 4, 84


class AtariWrapper(gymnasium.Wrapper):
    """Fuses no-op start, FIRE start, frame skip, max-pooling, resizing, stacking, life episodes and sign rewards.

    It drives the emulator itself, since `AtariEnv.step` copies a color screen each frame that nobody looks at, and so
    steps over what gymnasium.make puts around it: `max_episode_steps` becomes the emulator's limit on frames a game.

    - `reset()` right after a lost life goes on with the same game; any other `reset` starts a new one.
    - `terminated` means a life or the game was lost, `truncated` that the game met its frame limit.
    - `info["lives"]` is always there. `info["episode"]` holds the whole game's `r` (score, neither clipped nor cut at
      lives), `l` (calls of `step`) and `t` (seconds). If the game ends within the FIRE with which `reset` goes on,
      that `reset` starts the next game and its info carries the ended one's numbers.

    Args:
        env: What gymnasium.make returns for a `*NoFrameskip-v4` id, or an `ALE/*-v5` id with `frameskip=1`. TypeError:
            it is no Atari environment, or a wrapper sits between; ValueError: its settings cannot be honored.
        noop_max: A new game starts with 1 to `noop_max` no-op frames; 0 means none. ValueError: it is negative.
    """

    def __init__(self, env: gymnasium.Env, noop_max: int = 30):
        _check_is_raw_atari(env)
        if noop_max < 0:
            raise ValueError(f"AtariWrapper needs noop_max >= 0, got {noop_max}; 0 turns the no-op start off")
        super().__init__(env)
        self.observation_space = gymnasium.spaces.Box(0, 255, (STACK_SIZE, SCREEN_SIZE, SCREEN_SIZE), np.uint8)
        # The console draws 60 frames a second and a video gets one per step: so it runs at the game's own pace.
        self.metadata = {**env.metadata, "render_fps": 60 // FRAME_SKIP}
        self.noop_max, self._atari, self._actions = noop_max, env.unwrapped, env.unwrapped._action_set
        # Some games stand still until FIRE is pressed, after each lost life too.
        self._start_action = self._actions[self._atari.get_action_meanings()[:2] == ["NOOP", "FIRE"]]
        if env.spec and env.spec.max_episode_steps:
            own_limit = self._atari.ale.getInt("max_num_frames_per_episode") or np.inf  # 0: no limit
            self._atari.ale.setInt("max_num_frames_per_episode", min(env.spec.max_episode_steps, own_limit))
            self._atari.load_game()  # when the emulator reads its settings
        self._newest, self._second_newest, self._drawn = np.zeros((3, *self._atari.ale.getScreenDims()), np.uint8)
        self._stack = np.zeros(self.observation_space.shape, np.uint8)
        # 210 rows shrink in bands, 5 rows to 2, whatever the other bands hold; no other height has so exact a ratio.
        self._band = (5, 2) if len(self._newest) == 210 else (len(self._newest), SCREEN_SIZE)
        self._lives, self._life_lost, self._needs_reset = 0, False, True

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Goes on with the next life if one was just lost and no seed is given, else starts a new game."""
        info, goes_on = {}, self._life_lost and seed is None
        if goes_on:
            self._press(self._start_action)
            if self._atari.ale.game_over():
                goes_on, info["episode"] = False, self._statistics()
        if not goes_on:
            self._start_game(seed, options)
        self._life_lost = self._needs_reset = False
        self._draw()
        self._stack[:] = self._stack[-1]
        return self._stack.copy(), info | {"lives": self._lives}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Plays one agent step, which is up to four frames of the game."""
        if self._needs_reset:
            raise gymnasium.error.ResetNeeded("AtariWrapper.step() needs a running game: call reset() first")
        reward, life_lost = self._press(self._actions[action])
        self._length += 1
        pixels = self._stack.reshape(-1).data
        pixels[: -(SCREEN_SIZE**2)] = pixels[SCREEN_SIZE**2 :]  # 2 us, where arrays that overlap take 9
        self._draw()
        game_over, truncated = self._atari.ale.game_over(with_truncation=False), self._atari.ale.game_truncated()
        self._needs_reset = game_over or truncated
        info = {"lives": self._lives}
        if self._needs_reset:
            info["episode"] = self._statistics()
        self._life_lost = life_lost and not self._needs_reset
        return self._stack.copy(), float((reward > 0) - (reward < 0)), game_over or life_lost, truncated, info

    def _start_game(self, seed: int | None, options: dict | None) -> None:
        """Resets the emulator, waits a random number of frames and presses FIRE where the game has it."""
        ale = self._atari.ale
        self._score, self._length, self._start_time = 0, 0, time.perf_counter()
        self.env.reset(seed=seed, options=options)
        for _ in range(self._atari.np_random.integers(1, self.noop_max + 1) if self.noop_max else 0):
            self._score += ale.act(self._actions[0])
            if ale.game_over():
                self._score = 0
                self.env.reset(seed=seed, options=options)
        self._lives = ale.lives()
        ale.getScreenGrayscale(self._newest)
        self._second_newest.fill(0)
        if self._start_action != self._actions[0]:
            self._press(self._start_action)

    def _press(self, action) -> tuple[int, bool]:
        """Holds one action for four frames or until a life or the game ends; returns the raw reward and `life_lost`."""
        ale, reward, life_lost = self._atari.ale, 0, False
        for frame in range(FRAME_SKIP):
            reward += ale.act(action)
            lives = ale.lives()
            self._lives, life_lost = lives, lives < self._lives
            # A step cut short shows the screens of the one before, as in gymnasium's chain: runs stay comparable.
            if life_lost or ale.game_over():
                break
            if frame == FRAME_SKIP - 2:
                ale.getScreenGrayscale(self._second_newest)
            elif frame == FRAME_SKIP - 1:
                ale.getScreenGrayscale(self._newest)
        # The maximum, as the console draws some objects every other frame only; in place, for the step cut short.
        np.maximum(self._newest, self._second_newest, out=self._newest)
        self._score += reward
        return reward, life_lost

    def _draw(self) -> None:
        """Shrinks the newest screen into the stack's last place, the rows that differ from the screen drawn last."""
        (rows, shrunk), width = self._band, self._newest.shape[1]
        changed = (self._newest != self._drawn).tobytes()  # a byte a pixel; where no 1 is found, `stop` is 0
        first, stop = changed.find(1) // width // rows, changed.rfind(1) // width // rows + 1
        if stop:  # with what precedes it 35 us on Breakout, where all of the screen takes 73
            source, target = self._newest[first * rows : stop * rows], self._stack[-1, first * shrunk : stop * shrunk]
            cv2.resize(source, target.shape[::-1], dst=target, interpolation=cv2.INTER_AREA)  # in place, as it fits
            self._drawn[:] = self._newest

    def _statistics(self) -> dict:
        return {"r": float(self._score), "l": self._length, "t": time.perf_counter() - self._start_time}


def _check_is_raw_atari(env) -> None:
    """Refuses whatever would be silently wrong once the emulator is driven from here."""
    remedy = 'wrap gymnasium.make("BreakoutNoFrameskip-v4") or gymnasium.make("ALE/Breakout-v5", frameskip=1) directly'
    while isinstance(env, (OrderEnforcing, PassiveEnvChecker, TimeLimit)):
        env = env.env
    if not isinstance(env, AtariEnv):
        raise TypeError(f"AtariWrapper needs a raw Atari environment, got {type(env).__name__}: {env}; {remedy}")
    required = {"_frameskip": [1], "_obs_type": ["rgb", "grayscale"], "continuous": [False], "sound_obs": [False]}
    for name, allowed in required.items():
        if (got := getattr(env, name)) not in allowed:
            raise ValueError(f"AtariWrapper needs {name.strip('_')}={allowed[0]!r}, got {got!r} in {env}; {remedy}")
