"""PPO on Atari in CleanRL's form, over gymnasium's SyncVectorEnv: the base that the other scripts change."""

import os
import random
import time
from dataclasses import dataclass, field

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn, optim
from torch.distributions.categorical import Categorical
from torch.utils.tensorboard import SummaryWriter

from atari_wrappers import AtariWrapper  # which makes the games known to gymnasium too


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__).removesuffix(".py")
    """name of this experiment, a part of the run's name"""
    seed: int = 1
    """seed of the networks, of the actions and (plus its index) of every environment"""
    torch_deterministic: bool = True
    """have cuDNN use deterministic algorithms only"""
    cuda: bool = True
    """train on the GPU if there is one"""
    track: bool = False
    """log to Weights & Biases too"""
    wandb_project_name: str = "puffer-core"
    """project at Weights & Biases"""
    wandb_entity: str | None = None
    """team at Weights & Biases; your own account by default"""
    capture_video: bool = False
    """record episodes 0, 1, 8, 27, ... of the first environment under videos/, one mp4 each"""

    env_id: str = "BreakoutNoFrameskip-v4"
    """game, without gymnasium's own frame skip"""
    total_timesteps: int = 10_000_000
    """environment steps of the whole run, over all environments"""
    learning_rate: float = 2.5e-4
    """step size of Adam, at the start"""
    num_envs: int = 8
    """environments stepped side by side"""
    num_steps: int = 128
    """steps that each environment takes between two updates"""
    anneal_lr: bool = True
    """lower the learning rate linearly, to 0 at the end"""
    gamma: float = 0.99
    """discount of later rewards"""
    gae_lambda: float = 0.95
    """lambda of the generalized advantage estimation"""
    num_minibatches: int = 4
    """parts that a batch is split into"""
    update_epochs: int = 4
    """times that every batch is used"""
    norm_adv: bool = True
    """give the advantages of every minibatch mean 0 and deviation 1"""
    clip_coef: float = 0.1
    """PPO's clipping range of the probability ratio, either way from 1"""
    clip_vloss: bool = True
    """clip the value function's change too"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """the gradient is scaled down to this norm"""
    target_kl: float | None = None
    """stop the epochs of an update when the policy has moved further than this"""

    batch_size: int = field(default=0, init=False)
    """num_envs * num_steps, computed at the start"""
    minibatch_size: int = field(default=0, init=False)
    """batch_size / num_minibatches, computed at the start"""
    num_iterations: int = field(default=0, init=False)
    """total_timesteps / batch_size, computed at the start"""


def make_env(env_id, idx, capture_video, run_name):
    def thunk():
        recorded = capture_video and idx == 0
        env = AtariWrapper(gym.make(env_id, render_mode="rgb_array" if recorded else None))
        if recorded:
            env = gym.wrappers.RecordVideo(env, f"videos/{run_name}")
        return env

    return thunk


def layer_init(layer, std=2**0.5, bias=0.0):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias)
    return layer


class Agent(nn.Module):
    def __init__(self, envs):
        super().__init__()
        self.network = nn.Sequential(
            layer_init(nn.Conv2d(4, 32, 8, stride=4)),
            nn.ReLU(),
            layer_init(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(),
            layer_init(nn.Conv2d(64, 64, 3, stride=1)),
            nn.ReLU(),
            nn.Flatten(),
            layer_init(nn.Linear(64 * 7 * 7, 512)),
            nn.ReLU(),
        )
        self.actor = layer_init(nn.Linear(512, envs.single_action_space.n), std=0.01)
        self.critic = layer_init(nn.Linear(512, 1), std=1)

    def get_value(self, x):
        return self.critic(self.network(x.float() / 255.0))

    def get_action_and_value(self, x, action=None):
        hidden = self.network(x.float() / 255.0)
        policy = Categorical(logits=self.actor(hidden))
        if action is None:
            action = policy.sample()
        return action, policy.log_prob(action), policy.entropy(), self.critic(hidden)


if __name__ == "__main__":
    args = tyro.cli(Args)
    run_name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    args.batch_size = args.num_envs * args.num_steps
    args.minibatch_size = args.batch_size // max(args.num_minibatches, 1)
    args.num_iterations = args.total_timesteps // max(args.batch_size, 1)

    # Wrong arguments: better one line now than a traceback later
    batch = f"--num-envs * --num-steps, {args.batch_size}"
    not_negative = ("learning_rate", "clip_coef", "ent_coef", "vf_coef", "max_grad_norm")
    for name, is_right, expected in (
        ("num_envs", args.num_envs > 0, "at least 1"),
        ("num_steps", args.num_steps > 0, "at least 1"),
        ("update_epochs", args.update_epochs > 0, "at least 1"),
        *[(name, getattr(args, name) >= 0, "at least 0") for name in not_negative],
        *[(name, 0 <= getattr(args, name) <= 1, "from 0 to 1") for name in ("gamma", "gae_lambda")],
        ("num_minibatches", 0 < args.num_minibatches * args.minibatch_size == args.batch_size, f"to divide {batch}"),
        ("norm_adv", args.minibatch_size > 1 or not args.norm_adv, "minibatches of two steps or more"),
        ("total_timesteps", args.num_iterations > 0, f"at least {batch}"),
        ("seed", 0 <= args.seed < 2**31, "at least 0 and below 2**31"),
    ):
        if not is_right:
            raise SystemExit(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {expected}")
    try:
        make_env(args.env_id, 0, False, run_name)().close()
    except Exception as error:
        raise SystemExit(f"--env-id {args.env_id}: {' '.join(str(error).split())}") from None

    # Logging
    if args.track:
        import wandb

        wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            name=run_name,
            config=vars(args),
            sync_tensorboard=True,
            save_code=True,
        )
    writer = SummaryWriter(f"runs/{run_name}")
    table = [f"|{name}|{value}|" for name, value in vars(args).items()]
    writer.add_text("hyperparameters", "\n".join(["|param|value|", "|-|-|", *table]))

    # Seeding
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")

    # Environments
    envs = gym.vector.SyncVectorEnv(
        [make_env(args.env_id, idx, args.capture_video, run_name) for idx in range(args.num_envs)],
        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
    )
    agent = Agent(envs).to(device)
    optimizer = optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)

    # Storage of a rollout, in the spaces' own dtypes: uint8 frames take a quarter of what float32 would
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    steps = (args.num_steps, args.num_envs)
    obs = torch.zeros(steps + obs_space.shape, dtype=getattr(torch, obs_space.dtype.name), device=device)
    actions = torch.zeros(steps + action_space.shape, dtype=getattr(torch, action_space.dtype.name), device=device)
    logprobs = torch.zeros(steps, device=device)
    rewards = torch.zeros(steps, device=device)
    dones = torch.zeros(steps, device=device)
    values = torch.zeros(steps, device=device)

    global_step = 0
    next_obs, _ = envs.reset(seed=args.seed)
    next_obs = torch.as_tensor(next_obs).to(device)
    next_done = torch.zeros(args.num_envs, device=device)

    for iteration in range(1, args.num_iterations + 1):
        iteration_start = time.perf_counter()
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = (1 - (iteration - 1) / args.num_iterations) * args.learning_rate

        # Rollout
        for step in range(args.num_steps):
            global_step += args.num_envs
            obs[step] = next_obs  # a copy: the vectorizer may overwrite its own at the next step
            dones[step] = next_done
            with torch.no_grad():
                action, logprob, _, value = agent.get_action_and_value(next_obs)
            actions[step], logprobs[step], values[step] = action, logprob, value.flatten()

            next_obs, reward, terminations, truncations, infos = envs.step(action.cpu().numpy())
            next_obs = torch.as_tensor(next_obs).to(device)
            rewards[step] = torch.as_tensor(reward).to(device)
            next_done = torch.as_tensor(terminations | truncations).to(device).float()

            finals = infos.get("final_info", {})
            for idx in np.flatnonzero(finals.get("_episode", False)):  # games that ended, not just a life
                episodic_return, episodic_length = finals["episode"]["r"][idx], finals["episode"]["l"][idx]
                print(f"global_step={global_step}, episodic_return={episodic_return}")
                writer.add_scalar("charts/episodic_return", episodic_return, global_step)
                writer.add_scalar("charts/episodic_length", episodic_length, global_step)

        # Generalized advantage estimation: dones[t + 1] tells whether step t ended an episode
        with torch.no_grad():
            goes_on = 1.0 - torch.cat([dones[1:], next_done[None]])
            next_values = torch.cat([values[1:], agent.get_value(next_obs).view(1, -1)])
            deltas = rewards + args.gamma * goes_on * next_values - values
            advantages, advantage = torch.zeros_like(rewards), 0.0
            for step in reversed(range(args.num_steps)):
                advantage = deltas[step] + args.gamma * args.gae_lambda * goes_on[step] * advantage
                advantages[step] = advantage
            returns = advantages + values

        # One flat batch: rows (step, environment)
        b_obs, b_actions, b_logprobs = obs.flatten(0, 1), actions.flatten(0, 1), logprobs.flatten()
        b_advantages, b_returns, b_values = advantages.flatten(), returns.flatten(), values.flatten()

        # Update
        clipfracs = []
        for _ in range(args.update_epochs):
            for mb_inds in torch.randperm(args.batch_size, device=device).split(args.minibatch_size):
                _, newlogprob, entropy, newvalue = agent.get_action_and_value(b_obs[mb_inds], b_actions[mb_inds])
                logratio = newlogprob - b_logprobs[mb_inds]
                ratio = logratio.exp()
                clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                with torch.no_grad():  # two estimates of the divergence, see http://joschu.net/blog/kl-approx.html
                    old_approx_kl = -logratio.mean()
                    approx_kl = (ratio - 1 - logratio).mean()
                    clipfracs.append((ratio != clipped_ratio).float().mean().item())

                mb_advantages = b_advantages[mb_inds]
                if args.norm_adv:
                    mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                pg_loss = -torch.min(mb_advantages * ratio, mb_advantages * clipped_ratio).mean()

                newvalue, mb_values, mb_returns = newvalue.flatten(), b_values[mb_inds], b_returns[mb_inds]
                v_error = (newvalue - mb_returns) ** 2
                if args.clip_vloss:
                    clipped_value = mb_values + (newvalue - mb_values).clamp(-args.clip_coef, args.clip_coef)
                    v_error = torch.max(v_error, (clipped_value - mb_returns) ** 2)
                v_loss = 0.5 * v_error.mean()

                entropy_loss = entropy.mean()
                loss = pg_loss - args.ent_coef * entropy_loss + args.vf_coef * v_loss

                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()

            if args.target_kl is not None and approx_kl > args.target_kl:
                break

        # What the value function explains of the returns' variance: 1 is all, 0 nothing, below 0 worse than a constant
        explained_variance = 1 - (b_returns - b_values).var() / b_returns.var()
        sps = int(args.batch_size / (time.perf_counter() - iteration_start))  # of this iteration, so without start-up
        print(f"SPS: {sps}")
        for tag, value in (
            ("charts/learning_rate", optimizer.param_groups[0]["lr"]),
            ("losses/value_loss", v_loss.item()),
            ("losses/policy_loss", pg_loss.item()),
            ("losses/entropy", entropy_loss.item()),
            ("losses/old_approx_kl", old_approx_kl.item()),
            ("losses/approx_kl", approx_kl.item()),
            ("losses/clipfrac", np.mean(clipfracs)),
            ("losses/explained_variance", explained_variance.item()),
            ("charts/SPS", sps),
        ):
            writer.add_scalar(tag, value, global_step)

    envs.close()
    writer.close()
