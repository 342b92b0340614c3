"""demo.py: its experience, its updates, its checkpoints and its modes, on small budgets of real environments."""

import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import cv2
import gymnasium
import numpy as np
import optuna
import psutil
import pytest
import torch
import tyro
import yaml
from gymnasium import spaces
from rich.console import Console
from running import ROOT, Run, environment, heed_ctrl_c, run
from test_scripts import ppo_losses, running_in_group
from torch import nn

import demo
import puffer_core
import vanilla_ppo_atari
from tests.envs import MINIHACK_SPACE, Blind, Counter, Written

torch.set_num_threads(1)


@contextlib.contextmanager
def trainer_of(env_id, **arguments):
    """A trainer with its environments at their first observations."""
    small = {"num_envs": 4, "num_steps": 8, "hidden_size": 16, "total_timesteps": 10**6, "quiet": True, "vec": "serial"}
    args = demo.Args(env_id=env_id, cuda=False, **(small | arguments))
    demo.prepare(args)
    trainer = demo.Trainer(args)
    with trainer.envs:
        trainer.start()
        yield trainer


# ----------------------------------------------------------------------------------------------------------- segments

FIELDS = ("observations", "actions", "logprobs", "values", "advantages", "returns", "trainable", "starts")


def segments(count, **arguments):
    """By row and number, the first segments of every row, of a policy whose choices are certain."""
    found = {}
    with trainer_of("envs:Uneven", num_envs=6, seed=5, **arguments) as trainer:
        experience = trainer.experience
        with torch.no_grad():
            trainer.policy.actor.weight.mul_(1e9)  # by less, near ties are still a matter of chance
        while min(sum(key[0] == row for key in found) for row in range(6)) < count:
            assert trainer.collect()
            before = experience.consumed.copy()
            for index in trainer.prepare():
                row = int(index[0]) // experience.num_slots
                number = before[row] // experience.num_steps
                assert (row, number) not in found
                found[row, number] = {name: getattr(experience, name)[index].clone() for name in FIELDS}
    return found


@pytest.mark.parametrize("use_lstm", [False, True])
def test_segments_do_not_depend_on_who_is_ready_first(use_lstm):
    """Nor does it matter how many environments are waited for, or whether their rows are copied."""
    memory = {"use_lstm": use_lstm, "bptt_horizon": 4}
    expected = segments(4, **memory)
    assert len(torch.cat([one["actions"] for one in expected.values()]).unique()) > 1
    for workers, batch, zero_copy in ((6, 2, True), (6, 1, True), (3, 4, False), (6, 5, False)):
        ways = {"vec": "multiprocessing", "num_workers": workers, "env_batch_size": batch, "zero_copy": zero_copy}
        found = segments(4, **ways, **memory)
        for row in range(6):
            for number in range(4):
                for name in FIELDS:
                    one, other = expected[row, number][name], found[row, number][name]
                    torch.testing.assert_close(
                        one, other, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
                    )


def test_a_quick_row_neither_waits_nor_counts_twice():
    """Where one environment is much slower, the others' segments are taken without it, and its own later."""
    with trainer_of(
        "envs:OneSlow", num_envs=2, vec="multiprocessing", num_workers=2, env_batch_size=1, num_steps=4
    ) as trainer:
        taken = np.zeros(2, int)
        while taken.min() < 2:
            trainer.collect()
            rows = trainer.prepare()[:, 0] // trainer.experience.num_slots
            assert len(set(rows.tolist())) == len(rows)
            taken[rows] += 1
        assert taken[0] > taken[1]
        held = trainer.experience.complete - trainer.experience.consumed
        assert (held <= trainer.experience.num_slots).all()


def test_an_update_waits_for_all_rows_while_there_is_place():
    pool = {"vec": "multiprocessing", "num_workers": 2, "env_batch_size": 1, "num_steps": 4}
    with trainer_of("envs:OneSlow", num_envs=2, **pool) as trainer:
        for _ in range(4):
            trainer.collect()
            held = trainer.experience.complete - trainer.experience.consumed
            assert held.min() >= 4 or held.max() == trainer.experience.num_slots
            trainer.prepare()


def test_a_first_ready_run_ends_when_it_has_learned_from_all_its_steps():
    """An update may take the quick rows only: it counts for what it took, in the schedule too."""
    pool = {"vec": "multiprocessing", "num_envs": 4, "num_workers": 4, "env_batch_size": 1, "num_steps": 4}
    with trainer_of("envs:OneSlow", total_timesteps=8 * 16, **pool) as trainer:
        rates, consumed = [], trainer.experience.consumed
        while not trainer.is_over():
            before = consumed.sum()
            trainer.collect()
            trainer.update()
            rates.append((before, float(trainer.optimizer.param_groups[0]["lr"])))
        assert 8 * 16 <= consumed.sum() == trainer.learned < 8 * 16 + 16 and trainer.global_step >= 8 * 16
        assert trainer.iteration == len(rates) > 8
        assert rates == [(done, pytest.approx(trainer.args.learning_rate * (1 - done / 128))) for done, _ in rates]


def test_a_run_is_as_many_whole_updates_as_fit():
    with trainer_of("CartPole-v1", total_timesteps=3 * 32 - 1) as trainer:
        while not trainer.is_over():
            trainer.collect()
            trainer.update()
        assert trainer.global_step == trainer.learned == 2 * 32


def test_truncation_bootstraps_from_the_last_observation_and_termination_from_nothing():
    with trainer_of("envs:Uneven", num_steps=16, gamma=0.9, gae_lambda=0.8, reward_scale=2.0) as trainer:
        trainer.collect()
        experience, policy = trainer.experience, trainer.policy
        index = trainer.prepare()
        observations, ended = experience.observations[index], experience.ended[index]

        def value(observation):
            return float(policy(observation.view(1, 1, -1), None, None)[3])

        kinds = set()
        with torch.no_grad():
            for row in range(4):
                advantage = 0.0
                for step in reversed(range(16)):
                    seed, episode, number, _ = observations[row, step].tolist()
                    action = float(experience.actions[index[row, step]])
                    after = torch.tensor(
                        [seed, episode, number + 1, action]
                    )  # also where the row has the next episode's
                    is_terminated = episode % 2 == 0 and number + 1 == 3
                    is_truncated = episode % 2 == 1 and number + 1 == 5
                    kinds.add((is_terminated, is_truncated))
                    assert ended[row, step] == (is_terminated or is_truncated)
                    next_value = 0.0 if is_terminated else value(after)
                    delta = 2 * (number + 1) + 0.9 * next_value - value(observations[row, step])
                    advantage = delta + 0.9 * 0.8 * advantage * (not ended[row, step])
                    assert float(experience.advantages[index[row, step]]) == pytest.approx(advantage, abs=1e-4)
        assert len(kinds) == 3


def test_the_value_of_a_last_observation_is_that_of_the_episodes_memory():
    with trainer_of("envs:Uneven", num_envs=1, use_lstm=True, bptt_horizon=1) as trainer, torch.no_grad():
        for _ in range(3 + 5):  # steps of an episode that terminates, and of one that is cut short
            trainer.act()
        experience, last = trainer.experience, trainer.experience.place(trainer.rows, back=1)
        assert experience.ended[last] and not experience.terminated[last]
        observation = torch.tensor([[[trainer.args.seed, 1, 5, float(experience.actions[last])]]])
        value = trainer.policy(observation, trainer.state, torch.zeros(1, 1, dtype=torch.bool))[3][0]
        torch.testing.assert_close(experience.next_values[last], value)


def test_a_memory_outlives_the_end_of_an_agent_that_is_cut_short():
    """Its team goes on, so the row still has the last observation, whose value the memory of the episode belongs to."""
    with trainer_of("envs:Leaver", num_envs=1, use_lstm=True, bptt_horizon=1) as trainer:
        for _ in range(3):
            trainer.act()
        previous = trainer.experience.place(trainer.rows, back=1)
        assert trainer.experience.ended[previous].tolist() == [True, False]
        state, observations = trainer.state.clone(), trainer.observations.clone()
        assert state[0].abs().sum() > 0
        with torch.no_grad():
            value = trainer.policy(observations[:, None], state, torch.zeros(2, 1, dtype=torch.bool))[3][0, 0]
        trainer.act()
        assert trainer.experience.next_values[previous[0]] == value
        assert trainer.starts.tolist() == [True, False]  # and whoever comes next begins anew


def test_advantages_are_those_of_each_agents_own_time_line():
    """Against a loop over agents; what is masked is NaN."""
    generator = torch.Generator().manual_seed(1)
    rewards, values, next_values = torch.randn(3, 7, 40, generator=generator)
    terminated, truncated, absent = torch.rand(3, 7, 40, generator=generator) < 0.15
    ended, valid = terminated | truncated, ~absent
    poisoned = [part.masked_fill(absent, torch.nan) for part in (rewards, values, next_values)]
    found = demo.estimate_advantages(*poisoned, terminated, ended, valid, 0.97, 0.9)
    for row in range(7):
        advantage = 0.0
        for step in reversed(range(40)):
            if absent[row, step]:
                advantage = 0.0
                assert found[row, step] == 0
                continue
            next_value = 0.0 if terminated[row, step] else next_values[row, step]
            carried = 0.0 if ended[row, step] else advantage
            advantage = rewards[row, step] + 0.97 * next_value - values[row, step] + 0.97 * 0.9 * carried
            assert found[row, step] == pytest.approx(float(advantage), abs=1e-5)


@pytest.mark.parametrize("use_lstm", [False, True])
def test_a_first_minibatch_finds_the_policy_that_acted(use_lstm):
    """With the memories it had then, so that nothing has changed yet."""
    with trainer_of("CartPole-v1", num_steps=16, use_lstm=use_lstm, bptt_horizon=4, clip_coef=1e-3) as trainer:
        with torch.no_grad():
            trainer.policy.actor.weight.mul_(100)
        trainer.collect()
        index = trainer.prepare().view(-1, trainer.experience.horizon)
        _, value_loss, _, old_approx_kl, approx_kl, clipfrac, _ = trainer.learn(index).tolist()
        assert value_loss == pytest.approx(0.5 * float(trainer.experience.advantages[index].square().mean()), rel=1e-4)
        assert abs(old_approx_kl) < 1e-5 and abs(approx_kl) < 1e-5 and clipfrac == 0


