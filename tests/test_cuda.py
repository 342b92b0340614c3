"""What only a GPU can show: it learns the same there as on the CPU, and every script runs. Skipped where none is."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from running import BATCH, OWN_FLAGS, TINY, run

import demo
import puffer_core

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PRESENT = "state packed".split()  # what a trainer holds between two batches


@pytest.fixture(autouse=True)
def exact():
    """Convolutions in full float32, as the CPU's are, and as products are by default."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def trainer_of(env_id, cuda, **arguments):
    small = {"num_envs": 4, "num_steps": 16, "total_timesteps": 10**6, "quiet": True, "precision": "fp32"}
    args = demo.Args(env_id=env_id, cuda=cuda, **(small | {"vec": "serial"} | arguments))
    demo.prepare(args)
    return demo.Trainer(args)


def bring(part, other):
    """Copy a tensor or an array to where the other trainer, and its graphs, look for it."""
    if isinstance(part, torch.Tensor):
        other.copy_(part)
    elif isinstance(part, np.ndarray):
        other[...] = part


@pytest.mark.parametrize("use_lstm", [False, True])
@pytest.mark.parametrize("env_id", ["BreakoutNoFrameskip-v4", "MiniHack-Room-5x5-v0", "envs:FloatTeam", "Pendulum-v1"])
def test_an_update_on_the_gpu_is_that_of_the_cpu(env_id, use_lstm, monkeypatch):
    """From the same transitions in the same minibatches, two updates lead to the same weights."""
    monkeypatch.setattr(torch, "randperm", torch.arange)  # random numbers of the CPU, which draws its actions from them
    one, other = (trainer_of(env_id, cuda, use_lstm=use_lstm) for cuda in (False, True))
    with one.envs, other.envs:
        one.start()
        other.start()
        for _ in range(2):
            assert one.collect()
            for name in PRESENT:
                bring(getattr(one, name), getattr(other, name))
            for name, part in vars(one.experience).items():
                bring(part, getattr(other.experience, name))
            one.update()
            other.update()
            assert other.losses == pytest.approx(one.losses, rel=1e-2, abs=1e-4, nan_ok=True)
            for name, weights in one.policy.state_dict().items():
                torch.testing.assert_close(other.policy.state_dict()[name].cpu(), weights, rtol=1e-3, atol=3e-4)
            other.policy.load_state_dict(one.policy.state_dict())
            for mine, its in zip(*[[*trainer.policy.parameters()] for trainer in (one, other)]):
                for name, part in one.optimizer.state[mine].items():
                    bring(part, other.optimizer.state[its][name])


@pytest.mark.parametrize("use_lstm", [False, True])
@pytest.mark.parametrize(
    "env_id", ["BreakoutNoFrameskip-v4", "MiniHack-Room-5x5-v0", "envs:FloatTeam", "CartPole-v1", "Pendulum-v1"]
)
def test_graphs_do_what_their_functions_do(env_id, use_lstm, monkeypatch):
    """Over five updates, in the first of which both are captured; nothing is drawn, all do what is likeliest."""
    monkeypatch.setattr(torch, "randperm", torch.arange)
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda noise: noise.fill_(1.0))
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    graph, trainers = demo.Graph, []
    for wrap in (graph, lambda function, *rows: function):
        monkeypatch.setattr(demo, "Graph", wrap)
        trainers.append(trainer_of(env_id, True, use_lstm=use_lstm, learning_rate=1e-4))
    one, other = trainers
    with one.envs, other.envs:
        one.start()
        other.start()
        for _ in range(5):
            for trainer in trainers:
                assert trainer.collect()
                trainer.update()
            for name in ("actions", "logprobs", "values", "next_values", "advantages"):
                torch.testing.assert_close(*[getattr(each.experience, name) for each in trainers], rtol=1e-2, atol=1e-2)
            assert other.losses == pytest.approx(one.losses, rel=0.05, abs=1e-3, nan_ok=True)
        assert all(hasattr(graph, "result") for graph in (one.decide, one.learn))  # both were captured


