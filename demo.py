"""The full PPO trainer, for any environment: first-ready sampling, LSTM, dashboard, checkpoints, sweeps, many machines.

    python demo.py --env-id CartPole-v1
    python demo.py --env-id pettingzoo:mpe2.simple_spread_v3
    python demo.py --mode eval --resume runs/<run>/checkpoint.pt

Read on: arguments, environments, networks, experience, the trainer, checkpoints, dashboard, and the four modes.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import random
import re
import signal
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import psutil
import torch
import torch.nn.functional as F
import tyro
from gymnasium import spaces
from torch import distributed, nn

import puffer_core

# ---------------------------------------------------------------------------------------------------------- arguments


@dataclass
class Args:
    """Train an agent; or look at one, search for better hyperparameters, or for the fastest way to step."""

    mode: Literal["train", "eval", "sweep", "autotune"] = "train"
    """train an agent; play a checkpoint; search hyperparameters; measure which vectorization is the fastest here"""
    env_id: str = "BreakoutNoFrameskip-v4"
    """a Gymnasium id, pettingzoo:<module with parallel_env>, or <module>:<function that returns an environment>"""
    seed: int = 1
    """seed of the network, of the actions and (plus its index) of every environment"""
    total_timesteps: int | None = None
    """agent steps of the whole run, over all environments and ranks"""
    target_return: float | None = None
    """stop as soon as the last 100 episodes have this mean return"""
    exp_name: str = "demo"
    """a part of the run's name"""
    resume: str | None = None
    """checkpoint to go on with, or to play; its arguments hold where no flag is given"""
    quiet: bool = False
    """print nothing but errors"""

    vec: Literal["serial", "multiprocessing"] = "multiprocessing"
    """step environments in this process, or in workers"""
    num_envs: int | None = None
    """environments of each rank"""
    num_workers: int = 0
    """processes that share them, 0 for what the cores allow"""
    env_batch_size: int = 0
    """environments that are waited for at a time, the first that are ready; 0 for all"""
    zero_copy: bool = True
    """take neighbouring workers' rows as they lie in shared memory; otherwise any workers' rows, copied"""

    num_steps: int | None = None
    """steps of each agent that an update learns from"""
    num_minibatches: int | None = None
    """parts that an update's steps are split into"""
    update_epochs: int | None = None
    """times that every step is used"""
    learning_rate: float | None = None
    """step size of Adam, at the start"""
    anneal_lr: bool = True
    """lower the learning rate linearly, to 0 at the end"""
    gamma: float | None = None
    """discount of later rewards"""
    gae_lambda: float | None = None
    """lambda of the generalized advantage estimation"""
    clip_coef: float | None = None
    """how far the new policy's probability ratio may pay off, either way from 1"""
    clip_vloss: bool = True
    """clip the value function's change too"""
    ent_coef: float | None = None
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """the gradient is scaled down to this norm"""
    norm_adv: bool = True
    """give the advantages of every minibatch mean 0 and deviation 1"""
    norm_obs: bool | None = None
    """give observations that are plain numbers mean 0 and deviation 1"""
    norm_reward: bool | None = None
    """divide rewards by the deviation of their discounted sum"""

    hidden_size: int | None = None
    """width of the layer that actor and critic read"""
    use_lstm: bool = False
    """give the agent a memory"""
    bptt_horizon: int = 16
    """steps that gradients flow back through the memory, a divisor of num_steps"""
    cuda: bool = True
    """train on the GPU if there is one"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """numbers of the forward pass; auto is bf16 where the hardware computes with it"""
    compile: bool = False
    """torch.compile the network"""

    checkpoint_interval: int = 50
    """updates between two checkpoints, 0 for one at the end only"""
    eval_episodes: int = 10
    """episodes that --mode eval plays"""
    sweep_trials: int = 20
    """trials of --mode sweep in all, those of earlier calls counted"""
    track: bool = False
    """log to Weights & Biases too"""
    wandb_project_name: str = "puffer-core"
    """project at Weights & Biases"""
    wandb_entity: str | None = None
    """team at Weights & Biases; your own account by default"""


# What holds where no flag is given, by the kind of environment. Atari's are those of puffer_ppo_atari.py.
COMMON = dict(
    **dict(total_timesteps=1_000_000, num_envs=8, num_steps=128, num_minibatches=4, update_epochs=4, gamma=0.99),
    **dict(gae_lambda=0.95, clip_coef=0.2, ent_coef=0.01, norm_obs=False, norm_reward=False, hidden_size=128),
)
PRESETS = {
    "images": dict(total_timesteps=10_000_000, learning_rate=2.5e-4, clip_coef=0.1, hidden_size=512),
    "nethack": dict(learning_rate=1e-3, hidden_size=256),
    "structures": dict(learning_rate=1e-3),
    "numbers": dict(learning_rate=2.5e-3, norm_obs=True),
    "continuous": dict(learning_rate=1e-3, norm_obs=True, norm_reward=True, ent_coef=0.0, update_epochs=10),
}


def choose(args: Args, kind: str) -> dict[str, Any]:
    """Fill in what no flag says, by the kind of environment; returns what was chosen."""
    chosen = {name: value for name, value in (COMMON | PRESETS[kind]).items() if getattr(args, name) is None}
    for name, value in chosen.items():
        setattr(args, name, value)
    return chosen


def check(args: Args) -> None:
    """End with one line if some argument cannot be right."""
    horizon, per_worker = args.bptt_horizon if args.use_lstm else 1, args.num_envs // (args.num_workers or 1)
    asynchronous = args.env_batch_size not in (0, args.num_envs)
    for name, is_right, expected in (
        ("num_envs", args.num_envs > 0, "at least 1"),
        ("num_steps", args.num_steps > 0, "at least 1"),
        ("num_minibatches", args.num_minibatches > 0, "at least 1"),
        ("update_epochs", args.update_epochs > 0, "at least 1"),
        ("hidden_size", args.hidden_size > 0, "at least 1"),
        ("eval_episodes", args.eval_episodes > 0, "at least 1"),
        ("bptt_horizon", horizon > 0 and args.num_steps % horizon == 0, f"to divide --num-steps {args.num_steps}"),
        ("num_workers", args.num_workers >= 0 and args.num_envs % (args.num_workers or 1) == 0, "to divide --num-envs"),
        ("env_batch_size", not asynchronous or args.vec == "multiprocessing", "0 with --vec serial"),
        ("env_batch_size", 0 <= args.env_batch_size <= args.num_envs, f"at most --num-envs {args.num_envs}"),
        ("env_batch_size", not asynchronous or args.num_workers > 0, "a --num-workers beside it"),
        (
            "env_batch_size",
            args.env_batch_size % per_worker == 0,
            f"a multiple of a worker's {per_worker} environments",
        ),
        (
            "env_batch_size",
            not asynchronous or not args.zero_copy or args.num_envs % args.env_batch_size == 0,
            "to divide --num-envs, or --no-zero-copy",
        ),
        (
            "total_timesteps",
            args.total_timesteps >= args.num_envs * args.num_steps * world_size(),
            f"at least one update, {args.num_envs * args.num_steps * world_size()}",
        ),
        ("mode", args.mode != "eval" or args.resume, "--resume CHECKPOINT beside it"),
    ):
        if not is_right:
            raise SystemExit(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {expected}")


# ------------------------------------------------------------------------------------------------------- environments

NETHACK_KEYS = ("glyphs", "blstats", "message")  # what its network reads
SCREEN_KEYS = ("tty_chars", "tty_colors", "tty_cursor")


class NetHack(gym.Wrapper):
    """NetHack, seeded as other environments are, that renders its terminal as text."""

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        """Draw this game's two seeds, which NLE itself would leave to the clock."""
        gym.Env.reset(self.unwrapped, seed=seed)
        self.unwrapped.seed(*self.np_random.integers(2**63, size=2).tolist())
        return self.env.reset(options=options)

    def render(self) -> str:
        """Return the terminal's screen with its colors, as escape codes."""
        from nle.nethack import tty_render

        keys, screen = self.unwrapped._observation_keys, self.unwrapped.last_observation
        return tty_render(*[screen[keys.index(key)] for key in SCREEN_KEYS])