def test_an_update_leaves_no_step_out_that_counts():
    """Also where an agent is absent for a part of a sequence."""
    with trainer_of("envs:FloatTeam", num_steps=24, use_lstm=True, bptt_horizon=8, update_epochs=1) as trainer:
        seen, learn = [], trainer.learn
        trainer.learn = lambda index: (seen.append(index.flatten()), learn(index))[1]
        trainer.collect()
        trainer.update()
    (trainable,) = trainer.experience.trainable.nonzero(as_tuple=True)
    seen = torch.cat(seen).tolist()
    assert len(seen) == len(set(seen)) and set(trainable.tolist()) <= set(seen)


@pytest.mark.parametrize("use_lstm", [False, True])
def test_masked_rows_never_touch_an_update(use_lstm):
    """Whatever stands in the rows of absent and dead agents, NaN for one, the update is the same bit for bit."""
    weights = []
    for poison in (False, True):
        with trainer_of("envs:FloatTeam", num_envs=2, num_steps=24, use_lstm=use_lstm, bptt_horizon=8) as trainer:
            trainer.collect()
            experience = trainer.experience
            masked = ~experience.valid
            assert 0.2 < masked.mean() < 0.8
            if poison:
                experience.rewards[masked] = np.nan
                flat = torch.as_tensor(masked)
                for name in ("observations", "logprobs", "values", "next_values"):
                    getattr(experience, name)[flat] = torch.nan
                experience.actions[flat] = 2**40
                experience.states[flat & experience.starts] = torch.nan  # of the last observation before, say
            trainer.update()
            assert all(np.isfinite(value) for value in trainer.losses.values())
            weights.append(trainer.policy.state_dict())
    assert all(torch.equal(one, weights[1][name]) for name, one in weights[0].items())


@pytest.mark.parametrize("use_lstm", [False, True])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "envs:FloatTeam"])
def test_minibatches_that_are_filled_up_teach_the_same(env_id, use_lstm):
    """As for CUDA graphs, with rows that are no one's, and also if there are no others."""
    weights = []
    for more in (0, 5):
        with trainer_of(env_id, num_steps=8, use_lstm=use_lstm, bptt_horizon=4, num_minibatches=3) as trainer:
            learn, fill = trainer.learn, functools.partial(nn.functional.pad, pad=(0, 0, 0, more), value=-1)
            trainer.learn = lambda index, learn=learn, fill=fill: learn(fill(index))
            for is_learned_from in (True, True, False):
                trainer.collect()
                trainer.experience.valid &= is_learned_from
                weights.append(flat_weights(trainer.policy))
                trainer.update()
            assert trainer.losses["entropy"] == trainer.losses["grad_norm"] == 0
    for one, other in zip(weights[:3], weights[3:]):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert not torch.equal(weights[0], weights[2])


def test_actions_are_drawn_from_the_policy():
    parameters = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.3])
    args, layout = demo.Args(hidden_size=8), puffer_core.Layout(spaces.Box(-1, 1, (3,)))
    policy = demo.Policy(layout, spaces.MultiDiscrete([3, 2]), args)
    actions, logprobs, entropies = policy.act(parameters.expand(100_000, 5), None)
    expected = [torch.distributions.Categorical(logits=part) for part in parameters.split([3, 2])]
    for number, part in enumerate(expected):
        frequencies = torch.bincount(actions[:, number], minlength=len(part.probs)) / 100_000
        torch.testing.assert_close(frequencies, part.probs, rtol=0, atol=0.01)
    torch.testing.assert_close(logprobs, sum(part.log_prob(one) for part, one in zip(expected, actions.T)))
    torch.testing.assert_close(entropies[0], sum(part.entropy() for part in expected))
    policy = demo.Policy(layout, spaces.Box(-1, 1, (5,)), args)
    policy.log_std.data = parameters.neg()
    actions, logprobs, entropies = policy.act(parameters.expand(100_000, 5), None)
    torch.testing.assert_close(actions.mean(0), parameters, rtol=0, atol=0.05)
    torch.testing.assert_close(actions.std(0), parameters.neg().exp(), rtol=0.02, atol=0)
    expected = torch.distributions.Normal(parameters, parameters.neg().exp())
    torch.testing.assert_close(logprobs, expected.log_prob(actions).sum(-1))
    torch.testing.assert_close(entropies, expected.entropy().sum().expand(100_000))
    assert not actions.requires_grad


def test_agents_that_come_and_go_are_trained_on_while_they_live():
    """The rows of `FloatTeam`, by hand: agent 1 dies on the first step of the first episode, and is absent then."""
    with trainer_of("envs:FloatTeam", num_envs=1, num_steps=8) as trainer:
        trainer.collect()
        valid, ended = [part[:-1].reshape(3, 8) for part in (trainer.experience.valid, trainer.experience.ended)]
        assert valid.tolist() == [
            [True, True, True, True, True, False, False, False],
            [True, False, False, True, True, True, True, True],
            [False, False, True, True, True, True, False, False],
        ]
        assert (ended & valid).tolist() == [
            [False, False, False, True, True, False, False, False],
            [True, False, False, True, False, False, False, True],
            [False, False, False, True, False, True, False, False],
        ]


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("env_id", ["CartPole-v1", "envs:FloatTeam", "envs:Uneven"])
@pytest.mark.parametrize("use_lstm", [False, True])
def test_recomputed_logprobs_equal_the_sampled_ones(env_id, use_lstm):
    ways = {"vec": "multiprocessing", "num_workers": 4, "env_batch_size": 2} if env_id == "envs:Uneven" else {}
    with trainer_of(env_id, num_steps=64, use_lstm=use_lstm, bptt_horizon=16, **ways) as trainer, torch.no_grad():
        trainer.collect()
        experience, index = trainer.experience, trainer.prepare()
        index = index.view(-1, experience.horizon)
        assert experience.starts[index].any()
        state = experience.states[index[:, 0]]
        steps = (experience.observations[index], state, experience.starts[index], experience.actions[index])
        _, logprobs, _, values, _ = trainer.policy(*steps)
        kept = experience.trainable[index]
        torch.testing.assert_close(logprobs[kept], experience.logprobs[index][kept], rtol=0, atol=1e-5)
        torch.testing.assert_close(values[kept], experience.values[index][kept], rtol=0, atol=1e-4)


def test_gradients_flow_back_through_the_memory_as_far_as_an_episode_goes():
    args, layout = demo.Args(hidden_size=8, use_lstm=True), puffer_core.Layout(spaces.Box(-1, 1, (3,)))
    policy = demo.Policy(layout, spaces.Discrete(2), args)
    starts = torch.tensor([[False] * 4, [False, False, True, False]])
    rows = torch.rand(2, 4, 3, requires_grad=True)
    policy(rows, torch.zeros(2, 16), starts)[3][:, 3].sum().backward()
    assert (rows.grad != 0).any(-1).tolist() == [[True] * 4, [False, False, True, True]]


def learned(tmp_path, monkeypatch, env_id, **arguments):
    monkeypatch.chdir(tmp_path)
    args = demo.Args(env_id=env_id, cuda=False, quiet=True, vec="serial", **arguments)
    demo.prepare(args)
    return demo.train(args)


def test_only_a_memory_solves_a_memory_task(tmp_path, monkeypatch):
    settings = {"num_steps": 64, "hidden_size": 32, "learning_rate": 5e-3, "target_return": 0.95}
    assert learned(tmp_path, monkeypatch, "envs:Recall", use_lstm=True, total_timesteps=25_000, **settings) >= 0.95
    assert learned(tmp_path, monkeypatch, "envs:Recall", total_timesteps=10_000, **settings) < 0.75


# ----------------------------------------------------------------------------------------------------------- networks

SPACES = {
    "frames": (spaces.Box(0, 255, (4, 84, 84), np.uint8), spaces.Discrete(4)),
    "channels last": (spaces.Box(0, 255, (64, 48, 3), np.uint8), spaces.Box(-2, 2, (3,), np.float32)),
    "numbers": (spaces.Box(-1, 1, (3, 2), np.float32), spaces.MultiDiscrete([3, 2])),
    "nested numbers": (
        spaces.Dict({"a": spaces.Box(-1, 1, (), np.float32), "b": spaces.Box(-1, 1, (2,), np.float64)}),
        spaces.Discrete(2, start=3),
    ),
    "bytes": (spaces.Box(0, 255, (128,), np.uint8), spaces.Discrete(2)),
    "category": (spaces.Discrete(5, start=-2), spaces.Discrete(2)),
    "structure": (
        spaces.Dict(
            {
                "image": spaces.Box(0, 255, (3, 40, 40), np.uint8),
                "rest": spaces.Tuple([spaces.MultiBinary(3), spaces.MultiDiscrete([2, 3], start=[1, -1])]),
            }
        ),
        spaces.Box(-np.inf, np.inf, (2,), np.float64),
    ),
}


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("use_lstm", [False, True])
def test_a_policy_fits_any_spaces(name, use_lstm):
    space, action_space = SPACES[name]
    layout = puffer_core.Layout(space)
    args = demo.Args(hidden_size=8, use_lstm=use_lstm)
    policy = demo.Policy(layout, action_space, args)
    space.seed(1)
    rows = torch.as_tensor(np.stack([layout.flatten(space.sample()) for _ in range(6)])).unflatten(0, (3, 2))
    state, starts = torch.zeros(3, 16), torch.zeros(3, 2, dtype=torch.bool)
    actions, logprobs, entropies, values, _ = policy(rows, state, starts)
    assert logprobs.shape == entropies.shape == values.shape == (3, 2)
    assert torch.isfinite(logprobs).all() and torch.isfinite(values).all()
    for action in policy.for_envs(actions[:, 0]):
        assert action.dtype == action_space.dtype and action.shape == action_space.shape
        assert isinstance(action_space, spaces.Box) or action_space.contains(action)
    torch.testing.assert_close(policy(rows, state, starts, actions)[1], logprobs)
    assert not torch.allclose(values, policy(rows.flip(0), state, starts)[3])  # it looks at what it is given


