"""The full PPO trainer, for any environment: first-ready sampling, LSTM, dashboard, checkpoints, sweeps, many machines.

Run `python demo.py --env-id CartPole-v1`; `--help` lists all flags, and README.md shows what else it does.
"""

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import random
import re
import signal
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import gymnasium as gym
import numpy as np
import psutil
import torch.distributed.nn  # here, as its functions hold for ever the process group there is when it is imported
import tyro
from gymnasium import spaces
from gymnasium.envs.registration import load_env_creator
from rich import columns, console, live, panel, progress_bar, table
from torch import distributed, nn
from torch.utils.tensorboard import SummaryWriter

import puffer_core

WORLD_SIZE, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))  # torchrun sets them
NETHACK_KEYS = ("glyphs", "blstats", "message")  # what its network reads


@dataclasses.dataclass
class Args:
    """Train, play, search or measure speed. Hyperparameters that are None depend on the kind of environment."""
    mode: Literal["train", "eval", "sweep", "autotune"] = "train"  # train, play, search hyperparameters, measure speed
    env_id: str = "BreakoutNoFrameskip-v4"  # a Gymnasium id, pettingzoo:MODULE, or MODULE:FUNCTION that returns one
    seed: int = 1  # seed of the network, of the actions and (plus its index) of every environment
    total_timesteps: int = 10_000_000  # agent steps of the whole run, over all environments and ranks
    target_return: float = float("inf")  # stop as soon as the last 100 episodes have this mean return
    exp_name: str = "demo"  # a part of the run's name
    resume: str | None = None  # checkpoint to go on with, or to play; its arguments become the defaults
    quiet: bool = False  # print only errors, and the results of eval, sweep and autotune
    vec: Literal["multiprocessing", "serial"] = "multiprocessing"  # step environments in workers, or in this process
    num_envs: int | None = None  # environments of each rank
    num_workers: int = 0  # worker processes, 0 for what the cores allow
    env_batch_size: int = 0  # environments that are waited for at a time, the first that are ready; 0 for all
    zero_copy: bool = True  # batches are blocks of neighbors, not copied; otherwise copies from any ready workers
    num_steps: int = 128  # steps of each agent that an update learns from
    num_minibatches: int = 4  # parts that an update's steps are split into
    update_epochs: int | None = None  # times that each step is used
    learning_rate: float | None = None  # step size of Adam, at the start
    anneal_lr: bool = True  # lower the learning rate linearly, to 0 at the end
    gamma: float | None = None  # discount of later rewards
    gae_lambda: float | None = None  # lambda of the generalized advantage estimation
    clip_coef: float | None = None  # PPO's clipping range of the probability ratio, either way from 1
    clip_vloss: Annotated[bool | None, tyro.conf.arg(constructor=bool)] = None  # clip the value function's change too
    ent_coef: float | None = None  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # the gradient is scaled down to this norm
    norm_adv: bool = True  # give the advantages of every minibatch mean 0 and deviation 1
    reward_scale: float | None = None  # what rewards are multiplied by before the agent learns from them
    hidden_size: int | None = None  # width of the layer that actor and critic read
    use_lstm: bool = False  # give the agent a memory
    bptt_horizon: int = 16  # steps that gradients flow back through the memory, a divisor of num_steps
    cuda: bool = True  # train on the GPU if there is one
    cuda_graphs: bool = True  # launch all of a batch at once, for which no code may wait for the GPU, as `.item()`
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of the forward pass; auto: bf16 for large networks on a GPU
    compile: bool = False  # torch.compile the network
    checkpoint_interval: int = 50  # updates between two checkpoints, 0 for one at the end only
    eval_episodes: int = 10  # episodes that --mode eval plays
    sweep_trials: int = 20  # trials of --mode sweep in all, those of earlier calls counted
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "puffer-core"  # project at Weights & Biases
    wandb_entity: str | None = None  # team at Weights & Biases; your own account by default

    def expect(self, name: str, is_right: Any, expected: str) -> None:
        """End with one line if an argument is wrong."""
        if not is_right:
            raise SystemExit(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {expected}")


# What holds where no flag is given, by the kind of environment; for images it is what puffer_ppo_atari.py has.
COMMON = {"num_envs": 8, "update_epochs": 4, "learning_rate": 1e-3, "gamma": 0.99, "gae_lambda": 0.95, "clip_coef": 0.2}
COMMON |= {"clip_vloss": False, "ent_coef": 0.01, "reward_scale": 0.1, "hidden_size": 128}
PRESETS = {"continuous": {"ent_coef": 0.0, "update_epochs": 10}, "discrete": {"learning_rate": 2.5e-3}}
PRESETS |= {"nethack": {"hidden_size": 256, "reward_scale": 1.0}, "images": {"hidden_size": 512, "reward_scale": 1.0}}
PRESETS["images"] |= {"learning_rate": 2.5e-4, "clip_coef": 0.1, "clip_vloss": True}
SEARCH = {"learning_rate": (1e-4, 1e-2), "ent_coef": (1e-4, 0.1), "gae_lambda": (0.8, 0.99), "gamma": (0.9, 0.999)}
SEARCH |= {"clip_coef": (0.1, 0.3), "update_epochs": (1, 10)}  # of a sweep, logarithmic if over tenfold


def prepare(args: Args) -> list[str]:
    """Fill in what no flag says, and end with one line if something cannot be right; returns the names of choices."""
    try:
        with puffer_core.Serial([partial(make_env, args.env_id)]) as envs:
            kind = kind_of(envs.layout.space, envs.single_action_space)
    except Exception as error:
        raise SystemExit(f"--env-id {args.env_id}: {type(error).__name__}: {' '.join(str(error).split())}") from None
    chosen = {name: value for name, value in (COMMON | PRESETS[kind]).items() if getattr(args, name) is None}
    vars(args).update(chosen)
    counts = "num_envs num_steps num_minibatches update_epochs hidden_size bptt_horizon eval_episodes sweep_trials"
    others = "seed checkpoint_interval learning_rate clip_coef max_grad_norm vf_coef ent_coef gamma gae_lambda"
    for name, least in (dict.fromkeys(counts.split(), 1) | dict.fromkeys(others.split(), 0)).items():
        args.expect(name, getattr(args, name) >= least, f"at least {least}")
        args.expect(name, name not in ("gamma", "gae_lambda") or getattr(args, name) <= 1, "at most 1")
    args.expect("env_id", envs.layout.flat_space.dtype.str[1:] not in ("u2", "u4", "u8"), "no uint16/32/64 observation")
    steps, length = args.num_envs * envs.num_agents * args.num_steps, args.bptt_horizon if args.use_lstm else 1
    args.expect("bptt_horizon", args.num_steps % length == 0, "to divide --num-steps")
    args.expect("num_minibatches", args.num_minibatches * length <= steps, f"at most {steps // length}, one a sequence")
    args.expect("total_timesteps", args.total_timesteps >= (one := steps * WORLD_SIZE), f"at least one update, {one}")
    args.expect("env_batch_size", args.vec != "serial" or not args.env_batch_size, "--vec multiprocessing beside it")
    args.expect("mode", args.mode != "eval" or args.resume, "--resume CHECKPOINT beside it")
    args.expect("mode", args.mode == "train" or WORLD_SIZE == 1, "one process, torchrun has more")
    args.expect("mode", args.mode != "sweep" or SEARCH.keys() & chosen, f"no --resume nor flags for all of {[*SEARCH]}")
    RANK or args.quiet or print(f"{args.env_id} ({kind}):", *[f"{name}={chosen[name]}" for name in chosen], flush=True)
    return list(chosen)


def make_env(env_id: str, render: bool = False) -> Any:
    """Return an environment by its id; with `render`, one that can draw itself, as a picture or as text."""
    module, _, name = (env_id := re.sub("^(ale_py|minihack|nle):", "", env_id)).partition(":")
    if module == "pettingzoo" or name.isidentifier():
        create, env = load_env_creator(f"{name}:parallel_env" if module == "pettingzoo" else env_id), None
        with contextlib.suppress(Exception):  # one that cannot draw itself
            env = create(render_mode="rgb_array") if render else None
        env = create() if env is None else env
        env = env.env if isinstance(env, puffer_core.GymnasiumPufferEnv) else env  # all are made flat later, and once
    elif env_id.startswith(("MiniHack-", "NetHack")):
        from nethack_wrappers import SCREEN_KEYS, NetHackWrapper
        full_id, keys = f"{'minihack' if 'MiniHack' in env_id else 'nle'}:{env_id}", NETHACK_KEYS + SCREEN_KEYS * render
        env = gym.make(full_id, observation_keys=keys, fix_moon_phase=True, render_mode="ansi")
        env = gym.wrappers.FilterObservation(NetHackWrapper(env), NETHACK_KEYS)
    else:
        if is_atari := env_id.startswith("ALE/") or "NoFrameskip" in env_id:
            from atari_wrappers import AtariWrapper  # which makes the games known to gymnasium too
        make = partial(gym.make, env_id, **({"frameskip": 1} if env_id.startswith("ALE/") else {}))
        modes = make().metadata.get("render_modes", ()) if render else ()
        env = make(**next(({"render_mode": mode} for mode in ("rgb_array", "ansi") if mode in modes), {}))
        env = AtariWrapper(env) if is_atari else env  # which counts whole games, not lives
    counts = re.search(r"<AtariWrapper<|^(<(?!TimeLimit<)\w+)*<(RecordEpisodeStatistics|EpisodeStats)<", str(env))
    return puffer_core.EpisodeStats(env) if isinstance(env, gym.Env) and not counts else env  # one that sees all ends


def kind_of(space: spaces.Space, action_space: spaces.Space | None = None) -> str:
    """Tell NetHack, what has a picture large enough for the convolutions, and the rest by what the agent does."""
    if isinstance(space, spaces.Dict) and set(NETHACK_KEYS) <= set(space):
        return "nethack"
    sizes = [leaf.shape for leaf in leaves_of(space) if leaf.dtype == np.uint8 and len(leaf.shape) == 3]
    if any(min(size[:2] if size[2] < size[0] else size[1:]) >= 36 for size in sizes):
        return "images"
    return "continuous" if isinstance(action_space, spaces.Box) else "discrete"


def leaves_of(nested: Any) -> list:
    """Return the leaves of a nested space or, in the same order, of its observations; NetHack's Dict is one."""
    if isinstance(nested, Mapping) and not set(NETHACK_KEYS) <= set(nested):
        nested = tuple(nested.values())
    return sum(map(leaves_of, nested), []) if isinstance(nested, (tuple, spaces.Tuple)) else [nested]


class LeafNet(nn.Module):
    """Reads pictures by the convolutions of Mnih et al. 2015, categories one-hot, bytes as 0 to 1, others by asinh."""

    def __init__(self, space: spaces.Space, width: int):
        super().__init__()
        sizes = getattr(space, "nvec", getattr(space, "n", ())) if not isinstance(space, spaces.MultiBinary) else ()
        self.space, self.sizes, self.is_image = space, np.ravel(sizes).tolist(), kind_of(space) == "images"
        self.is_nhwc = self.is_image and space.shape[2] < space.shape[0]
        self.starts = np.ravel(getattr(space, "start", 0)).tolist()
        first = convolutions((32, 8, 4), (64, 4, 2), (64, 3, 1)) if self.is_image else nn.Flatten()
        self.network = nn.Sequential(first, nn.LazyLinear(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_image:
            x = (x if self.is_nhwc else torch.stack(x.unbind(1), -1)).permute(0, 3, 1, 2)  # quicker than `contiguous`
            dtype = torch.bfloat16 if torch.is_autocast_enabled(x.device.type) else torch.float32  # both hold bytes
            return self.network(x.to(dtype).mul_(1 / 255.0))
        if self.sizes:  # the rows of absent agents are zero, which may be no category
            numbers = zip(x.unsqueeze(-1).flatten(1).long().unbind(1), self.starts, self.sizes)
            parts = [nn.functional.one_hot((one - start).clamp(0, size - 1), size) for one, start, size in numbers]
            return self.network(torch.cat(parts, dim=1).float())
        return self.network((x / 255.0 if self.space.dtype == np.uint8 else x.float().asinh()).unsqueeze(-1))


class NetHackNet(nn.Module):
    """Reads NetHack's map of glyphs, its numbers and its message."""

    def __init__(self, space: spaces.Dict, width: int):
        super().__init__()
        self.glyphs, self.message = nn.Embedding(int(space["glyphs"].high.max()) + 1, 8), nn.EmbeddingBag(256, 16)
        self.map, self.last = convolutions((16, 3, 2), (32, 3, 2)), nn.LazyLinear(width)

    def forward(self, x: dict[str, torch.Tensor]) -> torch.Tensor:
        seen = self.map(self.glyphs(x["glyphs"].int()).permute(0, 3, 1, 2))
        return self.last(torch.cat([seen, x["blstats"].float().asinh(), self.message(x["message"].int())], dim=1))


def convolutions(*layers: tuple[int, int, int]) -> nn.Sequential:
    """Return convolutions of so many channels, kernel size and stride."""
    return nn.Sequential(*[part for layer in layers for part in (nn.LazyConv2d(*layer), nn.ReLU())], nn.Flatten())


class Policy(nn.Module):
    """Actor and critic, with or without a memory, over the network that fits the observations."""

    def __init__(self, layout: puffer_core.Layout, action_space: spaces.Space, args: Args):
        super().__init__()
        self.layout, self.action_space, width, flat = layout, action_space, args.hidden_size, layout.flat_space
        readers = [(NetHackNet if kind_of(leaf) == "nethack" else LeafNet, leaf) for leaf in leaves_of(layout.space)]
        self.readers = nn.ModuleList([reader(leaf, width) for reader, leaf in readers])
        is_deep = kind_of(layout.space) in ("images", "nethack")
        self.rest = nn.ReLU() if is_deep else nn.Sequential(nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.memory, self.is_bf16 = nn.LSTMCell(width, width) if args.use_lstm else None, False
        self.is_continuous, num_actions = isinstance(action_space, spaces.Box), np.prod(action_space.shape, dtype=int)
        self.sizes = np.ravel(getattr(action_space, "nvec", getattr(action_space, "n", num_actions))).tolist()
        self.center, self.radius = np.ravel(getattr(action_space, "start", 0)), 1
        if self.is_continuous:  # -1 and 1 are the bounds, or the one there is (below 1e30) and 2 beside it
            low, high = action_space.low.ravel().astype(float), action_space.high.ravel().astype(float)
            low = np.where(abs(low) < 1e30, low, np.where(abs(high) < 1e30, high - 2.0, -1.0))
            high = np.where(abs(high) < 1e30, high, low + 2.0)
            self.center, self.radius = (high + low) / 2, (high - low) / 2
            self.log_std = nn.Parameter(torch.zeros(num_actions))
        self.actor, self.critic = nn.Linear(width, sum(self.sizes)), nn.Linear(width, 1)
        nothing = torch.zeros(1, 1, *flat.shape, dtype=getattr(torch, flat.dtype.name))
        self(nothing, torch.zeros(1, 2 * width), torch.zeros(1, 1, dtype=torch.bool))  # gives lazy layers their sizes
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.orthogonal_(layer.weight, {self.actor: 0.01, self.critic: 1.0}.get(layer, 2**0.5))
                nn.init.zeros_(layer.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor, state: Any, starts: torch.Tensor, actions: Any = None) -> tuple:
        """Follow sequences `(batch, time, *row)`; returns actions, log-probabilities, entropies, values, last state."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.is_bf16):
            leaves = leaves_of(self.layout.unflatten(x.flatten(0, 1)))
            summed = sum(read(leaf) for read, leaf in zip(self.readers, leaves))  # as one layer over all of them would
            hidden, outputs = self.rest(summed).unflatten(0, x.shape[:2]).float(), []
        for step in range(x.shape[1]) if self.memory else ():
            state = state.masked_fill(starts[:, step, None], 0.0)  # an episode starts without memories
            output, cell = self.memory(hidden[:, step], state.chunk(2, dim=1))
            outputs, state = [*outputs, output], torch.cat([output, cell], dim=1)
        hidden = torch.stack(outputs, dim=1) if self.memory else hidden
        return (*self.act(self.actor(hidden), actions), self.critic(hidden)[..., 0], state)

    def act(self, parameters: torch.Tensor, actions: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Return actions, their log-probabilities and the entropies of the policy that the parameters describe."""
        if self.is_continuous:
            gauss = torch.distributions.Normal(parameters, self.log_std.exp(), False)  # whose `sample` waits for a GPU
            actions = (gauss.loc + gauss.scale * torch.randn_like(gauss.loc)).detach() if actions is None else actions
            return actions, gauss.log_prob(actions).sum(-1), gauss.entropy().sum(-1)
        parts = [part.log_softmax(-1) for part in parameters.split(self.sizes, -1)]
        if actions is None:  # the likeliest with Gumbel noise, as Categorical's `sample` waits for a GPU
            actions = torch.stack([nn.functional.gumbel_softmax(part).argmax(-1) for part in parts], dim=-1)
        logprobs = sum(part.gather(-1, one[..., None])[..., 0] for part, one in zip(parts, actions.unbind(-1)))
        return actions, logprobs, -sum((part.exp() * part).sum(-1) for part in parts)

    def for_envs(self, actions: torch.Tensor) -> np.ndarray:
        """Turn actions `(batch, parts)` into those that the environments take."""
        values = self.center + self.radius * actions.cpu().numpy()
        if self.is_continuous and (box := self.action_space).dtype.kind != "f":  # a cast would wrap around and cut off
            values = values.clip(box.low.ravel(), np.nextafter(box.high.ravel() * 1.0, 0)).round()  # 2**63 is no int64
        return values.reshape(len(values), *self.action_space.shape).astype(self.action_space.dtype)


class Experience:
    """Transitions by agent row: in whatever order environments are ready, each row has a time line of its own."""

    def __init__(self, envs: puffer_core.Serial, policy: Policy, args: Args, device: torch.device):
        self.num_steps, space = args.num_steps, envs.single_observation_space
        self.num_slots = args.num_steps * (2 if envs.batch_size < envs.num_envs else 1)
        self.horizon, width = (args.bptt_horizon, 2 * args.hidden_size) if args.use_lstm else (1, 0)
        count, zeros = envs.num_agents * self.num_slots + 1, partial(torch.zeros, device=device)  # the last is no one's
        parts, dtype = (policy.sizes[0], torch.float32) if policy.is_continuous else (len(policy.sizes), torch.int64)
        self.observations = zeros(count, *space.shape, dtype=getattr(torch, space.dtype.name))
        self.actions, self.states = zeros(count, parts, dtype=dtype), zeros(count, width)
        self.logprobs, self.values, self.next_values, self.advantages, self.returns = zeros(5, count)
        self.starts, self.trainable = zeros(2, count, dtype=torch.bool)
        self.rewards, (self.valid, self.terminated, self.ended) = np.zeros(count, "f4"), np.zeros((3, count), bool)
        self.begun, self.complete, self.consumed = np.zeros((3, envs.num_agents), np.int64)  # a row's transitions

    def place(self, rows: np.ndarray, back: int = 0) -> np.ndarray:
        """Return where the rows' next or, one `back`, last transitions lie; before the first, that is not `valid`."""
        return rows * self.num_slots + (self.begun[rows] - back) % self.num_slots

    def is_due(self, rows: np.ndarray) -> bool:
        """Tell whether all rows have a complete segment, or one of `rows`, which are to go on, has no place left."""
        held = self.complete - self.consumed
        return held.min() >= self.num_steps or held[rows].max() == self.num_slots

    def take(self) -> np.ndarray:
        """Take the oldest complete segments out; returns where they lie, `(segments, num_steps)`."""
        rows = np.flatnonzero(self.complete - self.consumed >= self.num_steps)
        first = rows * self.num_slots + self.consumed[rows] % self.num_slots
        self.consumed[rows] += self.num_steps
        return first[:, None] + np.arange(self.num_steps)


def estimate_advantages(rewards, values, next_values, terminated, ended, valid, gamma, gae_lambda) -> torch.Tensor:
    """Return the generalized advantages of segments `(rows, time)`, see Schulman et al. 2016; 0 where not `valid`."""
    # An end cuts off what comes later, but for the value of the last observation; a termination cuts off that too
    deltas = rewards + gamma * next_values.masked_fill(terminated, 0.0) - values
    advantages = deltas.masked_fill(~valid, 0.0).T.contiguous()
    decays = (gamma * gae_lambda * (valid & ~ended)).T.contiguous()
    for step in reversed(range(len(advantages) - 1)):
        advantages[step] += decays[step] * advantages[step + 1]
    return advantages.T


class Graph:
    """Calls a function on a GPU; from the fourth time on as a CUDA graph, which launches all its kernels at once."""

    def __init__(self, function: Callable, *rows: torch.Tensor):
        self.function, self.rows, self.calls, self.graph = function, rows, 0, torch.cuda.CUDAGraph()

    def __call__(self, *rows: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        for mine, given in zip(self.rows, rows):
            mine.fill_(-1)[: len(given)] = given  # a graph's sizes are fixed, and the last row is no one's
        if self.calls <= 3:  # in which libraries, compiler and optimizer prepare what cannot be captured
            return self.function(*self.rows)
        if self.calls == 4:
            torch.clear_autocast_cache()  # a graph casts weights itself, each time
            with torch.cuda.graph(self.graph):
                self.result = self.function(*self.rows)
        self.graph.replay()
        return self.result


class Trainer:
    """Environments, policy, optimizer and experience of one rank: `collect` and `update` take turns."""

    def __init__(self, args: Args):
        gc.collect()  # an earlier trainer that was compiled or captured, which refers to itself
        self.args, self.iteration, self.global_step, self.num_episodes, self.stopping = args, 0, 0, 0, False
        self.returns, self.lengths, self.episode = deque(maxlen=100), deque(maxlen=100), {}  # `episode`: the last
        self.seconds, self.losses, self.learned, self.device = defaultdict(float), {}, 0, torch.device("cpu")
        env_fns = [partial(make_env, args.env_id, render=args.mode == "eval")] * args.num_envs
        pool = {"num_workers": args.num_workers or None, "batch_size": args.env_batch_size or None}
        make = puffer_core.Serial if args.vec == "serial" else partial(puffer_core.Multiprocessing, **pool)
        try:
            self.envs = envs = make(env_fns, zero_copy=args.zero_copy, infos="episode")  # early: forks cannot use CUDA
        except ValueError as error:
            raise SystemExit(f"environments, --num-workers or --env-batch-size: {error}") from None
        if torch.cuda.is_available() and args.cuda:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        has_bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported(False)
        torch.manual_seed(args.seed)  # all ranks begin with the same weights
        self.task = f"{envs.layout.space}, {envs.single_action_space}, {args.hidden_size=}, {args.use_lstm=}"
        self.is_team = not envs.get_attr("masks")[0].all()  # agents of a team are absent before the first reset
        self.total_steps = args.total_timesteps // (one := envs.num_agents * args.num_steps * WORLD_SIZE) * one
        most, _ = torch.get_num_threads(), torch.set_num_threads(1)  # more would round the first weights differently
        self.policy = Policy(envs.layout, envs.single_action_space, args).to(self.device)
        is_large = "Conv2d" in str(self.policy)  # a small one gains nothing by bfloat16, and loses by sharing cores
        torch.set_num_threads(most if is_large and self.device.type == "cpu" or "OMP_NUM_THREADS" in os.environ else 1)
        self.policy.is_bf16 = args.precision == "bf16" or args.precision == "auto" and has_bf16 and is_large
        set_malloc = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)  # glibc's: keep memory that was freed, as
        set_malloc(-1, 2**31 - 1), set_malloc(-4, 0)  # new pages slow a minibatch down; M_TRIM_THRESHOLD, M_MMAP_MAX
        self.model = nn.parallel.DistributedDataParallel(self.policy) if distributed.is_initialized() else self.policy
        self.model = torch.compile(self.model) if args.compile else self.model
        self.rate, settings = torch.tensor(0.0, device=self.device), {"eps": 1e-5, "fused": True, "capturable": True}
        self.optimizer = torch.optim.Adam(self.policy.parameters(), self.rate, **settings)  # a graph looks the rate up
        self.experience = Experience(envs, self.policy, args, self.device)
        if self.device.type == "cuda" and args.cuda_graphs and WORLD_SIZE == 1:
            index = torch.zeros(one // self.experience.horizon, self.experience.horizon, dtype=int, device=self.device)
            self.decide, self.learn = Graph(self.decide), Graph(self.learn, index.tensor_split(args.num_minibatches)[0])
        torch.manual_seed(args.seed + RANK)  # and draw other actions

    @contextlib.contextmanager
    def clock(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def start(self) -> None:
        self.packed, self.state = None, torch.zeros_like(self.experience.states[: self.envs.num_agents])
        self.team_sums = np.zeros((2, self.envs.num_agents))  # of the episodes that are under way
        seed = self.args.seed + RANK * self.args.num_envs + self.global_step
        random.seed(seed), np.random.seed(seed % 2**32)  # for environments of this process that draw from these
        self.envs.async_reset(seed)
        self.receive()

    def stop(self, number: int, _: Any) -> None:
        self.stopping = True
        signal.signal(number, signal.default_int_handler)  # a second Ctrl-C does not wait

    def is_over(self) -> bool:
        is_good = len(self.returns) >= 100 and np.mean(self.returns) >= self.args.target_return
        votes = torch.tensor(float(self.stopping or is_good or self.learned >= self.total_steps), device=self.device)
        distributed.all_reduce(votes) if distributed.is_initialized() else None  # ranks end together
        return bool(votes)

    def collect(self) -> bool:
        """Step environments until an update is due; returns False if asked to stop before."""
        with torch.autocast(self.device.type, enabled=False):  # around them all, casts of the weights are kept
            while not (is_due := self.experience.is_due(self.rows)) and not (self.stopping and WORLD_SIZE == 1):
                self.act()
        return is_due

    @torch.no_grad()
    def receive(self) -> None:
        """Take the next batch: it completes its rows' last transitions, and brings their next observations."""
        with self.clock("env wait"):
            batch = self.envs.recv()
        with self.clock("copies"):
            experience, self.rows = self.experience, batch.agent_ids
            where, last = experience.place(self.rows), experience.place(self.rows, back=1)
            ended, was_alive = batch.terminations | batch.truncations, experience.valid[last]
            begins = batch.infos.get("_final_obs", np.zeros_like(ended))
            self.alive, starts = batch.masks & (begins | ~ended), begins | ~was_alive
            experience.rewards[last], experience.terminated[last] = batch.rewards, batch.terminations
            experience.ended[last], experience.complete[self.rows] = ended, experience.begun[self.rows]
            is_cut = ~batch.terminations & [one is not None for one in batch.infos.get("final_obs", [None] * len(last))]
            experience.valid[last] &= np.where(begins, is_cut, batch.masks) | batch.terminations  # what led somewhere
            parts = np.stack([self.rows, where, np.where(is_cut, -1, last)]), batch.observations, starts
            parts = [np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts]
            packed = torch.empty(sum(map(len, parts)), dtype=torch.uint8, pin_memory=self.device.type == "cuda")
            np.concatenate(parts, out=packed.numpy())
            self.packed = packed.to(self.device) if self.packed is None else self.packed  # which a graph looks at
            self.packed.copy_(packed, non_blocking=True)  # one copy to the device, from pinned memory on CUDA
            ids, flat, starts = self.packed.split([len(part) for part in parts])
            self.row_ids, self.index, self.previous = ids.view(torch.int64).view(3, -1)
            self.observations = flat.view(experience.observations.dtype).view(batch.observations.shape)
            self.starts = starts.view(torch.bool)
            if is_cut.any():  # the values of their last observations are what these episodes would have had yet
                final_obs = torch.as_tensor(np.stack(batch.infos["final_obs"][is_cut]), device=self.device)
                states, starts = self.state[self.rows[is_cut]], self.starts.new_zeros(len(final_obs), 1)
                experience.next_values[last[is_cut]] = self.policy(final_obs[:, None], states, starts)[3][:, 0]
        self.count_episodes(batch, was_alive)

    def count_episodes(self, batch: puffer_core.Batch, acted: np.ndarray) -> None:
        """Keep statistics of episodes that have ended: of whole games from infos, of a team's agents from rewards."""
        self.team_sums[:, self.rows] += np.where(acted, (batch.rewards, acted), 0)  # others' rewards may be NaN
        infos, ended = {} if self.is_team else batch.infos.get("final_info", {}), batch.terminations | batch.truncations
        ended = ended & (self.team_sums[1, self.rows] > 0) if self.is_team else infos.get("_episode", False)
        for at in np.flatnonzero(ended):
            told = {str(key): float(sums[at]) for key, sums in infos.get("episode", {}).items() if str(key)[:1] != "_"}
            self.episode = told or dict(zip("rl", self.team_sums[:, self.rows[at]].tolist()))
            self.returns.append(self.episode["r"]), self.lengths.append(self.episode["l"])
            self.num_episodes += 1
            self.team_sums[:, self.rows[at]] = 0

    @torch.no_grad()
    def think(self) -> tuple[torch.Tensor, ...]:
        """Run the policy on the batch, whose values are also those of what came after the rows' last transitions."""
        rows = (self.observations[:, None], self.state[self.row_ids], self.starts[:, None])
        actions, logprobs, _, values, state = self.model(*rows)
        self.experience.next_values[self.previous] = values[:, 0]
        return actions[:, 0], logprobs[:, 0], values[:, 0], state

    @torch.no_grad()
    def decide(self) -> torch.Tensor:
        """Choose actions for the batch, and remember both."""
        (actions, logprobs, values, state), experience, index = self.think(), self.experience, self.index
        experience.observations[index], experience.starts[index] = self.observations, self.starts
        experience.actions[index], experience.logprobs[index], experience.values[index] = actions, logprobs, values
        experience.states[index], self.state[self.row_ids] = self.state[self.row_ids], state
        return actions

    def act(self) -> None:
        """Choose actions for the batch, send its environments to work, and take the next batch."""
        experience, most = self.experience, torch.get_num_threads()
        torch.set_num_threads(min(most, max(1, len(self.rows) // 16)))  # idle ones would spin on the workers' cores
        with self.clock("inference"):
            actions = self.policy.for_envs(self.decide())
        experience.valid[experience.place(self.rows)] = self.alive
        experience.begun[self.rows] += 1
        with self.clock("env wait"):  # Serial steps here
            self.envs.send(actions)
        self.global_step += len(self.rows) * WORLD_SIZE
        self.receive()
        torch.set_num_threads(most)

    def prepare(self) -> torch.Tensor:
        """Take the complete segments and work out their advantages and returns; returns where they lie."""
        experience, where = self.experience, self.experience.take()
        self.think()  # for the value of the batch that has just come, and is acted on after the update
        fields = experience.rewards * self.args.reward_scale, experience.terminated, experience.ended, experience.valid
        parts = where, *[field[where] for field in fields]
        index, rewards, *flags = [torch.as_tensor(part, device=self.device) for part in parts]
        values, next_values = experience.values[index], experience.next_values[index]
        advantages = estimate_advantages(rewards, values, next_values, *flags, self.args.gamma, self.args.gae_lambda)
        experience.advantages[index], experience.returns[index] = advantages, advantages + values
        experience.trainable[index] = flags[-1]
        return index

    def update(self) -> None:
        args, experience, sums = self.args, self.experience, torch.zeros(8, device=self.device)
        with self.clock("update"):
            index = self.prepare()
            left = 1 - args.anneal_lr * self.learned / self.total_steps
            self.optimizer.param_groups[0] |= {"lr": self.rate.fill_(args.learning_rate * left), "capturable": True}
            sums[7], sequences = index.numel(), index.view(-1, experience.horizon)
            sequences = sequences[experience.trainable[sequences].any(1)]
            parts = args.num_minibatches if WORLD_SIZE > 1 else min(args.num_minibatches, max(1, len(sequences)))
            for _ in range(args.update_epochs):
                for chosen in torch.randperm(len(sequences)).to(self.device).tensor_split(parts):
                    sums[:7] += self.learn(sequences[chosen])
            distributed.all_reduce(sums) if distributed.is_initialized() else None
            index = index[experience.trainable[index]]
            errors, returns = [part[index].var(0, False) for part in (experience.advantages, experience.returns)]
            means = [*sums[:7] / (args.update_epochs * parts), 1 - errors / returns]
            names = "policy_loss value_loss entropy old_approx_kl approx_kl clipfrac grad_norm explained_variance"
            self.losses, self.iteration = dict(zip(names.split(), torch.stack(means).tolist())), self.iteration + 1
            self.learned += int(sums[7])  # which ends a run, as ranks and first-ready updates differ in size
        if not np.isfinite(self.losses["grad_norm"]):
            raise FloatingPointError("gradients are not finite: look at observations, rewards and the learning rate")

    def learn(self, index: torch.Tensor) -> torch.Tensor:
        """Take one gradient step on a minibatch of sequences, `(sequences, horizon)`; returns what to log."""
        args, experience, kept = self.args, self.experience, self.experience.trainable[index]
        rows = experience.observations.index_select(0, index.flatten() % len(experience.valid))  # [index] takes longer
        parts = [vars(experience)[name][index] for name in "starts actions logprobs values returns advantages".split()]
        rows, starts, actions, logprobs, values, returns, advantages = parts = [rows.unflatten(0, index.shape), *parts]
        for part in [rows, *parts[2:]] if self.is_team else ():  # of absent agents, nothing gets anywhere, not even NaN
            part[~kept] = 0
        sums = (torch.stack([kept, advantages.double(), advantages.double().square()]) * kept).flatten(1).sum(1)
        distributed.all_reduce(sums) if distributed.is_initialized() else None
        count, total, squares = sums[0].clamp(min=1), *sums[1:]  # of all ranks together, where no step may count
        if args.norm_adv:
            deviation = ((squares - total.square() / count) / (count - 1).clamp(min=1)).clamp(min=0).sqrt()
            advantages = ((advantages - total / count) / (deviation + 1e-8)).float()
        _, newlogprob, entropy, newvalue, _ = self.model(rows, experience.states[index[:, 0]], starts, actions)
        logratio = (newlogprob - logprobs) * kept
        ratio = logratio.exp()  # further down, two estimates of the divergence: http://joschu.net/blog/kl-approx.html
        v_error = (newvalue - returns).square()
        if args.clip_vloss:
            clipped_value = values + (newvalue - values).clamp(-args.clip_coef, args.clip_coef)
            v_error = torch.max(v_error, (clipped_value - returns).square())
        gain = torch.min(advantages * ratio, advantages * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef))
        figures = -gain, 0.5 * v_error, entropy, -logratio, ratio - 1 - logratio, (ratio - 1).abs() > args.clip_coef
        means = (torch.stack(figures) * kept).flatten(1).sum(1) / count.float()
        self.optimizer.zero_grad()
        loss = means[0] + args.vf_coef * means[1] - args.ent_coef * means[2]
        (loss * WORLD_SIZE).backward()  # which averages gradients over ranks, where a sum is due
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), args.max_grad_norm)
        self.optimizer.step()
        return torch.cat([means.detach(), norm[None] / WORLD_SIZE])  # all ranks have the same


def save(trainer: Trainer, path: Path) -> None:
    """Write a checkpoint beside the last one and put it in its place: a kill at any time leaves one of the two."""
    contents = {key: vars(trainer)[key] for key in ("iteration", "learned", "global_step", "num_episodes", "task")}
    contents |= {"policy": trainer.policy.state_dict(), "optimizer": trainer.optimizer.state_dict()}
    contents |= {"args": vars(trainer.args), "returns": list(trainer.returns), "rng": torch.get_rng_state()}
    torch.save(contents, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load(path: str) -> dict[str, Any]:
    """Read a checkpoint; ends with one line if it is none."""
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
        return contents | {"args": Args(**contents["args"]), "learned": contents["learned"]}
    except Exception as error:
        raise SystemExit(f"--resume {path}: expected a checkpoint of demo.py, got {error!r:.100}") from None


def restore(trainer: Trainer, contents: dict[str, Any]) -> None:
    """Go on from a checkpoint; ends with one line if it is of another environment or network."""
    trainer.args.expect("resume", trainer.task == contents["task"], f"one for {trainer.task}, not {contents['task']}")
    trainer.policy.load_state_dict(contents["policy"])
    trainer.optimizer.load_state_dict(contents["optimizer"])
    vars(trainer).update({name: contents[name] for name in ("iteration", "learned", "global_step", "num_episodes")})
    trainer.returns.extend(contents["returns"])
    torch.set_rng_state(contents["rng"])  # which is rank 0's, of the CPU, and goes back to that seed
    if WORLD_SIZE > 1 or trainer.device.type == "cuda" or trainer.args.seed != contents["args"].seed:
        torch.manual_seed(trainer.args.seed + RANK + trainer.global_step)


class Dashboard(contextlib.ExitStack):
    """Logs a run, and shows it: live on a terminal, otherwise as a line every few seconds; nothing if `quiet`."""

    def __init__(self, trainer: Trainer, folder: Path):
        super().__init__()
        self.trainer, self.args, self.history = trainer, trainer.args, defaultdict(list)
        if self.args.track:
            import wandb
            names = {"project": self.args.wandb_project_name, "entity": self.args.wandb_entity, "name": folder.name}
            wandb.init(**names, config=vars(self.args), sync_tensorboard=True, reinit="finish_previous")
        self.start, self.printed, trainer.seconds = time.perf_counter(), -np.inf, defaultdict(float)
        can_draw = sys.stdout.isatty() and console.Console().is_interactive and "utf" in sys.stdout.encoding.lower()
        self.last, self.is_live = (self.start, trainer.global_step), can_draw and not self.args.quiet
        self.writer, lines = SummaryWriter(folder), [f"|{name}|{value}|" for name, value in vars(self.args).items()]
        self.writer.add_text("hyperparameters", "\n".join(["|param|value|", "|-|-|", *lines]))
        self.callback(self.writer.close)
        self.enter_context(live.Live(get_renderable=self.render, refresh_per_second=1)) if self.is_live else None

    def log(self, is_last: bool) -> None:
        trainer, now, cuda = self.trainer, time.perf_counter(), torch.cuda
        (then, step), self.last = self.last, (now, trainer.global_step)
        speed = (trainer.global_step - step) / (now - then)
        left, rate = max(trainer.total_steps - trainer.learned, 0) / max(speed, 1.0) / 60, float(trainer.rate)
        charts = {"SPS": round(speed), "episodes": trainer.num_episodes, "minutes_left": left, "learning_rate": rate}
        if trainer.episode:
            charts |= {"episodic_return": np.mean(trainer.returns), "episodic_length": np.mean(trainer.lengths)}
        shares = {name: 100 * seconds / (now - self.start) for name, seconds in trainer.seconds.items()}
        system = {"CPU_percent": psutil.cpu_percent(), "memory_GiB": psutil.virtual_memory().used / 2**30}
        with contextlib.suppress(Exception):  # this may be no GPU, or one that does not tell
            system |= {"GPU_percent": cuda.utilization(trainer.device), "GPU_GiB": cuda.max_memory_allocated() / 2**30}
        groups = {"charts": charts, "losses": trainer.losses, "time_percent": shares, "system": system}
        for group, numbers in (groups | {"episode": trainer.episode}).items():
            for name, value in numbers.items():
                self.history[group, name.replace("[", r"\[")].append(value)  # which would begin a style
                self.writer.add_scalar(f"{group}/{name}", value, trainer.global_step)
        if not (self.is_live or self.args.quiet) and (is_last or now - self.printed > 2):
            self.printed, names = now, ("SPS", "episodic_return", "value_loss", "entropy", "approx_kl", "minutes_left")
            shown = [f"{name}={value:.5g}" for name, value in (charts | trainer.losses).items() if name in names]
            print(f"global_step={trainer.global_step}", *shown, flush=True)

    def render(self) -> panel.Panel:
        trainer, total, tables = self.trainer, self.trainer.total_steps, {}
        for (group, name), values in list(self.history.items()):
            parts = np.array_split(np.nan_to_num(values[-200:], posinf=0.0, neginf=0.0), 6)
            means = np.array([part.mean() for part in parts if len(part)])
            trend = "".join("▁▂▃▄▅▆▇█"[int(7 * height)] for height in (means - means.min()) / (np.ptp(means) or 1.0))
            shown = f"{values[-1]:,.0f}" if abs(values[-1]) >= 1e4 else f"{values[-1]:.4g}"
            tables.setdefault(group, table.Table(group, "", "", box=None, pad_edge=False)).add_row(name, shown, trend)
        body = console.Group(progress_bar.ProgressBar(total, trainer.global_step), "", columns.Columns(tables.values()))
        title = f"[bold]{self.args.env_id}[/], {trainer.global_step:,} of {total:,} steps{', stops' * trainer.stopping}"
        return panel.Panel(body, title=title, subtitle=f"{trainer.device}{', bf16' * trainer.policy.is_bf16}; ^C saves")


def train(args: Args, report: Callable[[Trainer], None] = lambda trainer: None) -> float:
    """Train an agent; returns the mean of its last 100 returns. After every update, `report` looks at the trainer."""
    trainer = Trainer(args)
    path = Path("runs", f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns()}", "checkpoint.pt")
    with trainer.envs, contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, trainer.stop))
        if args.resume:
            restore(trainer, load(args.resume))
            args.expect("resume", not trainer.is_over(), "one short of --total-timesteps and --target-return")
        trainer.start()
        dashboard, is_over = stack.enter_context(Dashboard(trainer, path.parent)) if RANK == 0 else None, False
        dashboard and stack.callback(lambda: np.isfinite(trainer.losses.get("grad_norm", 0)) and save(trainer, path))
        while not is_over and trainer.collect():
            trainer.update()
            is_over = trainer.is_over()
            if dashboard:
                if args.checkpoint_interval and trainer.iteration % args.checkpoint_interval == 0:
                    save(trainer, path)
                dashboard.log(is_over)
            report(trainer)
    RANK or args.quiet or print(f"Saved {path}, {trainer.learned} steps; --resume goes on, --mode eval --resume plays")
    if trainer.stopping:
        raise SystemExit(130)
    return float(np.mean(trainer.returns)) if trainer.returns else np.nan


def evaluate(args: Args) -> None:
    """Play a checkpoint, print how it did, and record its first episode beside it as a video or a cast of text."""
    trainer, frames = Trainer(dataclasses.replace(args, num_envs=1, vec="serial", env_batch_size=0, compile=False)), []
    with trainer.envs as envs, contextlib.suppress(KeyboardInterrupt):  # what has been played until then counts
        restore(trainer, load(args.resume)), trainer.start()
        trainer.returns, fault = deque(), "" if envs.render_mode in ("rgb_array", "ansi") else "no such render_mode"
        while len(trainer.returns) < args.eval_episodes * envs.num_agents:
            if not fault and len(trainer.returns) < envs.num_agents and len(frames) * np.array(frames[:1]).nbytes < 2e9:
                try:  # until 2 GB, as some episodes never end
                    frames.append(np.array(envs.render()[0]))
                except Exception as error:  # there may be no display, and some crash if they are asked again
                    fault = repr(error)
            trainer.act()
    returns, path = np.array(trainer.returns), Path(args.resume).with_name("eval.mp4")
    print(f"{len(returns)} episodes: return {returns.mean():.4g} +- {returns.std():.4g}", flush=True)
    if frames and frames[0].ndim:
        from moviepy.video.io.ImageSequenceClip import ImageSequenceClip
        clip = ImageSequenceClip([*frames, frames[-1]], fps=envs.metadata.get("render_fps", 30))  # it may drop the last
        clip.write_videofile(str(path), logger=None)
    elif frames:  # see https://docs.asciinema.org/manual/asciicast/v2
        path, lines = path.with_suffix(".cast"), [{"version": 2, "width": 80, "height": 24}]
        lines += [[at / 5, "o", "\033[H\033[2J" + str(frame).replace("\n", "\r\n")] for at, frame in enumerate(frames)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"Recorded {path}" if frames else f"{args.env_id} cannot draw itself, so nothing was recorded: {fault}")


def sweep(args: Args, chosen: list[str]) -> None:
    """Search over what no flag says; the study is a file, so a search that was killed goes on when called again."""
    import optuna
    (folder := Path("runs", f"sweep__{args.env_id}__{args.exp_name}")).mkdir(parents=True, exist_ok=True)
    fixed = {name: getattr(args, name) for name in vars(args) if name not in (*chosen, "sweep_trials", "quiet")}
    settings = {"study_name": str(fixed), "storage": f"sqlite:///{folder}/study.db", "load_if_exists": True}
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(n_warmup_steps=2), **settings)
    num_ended = sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in study.trials)

    def objective(trial: optuna.Trial) -> float:
        drawn = {"mode": "train", "quiet": True, "exp_name": f"{args.exp_name}-{trial.number}"}
        for name, (low, high) in [(name, SEARCH[name]) for name in SEARCH if name in chosen]:
            suggest = trial.suggest_int if isinstance(low, int) else trial.suggest_float
            drawn[name] = suggest(name, low, high, log=high > 10 * low)

        def report(trainer: Trainer) -> None:
            trainer.returns and trial.report(np.mean(trainer.returns), trainer.iteration)
            if trial.should_prune():
                raise optuna.TrialPruned

        return train(dataclasses.replace(args, **drawn), report)

    study.optimize(objective, n_trials=max(args.sweep_trials - num_ended, 0), catch=Exception)  # NaN, for one
    args.expect("sweep_trials", any(trial.values for trial in study.trials), "one that does not fail but ends episodes")
    optuna.visualization.matplotlib.plot_optimization_history(study).figure.savefig(folder / "history.png")
    found = " ".join(f"--{name.replace('_', '-')} {value:.4g}" for name, value in study.best_params.items())
    print(f"Best of {len(study.trials)} trials, see {folder}/history.png: return {study.best_value:.4g} with {found}")


def autotune(args: Args, chosen: list[str]) -> None:
    """Measure ways to step this environment, policy included, and print the command of the fastest."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    counts = [*dict.fromkeys((16 * cores, 64 * cores, 4 * cores, 8))] if "num_envs" in chosen else [args.num_envs]
    pools = [(one, many) for one in counts for many in (2 * cores, cores + cores % 2, 4 * cores) if one % many == 0]
    ways = [f"--vec serial --env-batch-size 0 --num-envs {one}" for one in counts if one <= 32 or len(counts) == 1]
    args, results, deadline = dataclasses.replace(args, env_batch_size=0, zero_copy=True), [], time.perf_counter() + 50
    for count, workers in dict.fromkeys(pools):  # an even number of workers, so that half of them is some
        pool = f"--vec multiprocessing --num-envs {count} --num-workers {workers} --env-batch-size"
        ways += [f"{pool} 0 --zero-copy", f"{pool} {count // 2} --zero-copy", f"{pool} {count // 2} --no-zero-copy"]
    for way in (way for way in ways if time.perf_counter() < deadline):
        with (trainer := Trainer(tyro.cli(Args, args=[*way.split(), "--num-steps", "8"], default=args))).envs:
            trainer.start()
            for seconds in (0.3, 1.0):  # the first to warm up
                start, first = time.perf_counter(), trainer.global_step
                while time.perf_counter() - start < seconds:
                    trainer.act()
            results.append(((trainer.global_step - first) / (time.perf_counter() - start), way))
        print("{:10,.0f} steps/s with {}".format(*results[-1]), flush=True)
    rest = re.sub(r"--(mode|vec|num.(env|worker)s|env.batch.size)[ =]\S+|--(no.)?zero.copy", "", " ".join(sys.argv[1:]))
    print(f"Fastest of {len(results)} (of {len(ways)}): python demo.py", *rest.split(), max(results)[1])


def main() -> None:
    sys.path.append(os.getcwd())  # where one looks for a module of one's own
    os.environ["SDL_NO_SIGNAL_HANDLERS"] = "1"  # or pygame would leave SIGTERM without effect
    args = tyro.cli(Args)  # to resume, what the checkpoint's arguments say holds, unless a flag says otherwise
    args = tyro.cli(Args, default=dataclasses.replace(load(args.resume)["args"], quiet=False)) if args.resume else args
    chosen = prepare(args)
    distributed.init_process_group() if WORLD_SIZE > 1 else None
    searches = {"sweep": partial(sweep, chosen=chosen), "autotune": partial(autotune, chosen=chosen)}
    ({"train": train, "eval": evaluate} | searches)[args.mode](args)
    WORLD_SIZE == 1 or (gc.collect(), distributed.destroy_process_group())  # or its threads may abort Python's end


if __name__ == "__main__":
    main()
