"""What the ranks of tests/test_demo_distributed.py do, under torchrun: ranks.py WHAT DIRECTORY."""

import gc
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

import demo

UPDATES, NUM_ENVS = 3, 8  # environments of all ranks together
SHARED = ("observations", "actions", "logprobs", "values", "next_values", "starts", "states")
OWN = ("rewards", "valid", "terminated", "ended", "begun", "complete")


def make_trainer(num_envs: int, num_minibatches: int = 1) -> demo.Trainer:
    args = demo.Args(env_id="CartPole-v1", num_envs=num_envs, num_steps=16, vec="serial", cuda=False, quiet=True)
    args.num_minibatches, args.hidden_size = num_minibatches, 16
    demo.prepare(args)
    trainer = demo.Trainer(args)
    trainer.start()
    return trainer


def weights_of(trainer: demo.Trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.policy.parameters()])


def equal_weights(directory: Path) -> None:
    """Ranks that play for themselves see other things, and have the same weights after every update."""
    trainer = make_trainer(NUM_ENVS // 2, num_minibatches=4)
    for part in (trainer.observations.flatten(), torch.rand(8)):
        gathered = [torch.empty_like(part) for _ in range(2)]
        distributed.all_gather(gathered, part)
        assert not torch.equal(*gathered)  # ranks have other environments, and draw other actions
    for _ in range(UPDATES):
        trainer.collect()
        trainer.update()
        mine = [weights_of(trainer), trainer.experience.observations.flatten()]
        gathered = [[torch.empty_like(part) for _ in range(2)] for part in mine]
        for part, parts in zip(mine, gathered):
            distributed.all_gather(parts, part)
        assert torch.equal(*gathered[0]) and not torch.equal(*gathered[1])
    print("equal", flush=True)


def record(directory: Path) -> None:
    """One rank with all environments: saves the experience before each update, and the weights after it."""
    trainer = make_trainer(NUM_ENVS)
    records = []
    for _ in range(UPDATES):
        trainer.collect()
        trainer.think()  # the value that the update would ask for
        experience = trainer.experience
        before = {name: getattr(experience, name).clone() for name in SHARED}
        before |= {name: torch.as_tensor(getattr(experience, name)).clone() for name in OWN}
        trainer.update()
        records.append({"before": before, "after": weights_of(trainer)})
    torch.save(records, directory / "records.pt")


def replay(directory: Path) -> None:
    """Two ranks with half of the environments each learn from the recorded experience, and get the same weights."""
    trainer, rank = make_trainer(NUM_ENVS // 2), distributed.get_rank()
    for number, step in enumerate(torch.load(directory / "records.pt", weights_only=True)):
        experience = trainer.experience
        for name, whole in step["before"].items():
            store = getattr(experience, name)
            half = whole.tensor_split(2)[0] if rank == 0 else whole[-len(store) :]  # the last row of some is no one's
            store[...] = half[: len(store)] if name in SHARED else half[: len(store)].numpy()
        trainer.think = lambda: None  # the values of the next observations are recorded too
        trainer.update()
        torch.testing.assert_close(weights_of(trainer), step["after"], rtol=1e-4, atol=1e-6)
        print("like one", number, flush=True)


def die(directory: Path) -> None:
    """Rank 1 is killed after its first update; rank 0 must not wait for it for ever."""
    trainer = make_trainer(NUM_ENVS // 2)
    for number in range(1000):
        trainer.collect()
        trainer.update()
        if number == 0 and distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if demo.WORLD_SIZE > 1:
        distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    globals()[sys.argv[1]](Path(sys.argv[2]))
    if demo.WORLD_SIZE > 1:
        gc.collect()  # as in demo.py
        distributed.destroy_process_group()
        names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]  # of all threads
        assert not [name for name in names if "gloo" in name], names  # one that is left may abort Python at its end