@pytest.mark.parametrize("ways", [
    {},
    {"vec": "multiprocessing", "num_workers": 4, "env_batch_size": 2},
    {"vec": "multiprocessing", "num_workers": 4, "env_batch_size": 2, "zero_copy": False},
], ids=["in step", "first-ready", "gathered"])
@pytest.mark.parametrize("env_id", ["BreakoutNoFrameskip-v4", "CartPole-v1", "envs:FloatTeam"])
def test_recomputed_logprobs_equal_the_sampled_ones(env_id, ways):
    """And what the policy saw is what the environments sent: no copy to the device was overtaken by the next batch."""
    trainer = trainer_of(env_id, True, use_lstm=True, **ways)
    recv, decide, sent, seen = trainer.envs.recv, trainer.decide, [], []

    def recv_and_note():
        batch = recv()
        sent.append((batch.agent_ids.copy(), batch.observations.copy()))
        return batch

    def note_and_decide():
        seen.append((trainer.row_ids.clone(), trainer.observations.clone()))  # to look now would wait for the copy
        return decide()

    trainer.envs.recv, trainer.decide = recv_and_note, note_and_decide
    with trainer.envs:
        trainer.start()
        trainer.collect()
        assert len(seen) == len(sent) - 1 >= 16
        for arrays, tensors in zip(sent, seen):
            assert all(np.array_equal(array, tensor.cpu().numpy()) for array, tensor in zip(arrays, tensors))
        index, experience = trainer.prepare().view(-1, 16), trainer.experience
        with torch.no_grad():
            steps = experience.states[index[:, 0]], experience.starts[index], experience.actions[index]
            _, logprobs, _, values, _ = trainer.policy(experience.observations[index], *steps)
        kept = experience.trainable[index]
        assert kept.any()
        torch.testing.assert_close(logprobs[kept], experience.logprobs[index][kept], rtol=0, atol=1e-4)
        torch.testing.assert_close(values[kept], experience.values[index][kept], rtol=0, atol=1e-3)


def test_what_absent_agents_left_never_touches_an_update():
    trainer = trainer_of("envs:FloatTeam", True)
    with trainer.envs:
        trainer.start()
        trainer.collect()
        absent = torch.as_tensor(~trainer.experience.valid, device="cuda")
        assert absent.any()
        trainer.experience.observations[absent] = np.nan
        trainer.experience.logprobs[absent] = np.nan
        trainer.update()
        assert all(torch.isfinite(weights).all() for weights in trainer.policy.parameters())


def test_structure_is_unpacked_on_the_gpu_and_compiled():
    rest = spaces.Tuple([spaces.Discrete(5), spaces.MultiBinary(3)])
    space = spaces.Dict(a=spaces.Box(-1, 1, (3,), np.float64), b=rest)
    layout = puffer_core.Layout(space)
    space.seed(1)
    rows = np.stack([layout.flatten(space.sample()) for _ in range(7)])
    expected = layout.unflatten(rows)
    for unpack in (layout.unflatten, torch.compile(layout.unflatten, fullgraph=True)):
        found = unpack(torch.as_tensor(rows, device="cuda"))
        pairs = [(found["a"], expected["a"]), *zip(found["b"], expected["b"])]
        assert all(one.is_cuda and np.array_equal(one.cpu().numpy(), other) for one, other in pairs)


@pytest.mark.parametrize("flags", ["", "--compile", "--compile --num-envs 8 --env-batch-size 4 --num-workers 4"])
def test_a_run_is_resumed_and_played_on_either_device(flags):
    tiny = "--env-id BreakoutNoFrameskip-v4 --num-envs 4 --num-steps 16 --num-minibatches 2 --update-epochs 1".split()
    trained = run("demo.py", *tiny, *flags.split(), "--total-timesteps", "512")
    assert trained.returncode == 0, trained.stderr
    (path,) = (trained.directory / "runs").glob("*/checkpoint.pt")
    for further in ("--total-timesteps 1024", "--total-timesteps 1024 --no-cuda --no-compile"):
        resumed = run("demo.py", "--resume", str(path), *further.split())
        assert resumed.returncode == 0, resumed.stderr
        assert int(resumed.lines("global_step=")[-1].split()[0].partition("=")[2]) >= 1024
    for further in ((), ("--no-cuda",)):
        played = run("demo.py", "--mode", "eval", "--resume", str(path), "--eval-episodes", "1", *further)
        assert "1 episodes: return" in played.stdout, played.stderr


@pytest.mark.parametrize("script", [
    *("vanilla_ppo_atari.py", "ppo_atari.py", "large_ppo_atari.py", "puffer_ppo_atari.py", "large_puffer_ppo_atari.py"),
    *("ppo_atari_envpool.py", "puffer_ppo_minihack.py", "puffer_vec_ppo_minihack.py"),
])
def test_every_script_trains_on_the_gpu(script):
    done = run(script, *[flag for flag in TINY if flag != "--no-cuda"], *OWN_FLAGS.get(script, ()))
    assert done.returncode == 0 and BATCH in dict(done.scalars("charts/SPS")), done.stderr