def test_actions_of_a_multi_discrete_space_are_several_categoricals():
    policy = demo.Policy(
        puffer_core.Layout(SPACES["numbers"][0]), spaces.MultiDiscrete([3, 2]), demo.Args(hidden_size=8)
    )
    logits, actions = torch.randn(4, 1, 5), torch.tensor([[[0, 1]], [[2, 0]], [[1, 1]], [[0, 0]]])
    heads = [torch.distributions.Categorical(logits=part) for part in logits.split([3, 2], -1)]
    _, logprobs, entropies = policy.act(logits, actions)
    torch.testing.assert_close(logprobs, sum(head.log_prob(actions[..., at]) for at, head in enumerate(heads)))
    torch.testing.assert_close(entropies, sum(head.entropy() for head in heads))


def test_actions_of_an_integer_box_are_rounded_and_kept_in_range():
    policy = demo.Policy(
        puffer_core.Layout(SPACES["numbers"][0]), spaces.Box(0, 255, (2,), np.uint8), demo.Args(hidden_size=8)
    )
    actions = policy.for_envs(torch.tensor([[-2.0, -0.5], [0.5, 3.0]]))
    assert actions.dtype == np.uint8 and actions.tolist() == [[0, 64], [191, 255]]


@pytest.mark.parametrize("space", [
    spaces.Box(-(2**63), 2**63 - 1, (1,), np.int64), spaces.Box(0, 2**64 - 1, (1,), np.uint64),
    spaces.Box(-128, 127, (1,), np.int8), spaces.Box(-9, -3, (1,), np.int16), spaces.Box(0, 3, (1,), np.int64),
], ids=str)  # fmt: skip
def test_the_highest_integer_does_not_wrap_around(space):
    policy = demo.Policy(puffer_core.Layout(spaces.Box(-1, 1, (3,))), space, demo.Args(hidden_size=8))
    low, high = [int(one) for one in policy.for_envs(torch.tensor([[-1.5], [1.5]]))[:, 0]]
    assert low == space.low and 0 <= int(space.high[0]) - high < 2**12
    assert high == space.high or space.high > 2**53


def test_a_small_network_has_one_thread_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        torch.set_num_threads(2)
        with trainer_of("BreakoutNoFrameskip-v4", num_envs=1):
            assert torch.get_num_threads() == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        with trainer_of("CartPole-v1"):
            assert torch.get_num_threads() == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        with trainer_of("CartPole-v1"):
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


def test_first_weights_do_not_depend_on_how_many_threads_there_were():
    """As the first trial of a sweep would otherwise begin with others than a run from its flags."""
    weights = []
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            with trainer_of("CartPole-v1", hidden_size=128) as trainer:
                weights.append(torch.cat([one.flatten() for one in trainer.policy.parameters()]))
        assert torch.equal(*weights)
    finally:
        torch.set_num_threads(1)


def test_few_rows_are_thought_about_in_one_thread_and_learned_from_in_all():
    """Threads that torch leaves spinning after a small batch would keep the workers from their cores."""
    try:
        torch.set_num_threads(2)
        few = {"num_envs": 2, "num_steps": 2, "num_minibatches": 1, "update_epochs": 1}
        with trainer_of("BreakoutNoFrameskip-v4", **few) as trainer:
            seen = []
            trainer.policy.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
            assert trainer.collect()
            trainer.update()
            assert seen == [1, 1, 2, 2]  # two steps; the values of what came after them, and a minibatch
    finally:
        torch.set_num_threads(1)


def test_a_dtype_that_torch_cannot_store_is_refused():
    with pytest.raises(SystemExit, match="--env-id envs:Depth: expected no uint16/32/64 observation"):
        demo.prepare(demo.Args(env_id="envs:Depth", quiet=True))


@pytest.mark.parametrize("space", [spaces.Discrete(3, start=-5), spaces.MultiDiscrete([3, 4], start=[-5, 2])], ids=str)
def test_categories_may_start_anywhere_and_absent_rows_be_zero(space):
    layout = puffer_core.Layout(space)
    policy = demo.Policy(layout, spaces.Discrete(2), demo.Args(hidden_size=8))
    highest = np.ravel(space.start) + np.ravel(getattr(space, "nvec", getattr(space, "n", 0))) - 1
    rows = np.stack([layout.flatten(space.start), layout.flatten(highest.reshape(np.shape(space.start)))])
    rows = torch.as_tensor(np.concatenate([rows, 0 * rows[:1]]))[:, None]
    values = policy(rows, torch.zeros(3, 16), torch.zeros(3, 1, dtype=torch.bool))[3]
    assert values.isfinite().all() and values[0] != values[1]


@pytest.mark.parametrize("space, count", [
    (spaces.Discrete(5), 5), (spaces.MultiDiscrete([2, 3]), 5),
    (spaces.MultiBinary((2, 2)), 4), (spaces.Box(0, 1, (3,)), 3),
], ids=str)  # fmt: skip
def test_categories_are_read_one_hot_and_other_numbers_as_they_are(space, count):
    reader = demo.LeafNet(space, width=8)
    reader(torch.as_tensor(space.sample())[None])
    assert reader.network[1].in_features == count


BYTES = np.uint8, lambda x: x / 255


@pytest.mark.parametrize("dtype, read", [BYTES, (np.int32, np.arcsinh), (np.float32, np.arcsinh)])
def test_bytes_are_read_as_0_to_1_and_other_numbers_by_asinh(dtype, read):
    reader, numbers = demo.LeafNet(spaces.Box(0, 255, (3,), dtype), width=8), np.array([[0, 5, 255]], dtype)
    reader.network = nn.Flatten()
    np.testing.assert_allclose(reader(torch.as_tensor(numbers)), read(numbers.astype(float)), rtol=1e-6)


def test_of_nethack_all_is_read_that_is_kept():
    space = spaces.Dict({key: MINIHACK_SPACE[key] for key in demo.NETHACK_KEYS})
    space.seed(1)
    layout, (one, other) = puffer_core.Layout(space), (space.sample(), space.sample())
    torch.manual_seed(1)
    policy = demo.Policy(layout, spaces.Discrete(2), demo.Args(hidden_size=64))
    seen = [one, *[one | {key: other[key]} for key in demo.NETHACK_KEYS]]
    rows = torch.as_tensor(np.stack([layout.flatten(part) for part in seen]))[:, None]
    values = policy(rows, torch.zeros(4, 128), torch.zeros(4, 1, dtype=torch.bool))[3]
    assert ((values[1:] - values[0]).abs() > 1e-4).all()


def test_an_env_that_is_flat_already_keeps_its_structure():
    env = demo.make_env("envs:flat")
    assert isinstance(env, puffer_core.EpisodeStats) and isinstance(env.observation_space, spaces.Dict)


@pytest.mark.parametrize("shape, kind", [
    ((36, 36, 1), "images"), ((3, 40, 40), "images"), ((4, 36, 50), "images"),
    ((36, 35, 1), "discrete"), ((48, 16, 48), "discrete"), ((50, 30, 36), "discrete"), ((4, 20, 20), "discrete"),
])  # fmt: skip
def test_what_the_convolutions_cannot_take_is_no_image(shape, kind):
    layout = puffer_core.Layout(spaces.Box(0, 255, shape, np.uint8))
    assert demo.kind_of(layout.space) == kind
    policy = demo.Policy(layout, spaces.Discrete(2), demo.Args(hidden_size=8))
    seen = torch.zeros(2, 1, *shape, dtype=torch.uint8)
    assert policy(seen, torch.zeros(2, 16), torch.zeros(2, 1, dtype=torch.bool))[3].shape == (2, 1)


def test_an_image_within_a_structure_brings_what_images_have():
    for image, kind in (((48, 64, 3), "images"), ((8, 8, 3), "discrete")):
        space = spaces.Dict(speed=spaces.Box(-1, 1, (2,)), seen=spaces.Tuple([spaces.Box(0, 255, image, np.uint8)]))
        assert demo.kind_of(space, spaces.Discrete(2)) == kind


def test_an_env_that_knows_no_render_mode_is_made():
    gymnasium.register("Plain-v0", entry_point=lambda: Counter(3))
    for render in (False, True):
        assert demo.make_env("Plain-v0", render).render_mode is None


@pytest.mark.parametrize("env_id, mode", {
    "CartPole-v1": "rgb_array", "envs:drawn": "rgb_array", "Written-v0": "ansi", "envs:counted": None,
}.items())  # fmt: skip
def test_an_env_is_made_to_draw_itself_as_it_can(env_id, mode):
    if "Written-v0" not in gymnasium.registry:
        gymnasium.register("Written-v0", entry_point=Written)
    env = demo.make_env(env_id, render=True)
    env.reset()
    assert env.render_mode == mode
    assert mode is None or np.ndim(env.render()) == {"rgb_array": 3, "ansi": 0}[mode]