def make_env(env_id: str, render: bool = False) -> Any:
    """Return an environment by its id; with `render`, one that can draw itself, as a picture or as text."""
    module, _, function = env_id.partition(":")
    family = re.split("[-/]", env_id)[0]
    if module == "pettingzoo":
        return importlib.import_module(function).parallel_env(**({"render_mode": "rgb_array"} if render else {}))
    if function and hasattr(importlib.import_module(module), function):
        env = getattr(importlib.import_module(module), function)()
    elif family.startswith(("MiniHack", "NetHack")):
        importlib.import_module("minihack" if family == "MiniHack" else "nle")
        keys = NETHACK_KEYS + SCREEN_KEYS * render
        env = gym.make(env_id, observation_keys=keys, fix_moon_phase=True, render_mode="ansi" if render else None)
        env = gym.wrappers.FilterObservation(NetHack(env), NETHACK_KEYS)
    else:
        if is_atari := family == "ALE" or "NoFrameskip" in env_id:
            from atari_wrappers import AtariWrapper  # which makes the games known to gymnasium too
        settings = {"frameskip": 1} if family == "ALE" else {}
        modes = gym.make(env_id, **settings).metadata.get("render_modes", ()) if render else ()
        mode = next((mode for mode in ("rgb_array", "ansi") if mode in modes), None)
        env = gym.make(env_id, render_mode=mode, **settings)
        if is_atari:
            return AtariWrapper(env)  # counts whole games, not lives
    return puffer_core.EpisodeStats(env) if isinstance(env, gym.Env) else env


def make_envs(args: Args, first: int = 0) -> Any:
    """Return the vectorizer that the arguments ask for."""
    env_fns = [lambda: make_env(args.env_id)] * args.num_envs
    if args.vec == "serial":
        return puffer_core.Serial(env_fns, zero_copy=args.zero_copy)
    sizes = dict(num_workers=args.num_workers or None, batch_size=args.env_batch_size or None)
    return puffer_core.Multiprocessing(env_fns, zero_copy=args.zero_copy, **sizes)


def kind_of(space: spaces.Space, action_space: spaces.Space) -> str:
    """Name the kind of an environment, one of PRESETS."""
    if is_image(space):
        return "images"
    if isinstance(space, spaces.Dict) and set(NETHACK_KEYS) <= set(space):
        return "nethack"
    if isinstance(action_space, spaces.Box):
        return "continuous"
    return "numbers" if is_numbers(space) else "structures"


def is_image(space: spaces.Space) -> bool:
    """Tell pictures, or stacks of them, from other arrays."""
    return (
        isinstance(space, spaces.Box)
        and space.dtype == np.uint8
        and len(space.shape) == 3
        and min(space.shape[:2]) > 0
        and sorted(space.shape)[1] >= 36
    )


def is_numbers(space: spaces.Space) -> bool:
    """Tell whether a space has nothing but floats, so that its flat row can be read as it is."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        return all(map(is_numbers, space.values() if isinstance(space, spaces.Dict) else space))
    return isinstance(space, spaces.Box) and space.dtype.kind == "f"


# ----------------------------------------------------------------------------------------------------------- networks


def layer_init(layer: nn.Module, std: float = 2**0.5) -> nn.Module:
    """Start with an orthogonal matrix and without bias."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Moments(nn.Module):
    """Mean and deviation of all rows ever seen, on all ranks."""

    def __init__(self, *shape: int):
        super().__init__()
        for name in ("count", "sums", "squares"):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))

    def update(self, rows: torch.Tensor) -> None:
        """Count rows in."""
        rows = rows.double()
        new = torch.stack([torch.full_like(self.count, len(rows)), rows.sum(0), rows.square().sum(0)])
        for total, more in zip(self.buffers(), reduce_sum(new)):
            total += more

    def normalize(self, rows: torch.Tensor) -> torch.Tensor:
        """Give rows mean 0 and deviation 1, with outliers cut off."""
        return ((rows - self.mean()) / self.deviation()).clamp(-10, 10)

    def mean(self) -> torch.Tensor:
        """Return the mean, 0 at first."""
        return (self.sums / self.count.clamp(min=1)).float()

    def deviation(self) -> torch.Tensor:
        """Return the standard deviation, 1 at first."""
        variance = self.squares / self.count.clamp(min=1) - (self.sums / self.count.clamp(min=1)).square()
        return torch.where(self.count > 1, variance.clamp(min=1e-8).sqrt(), 1.0).float()


