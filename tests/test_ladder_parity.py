"""One seed, one thread: the same losses and returns, bit for bit, whichever vectorizer steps the real game."""

import pytest
from running import BATCH, UPDATES, tiny_run

LOSSES = ("value_loss", "policy_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac", "explained_variance")
GAMES = ("charts/episodic_return", "charts/episodic_length")
PAIRS = (
    ("vanilla_ppo_atari.py", "ppo_atari.py"),
    ("vanilla_ppo_atari.py", "puffer_ppo_atari.py"),
    ("puffer_ppo_minihack.py", "puffer_vec_ppo_minihack.py"),
)


@pytest.mark.parametrize("script", sorted({base for base, _ in PAIRS}))
def test_the_base_run_is_worth_comparing_with(script):
    base = tiny_run(script)
    losses = base.scalars("losses/value_loss")
    assert [step for step, _ in losses] == [BATCH * (update + 1) for update in range(UPDATES)]
    assert len({value for _, value in losses}) == UPDATES  # it learns
    assert base.scalars("charts/episodic_return")  # a game ended
    assert base.lines("global_step=")


@pytest.mark.parametrize("script, variant", PAIRS)
def test_losses_and_returns_are_bit_equal(script, variant):
    base, other = tiny_run(script), tiny_run(variant)
    for tag in [f"losses/{name}" for name in LOSSES] + ["charts/learning_rate", *GAMES]:
        assert other.scalars(tag) == base.scalars(tag), tag
    assert other.lines("global_step=") == base.lines("global_step=")
