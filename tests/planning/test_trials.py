"""A drafter that does not pay is tried for a few steps now and then, less often as long as it does not pay."""

import pytest

from mtp_mlx.planning.trials import FIRST_TRIAL, LAST_TRIAL, TRIAL_STEPS, Trials


def until_a_trial(trials: Trials) -> int:
    """Steps without drafts until a trial runs."""
    steps = 0
    while not trials.running:
        assert not trials.count(False, 0.0), "no trial ends where none runs"
        steps += 1
    return steps


def tried(trials: Trials, gained: float, first: float = 0.0) -> None:
    """A whole trial, of which the first step gains `first` and each other one `gained`."""
    ends = [trials.count(True, gained if step else first) for step in range(TRIAL_STEPS)]
    assert ends == [False] * (TRIAL_STEPS - 1) + [True] and not trials.running


def test_trials_that_do_not_pay_get_rare_and_one_that_pays_starts_anew() -> None:
    trials, waits = Trials(), []
    for _ in range(6):
        waits.append(until_a_trial(trials))
        tried(trials, -0.1)
    assert (
        waits == [min(FIRST_TRIAL * 2**count, LAST_TRIAL) for count in range(6)] and waits[-1] == LAST_TRIAL
    )
    assert until_a_trial(trials) == LAST_TRIAL
    tried(trials, 0.1)
    assert until_a_trial(trials) == FIRST_TRIAL


def test_the_first_step_of_a_trial_is_not_judged() -> None:
    """The drafter may have to read the text before."""
    trials = Trials()
    until_a_trial(trials)
    tried(trials, 0.1, first=-9.0)
    assert until_a_trial(trials) == FIRST_TRIAL


@pytest.mark.parametrize("every", [2, FIRST_TRIAL])
def test_a_drafter_in_use_is_not_tried(every: int) -> None:
    trials = Trials()
    for step in range(20 * FIRST_TRIAL):
        trials.count(step % every == 0, 0.0)
        assert not trials.running