def test_a_recording_does_not_take_all_memory(tmp_path, monkeypatch, capsys):
    with trainer_of("CartPole-v1") as trainer:
        demo.save(trainer, tmp_path / "checkpoint.pt")
    large = type("Large", (np.ndarray,), {"nbytes": 2**28})
    with_large_arrays = types.SimpleNamespace(**vars(np) | {"array": lambda values: np.array(values).view(large)})
    monkeypatch.setattr(demo, "np", with_large_arrays)
    ways = {"mode": "eval", "resume": str(tmp_path / "checkpoint.pt"), "eval_episodes": 1}
    demo.evaluate(dataclasses.replace(trainer.args, **ways))
    assert "Recorded" in capsys.readouterr().out
    assert cv2.VideoCapture(str(tmp_path / "eval.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) in (8, 9)


def test_steps_of_an_agent_that_is_told_dead_again_and_again_are_no_episodes():
    with trainer_of("envs:Repeater", num_envs=1) as trainer:
        while trainer.num_episodes < 6:
            trainer.act()
        assert list(trainer.returns) == [11, 66] * 3 and trainer.episode["l"] == 3


def test_bfloat16_is_for_large_networks_and_reads_the_weights_as_they_are():
    """What autocast makes of the weights is kept for a whole rollout, but not beyond an update."""
    with trainer_of("CartPole-v1") as trainer:
        assert not trainer.policy.is_bf16
    game = {"env_id": "BreakoutNoFrameskip-v4", "num_envs": 2, "update_epochs": 1, "learning_rate": 0.01}
    with trainer_of(**game, precision="bf16") as trainer:
        for _ in range(2):
            trainer.collect()
            experience, before = trainer.experience, [weights.clone() for weights in trainer.policy.parameters()]
            torch.clear_autocast_cache()
            steps = experience.observations[:, None], experience.states, experience.starts[:, None]
            with torch.no_grad():
                _, logprobs, _, values, _ = trainer.policy(*steps, experience.actions[:, None])
            for recomputed, sampled in ((logprobs, experience.logprobs), (values, experience.values)):
                torch.testing.assert_close(recomputed[:-1, 0], sampled[:-1], rtol=0.02, atol=0.02)
            trainer.update()
            for new, old in zip(trainer.policy.parameters(), before):
                assert (new - old).abs().max() > 0.001


@pytest.mark.parametrize("name", ["counted", "cut_short", "OddInfos", "EpisodeStatus"])
def test_episodes_are_counted_once_whatever_infos_say(name):
    with trainer_of(f"envs:{name}", num_envs=2) as trainer:
        while trainer.num_episodes < 4:
            trainer.act()
    assert trainer.episode["l"] == 3 and len(trainer.returns) == trainer.num_episodes
    assert name != "OddInfos" or trainer.episode["0"] == 3


# -------------------------------------------------------------------------------------- updates, checkpoints, logging


def updated(updates, **arguments):
    with trainer_of("CartPole-v1", **arguments) as trainer:
        for _ in range(updates):
            trainer.collect()
            trainer.update()
        return trainer.policy.state_dict(), trainer.losses, list(trainer.returns)


def flat_weights(network):
    return torch.cat([weights.detach().flatten() for weights in network.parameters()])


def beside_vanilla_ppo_atari(seed, precision="fp32"):
    """Learn twice on the real game, and from the same steps by PPO written out plainly, in float32, with that network.

    Returns how far apart the weights come to be, and the cosine between their ways there.
    """
    sizes, game = {"num_envs": 4, "num_steps": 64}, {"env_id": "BreakoutNoFrameskip-v4", "hidden_size": 512}
    with trainer_of(**sizes, **game, total_timesteps=10 * 256, seed=seed, precision=precision) as trainer:
        agent = vanilla_ppo_atari.Agent(trainer.envs)
        for own, other in zip(trainer.policy.parameters(), agent.parameters(), strict=True):
            torch.testing.assert_close(own.norm(), other.norm(), rtol=1e-4, atol=0)  # orthogonal, of one gain
            other.data.copy_(own)
        first = flat_weights(agent)
        optimizer, experience = torch.optim.Adam(agent.parameters(), lr=2.5e-4, eps=1e-5), trainer.experience
        for update in range(2):
            trainer.collect()
            observations, actions = experience.observations[:-1].clone(), experience.actions[:-1, 0].clone()
            rewards, dones = [torch.as_tensor(part[:-1]) for part in (experience.rewards, experience.ended)]
            rewards = rewards.view(4, 64)
            assert rewards.any() and dones.any()
            with torch.no_grad():
                _, logprobs, _, values = agent.get_action_and_value(observations, actions)
                values, next_value = values.view(4, 64), agent.get_value(trainer.observations).view(-1)
            advantages, last, lives_on = torch.zeros(4, 64), 0.0, 1.0 - dones.view(4, 64).float()
            for step in reversed(range(64)):
                delta = rewards[:, step] + 0.99 * next_value * lives_on[:, step] - values[:, step]
                last = delta + 0.99 * 0.95 * lives_on[:, step] * last
                advantages[:, step], next_value = last, values[:, step]
            returns, advantages, values = (advantages + values).view(-1), advantages.view(-1), values.view(-1)

            generator = torch.get_rng_state()
            trainer.update()
            torch.set_rng_state(generator)
            torch.zeros(4, 1, 4).exponential_()  # as for the value of the next batch
            optimizer.param_groups[0]["lr"] = 2.5e-4 * (1 - update / 10)
            for chosen in [part for _ in range(4) for part in torch.randperm(256).tensor_split(4)]:
                _, new, entropy, value = agent.get_action_and_value(observations[chosen], actions[chosen])
                before = logprobs[chosen], advantages[chosen], value.view(-1), values[chosen], returns[chosen]
                policy_loss, value_loss = ppo_losses(new, *before)
                optimizer.zero_grad()
                (policy_loss - 0.01 * entropy.mean() + 0.5 * value_loss).backward()
                torch.nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
        own, other = flat_weights(trainer.policy) - first, flat_weights(agent) - first
        return (own - other).abs().max().item(), torch.cosine_similarity(own, other, dim=0).item()


def test_an_update_is_that_of_vanilla_ppo_atari():
    """From the same weights and steps, to rounding; where one of two figures is clipped in the other's place, rounding
    is enough to take another turn, which some seeds do on some processors."""
    distances = []
    while not distances or (distances[-1] > 1e-5 and len(distances) < 3):
        distances.append(beside_vanilla_ppo_atari(seed=3 + len(distances))[0])
    assert distances[-1] <= 1e-5 and max(distances) < 1e-3, distances


@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("clip_vloss", [True, False])
def test_losses_are_as_flags_say(norm_adv, clip_vloss):
    """Of a minibatch, once the policy is another than the one that acted."""
    flags = {"norm_adv": norm_adv, "clip_vloss": clip_vloss, "clip_coef": 0.01, "learning_rate": 0.01}
    with trainer_of("CartPole-v1", num_steps=32, **flags) as trainer:
        for _ in range(2):
            trainer.collect()
            trainer.update()
        trainer.collect()
        index, experience = trainer.prepare().view(-1, 1)[:64], trainer.experience
        for _ in range(20):
            trainer.learn(index)
        logprobs, values, advantages, returns = [
            part[index] for part in (experience.logprobs, experience.values, experience.advantages, experience.returns)
        ]
        with torch.no_grad():
            steps = experience.observations[index], experience.states[index[:, 0]], experience.starts[index]
            _, new, entropy, value, _ = trainer.policy(*steps, experience.actions[index])
        for change in ((new - logprobs).exp() - 1, value - values):
            assert (change > 0.01).any() and (change < -0.01).any()  # so that clipping makes a difference
        losses = ppo_losses(new, logprobs, advantages, value, values, returns, 0.01, norm_adv, clip_vloss)
        ratio, far = (new - logprobs).exp(), ((new - logprobs).exp() - 1).abs() > 0.01
        divergences = (logprobs - new).mean(), (ratio - 1 + logprobs - new).mean(), far.float().mean()
        expected = torch.stack([*losses, entropy.mean(), *divergences])
        torch.testing.assert_close(trainer.learn(index)[:6], expected)


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_the_learning_rate_is_lowered_only_if_asked_for(anneal_lr):
    with trainer_of("CartPole-v1", total_timesteps=4 * 32, learning_rate=0.01, anneal_lr=anneal_lr) as trainer:
        for left in (1.0, 0.75):
            trainer.collect()
            trainer.update()
            assert float(trainer.rate) == pytest.approx(0.01 * (left if anneal_lr else 1.0))


def test_explained_variance_is_the_part_of_returns_that_values_tell():
    with trainer_of("CartPole-v1", num_steps=32) as trainer:
        for _ in range(3):
            trainer.collect()
            trainer.update()
        returns, values = trainer.experience.returns[:-1], trainer.experience.values[:-1]
    assert trainer.losses["explained_variance"] == pytest.approx(float(1 - (returns - values).var() / returns.var()))


def test_bfloat16_goes_the_way_of_float32():
    """Of a network's first steps, which is where Adam makes most of rounding: 0.96 and 0.97 were seen."""
    assert beside_vanilla_ppo_atari(3, precision="bf16")[1] > 0.9


@pytest.mark.parametrize("env_id, use_lstm", [("Pendulum-v1", False), ("envs:FloatTeam", True)])
def test_a_compiled_update_is_the_same(env_id, use_lstm, monkeypatch):
    """Compiled by torch's tracer alone, which takes seconds and no compiler."""
    original, weights, counts = torch.compile, [], torch._dynamo.utils.counters["stats"]
    monkeypatch.setattr(torch, "compile", lambda function: original(function, backend="aot_eager"))
    for is_compiled in (False, True):
        before = counts["unique_graphs"]
        arguments = {"num_steps": 16, "use_lstm": use_lstm, "bptt_horizon": 2, "num_minibatches": 3}
        with trainer_of(env_id, compile=is_compiled, **arguments) as trainer:
            for _ in range(2):
                trainer.collect()
                trainer.update()
            weights.append(flat_weights(trainer.policy))
        assert (counts["unique_graphs"] > before) == is_compiled
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_a_rollout_is_what_vanilla_ppo_atari_would_play():
    """On the real game, with the same actions, over two updates: frames, rewards, ends, scores, log-probabilities."""
    envs = gymnasium.vector.SyncVectorEnv(
        [vanilla_ppo_atari.make_env("BreakoutNoFrameskip-v4", index, False, "") for index in range(4)],
        autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP,
    )
    game = {"env_id": "BreakoutNoFrameskip-v4", "num_steps": 96, "vec": "multiprocessing", "seed": 3}
    with trainer_of(**game) as trainer, contextlib.closing(envs):
        (observations, _), scores, experience = envs.reset(seed=3), [], trainer.experience
        for _ in range(2):
            trainer.collect()
            for at in np.arange(4 * 96).reshape(4, 96).T:  # where the steps of the same time lie
                assert np.array_equal(experience.observations[at], observations)
                rows, nothing = experience.observations[at][:, None], torch.zeros(4, 0)
                actions, starts = experience.actions[at], torch.zeros(4, 1, dtype=torch.bool)
                _, logprobs, _, values, _ = trainer.policy(rows, nothing, starts, actions[:, None])
                torch.testing.assert_close(logprobs[:, 0], experience.logprobs[at], rtol=0, atol=1e-5)
                torch.testing.assert_close(values[:, 0], experience.values[at], rtol=0, atol=1e-5)
                observations, rewards, terminations, _, infos = envs.step(actions[:, 0].numpy())
                assert np.array_equal(experience.rewards[at], rewards)
                assert np.array_equal(experience.terminated[at], terminations)
                told = infos.get("final_info", {}).get("episode", {"r": (), "_r": ()})
                scores += [float(score) for score, is_told in zip(told["r"], told["_r"]) if is_told]
            trainer.update()
        assert scores == list(trainer.returns) and any(scores)


def test_one_seed_gives_one_result_bit_for_bit():
    weights, losses, returns = updated(3, vec="multiprocessing", num_steps=32)
    again, same_losses, same_returns = updated(3, num_steps=32)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert losses == same_losses and returns == same_returns and returns
    assert updated(3, num_steps=32, seed=2)[1] != losses


def test_environments_that_draw_from_global_generators_are_seeded():
    seen = []
    for seed in (1, 1, 2):
        with trainer_of("envs:GlobalRandom", seed=seed) as trainer:
            seen.append(trainer.observations.clone())
    assert torch.equal(*seen[:2]) and not torch.equal(*seen[1:])


def test_a_resumed_run_goes_on_with_its_schedule_counts_and_random_numbers(tmp_path):
    with trainer_of("CartPole-v1", total_timesteps=10 * 32) as trainer:
        for _ in range(4):
            trainer.collect()
            trainer.update()
        demo.save(trainer, tmp_path / "checkpoint.pt")
        drawn, rates = torch.rand(3), []
        for _ in range(2):
            trainer.collect()
            trainer.update()
            rates.append(float(trainer.optimizer.param_groups[0]["lr"]))
    contents = demo.load(str(tmp_path / "checkpoint.pt"))
    with trainer_of("CartPole-v1", seed=7) as other:
        demo.restore(other, contents)  # but a flag that is given holds
        assert not torch.equal(torch.rand(3), drawn)
    with trainer_of("CartPole-v1", total_timesteps=10 * 32) as resumed:
        demo.restore(resumed, contents)
        assert (resumed.iteration, resumed.global_step) == (4, 4 * 32)
        assert torch.equal(torch.rand(3), drawn)
        moments = resumed.optimizer.state_dict()["state"][0]
        assert moments["step"] == 4 * 4 * 4 and moments["exp_avg"].abs().sum() > 0
        resumed.start()
        for rate in rates:
            resumed.collect()
            resumed.update()
            assert resumed.optimizer.param_groups[0]["lr"] == rate


def test_a_resumed_run_has_the_weights_and_plays_on_rather_than_anew(tmp_path):
    with trainer_of("CartPole-v1") as trainer:
        first = trainer.observations.clone()
        for _ in range(4):
            trainer.collect()
            trainer.update()
        demo.save(trainer, tmp_path / "checkpoint.pt")
    with trainer_of("CartPole-v1") as resumed:
        demo.restore(resumed, demo.load(str(tmp_path / "checkpoint.pt")))
        assert torch.equal(flat_weights(resumed.policy), flat_weights(trainer.policy))
        assert resumed.returns == trainer.returns and resumed.num_episodes == trainer.num_episodes > 0
        resumed.start()
        assert not torch.equal(resumed.observations, first)
    with trainer_of("CartPole-v1", seed=7) as other:
        generator = torch.get_rng_state()
        demo.restore(other, demo.load(str(tmp_path / "checkpoint.pt")))
        assert not torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("num_envs, num_steps", [(2, 8), (8, 8), (4, 16)])
def test_a_run_resumed_with_updates_of_another_size_ends_at_the_same_step(tmp_path, num_envs, num_steps):
    with trainer_of("CartPole-v1", total_timesteps=10 * 32) as trainer:
        for _ in range(4):
            trainer.collect()
            trainer.update()
        demo.save(trainer, tmp_path / "checkpoint.pt")
    sizes = {"num_envs": num_envs, "num_steps": num_steps, "total_timesteps": 10 * 32}
    with trainer_of("CartPole-v1", **sizes) as resumed:
        demo.restore(resumed, demo.load(str(tmp_path / "checkpoint.pt")))
        resumed.start()
        while not resumed.is_over():
            resumed.collect()
            resumed.update()
        assert resumed.global_step == 10 * 32


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run from the command line, with its checkpoint."""
    flags = ("--env-id", "MiniHack-Room-5x5-v0", "--num-envs", "4", "--num-steps", "32", "--total-timesteps", "512")
    return run(
        "demo.py", *flags, "--hidden-size", "16", "--num-workers", "2", "--checkpoint-interval", "1", "--no-cuda"
    )


def test_a_run_prints_logs_and_saves(finished):
    assert finished.returncode == 0 and not finished.lines("\033"), finished.stderr
    (chosen,) = finished.lines("MiniHack-Room-5x5-v0 (nethack): ")
    assert " update_epochs=4 " in chosen and "num_envs" not in chosen  # a flag was given
    assert re.match(r"global_step=512 SPS=\d+ minutes_left=0 episodic_return=", finished.lines("global_step=")[-1])
    tags = set(finished.events().Tags()["scalars"])
    assert {"charts/SPS", "charts/learning_rate", "losses/value_loss", "losses/explained_variance"} <= tags
    (path,) = finished.directory.glob("runs/*/checkpoint.pt")
    assert torch.load(path, weights_only=True)["iteration"] == 4
    assert not list(finished.directory.glob("runs/*/*.part"))


def test_what_nobody_knows_yet_is_not_logged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--env-id CartPole-v1 --num-envs 2 --num-steps 4 --total-timesteps 8 --quiet --vec serial --no-cuda"
    demo.train(prepared(flags))  # no pole falls within four steps
    events = Run("", "", 0, tmp_path).events()
    logged = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    assert logged["charts/episodes"] == 0 and "charts/episodic_return" not in logged
    assert np.isfinite(list(logged.values())).all(), logged


def test_nethack_is_played_and_recorded_as_text(finished):
    (path,) = finished.directory.glob("runs/*/checkpoint.pt")
    played = run("demo.py", "--mode", "eval", "--resume", str(path), "--eval-episodes", "2")
    assert re.search(r"^2 episodes: return -?[\d.]+ \+- [\d.]+$", played.stdout, re.MULTILINE), played.stderr
    header, *events = [json.loads(line) for line in path.with_name("eval.cast").read_text().splitlines()]
    assert header == {"version": 2, "width": 80, "height": 24}
    assert [event[0] for event in events] == [at / 5 for at in range(len(events))]
    screens = [re.sub(r"\033\[[\d;]*[A-Za-z]", "", text) for _, kind, text in events if kind == "o"]
    assert len(screens) == len(events) > 1
    assert all("@" in screen and "HP:" in screen and screen.count("\r\n") == 23 for screen in screens)


def test_atari_is_played_and_recorded_as_video(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = demo.Args(num_envs=2, num_steps=8, total_timesteps=16, vec="serial", quiet=True, cuda=False)
    demo.prepare(args)
    demo.train(args)
    (path,) = tmp_path.glob("runs/*/checkpoint.pt")
    demo.evaluate(dataclasses.replace(args, mode="eval", resume=str(path), eval_episodes=1))
    assert "1 episodes: return" in capsys.readouterr().out
    video = cv2.VideoCapture(str(path.with_name("eval.mp4")))
    assert video.read()[1].shape == (210, 160, 3) and video.get(cv2.CAP_PROP_FRAME_COUNT) > 100


@pytest.mark.parametrize("name, printed", {
    "MuteTeam": "cannot draw itself",  # its function takes no render_mode
    "DrawnTeam": "Recorded",
    "HumanTeam": "cannot draw itself",  # a window for people gives no pictures
    "BlindTeam": "OSError('no display')",
}.items())  # fmt: skip
def test_a_team_is_played_and_recorded_until_all_its_agents_have_ended(name, printed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{name}_module.py").write_text(f"from tests.envs import {name} as parallel_env")
    flags = "--num-steps 16 --num-envs 2 --total-timesteps 64 --hidden-size 8 --quiet --vec serial --no-cuda"
    args = prepared(f"--env-id pettingzoo:{name}_module {flags}")
    demo.train(args)
    (path,) = tmp_path.glob("runs/*/checkpoint.pt")
    demo.evaluate(dataclasses.replace(args, mode="eval", resume=str(path), eval_episodes=2))
    said = capsys.readouterr().out
    assert "4 episodes: return" in said and printed in said
    assert [one.name for one in path.parent.glob("eval.*")] == ["eval.mp4"] * (name == "DrawnTeam")
    if name == "DrawnTeam":
        video = cv2.VideoCapture(str(path.with_name("eval.mp4")))
        seen = [frame.mean() for good, frame in iter(video.read, (False, None)) if good]
        assert np.allclose(seen[:8], 20 * np.arange(8), atol=3) and len(seen) in (8, 9)


@pytest.mark.parametrize("vec", ["serial", "multiprocessing"])
def test_the_reward_of_dying_counts_without_a_last_observation_too(vec):
    with trainer_of("tests.envs:Silent", vec=vec, num_envs=2) as trainer:
        assert trainer.collect()
        fields = [getattr(trainer.experience, name) for name in ("valid", "terminated", "starts", "rewards")]
        valid, terminated, starts, rewards = [np.asarray(field)[:-1].reshape(2, 3, 8).astype(int) for field in fields]
    # Episodes of three steps and of two, in turn; a row an agent
    played = [[1, 0, 0, 1, 0, 1, 0, 0], [1, 1, 0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 1, 1, 1]]
    died = [[1, 0, 0, 1, 0, 1, 0, 0], [0, 1, 0, 0, 1, 0, 1, 0], [0, 0, 1, 1, 0, 0, 0, 1]]
    began = [[1, 0, 0, 1, 0, 1, 0, 0]] * 3
    times = np.array([1, 2, 3, 1, 2, 1, 2, 3])
    for env in range(2):
        assert valid[env].tolist() == played and (terminated * valid)[env].tolist() == died
        assert (starts * valid)[env].tolist() == [[one * two for one, two in zip(*rows)] for rows in zip(began, played)]
        assert (rewards * valid)[env].tolist() == [((10 * row + times) * played[row - 1]).tolist() for row in (1, 2, 3)]


def test_an_action_that_led_nowhere_to_be_seen_is_not_learned_from():
    with trainer_of("tests.envs:Pausing", num_envs=1, num_steps=9) as trainer:
        assert trainer.collect()
        valid = trainer.experience.valid[:-1].reshape(3, 9).astype(int)
    assert valid.tolist() == [[1] * 9, [0, 0, 1] * 3, [1] * 9]  # the one before the pause, and what is in it


@pytest.mark.parametrize("vec", ["serial", "multiprocessing"])
def test_a_team_that_is_cut_off_unseen_is_not_learned_from(vec):
    """Nor do infos matter that nobody reads, which gymnasium could not batch, nor a pipe take."""
    with trainer_of("tests.envs:Halting", vec=vec, num_envs=2) as trainer:
        assert trainer.collect()
        index, experience = trainer.prepare(), trainer.experience
        fields = experience.trainable[index], experience.next_values[index] - experience.values[index].roll(-1, 1)
        trainable, jumps = [field.reshape(2, 3, 8).numpy() for field in fields]
    assert trainable[0].astype(int).tolist() == [[1, 0, 0] * 2 + [1, 0], [1, 0, 1] * 2 + [1, 0], [1] * 8]
    ended = np.array([False, True, True] * 2 + [False, True])
    assert (jumps[:, 2, :-1] != 0).tolist() == [ended[:-1].tolist()] * 2  # whose last observations were seen


@pytest.mark.parametrize("low, high, center, radius", [
    (-2, 4, 1, 3), (3, np.inf, 4, 1), (-np.inf, 7, 6, 1), (-np.inf, np.inf, 0, 1), (-3.4e38, 3.4e38, 0, 1),
])  # fmt: skip
def test_continuous_actions_begin_where_bounds_allow(low, high, center, radius):
    space = spaces.Box(np.float32(low), np.float32(high), (2,))
    layout, args = puffer_core.Layout(spaces.Box(-1, 1, (3,))), demo.Args(hidden_size=8)
    policy = demo.Policy(layout, space, args)
    for action in (-1.0, 0.0, 1.0):
        assert policy.for_envs(torch.full((1, 2), action)).tolist() == [[center + radius * action] * 2]


@pytest.mark.parametrize("env_id, episodes", [("envs:FloatTeam", 40), ("pettingzoo:mpe2.simple_v3", 3)])
def test_as_many_episodes_are_played_as_asked_for(env_id, episodes, tmp_path, capsys):
    """Of every agent: also if that makes more than the hundred whose mean is logged, and if the team is one agent."""
    with trainer_of(env_id) as trainer:
        demo.save(trainer, tmp_path / "checkpoint.pt")
        resume = str(tmp_path / "checkpoint.pt")
        demo.evaluate(dataclasses.replace(trainer.args, mode="train", resume=resume, eval_episodes=episodes))
        num_agents = trainer.envs.num_agents // trainer.envs.num_envs
    played = int(re.match(r"(\d+) episodes: return ", capsys.readouterr().out)[1])
    assert 0 <= played - episodes * num_agents < num_agents  # some may end in the same step


def test_it_is_the_checkpoints_policy_that_is_played(tmp_path, capsys):
    with trainer_of("envs:Counter") as trainer:
        trainer.policy.actor.bias.data[4] = 1e3  # always action 4, which earns half a point more a step
        demo.save(trainer, tmp_path / "checkpoint.pt")
    demo.evaluate(dataclasses.replace(trainer.args, resume=str(tmp_path / "checkpoint.pt"), eval_episodes=3))
    assert "3 episodes: return 7.5 +- 0\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["FloatTeam", "Unpaid"])
def test_returns_of_agents_are_summed_whatever_the_absent_earn(name):
    with trainer_of(f"envs:{name}", num_envs=1) as trainer:
        while trainer.num_episodes < 8:
            trainer.act()
    assert list(trainer.returns)[:4] == [21.0, 50.0, 24.0, 67.0]


def test_an_agent_that_is_away_at_its_last_step_takes_nothing_into_the_next_episode():
    with trainer_of("envs:Away", num_envs=1) as trainer:
        while trainer.num_episodes < 6:
            trainer.act()
    assert list(trainer.returns)[:6] == [23.0, 21.0] * 3  # of the second what it earned for its actions


def test_the_step_of_dying_counts_without_a_last_observation_too():
    with trainer_of("envs:Silent", num_envs=1) as trainer:
        lengths, count_episodes = [], trainer.count_episodes

        def count_and_note(batch, acted):
            sums, count = trainer.team_sums.copy(), trainer.num_episodes
            count_episodes(batch, acted)
            if trainer.num_episodes > count:
                ended = acted & (batch.terminations | batch.truncations)
                lengths.extend((sums[1] + 1)[ended].tolist())
                assert trainer.episode["l"] == lengths[-1]

        trainer.count_episodes = count_and_note
        while trainer.num_episodes < 6:
            trainer.act()
    assert lengths[:6] == [1, 2, 3, 1, 1, 2]  # as its scripts say


def test_an_update_learns_from_no_empty_minibatch():
    ways = {"vec": "multiprocessing", "num_workers": 2, "env_batch_size": 1, "num_minibatches": 2}
    memory = {"use_lstm": True, "num_steps": 4, "bptt_horizon": 4}
    with trainer_of("envs:OneSlow", num_envs=2, **ways, **memory) as trainer:
        sizes, learn = [], trainer.learn
        trainer.learn = lambda index: (sizes.append(len(index)), learn(index))[1]
        for _ in range(4):
            trainer.collect()
            trainer.update()
            assert trainer.losses["entropy"] > 0.8 * np.log(2)  # the mean of as many as there were
    assert min(sizes) == 1 and len(sizes) < 4 * 2 * trainer.args.update_epochs


@pytest.mark.parametrize("num_steps", [4, 1])
def test_minibatches_of_one_sequence_or_none_leave_the_weights_finite(num_steps):
    """Where one environment is slow, an update may have a single segment of the other: less than it has minibatches."""
    ways = {"vec": "multiprocessing", "num_workers": 2, "env_batch_size": 1, "num_minibatches": 2}
    memory = {"use_lstm": True, "num_steps": num_steps, "bptt_horizon": num_steps}
    with trainer_of("envs:OneSlow", num_envs=2, **ways, **memory) as trainer:
        before = {name: weight.clone() for name, weight in trainer.policy.state_dict().items()}
        for _ in range(4):
            trainer.collect()
            trainer.update()
        after = trainer.policy.state_dict()
    assert all(weight.isfinite().all() for weight in after.values())
    assert not all(torch.equal(weight, after[name]) for name, weight in before.items())


WRONG = {
    "--num-envs 0": "--num-envs 0: expected at least 1",
    "--vec serial --env-batch-size 4": "--env-batch-size 4: expected --vec multiprocessing beside it",
    "--use-lstm --num-steps 40": "--bptt-horizon 16: expected to divide --num-steps",
    "--use-lstm --bptt-horizon 0": "--bptt-horizon 0: expected at least 1",
    "--seed -1": "--seed -1: expected at least 0",
    "--learning-rate -0.1": "--learning-rate -0.1: expected at least 0",
    "--clip-coef -0.1": "--clip-coef -0.1: expected at least 0",
    "--max-grad-norm -1": "--max-grad-norm -1.0: expected at least 0",
    "--ent-coef nan": "--ent-coef nan: expected at least 0",
    "--gamma 2": "--gamma 2.0: expected at most 1",
    "--gae-lambda 95": "--gae-lambda 95.0: expected at most 1",
    "--mode sweep --learning-rate 0.1 --ent-coef 0 --gae-lambda 1 --gamma 1 --clip-coef 0.1 --update-epochs 1": (
        "--mode sweep: expected no --resume nor flags for all of ['learning_rate', 'ent_coef'"
    ),
    "--num-envs 1 --num-steps 3": "--num-minibatches 4: expected at most 3",
    "--use-lstm --num-envs 1 --num-steps 32": "--num-minibatches 4: expected at most 2",
    "--total-timesteps 100": "--total-timesteps 100: expected at least one update, 1024",
    "--total-timesteps 3000 --env-id envs:FloatTeam": "--total-timesteps 3000: expected at least one update, 3072",
    "--mode eval": "--mode eval: expected --resume CHECKPOINT beside it",
    "--env-id CartPoll-v1": "--env-id CartPoll-v1: NameNotFound: Environment `CartPoll` doesn't exist",
    "--env-id nothing:here": "--env-id nothing:here: ModuleNotFoundError: No module named 'nothing'",
    "--env-id tests.envs:needy": "--env-id tests.envs:needy: KeyError: 'size'",
}


@pytest.mark.parametrize("flags", WRONG)
def test_a_wrong_argument_is_told_in_a_line(flags):
    args = tyro.cli(demo.Args, args=["--env-id", "CartPole-v1", *flags.split()])
    with pytest.raises(SystemExit) as end:
        demo.prepare(args)
    assert str(end.value).startswith(WRONG[flags]) and "\n" not in str(end.value)


@pytest.mark.parametrize(
    "flags, expected",
    {
        "--num-envs 6 --num-workers 4": "num_workers: expected a divisor of num_envs=6, got 4",
        "--num-envs 2 --num-workers 4 --env-batch-size 1": "num_workers: expected a divisor of num_envs=2, got 4",
        "--num-workers -1": "num_workers: expected a divisor of num_envs=8, got -1",
        "--num-workers 4 --env-batch-size 3": "batch_size: expected 2 * n, with zero_copy 8 / n, got 3",
        "--num-workers 8 --env-batch-size 3": "batch_size: expected 1 * n, with zero_copy 8 / n, got 3",
        "--num-workers 8 --env-batch-size -1": "batch_size: expected 1 * n, with zero_copy 8 / n, got -1",
    }.items(),
)
def test_a_wrong_pool_is_told_in_a_line_before_any_process_starts(flags, expected):
    args = tyro.cli(demo.Args, args=["--env-id", "CartPole-v1", "--quiet", "--no-cuda", *flags.split()])
    demo.prepare(args)
    with pytest.raises(SystemExit) as end:
        demo.Trainer(args)
    assert str(end.value) == f"environments, --num-workers or --env-batch-size: {expected}"
    assert not multiprocessing.active_children()


def test_a_checkpoint_that_cannot_be_used_is_told_in_a_line(tmp_path):
    with trainer_of("CartPole-v1") as trainer:
        demo.save(trainer, tmp_path / "good.pt")
    whole = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    for name in ("cut.pt", "other.pt", "missing.pt"):
        with pytest.raises(SystemExit, match=r"--resume .*: expected a checkpoint of demo.py, got ") as end:
            demo.load(str(tmp_path / name))
        assert "\n" not in str(end.value)
    contents = demo.load(str(tmp_path / "good.pt"))
    for env_id, arguments in {"Acrobot-v1": {}, "CartPole-v1": {"hidden_size": 8}}.items():
        with trainer_of(env_id, **arguments) as trainer:
            with pytest.raises(SystemExit, match="expected one for .*, not Box") as end:
                demo.restore(trainer, contents)
            assert "\n" not in str(end.value)


def test_a_checkpoint_runs_no_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"args": {}, "learned": Harmful()}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="expected a checkpoint"):
        demo.load(str(tmp_path / "checkpoint.pt"))
    assert not (tmp_path / "harm").exists()


def test_a_run_that_is_over_is_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--env-id CartPole-v1 --vec serial --quiet --no-cuda --num-steps 16 --total-timesteps 256 --hidden-size 8"
    demo.train(prepared(flags))
    (path,) = tmp_path.glob("runs/*/checkpoint.pt")
    contents = demo.load(str(path))
    assert contents["args"].precision == "auto"  # what this machine made of it holds for no other
    with pytest.raises(SystemExit, match="checkpoint.pt: expected one short of --total-timesteps"):
        demo.train(dataclasses.replace(contents["args"], resume=str(path)))
    reached = dataclasses.replace(contents["args"], resume=str(path), total_timesteps=512, target_return=0.0)
    with pytest.raises(SystemExit, match="checkpoint.pt: expected one short of --total-timesteps"):
        contents["returns"] = [9.0] * 100
        torch.save(contents | {"args": vars(contents["args"])}, path)
        demo.train(reached)
    demo.train(dataclasses.replace(reached, target_return=np.inf))
    assert [demo.load(str(path))["learned"] for path in sorted(tmp_path.glob("runs/*/checkpoint.pt"))] == [256, 512]


@pytest.mark.parametrize("env_id, wrapper", [
    ("ale_py:ALE/Pong-v5", "AtariWrapper"), ("minihack:MiniHack-Room-5x5-v0", "NetHackWrapper"),
    ("nle:NetHackScore-v0", "NetHackWrapper"),
])  # fmt: skip
def test_ids_that_name_their_module_get_the_same_wrappers(env_id, wrapper):
    env = demo.make_env(env_id)
    assert f"<{wrapper}<" in str(env)
    env.close()


def prepared(flags):
    args = tyro.cli(demo.Args, args=flags.split())
    demo.prepare(args)
    return args


def started(directory, *flags):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "demo.py"), "--env-id", "CartPole-v1", "--no-cuda", *flags],
        cwd=directory,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path):
    """Killed as soon as a second checkpoint is being written beside the first."""
    flags = ("--num-steps", "1", "--num-minibatches", "1", "--update-epochs", "1", "--checkpoint-interval", "1")
    process = started(tmp_path, *flags, "--hidden-size", "1024", "--vec", "serial", "--num-envs", "1")
    try:
        (path,) = wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")))
        before = demo.load(str(path))["iteration"]
        for _ in range(200):
            wait_for(lambda: path.with_suffix(".part").exists())
            os.kill(process.pid, signal.SIGSTOP)  # to look at it in peace
            wait_for(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
            if path.with_suffix(".part").exists():
                break
            os.kill(process.pid, signal.SIGCONT)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        part = path.with_suffix(".part")
        assert part.exists()  # it was in the middle of writing
        assert demo.load(str(path))["iteration"] >= before
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("interval", [0, 1])
def test_a_reward_that_is_no_number_ends_a_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, interval):
    monkeypatch.chdir(tmp_path)
    flags = "--env-id tests.envs:Failing --vec serial --quiet --no-cuda --num-envs 2 --num-steps 32 --hidden-size 8"
    with pytest.raises(FloatingPointError, match="gradients are not finite: look at observations, rewards"):
        demo.train(prepared(f"{flags} --total-timesteps 6400 --checkpoint-interval {interval}"))
    found = [demo.load(str(path)) for path in tmp_path.glob("runs/*/checkpoint.pt")]
    assert [contents["iteration"] for contents in found] == [300 // 32] * interval
    assert all(torch.isfinite(part).all() for contents in found for part in contents["policy"].values())


def test_whatever_ends_a_run_it_saves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("from tests.envs import Failing\nmake = lambda: Failing('raise')")
    monkeypatch.syspath_prepend(tmp_path)
    flags = "--env-id mine:make --vec serial --quiet --no-cuda --num-envs 2 --num-steps 32 --hidden-size 8"
    with pytest.raises(ZeroDivisionError, match="the environment fails"):
        demo.train(prepared(f"{flags} --total-timesteps 6400"))
    (path,) = tmp_path.glob("runs/*/checkpoint.pt")
    assert demo.load(str(path))["iteration"] == 300 // 32


def test_a_run_saves_when_nobody_reads_its_lines(tmp_path):
    """Ctrl-C under `| tee` ends tee too, so that printing fails."""
    process = started(tmp_path, "--num-steps", "16", "--total-timesteps", "128", "--vec", "serial")
    assert "CartPole-v1" in process.stdout.readline()  # what it chose, before it starts
    process.stdout.close()
    assert "BrokenPipeError" in process.stderr.read()
    assert process.wait() != 0
    (path,) = tmp_path.glob("runs/*/checkpoint.pt")
    assert demo.load(str(path))["learned"] == 128


OWN = """
import gymnasium, numpy

class Env(gymnasium.Wrapper):
    def step(self, action):  # an array as a reward, and an "episode" of its own, as users have them
        observation, reward, *ends, info = super().step(action)
        return observation, numpy.array([reward], numpy.float32), *ends, {"episode": {"r": -1.0, "l": 0}}

def make():
    return Env(gymnasium.make("CartPole-v1"))
"""


def test_an_environment_of_ones_own_is_found_where_one_works(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    flags = "--env-id mine:make --num-envs 2 --num-workers 2 --num-steps 64 --total-timesteps 256 --no-cuda"
    done = subprocess.run(
        [sys.executable, ROOT / "demo.py", *flags.split()], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert 8 < float(re.findall(r"episodic_return=(\S+)", done.stdout)[-1]) < 100


def test_a_run_that_goes_on_from_a_quiet_one_is_not_quiet(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    flags = "--env-id CartPole-v1 --no-cuda --num-steps 16 --num-envs 2 --vec serial --hidden-size 8 --quiet"
    demo.train(prepared(f"{flags} --total-timesteps 64"))
    assert capfd.readouterr().out == ""
    (path,) = tmp_path.glob("runs/*/checkpoint.pt")
    again = started(tmp_path, "--resume", str(path), "--total-timesteps", "128")
    lines = again.communicate()[0].splitlines()
    assert again.returncode == 0 and re.match("global_step=128 .* minutes_left=0 ", lines[-2])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_game_that_pygame_draws(number, tmp_path, monkeypatch):
    """Which it would not, as SDL takes signals for wishes to close a window; after Ctrl-C, what was played counts."""
    monkeypatch.chdir(tmp_path)
    flags = "--env-id CartPole-v1 --no-cuda --num-steps 16 --vec serial --hidden-size 8 --quiet --total-timesteps 128"
    demo.train(prepared(flags))
    (path,) = tmp_path.glob("runs/*/checkpoint.pt")
    playing = started(tmp_path, "--mode", "eval", "--resume", str(path), "--eval-episodes", "1000000")
    try:
        wait_for(lambda: "libSDL2" in Path(f"/proc/{playing.pid}/maps").read_text())
        time.sleep(2)  # until a few pictures are drawn
        playing.send_signal(number)
        stdout, _ = playing.communicate(timeout=20)
        assert playing.returncode == (0 if number == signal.SIGINT else -signal.SIGTERM)
        assert ("episodes: return" in stdout and "Recorded" in stdout) == (number == signal.SIGINT)
    finally:
        playing.kill()


def test_a_run_that_is_to_stop_does_not_play_its_rollout_to_the_end():
    with trainer_of("CartPole-v1", num_steps=10_000) as trainer:
        assert not trainer.is_over()
        trainer.stopping = True
        assert not trainer.collect() and trainer.global_step == 0 and trainer.is_over()


def test_ctrl_c_saves_and_leaves_no_process(tmp_path):
    process = started(tmp_path, "--num-steps", "32", "--num-workers", "2", "--checkpoint-interval", "0")
    try:
        assert any(line.startswith("global_step=") for line in process.stdout)
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
        wait_for(lambda: not running_in_group(process.pid), 5)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in stderr
    (path,) = tmp_path.glob("runs/*/checkpoint.pt")
    assert demo.load(str(path))["iteration"] > 0
    assert f"Saved {path.relative_to(tmp_path)}" in stdout


HANGING = """
import time
import puffer_core
from tests.envs import Counter
puffer_core.CLOSE_SECONDS = 2.0

class Hanging(Counter):
    def step(self, action):
        print("hangs", flush=True)
        time.sleep(60)
"""


def test_a_second_signal_does_not_wait_for_an_env_that_hangs(tmp_path):
    (tmp_path / "mine.py").write_text(HANGING)
    process = started(tmp_path, "--env-id", "mine:Hanging", "--num-workers", "1")
    try:
        assert "hangs\n" in iter(process.stdout.readline, "")
        for pause in (0.5, 8.0):  # workers get 2 s to close before they are killed
            process.send_signal(signal.SIGTERM)  # which is heeded as Ctrl-C is
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=pause)
            assert (process.poll() is None) == (pause < 1)
        wait_for(lambda: not running_in_group(process.pid), 5)
        assert len(list(tmp_path.glob("runs/*/checkpoint.pt"))) == 1
    finally:
        process.kill()


def test_the_dashboard_shows_where_a_run_stands(tmp_path):
    with trainer_of("CartPole-v1", num_steps=32, total_timesteps=1280) as trainer:
        dashboard = demo.Dashboard(trainer, tmp_path)
        for _ in range(3):
            trainer.collect()
            trainer.update()
            dashboard.log(is_last=False)
        trainer.losses["explained_variance"] = np.nan  # as it is where all returns are alike
        dashboard.log(is_last=True)
        console = Console(width=140, record=True, file=open(os.devnull, "w"))
        console.print(dashboard.render())
        text = console.export_text()
        dashboard.writer.close()
    step, loss = f"{trainer.global_step:,} of 1,280 steps", f"{trainer.losses['value_loss']:.4g}"
    for part in (
        "CartPole-v1",
        step,
        loss,
        "env wait",
        "inference",
        "update",
        "copies",
        "CPU",
        "GiB",
        "entropy",
        "minutes_left",
    ):
        assert part in text
    assert f"{np.mean(trainer.returns):.4g}" in text and set("▁█") <= set(text)


def test_the_dashboard_counts_from_the_first_step_and_takes_names_as_they_are(tmp_path):
    with trainer_of("tests.envs:Failing", num_envs=2, num_steps=64, total_timesteps=512) as trainer:  # slow to start
        dashboard = demo.Dashboard(trainer, tmp_path)
        for _ in range(2):
            trainer.collect()
            trainer.update()
            dashboard.log(is_last=False)
        console = Console(width=140, record=True, file=open(os.devnull, "w"))
        trainer.stopping = True
        console.print(dashboard.render())
        text = console.export_text()
        dashboard.writer.close()
    latest = {key: values[-1] for key, values in dashboard.history.items()}
    assert 50 < sum(value for (group, _), value in latest.items() if group == "time_percent") <= 100.5
    assert latest["charts", "episodic_return"] == latest["charts", "episodic_length"] == np.mean(trainer.returns)
    assert latest["losses", "grad_norm"] > 0
    assert "hits[/s]" in text and "512 steps, stops" in text


def test_a_terminal_that_cannot_draw_gets_lines(tmp_path, monkeypatch):
    with trainer_of("CartPole-v1") as trainer:
        for encoding in ("latin-1", "utf-8"):
            terminal = types.SimpleNamespace(isatty=lambda: True, encoding=encoding)
            monkeypatch.setattr(sys, "stdout", terminal)
            monkeypatch.setattr(demo.live, "Live", lambda **_: contextlib.nullcontext())
            trainer.args.quiet = False
            with demo.Dashboard(trainer, tmp_path) as dashboard:
                assert dashboard.is_live == (encoding == "utf-8")


# -------------------------------------------------------------------------------------------------- sweep and autotune


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_parameters_of_sweeps_are_flags(path):
    config = yaml.safe_load(path.read_text())
    assert config["program"] == "demo.py" and config["metric"]["name"] == "charts/episodic_return"
    fixed = [word for word in config["command"] if not word.startswith("${")]
    for pick in (0, -1):
        drawn = {}
        for name, rule in config["parameters"].items():
            drawn[name] = rule.get("values", [rule.get("value", rule.get("min")), rule.get("value", rule.get("max"))])[
                pick
            ]
        args = tyro.cli(demo.Args, args=[*fixed, *[f"--{name}={value}" for name, value in drawn.items()]])
        assert {name: getattr(args, name) for name in drawn} == drawn and args.track
        demo.prepare(args)


def test_a_sweep_that_was_killed_goes_on(tmp_path):
    flags = (
        "--gamma",
        "0.9",
        "--mode",
        "sweep",
        "--sweep-trials",
        "4",
        "--num-steps",
        "16",
        "--total-timesteps",
        "512",
        "--vec",
        "serial",
    )
    ended = re.compile(r"Trial \d+ (finished with|pruned)")  # as Optuna logs it
    process = started(tmp_path, *flags)
    first_two = itertools.islice(filter(ended.search, process.stderr), 2)
    assert len(list(first_two)) == 2
    process.kill()
    process.communicate()
    again = started(tmp_path, *flags)
    stdout, stderr = again.communicate(timeout=100)
    assert again.returncode == 0, stderr
    assert len(ended.findall(stderr)) == 2  # the other two
    best = next(line for line in stdout.splitlines() if line.startswith("Best of "))
    found = tyro.cli(demo.Args, args=best.partition(" with ")[2].split())
    assert 1e-4 <= found.learning_rate <= 1e-2 and found.gamma is None  # a flag is not searched over
    path = next(tmp_path.glob("runs/CartPole-v1__demo-0__*/checkpoint.pt"))
    assert demo.load(str(path))["args"].mode == "train"  # so that it can be gone on with
    picture = cv2.imread(str(next(tmp_path.glob("runs/sweep__*/history.png"))))
    assert picture.std() > 0


def test_a_sweep_trains_with_what_it_draws_and_goes_on_only_with_the_same_flags(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = "--mode sweep --env-id tests.envs:Counter --vec serial --num-envs 1 --num-steps 16 --total-timesteps 16"
    for more, count in (("--sweep-trials 1", 1), ("--sweep-trials 2", 2), ("--sweep-trials 1 --vf-coef 1", 1)):
        args = tyro.cli(demo.Args, args=[*flags.split(), "--hidden-size", "8", "--no-cuda", *more.split()])
        demo.sweep(args, demo.prepare(args))
        assert f"Best of {count} trials" in capsys.readouterr().out
    storage = f"sqlite:///{next(tmp_path.glob('runs/*/study.db'))}"
    name = next(one.study_name for one in optuna.get_all_study_summaries(storage) if "'vf_coef': 0.5" in one.study_name)
    trials = optuna.load_study(study_name=name, storage=storage).trials
    assert len(trials) == 2 and trials[0].params != trials[1].params
    trained = [demo.load(str(path)) for path in tmp_path.glob("runs/*__demo-*__*/checkpoint.pt")]
    drawn = [{name: getattr(one["args"], name) for name in demo.SEARCH} for one in trained]
    assert all(trial.params in drawn for trial in trials)
    logs = {name for name, distribution in trials[0].distributions.items() if distribution.log}
    assert logs == {"learning_rate", "ent_coef"}


@pytest.fixture
def one_core():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("needs a system that ties a process to cores")
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(usable)})
    yield
    os.sched_setaffinity(0, usable)


def out_of_order(env):
    if np.isnan(env.seen).any():
        raise ValueError("out of order")
    return env.seen


def test_a_sweep_in_which_no_episode_ends_has_no_best_trial(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--mode sweep --env-id CliffWalking-v1 --vec serial --num-envs 2 --num-steps 4 --total-timesteps 8 --quiet"
    args = tyro.cli(demo.Args, args=[*flags.split(), "--num-minibatches", "1", "--sweep-trials", "1", "--no-cuda"])
    with pytest.raises(SystemExit, match="--sweep-trials 1: expected one that does not fail but ends episodes"):
        demo.sweep(args, demo.prepare(args))


@pytest.mark.parametrize("failing, observe", [(1, Blind._observation), (2, Blind._observation), (1, out_of_order)])
def test_a_trial_that_fails_ends_no_sweep(failing, observe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Blind, "_observation", observe)
    monkeypatch.setattr(Blind, "made", 0)
    monkeypatch.setattr(Blind, "blind", 1 + failing)  # the first is made to look at the spaces
    flags = "--mode sweep --env-id tests.envs:Blind --vec serial --num-envs 1 --num-steps 16 --total-timesteps 16"
    args = tyro.cli(demo.Args, args=[*flags.split(), "--hidden-size", "8", "--sweep-trials", "2", "--no-cuda"])
    chosen = demo.prepare(args)
    if failing == 2:
        with pytest.raises(SystemExit, match="--sweep-trials 2: expected one that does not fail"):
            demo.sweep(args, chosen)
    else:
        demo.sweep(args, chosen)
        assert "Best of 2 trials" in capsys.readouterr().out


def test_a_hopeless_trial_is_pruned(tmp_path, monkeypatch):
    """The sixth: it has to reach the median of five, from the second update on."""
    monkeypatch.chdir(tmp_path)
    made = itertools.count()  # one to look at the spaces, then one a trial
    monkeypatch.setattr(Counter, "__init__", lambda env, init=Counter.__init__: init(env, 3 if next(made) < 6 else 1))
    flags = "--mode sweep --env-id tests.envs:Counter --vec serial --num-envs 1 --num-steps 16 --total-timesteps 64"
    args = tyro.cli(demo.Args, args=[*flags.split(), "--hidden-size", "8", "--sweep-trials", "6", "--no-cuda"])
    demo.sweep(args, demo.prepare(args))
    storage = f"sqlite:///{next(tmp_path.glob('runs/*/study.db'))}"
    *others, last = optuna.load_study(study_name=None, storage=storage).trials
    assert [trial.state.name for trial in others] == ["COMPLETE"] * 5 and last.state.name == "PRUNED"
    assert [[*trial.intermediate_values] for trial in (others[0], last)] == [[1, 2, 3, 4], [1, 2]]


def test_autotune_counts_no_time_but_that_of_steps(capsys, monkeypatch):
    now = [0.0]

    def act(trainer):
        now[0], trainer.global_step = now[0] + 0.125, trainer.global_step + 1

    def close(envs):
        now[0] += 100
        gymnasium.vector.VectorEnv.close(envs)

    monkeypatch.setattr(demo.Trainer, "act", act)
    monkeypatch.setattr(demo, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(puffer_core.Serial, "close", close)
    monkeypatch.setattr(sys, "argv", flags := ["demo.py", *"--env-id CartPole-v1 --no-cuda --num-envs 1".split()])
    args = tyro.cli(demo.Args, args=flags[1:])
    demo.autotune(args, demo.prepare(args))
    assert "         8 steps/s with --vec serial" in capsys.readouterr().out


def test_autotune_measures_and_names_a_command(capsys, monkeypatch, one_core):
    """On one core, where the workers of a pool that waits for half of its environments are two all the same."""
    own = "--env-id CartPole-v1 --no-cuda --quiet"
    tuned = "--mode autotune --num-envs=4 --env_batch_size 1 --no-zero-copy"  # no two workers of four could have that
    monkeypatch.setattr(sys, "argv", ["demo.py", *tuned.split(), *own.split()])
    args = tyro.cli(demo.Args)
    demo.autotune(args, demo.prepare(args))
    *measured, last = capsys.readouterr().out.splitlines()
    speeds = {line.partition(" with ")[2]: float(line.split()[0].replace(",", "")) for line in measured}
    assert len(measured) == len(speeds) >= 4 and min(speeds.values()) > 0  # nothing is measured twice
    command = last.partition(": ")[2]
    assert command.startswith(f"python demo.py {own} --vec ")
    named = next(way for way in speeds if command.endswith(way))
    assert speeds[named] == max(speeds.values())  # two may be as fast as one another, as printed
    demo.prepare(tyro.cli(demo.Args, args=shlex.split(command)[2:]))
