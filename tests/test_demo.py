"""demo.py: its experience, its updates, its checkpoints and its modes, on small budgets of real environments."""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import tyro
import yaml
from gymnasium import spaces
from rich.console import Console
from running import ROOT, environment, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_scripts import running_in_group

import demo
import puffer_core

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
            trainer.policy.actor.weight.mul_(1e6)
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
    assert len({len(expected[row, 0]["actions"].unique()) for row in range(6)}) > 0
    for workers, batch, zero_copy in ((6, 2, True), (6, 1, True), (3, 4, False), (6, 5, False)):
        ways = {"vec": "multiprocessing", "num_workers": workers, "env_batch_size": batch, "zero_copy": zero_copy}
        found = segments(4, **ways, **memory)
        for row in range(6):
            for number in range(4):
                for name in FIELDS:
                    one, other = expected[row, number][name], found[row, number][name]
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


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


def test_truncation_bootstraps_from_the_last_observation_and_termination_from_nothing():
    with trainer_of("envs:Uneven", num_steps=16, gamma=0.9, gae_lambda=0.8) as trainer:
        trainer.collect()
        experience, policy = trainer.experience, trainer.policy
        index = trainer.prepare()
        observations, ended = experience.observations[index], torch.as_tensor(experience.ended)

        def value(observation):
            return float(policy(observation.view(1, 1, -1), None, None)[3])

        kinds = set()
        with torch.no_grad():
            for row in range(4):
                advantage = 0.0
                for step in reversed(range(16)):
                    seed, episode, number, _ = observations[row, step].tolist()
                    action = float(experience.actions[index[row, step]])
                    after = torch.tensor([seed, episode, number + 1, action])  # also where the row has the next episode's
                    is_terminated = episode % 2 == 0 and number + 1 == 3
                    is_truncated = episode % 2 == 1 and number + 1 == 5
                    kinds.add((is_terminated, is_truncated))
                    assert ended[row, step] == (is_terminated or is_truncated)
                    delta = number + 1 + 0.9 * (0.0 if is_terminated else value(after)) - value(observations[row, step])
                    advantage = delta + 0.9 * 0.8 * advantage * (not ended[row, step])
                    assert float(experience.advantages[index[row, step]]) == pytest.approx(advantage, abs=1e-4)
        assert len(kinds) == 3


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
                flat = torch.as_tensor(masked.reshape(-1))
                for name in ("observations", "logprobs", "values", "next_values"):
                    getattr(experience, name)[flat] = torch.nan
                experience.actions[flat] = 2**40
            trainer.update()
            assert all(np.isfinite(value) for value in trainer.losses.values())
            weights.append(trainer.policy.state_dict())
    assert all(torch.equal(one, weights[1][name]) for name, one in weights[0].items())


def test_agents_that_come_and_go_are_trained_on_while_they_live():
    """The rows of `FloatTeam`, by hand: agent 1 dies on the first step of the first episode and is absent on the next."""
    with trainer_of("envs:FloatTeam", num_envs=1, num_steps=8) as trainer:
        trainer.collect()
        valid, ended = trainer.experience.valid, trainer.experience.ended
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
        state = experience.states[index[:, 0] // 16] if use_lstm else None
        steps = (experience.observations[index], state, experience.starts[index], experience.actions[index])
        _, logprobs, _, values, _ = trainer.policy(*steps)
        kept = experience.trainable[index]
        torch.testing.assert_close(logprobs[kept], experience.logprobs[index][kept], rtol=0, atol=1e-5)
        torch.testing.assert_close(values[kept], experience.values[index][kept], rtol=0, atol=1e-4)


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
    policy = demo.Policy(puffer_core.Layout(SPACES["numbers"][0]), spaces.MultiDiscrete([3, 2]), demo.Args(hidden_size=8))
    logits, actions = torch.randn(4, 1, 5), torch.tensor([[[0, 1]], [[2, 0]], [[1, 1]], [[0, 0]]])
    heads = [torch.distributions.Categorical(logits=part) for part in logits.split([3, 2], -1)]
    _, logprobs, entropies = policy.act(logits, actions)
    torch.testing.assert_close(logprobs, sum(head.log_prob(actions[..., at]) for at, head in enumerate(heads)))
    torch.testing.assert_close(entropies, sum(head.entropy() for head in heads))