class NatureCNN(nn.Module):
    """Reads pictures, `(channels, height, width)` or with the channels last, as in Mnih et al. 2015."""

    def __init__(self, space: spaces.Box, hidden_size: int):
        super().__init__()
        self.channels_last = space.shape[2] < space.shape[0]
        channels = space.shape[2 if self.channels_last else 0]
        self.convolutions = nn.Sequential(
            layer_init(nn.Conv2d(channels, 32, 8, stride=4)),
            nn.ReLU(),
            layer_init(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(),
            layer_init(nn.Conv2d(64, 64, 3, stride=1)),
            nn.ReLU(),
            nn.Flatten(),
        ).to(memory_format=torch.channels_last)
        size = self.features(torch.zeros(1, *space.shape)).shape[1]
        self.hidden = nn.Sequential(layer_init(nn.Linear(size, hidden_size)), nn.ReLU())

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the convolutions see."""
        x = x.permute(0, 3, 1, 2) if self.channels_last else x
        return self.convolutions(x.to(torch.float32, memory_format=torch.channels_last) / 255.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `(batch, hidden_size)`."""
        return self.hidden(self.features(x))


class NetHackNet(nn.Module):
    """Reads NetHack's map of glyphs, its numbers, on a scale of their own, and its message."""

    def __init__(self, space: spaces.Dict, hidden_size: int):
        super().__init__()
        self.glyphs = nn.Embedding(int(space["glyphs"].high.max()) + 1, 8)
        self.map = nn.Sequential(
            layer_init(nn.Conv2d(8, 16, 3, stride=2)),
            nn.ReLU(),
            layer_init(nn.Conv2d(16, 32, 3, stride=2)),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.message = nn.EmbeddingBag(256, 16)
        size = self.features({key: torch.zeros(1, *box.shape) for key, box in space.items()}).shape[1]
        self.hidden = nn.Sequential(layer_init(nn.Linear(size, hidden_size)), nn.ReLU())

    def features(self, x: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return map, numbers and message side by side."""
        glyphs = self.map(self.glyphs(x["glyphs"].int()).permute(0, 3, 1, 2))
        return torch.cat([glyphs, symlog(x["blstats"]), self.message(x["message"].int())], 1)

    def forward(self, x: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return `(batch, hidden_size)`."""
        return self.hidden(self.features(x))


def symlog(x: torch.Tensor) -> torch.Tensor:
    """Bring numbers of any size near 1."""
    return x.sign().float() * x.float().abs().log1p()


class MLP(nn.Module):
    """Reads rows of plain numbers."""

    def __init__(self, size: int, hidden_size: int):
        super().__init__()
        layers = [layer_init(nn.Linear(size, hidden_size)), nn.Tanh(), layer_init(nn.Linear(hidden_size, hidden_size))]
        self.layers = nn.Sequential(*layers, nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `(batch, hidden_size)`."""
        return self.layers(x.flatten(1))


class Summed(nn.Module):
    """Reads any structure: every leaf has an encoder, and the sum of what they say goes on."""

    def __init__(self, space: spaces.Space, hidden_size: int):
        super().__init__()
        self.space = space
        leaves = [leaf for leaf, _ in self.leaves(space)]
        self.encoders = nn.ModuleList([self.encoder(leaf, hidden_size) for leaf in leaves])
        self.hidden = nn.Sequential(nn.Tanh(), layer_init(nn.Linear(hidden_size, hidden_size)), nn.Tanh())

    @classmethod
    def leaves(cls, space: spaces.Space, x: Any = None) -> Iterator[tuple[spaces.Space, Any]]:
        """Walk over a space's leaves and, beside them, those of an observation."""
        if isinstance(space, (spaces.Dict, spaces.Tuple)):
            for key in space if isinstance(space, spaces.Dict) else range(len(space)):
                yield from cls.leaves(space[key], None if x is None else x[key])
        else:
            yield space, x

    @staticmethod
    def encoder(leaf: spaces.Space, hidden_size: int) -> nn.Module:
        """Return the encoder of one leaf."""
        if is_image(leaf):
            return NatureCNN(leaf, hidden_size)
        sizes = {spaces.Discrete: lambda: leaf.n, spaces.MultiDiscrete: lambda: leaf.nvec.sum()}
        return layer_init(nn.Linear(int(sizes.get(type(leaf), lambda: np.prod(leaf.shape))()), hidden_size))

    @staticmethod
    def numbers(leaf: spaces.Space, x: torch.Tensor) -> torch.Tensor:
        """Return a leaf as what its encoder reads: categories one-hot, other numbers near 1."""
        if is_image(leaf):
            return x
        if isinstance(leaf, spaces.Discrete):  # clamped, as rows of absent agents are zero
            return F.one_hot(
                (x.flatten(1)[:, 0].long() - int(leaf.start)).clamp(0, int(leaf.n) - 1), int(leaf.n)
            ).float()
        if isinstance(leaf, spaces.MultiDiscrete):
            start = torch.as_tensor(leaf.start.ravel(), device=x.device)
            columns = (x.flatten(1).long() - start).clamp(min=0).unbind(1)
            return torch.cat([F.one_hot(one, int(n)) for one, n in zip(columns, leaf.nvec.ravel())], 1).float()
        return x.flatten(1) / 255.0 if leaf.dtype == np.uint8 else symlog(x.flatten(1))

    def forward(self, x: Any) -> torch.Tensor:
        """Return `(batch, hidden_size)`."""
        leaves = self.leaves(self.space, x)
        return self.hidden(sum(encode(self.numbers(leaf, x)) for encode, (leaf, x) in zip(self.encoders, leaves)))


class Policy(nn.Module):
    """Actor and critic, with or without a memory, over the encoder that fits the observations."""

    def __init__(self, layout: puffer_core.Layout, action_space: spaces.Space, args: Args):
        super().__init__()
        self.layout, self.action_space, width = layout, action_space, args.hidden_size
        self.is_flat, self.is_continuous = is_numbers(layout.space), isinstance(action_space, spaces.Box)
        if is_image(layout.space):
            self.encoder = NatureCNN(layout.space, width)
        elif kind_of(layout.space, action_space) == "nethack":
            self.encoder = NetHackNet(layout.space, width)
        else:
            size = int(np.prod(layout.flat_space.shape))
            self.encoder = MLP(size, width) if self.is_flat else Summed(layout.space, width)
        self.moments = Moments(size) if args.norm_obs and self.is_flat else None
        self.returns = Moments(1) if args.norm_reward else None
        self.memory = nn.LSTMCell(width, width) if args.use_lstm else None
        if self.is_continuous:  # of bounded actions, -1 and 1 are the bounds
            low, high = action_space.low.ravel(), action_space.high.ravel()
            bounded = np.isfinite(low) & np.isfinite(high)
            self.center, self.radius = np.where(bounded, (high + low) / 2, 0), np.where(bounded, (high - low) / 2, 1)
            self.sizes = [len(low)]
            self.log_std = nn.Parameter(torch.zeros(len(low)))
        else:
            self.sizes = [int(n) for n in np.ravel(getattr(action_space, "nvec", getattr(action_space, "n", None)))]
        self.actor = layer_init(nn.Linear(width, sum(self.sizes)), std=0.01)
        self.critic = layer_init(nn.Linear(width, 1), std=1.0)
        bf16 = torch.bfloat16 if args.precision == "bf16" else None
        self.autocast = lambda x: torch.autocast(x.device.type, bf16, enabled=bf16 is not None, cache_enabled=False)

    def forward(self, obs: torch.Tensor, state: Any, starts: Any, action: Any = None) -> tuple[torch.Tensor, ...]:
        """Follow sequences `(batch, time, *row)` from `state`, which is forgotten wherever `starts`.

        Returns actions `(batch, time, parts)`, sampled if none are given, their log-probabilities, entropies and values
        `(batch, time)`, and the last state `(batch, 2 * hidden)`.
        """
        batch, steps = obs.shape[:2]
        obs = obs.flatten(0, 1)
        with self.autocast(obs):
            if self.is_flat:
                obs = obs.flatten(1).float()
                obs = self.moments.normalize(obs) if self.moments else obs
            hidden = self.encoder(obs if self.is_flat else self.layout.unflatten(obs)).view(batch, steps, -1)
            if self.memory:
                hidden, state = self.remember(hidden, state, starts)
        hidden = hidden.float()
        return (*self.act(self.actor(hidden), action), self.critic(hidden)[..., 0], state)

    def remember(self, x: torch.Tensor, state: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the memory along the sequences."""
        outputs = []
        for step in range(x.shape[1]):
            state = state.masked_fill(starts[:, step, None], 0.0)
            hidden, cell = self.memory(x[:, step], state.chunk(2, dim=1))
            outputs.append(hidden)
            state = torch.cat([hidden, cell], dim=1).float()
        return torch.stack(outputs, dim=1), state

    def act(self, parameters: torch.Tensor, action: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Return actions, their log-probabilities and the entropies, of the policy that the parameters describe."""
        if self.is_continuous:
            normal = torch.distributions.Normal(parameters, self.log_std.exp(), validate_args=False)
            action = normal.sample() if action is None else action
            return action, normal.log_prob(action).sum(-1), normal.entropy().sum(-1)
        parts = [logits.log_softmax(-1) for logits in parameters.split(self.sizes, -1)]
        if action is None:
            chosen = [torch.multinomial(part.exp().flatten(0, 1), 1).view(*part.shape[:2], 1) for part in parts]
            action = torch.cat(chosen, -1)
        logprob = sum(part.gather(-1, one)[..., 0] for part, one in zip(parts, action.split(1, -1)))
        return action, logprob, -sum((part.exp() * part).sum(-1) for part in parts)

    def for_envs(self, actions: np.ndarray) -> np.ndarray:
        """Turn sampled actions `(batch, parts)` into those that environments take."""
        actions = self.center + self.radius * actions if self.is_continuous else actions
        shaped = actions.reshape(len(actions), *self.action_space.shape) + getattr(self.action_space, "start", 0)
        return shaped.astype(self.action_space.dtype)


# --------------------------------------------------------------------------------------------------------- experience


class Experience:
    """Transitions by agent row: whoever comes when, each row has a time line of its own.

    A row's line is cut into segments of `num_steps`. An update takes the oldest complete segment of every row, so what
    it learns from does not depend on the order in which environments were ready. A row that is quicker than others
    begins its next segment meanwhile. Once it has no place left, the update takes the segments that are complete, and
    the slower rows' are in a later one: nothing is lost, and no row counts twice.

    Tensors on the device are flat, `(num_rows * num_slots, ...)`; what the parent process needs is numpy's.
    """

    def __init__(self, num_rows: int, args: Args, policy: Policy, device: torch.device, is_async: bool):
        flat = policy.layout.flat_space
        self.num_rows, self.num_steps, self.num_slots = num_rows, args.num_steps, args.num_steps * (1 + is_async)
        self.horizon, count = args.bptt_horizon if args.use_lstm else 1, num_rows * self.num_slots
        dtype, shape = getattr(torch, flat.dtype.name), flat.shape
        parts, action_dtype = (
            (sum(policy.sizes), torch.float32) if policy.is_continuous else (len(policy.sizes), torch.int64)
        )
        zeros = lambda *shape, dtype=torch.float32: torch.zeros(shape, dtype=dtype, device=device)  # noqa: E731
        self.observations, self.actions = zeros(count, *shape, dtype=dtype), zeros(count, parts, dtype=action_dtype)
        self.logprobs, self.values, self.next_values, self.advantages, self.returns = zeros(5, count)
        self.trainable = zeros(count, dtype=torch.bool)
        self.starts = zeros(count, dtype=torch.bool)  # an episode begins here: no memory of what was before
        self.states = zeros(count // self.horizon, 2 * args.hidden_size) if args.use_lstm else None
        self.rewards = np.zeros((num_rows, self.num_slots), np.float32)
        self.valid, self.terminated, self.ended = np.zeros((3, num_rows, self.num_slots), bool)
        self.begun, self.complete, self.consumed = np.zeros((3, num_rows), np.int64)  # transitions since the start

    def finish(self, batch: puffer_core.Batch, rows: np.ndarray) -> None:
        """Complete the rows' last transitions with what came of them; those of a reset end up where no one looks."""
        slots = (self.begun[rows] - 1) % self.num_slots
        self.rewards[rows, slots] = batch.rewards
        self.terminated[rows, slots] = batch.terminations
        self.ended[rows, slots] = batch.terminations | batch.truncations
        self.valid[rows, slots] &= batch.masks  # of a transition whose agent is gone there is nothing to learn
        self.complete[rows] = self.begun[rows]

    def ready(self) -> np.ndarray:
        """Return the rows that have a complete segment."""
        return np.flatnonzero(self.complete - self.consumed >= self.num_steps)

    def is_due(self, rows: np.ndarray) -> bool:
        """Tell whether all rows have a complete segment, or one of `rows`, which come next, has no place left."""
        held = self.complete - self.consumed
        return held.min() >= self.num_steps or held[rows].max() == self.num_slots

    def index(self, rows: np.ndarray) -> np.ndarray:
        """Return where the rows' oldest segments lie, `(rows, num_steps)`: row * num_slots + slot."""
        first = rows * self.num_slots + self.consumed[rows] % self.num_slots
        return first[:, None] + np.arange(self.num_steps)


def estimate_advantages(
    rewards: torch.Tensor,
    values: torch.Tensor,
    next_values: torch.Tensor,
    terminated: torch.Tensor,
    ended: torch.Tensor,
    valid: torch.Tensor,
    gamma: float,
    gae_lambda: float,
) -> torch.Tensor:
    """Return generalized advantages of segments `(rows, time)`, see Schulman et al. 2016; 0 where not `valid`.

    `next_values` is the value of what came after a step: after a truncation, of the last observation. An end cuts the
    sum of later advantages off, and a termination the next value too.
    """
    deltas = rewards + gamma * next_values.where(~terminated, 0.0) - values
    deltas = deltas.where(valid, 0.0).T.contiguous()
    decay = (gamma * gae_lambda * (valid & ~ended)).T.contiguous()
    for step in reversed(range(len(deltas) - 1)):
        deltas[step] += decay[step] * deltas[step + 1]
    return deltas.T


# -------------------------------------------------------------------------------------------------------- the trainer


def world_size() -> int:
    """Return how many ranks torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Return which of them this one is."""
    return int(os.environ.get("RANK", 0))


def reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, in place."""
    if distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor


def use_bf16(device: torch.device) -> bool:
    """Tell whether the hardware computes with bf16; where it is emulated, it takes ten times as long as fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and any(flag in cpu.read_text() for flag in ("amx_bf16", "avx512_bf16"))


class Inbox:
    """All that the device needs of a batch, in one piece of (on CUDA: pinned) memory, so that one copy moves it."""

    def __init__(self, count: int, flat: spaces.Box, device: torch.device):
        numbers = [(name, np.int64, (count,)) for name in ("rows", "index", "previous")]
        fields = [*numbers, ("starts", bool, (count,)), ("observations", flat.dtype, (count, *flat.shape))]
        struct = np.dtype(fields, align=True)
        self.memory = torch.zeros(struct.itemsize, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.on_device, self.host = self.memory.to(device), np.ndarray((), struct, self.memory.numpy())
        for name, dtype, shape in fields:
            part = self.on_device[struct.fields[name][1] :][: struct[name].itemsize]
            setattr(self, name, part.view(getattr(torch, np.dtype(dtype).name)).view(shape))

    def move(self, **fields: np.ndarray) -> None:
        """Copy the fields to the device, whose tensors hold until the next call."""
        for name, field in fields.items():
            self.host[name][...] = field
        if self.on_device is not self.memory:
            self.on_device.copy_(self.memory, non_blocking=True)


class Episodes:
    """Finds the returns of episodes that end: in infos, or for teams, which have none there, from rewards."""

    def __init__(self, envs: Any):
        self.is_team = envs.num_agents > envs.num_envs
        self.sums = np.zeros((2, envs.num_agents))

    def finished(self, batch: puffer_core.Batch) -> Iterator[dict[str, float]]:
        """Yield the statistics of each episode that this batch ends, `r` its return and `l` its length."""
        if not self.is_team:
            found = batch.infos.get("final_info", {}).get("episode", {})
            for row in np.flatnonzero(batch.infos.get("final_info", {}).get("_episode", False)):
                yield {key: float(value[row]) for key, value in found.items() if not key.startswith("_")}
            return
        self.sums[:, batch.agent_ids] += batch.rewards, batch.masks
        for row in batch.agent_ids[batch.terminations | batch.truncations]:
            yield {"r": self.sums[0, row], "l": self.sums[1, row]}
            self.sums[:, row] = 0


class Trainer:
    """Environments, policy, optimizer and experience of one rank: `collect` and `update` take turns."""

    def __init__(self, args: Args):
        self.args, self.iteration, self.global_step, self.stopping = args, 0, 0, False
        local = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        self.device = torch.device(local if torch.cuda.is_available() and args.cuda else "cpu")
        args.precision = args.precision.replace("auto", "bf16" if use_bf16(self.device) else "fp32")
        self.num_iterations = args.total_timesteps
        self.seconds, self.returns, self.episodes, self.losses = defaultdict(float), deque(maxlen=100), 0, {}
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(args.seed)
        self.envs = make_envs(args)
        self.num_iterations //= self.envs.num_agents * args.num_steps * world_size()
        self.policy = Policy(self.envs.layout, self.envs.single_action_space, args).to(self.device)
        self.parameters = list(self.policy.parameters())
        self.model = torch.compile(self.policy) if args.compile else self.policy
        self.optimizer = torch.optim.Adam(self.parameters, lr=args.learning_rate, eps=1e-5)
        is_async = self.envs.agents_per_batch < self.envs.num_agents
        self.experience = Experience(self.envs.num_agents, args, self.policy, self.device, is_async)
        self.inbox = Inbox(self.envs.agents_per_batch, self.envs.single_observation_space, self.device)
        torch.manual_seed(args.seed + rank())  # ranks have the same weights, and draw other actions

    def start(self) -> None:
        """Reset all environments, and every agent's memory."""
        count, size = self.envs.num_agents, 2 * self.args.hidden_size
        self.state = torch.zeros(count, size, device=self.device) if self.args.use_lstm else None
        self.alive, self.stats = np.zeros(count, bool), Episodes(self.envs)
        self.envs.async_reset(self.args.seed + rank() * self.args.num_envs + self.global_step)
        self.receive()

    @contextlib.contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Add up where the time goes."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def receive(self) -> None:
        """Take the next batch: it completes its rows' last transitions, and brings their next observations."""
        with self.clock("env wait"):
            batch = self.envs.recv()
        with self.clock("copies"):
            rows, experience, infos = batch.agent_ids, self.experience, batch.infos
            experience.finish(batch, rows)
            ended, has_next = batch.terminations | batch.truncations, infos.get("_final_obs", np.zeros(len(rows), bool))
            was_alive = self.alive[rows]
            self.rows, self.alive[rows] = rows.copy(), batch.masks & (has_next | ~ended)
            first, slots = rows * experience.num_slots, experience.begun[rows]
            index, previous = (first + slot % experience.num_slots for slot in (slots, slots - 1))
            starts, fields = ended | ~was_alive, dict(rows=rows, index=index, previous=previous)
            self.inbox.move(**fields, starts=starts, observations=batch.observations)
            truncated = np.flatnonzero(has_next & batch.truncations & ~batch.terminations)
            self.bootstraps = self.bootstrap(rows, truncated, infos["final_obs"]) if truncated.size else None
        self.global_step += len(rows) * world_size()
        for episode in self.stats.finished(batch):
            self.returns.append(episode.pop("r"))
            self.episodes += 1
            self.details = episode

    @torch.no_grad()
    def bootstrap(self, rows: np.ndarray, truncated: np.ndarray, final_obs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the values of the last observations of episodes that were cut off, and where in the batch they are."""
        obs = torch.as_tensor(np.stack([final_obs[row] for row in truncated]), device=self.device)[:, None]
        where = torch.as_tensor(truncated, device=self.device)
        state = self.state[torch.as_tensor(rows[truncated], device=self.device)] if self.args.use_lstm else None
        return where, self.policy(obs, state, torch.zeros(obs.shape[:2], dtype=torch.bool, device=self.device))[3][:, 0]

    @torch.no_grad()
    def think(self) -> list[torch.Tensor]:
        """Run the policy on the batch, whose values are also what came after the rows' last transitions."""
        inbox, state = self.inbox, self.state[self.inbox.rows] if self.args.use_lstm else None
        outputs = self.model(inbox.observations[:, None], state, inbox.starts[:, None])
        next_values = outputs[3][:, 0]
        if self.bootstraps:
            next_values = next_values.index_copy(0, *self.bootstraps)
        self.experience.next_values[inbox.previous] = next_values
        return outputs

    def act(self) -> None:
        """Choose actions for the batch, remember it, and send its environments to work."""
        experience, inbox, rows = self.experience, self.inbox, self.rows
        with self.clock("inference"):
            actions, logprobs, _, values, state = self.think()
            for store, values in (
                (experience.observations, inbox.observations),
                (experience.starts, inbox.starts),
                (experience.actions, actions[:, 0]),
                (experience.logprobs, logprobs[:, 0]),
                (experience.values, values[:, 0]),
            ):
                store[inbox.index] = values
            slots = experience.begun[rows] % experience.num_slots
            if self.args.use_lstm:
                begins = torch.as_tensor(np.flatnonzero(slots % experience.horizon == 0), device=self.device)
                experience.states[inbox.index[begins] // experience.horizon] = self.state[inbox.rows[begins]]
                self.state[inbox.rows] = state
            actions = self.policy.for_envs(actions[:, 0].cpu().numpy())
        experience.valid[rows, slots] = self.alive[rows]
        experience.begun[rows] += 1
        self.envs.send(actions)

    def collect(self) -> bool:
        """Step environments until an update is due; returns False if asked to stop before."""
        while not (self.stopping and world_size() == 1):
            self.act()
            self.receive()
            if self.experience.is_due(self.rows):
                return True
        return False

    def estimate(self) -> torch.Tensor:
        """Work out advantages and returns of the rows' oldest segments; returns the index of these, (rows, num_steps)."""
        args, experience, rows = self.args, self.experience, self.experience.ready()
        self.think()  # the value of the batch that has just come, and is acted on after the update
        where = experience.index(rows)
        index = torch.as_tensor(where, device=self.device)
        fields = (experience.rewards, experience.terminated, experience.ended, experience.valid)
        packed = np.stack([field.reshape(-1)[where] for field in fields]).astype(np.float32)  # one copy to the device
        rewards, *flags = torch.as_tensor(packed, device=self.device)
        terminated, ended, valid = (flag.bool() for flag in flags)
        if self.policy.returns:
            rewards = self.scale(rewards, ended, valid)
        values, discounts = experience.values[index], (args.gamma, args.gae_lambda)
        steps = (rewards, values, experience.next_values[index], terminated, ended, valid)
        experience.advantages[index] = advantages = estimate_advantages(*steps, *discounts)
        experience.returns[index], experience.trainable[index] = advantages + values, valid
        experience.consumed[rows] += args.num_steps
        return index

    def scale(self, rewards: torch.Tensor, ended: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Divide rewards by the deviation of their discounted sums, each from its segment's start on."""
        total, totals = torch.zeros_like(rewards[:, 0]), []
        for step in range(rewards.shape[1]):
            total = self.args.gamma * total + rewards[:, step].where(valid[:, step], 0.0)
            totals.append(total)
            total = total.masked_fill(ended[:, step], 0.0)
        self.policy.returns.update(torch.stack(totals, dim=1)[valid][:, None])
        return rewards / self.policy.returns.deviation()

    def update(self) -> None:
        """Learn from the segments that are complete."""
        args, experience = self.args, self.experience
        with self.clock("update"):
            index = self.estimate()
            self.optimizer.param_groups[0]["lr"] = self.learning_rate()
            sequences = index.view(-1, experience.horizon)
            trainable = experience.trainable[sequences]
            sequences = sequences[trainable.any(1)]
            has_gaps = experience.horizon > 1 and not trainable.all()
            sums = torch.zeros(6, device=self.device)
            for _ in range(args.update_epochs):
                for chosen in torch.randperm(len(sequences)).tensor_split(args.num_minibatches):
                    sums += self.learn(sequences[chosen.to(self.device)], has_gaps)
            index = index[experience.trainable[index]]
            if self.policy.moments:
                self.policy.moments.update(experience.observations[index].flatten(1))
            returns, values = experience.returns[index], experience.values[index]
            explained = 1 - (returns - values).var() / returns.var()
            means = (sums / (args.update_epochs * args.num_minibatches)).tolist()
        names = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")
        self.losses = dict(zip(names, means)) | {"explained_variance": explained.item()}
        self.iteration += 1

    def learning_rate(self) -> float:
        """Return the learning rate of the next update."""
        left = 1 - self.iteration / self.num_iterations if self.args.anneal_lr else 1.0
        return self.args.learning_rate * left

    def learn(self, index: torch.Tensor, has_gaps: bool) -> torch.Tensor:
        """Take one gradient step on a minibatch of sequences, `(sequences, horizon)`; returns what to log."""
        args, experience = self.args, self.experience
        observations, actions, starts = (
            experience.observations[index],
            experience.actions[index],
            experience.starts[index],
        )
        state = experience.states[index[:, 0] // experience.horizon] if args.use_lstm else None
        if has_gaps:  # nothing of an absent agent's rows gets anywhere, whatever they hold
            kept = experience.trainable[index]
            observations = observations.masked_fill(~kept.view(*kept.shape, *[1] * (observations.dim() - 2)), 0)
            actions = actions.masked_fill(~kept[..., None], 0)
        _, newlogprob, entropy, newvalue, _ = self.model(observations, state, starts, actions)
        flat = [part[kept] if has_gaps else part.flatten() for part in (index, newlogprob, entropy, newvalue)]
        index, newlogprob, entropy, newvalue = flat
        advantages, returns, values = (
            store[index] for store in (experience.advantages, experience.returns, experience.values)
        )

        # Statistics and means are those of the minibatches of all ranks together
        sums = torch.stack([torch.ones_like(advantages), advantages, advantages.square()]).double().sum(1)
        count, total, squares = reduce_sum(sums)
        if args.norm_adv:
            deviation = ((squares - total.square() / count) / (count - 1)).clamp(min=0).sqrt()
            advantages = ((advantages - total / count) / (deviation + 1e-8)).float()

        def mean(x: torch.Tensor) -> torch.Tensor:
            return x.sum() / count.float()

        logratio = newlogprob - experience.logprobs[index]
        ratio = logratio.exp()
        clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        policy_loss = -mean(torch.min(advantages * ratio, advantages * clipped_ratio))
        v_error = (newvalue - returns).square()
        if args.clip_vloss:
            clipped_value = values + (newvalue - values).clamp(-args.clip_coef, args.clip_coef)
            v_error = torch.max(v_error, (clipped_value - returns).square())
        value_loss, entropy = 0.5 * mean(v_error), mean(entropy)

        self.optimizer.zero_grad()
        (policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss).backward()
        if distributed.is_initialized():
            gradients = [parameter.grad for parameter in self.parameters]
            flat = reduce_sum(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
                gradient.copy_(part.view_as(gradient))
        nn.utils.clip_grad_norm_(self.parameters, args.max_grad_norm)
        self.optimizer.step()
        with torch.no_grad():  # two estimates of the divergence, see http://joschu.net/blog/kl-approx.html
            kls = (-mean(logratio), mean(ratio - 1 - logratio), mean((ratio != clipped_ratio).float()))
            return torch.stack([policy_loss, value_loss, entropy, *kls])


# -------------------------------------------------------------------------------------------------------- checkpoints


def save(trainer: Trainer, path: Path) -> None:
    """Write a checkpoint beside the last one and put it in its place: a kill at any time leaves one of the two."""
    name, numbers, position, *gauss = np.random.get_state()
    rng = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [name, numbers.tolist(), position, *gauss],
    }
    if trainer.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(trainer.device)
    checkpoint = {
        "args": vars(trainer.args),
        "spaces": spaces_of(trainer.envs),
        "policy": trainer.policy.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "counts": [trainer.iteration, trainer.global_step, trainer.episodes],
        "returns": list(trainer.returns),
        "rng": rng,
    }
    beside = path.with_suffix(".part")
    with open(beside, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def spaces_of(envs: Any) -> str:
    """Describe what a policy was made for."""
    return f"observations {envs.layout.space} and actions {envs.single_action_space}"


def load(path: str) -> dict[str, Any]:
    """Read a checkpoint; one line ends the program if it is none."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return checkpoint if checkpoint["args"] and checkpoint["policy"] else {}
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise SystemExit(
            f"--resume {path}: expected a checkpoint of demo.py, found none that can be read ({reason})"
        ) from None


def restore(trainer: Trainer, checkpoint: dict[str, Any], path: str) -> None:
    """Go on where a checkpoint was written; one line ends the program if it is of another network or environment."""
    made_for, here = checkpoint["spaces"], spaces_of(trainer.envs)
    if made_for != here:
        raise SystemExit(f"--resume {path}: expected a checkpoint for {here}, this one is for {made_for}")
    try:
        trainer.policy.load_state_dict(checkpoint["policy"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        flags = "--use-lstm, --hidden-size, --norm-obs and --norm-reward"
        raise SystemExit(f"--resume {path}: expected a network of the same {flags}: {reason}") from None
    trainer.optimizer.load_state_dict(checkpoint["optimizer"])
    trainer.iteration, trainer.global_step, trainer.episodes = checkpoint["counts"]
    trainer.returns.extend(checkpoint["returns"])
    if world_size() == 1:
        name, numbers, *rest = checkpoint["rng"]["numpy"]
        np.random.set_state((name, np.array(numbers, np.uint32), *rest))
        random.setstate(checkpoint["rng"]["python"])
        torch.set_rng_state(checkpoint["rng"]["torch"])
        if trainer.device.type == "cuda" and "cuda" in checkpoint["rng"]:
            torch.cuda.set_rng_state(checkpoint["rng"]["cuda"], trainer.device)


# ---------------------------------------------------------------------------------------------------------- dashboard


def sparkline(values: Any, width: int = 24) -> str:
    """Draw numbers as a line of blocks."""
    parts = np.array_split(np.asarray(values, float), min(width, len(values))) if len(values) else []
    means = np.array([part.mean() for part in parts])
    heights = (means - means.min()) / (np.ptp(means) or 1.0) * 7 if parts else []
    return "".join("▁▂▃▄▅▆▇█"[int(height)] for height in heights)


class Dashboard:
    """Shows a run: as a live screen on a terminal, else a line every few seconds, and nothing if quiet."""

    def __init__(self, args: Args, trainer: Trainer, title: str, writer: Any):
        self.args, self.trainer, self.title, self.writer, self.live = args, trainer, title, writer, None
        self.is_shown = rank() == 0 and not args.quiet
        self.start = self.last = time.perf_counter()
        self.first_step = self.last_step = trainer.global_step
        self.printed, self.speeds, self.trend = -np.inf, deque(maxlen=240), deque(maxlen=240)
        self.usage: tuple = (0.0, 0.0)
        if self.is_shown and sys.stdout.isatty():
            from rich.live import Live

            self.live = Live(get_renderable=self.render, refresh_per_second=4)
            self.live.start()

    def log(self) -> None:
        """Note what the last update has brought, and show it."""
        trainer, now = self.trainer, time.perf_counter()
        self.speeds.append((trainer.global_step - self.last_step) / (now - self.last))
        self.last, self.last_step = now, trainer.global_step
        charts = {"learning_rate": trainer.optimizer.param_groups[0]["lr"], "SPS": self.speeds[-1]}
        if trainer.returns:
            self.trend.append(np.mean(trainer.returns))
            charts |= {"episodic_return": self.trend[-1], "episodic_length": trainer.details.get("l", 0.0)}
        for group, numbers in (("charts", charts), ("losses", trainer.losses)):
            for name, value in numbers.items() if self.writer else ():
                self.writer.add_scalar(f"{group}/{name}", value, trainer.global_step)
        if self.is_shown and not self.live and now - self.printed > 2:
            self.print_line()

    def print_line(self) -> None:
        """Print where the run stands."""
        trainer, self.printed = self.trainer, time.perf_counter()
        numbers = " ".join(f"{name}={trainer.losses[name]:.3g}" for name in ("value_loss", "entropy", "approx_kl"))
        mean = f"{np.mean(trainer.returns):.4g}" if trainer.returns else "none yet"
        print(
            f"global_step={trainer.global_step} SPS={self.speeds[-1]:.0f} episodic_return={mean} {numbers} left={self.left()}",
            flush=True,
        )

    def left(self) -> str:
        """Return the time left."""
        trainer, seconds = self.trainer, self.last - self.start
        done = (trainer.global_step - self.first_step) / max(seconds, 1e-9)
        total = trainer.num_iterations * trainer.envs.num_agents * self.args.num_steps * world_size()
        return str(timedelta(seconds=int(max(total - trainer.global_step, 0) / done))) if done else "?"

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self.live:
            self.live.stop()
        elif self.is_shown and self.trainer.losses:
            self.print_line()

    def render(self) -> Any:
        """Draw the screen."""
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        trainer, args = self.trainer, self.args
        total = trainer.num_iterations * trainer.envs.num_agents * args.num_steps * world_size()

        def table(title: str, rows: Any, color: str) -> Panel:
            grid = Table.grid(padding=(0, 1), expand=True)
            for name, *values in rows:
                grid.add_row(f"[dim]{name}", *[Text(value, justify="right", style=color) for value in values])
            return Panel(grid, title=f"[bold]{title}", title_align="left", border_style=color, padding=(0, 1))

        top = Table.grid(padding=(0, 1), expand=True)
        top.add_column(), top.add_column(ratio=1), top.add_column(justify="right")
        share = min(1.0, trainer.global_step / max(total, 1))
        speed = f"{self.speeds[-1]:,.0f}" if self.speeds else "..."
        top.add_row(
            f"[bold cyan]{share:4.0%}",
            ProgressBar(total=1.0, completed=share, complete_style="cyan", finished_style="green"),
            f"[bold]{trainer.global_step:,}[/] of {total:,} steps  [bold cyan]{self.left()}[/] left",
        )
        seconds = trainer.seconds | {"rest": time.perf_counter() - self.start - sum(trainer.seconds.values())}
        whole = max(sum(seconds.values()), 1e-9)
        times = [(name, "█" * round(10 * own / whole), f"{own / whole:4.0%}") for name, own in seconds.items()]
        losses = [(name.replace("_", " "), f"{value:.3g}") for name, value in trainer.losses.items()]
        returns = (
            [("mean of 100", f"{np.mean(trainer.returns):.4g}"), ("best", f"{max(trainer.returns):.4g}")]
            if trainer.returns
            else []
        )
        episodes = [("episodes", f"{trainer.episodes:,}"), *returns, ("trend", sparkline(list(self.trend), 16))]
        episodes += [(key, f"{value:.4g}") for key, value in list(trainer.details.items())[:3] if key != "t"]
        machine = [("SPS", speed), ("trend", sparkline(list(self.speeds), 16)), *self.machine()]
        columns = Table.grid(expand=True)
        for _ in range(4):
            columns.add_column(ratio=1)
        columns.add_row(
            *(table("episodes", episodes, "green"), table("speed", machine, "cyan")),
            *(table("time", times, "yellow"), table("losses", losses, "magenta")),
        )
        return Panel(
            Group(top, columns), title=f"[bold]{self.title}", subtitle="Ctrl-C saves and stops", border_style="blue"
        )

    def machine(self) -> list[tuple[str, str]]:
        """Return how busy the machine is."""
        gib = 2**30
        memory = psutil.virtual_memory()
        lines = [
            ("CPU", f"{psutil.cpu_percent():.0f}%"),
            ("memory", f"{memory.used / gib:.1f}/{memory.total / gib:.0f} GiB"),
        ]
        if self.trainer.device.type == "cuda":
            lines += [
                ("GPU", torch.cuda.get_device_name()),
                ("GPU memory", f"{torch.cuda.max_memory_allocated() / gib:.1f} GiB"),
            ]
        return lines


# -------------------------------------------------------------------------------------------------------------- modes


def train(args: Args, report: Callable[[int, float], None] = lambda step, mean: None) -> float:
    """Train an agent; returns the mean return of its last 100 episodes. `report` hears of every update's."""
    checkpoint = load(args.resume) if args.resume else None
    name = re.sub(r"[^\w.-]+", "-", f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}")
    folder = Path("runs") / name
    trainer = Trainer(args)
    if checkpoint:
        restore(trainer, checkpoint, args.resume)
    writer = log_writer(args, name) if rank() == 0 else None
    count = sum(parameter.numel() for parameter in trainer.parameters)
    title = f"{args.env_id} on {trainer.device}, {args.precision}, {count:,} parameters"

    def stop(*_: Any) -> None:
        trainer.stopping = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with trainer.envs:
            trainer.start()
            dashboard = Dashboard(args, trainer, title, writer)
            try:
                while trainer.iteration < trainer.num_iterations and trainer.collect():
                    trainer.update()
                    dashboard.log()
                    mean = float(np.mean(trainer.returns)) if trainer.returns else -np.inf
                    reached = (
                        args.target_return is not None and len(trainer.returns) == 100 and mean >= args.target_return
                    )
                    if args.checkpoint_interval and trainer.iteration % args.checkpoint_interval == 0 and rank() == 0:
                        save(trainer, folder / "checkpoint.pt")
                    report(trainer.iteration, mean)
                    ends = torch.tensor([float(reached or trainer.stopping)])
                    if reduce_sum(ends.to(trainer.device)).item():
                        break
            finally:
                dashboard.close()
            if rank() == 0:
                save(trainer, folder / "checkpoint.pt")
                if not args.quiet:
                    print(f"Saved {folder}/checkpoint.pt; --resume goes on with it, --mode eval --resume plays it")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if writer:
            writer.close()
    if trainer.stopping:
        raise SystemExit(130)
    return float(np.mean(trainer.returns)) if trainer.returns else -np.inf


def log_writer(args: Args, name: str) -> Any:
    """Open TensorBoard's log, and W&B's if wanted."""
    from torch.utils.tensorboard import SummaryWriter

    if args.track:
        import wandb

        wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            name=name,
            config=vars(args),
            sync_tensorboard=True,
        )
    writer = SummaryWriter(f"runs/{name}")
    table = [f"|{name}|{value}|" for name, value in vars(args).items()]
    writer.add_text("hyperparameters", "\n".join(["|param|value|", "|-|-|", *table]))
    return writer


def prepare(args: Args) -> dict[str, Any]:
    """Fill in and check the arguments, on an environment built here, before any process starts; returns choices."""
    try:
        env = puffer_core.Serial([lambda: make_env(args.env_id)])
    except Exception as error:
        raise SystemExit(f"--env-id {args.env_id}: {' '.join(str(error).split())}") from None
    with env:
        kind = kind_of(env.layout.space, env.single_action_space)
    chosen = choose(args, kind)
    check(args)
    return {"kind": kind} | chosen


def main() -> None:
    """Read the command line and do what it asks for."""
    args = tyro.cli(Args)
    if args.resume:  # what its arguments say holds, unless a flag says otherwise
        args = tyro.cli(Args, default=Args(**load(args.resume)["args"]))
    chosen = prepare(args)
    if chosen and not args.quiet and rank() == 0:
        print("Chosen here:", " ".join(f"{name}={value}" for name, value in chosen.items()))
    if world_size() > 1:
        distributed.init_process_group(timeout=timedelta(seconds=60))
    try:
        {"train": train}[args.mode](args)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    main()
