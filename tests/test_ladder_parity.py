"""One seed, one thread: the same losses and returns, bit for bit, whichever vectorizer steps the real game."""

import pytest
from running import BATCH, UPDATES, tiny_run

LOSSES = ("value_loss", "policy_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac", "explained_variance")
GAMES = ("charts/episodic_return", "charts/episodic_length")


def test_the_base_run_is_worth_comparing_with():
    base = tiny_run("vanilla_ppo_atari.py")
    losses = base.scalars("losses/value_loss")
    assert [step for step, _ in losses] == [BATCH * (update + 1) for update in range(UPDATES)]
    assert len({value for _, value in losses}) == UPDATES  # it learns
    assert base.scalars("charts/episodic_return")  # a game ended
    assert base.lines("global_step=")


@pytest.mark.parametrize("script", ["ppo_atari.py", "puffer_ppo_atari.py"])
def test_losses_and_returns_are_bit_equal(script):
    base, other = tiny_run("vanilla_ppo_atari.py"), tiny_run(script)
    for tag in [f"losses/{name}" for name in LOSSES] + ["charts/learning_rate", *GAMES]:
        assert other.scalars(tag) == base.scalars(tag), tag
    assert other.lines("global_step=") == base.lines("global_step=")
