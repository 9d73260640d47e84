"""Training runs that fit a line: curves, checkpoints, and losses that are not finite."""

import math

import pytest
import torch

from colt5_bench.measuring.training import train
from colt5_bench.suite import Course

CPU = torch.device("cpu")


class KilledError(BaseException):
    """Ends a run as a signal does."""


def course(steps=12, evaluations=4, spoilt=None, killed=None):
    """A line fitted to random points; noise in the model shows whether random numbers are those of the step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    memory = {}

    def loss(step):
        if step == killed:
            raise KilledError
        x = torch.randn(8, 3)
        value = (model(x + 0.1 * torch.randn(8, 3)) - x.sum(1, keepdim=True)).square().mean()
        return value * math.nan if step == spoilt else value

    def evaluate():
        weights = model.weight.detach().clone()
        moved = (weights - memory.get("weights", torch.zeros(3))).norm()
        memory["weights"] = weights
        return {"noise": torch.rand(()).item(), "moved": moved.item()}

    return Course(
        model=model,
        optimizer=optimizer,
        prepare=torch.manual_seed,
        loss=loss,
        evaluate=evaluate,
        finish=dict,
        steps=steps,
        evaluations=evaluations,
        tokens_per_step=8,
        memory=memory,
    )


def curves(progress):
    """All of a record except times."""
    return {name: curve for name, curve in progress.curves.items() if name != "seconds"}


@pytest.mark.parametrize(("steps", "evaluations"), [(12, 4), (13, 4), (5, 5), (7, 1)])
def test_curves_have_a_value_for_each_evaluation(steps, evaluations):
    progress = train(course(steps, evaluations), None, CPU)
    assert {len(curve) for curve in progress.curves.values()} == {evaluations}
    assert progress.curves["step"][-1] == progress.steps == steps
    assert progress.curves["tokens"] == [8 * step for step in progress.curves["step"]]
    assert progress.curves["seconds"] == sorted(progress.curves["seconds"])


@pytest.mark.parametrize("killed", range(1, 12))
def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path, killed):
    whole = course()
    expected = train(whole, None, CPU)
    checkpoint = tmp_path / "checkpoints" / "run.pt"
    with pytest.raises(KilledError):
        train(course(killed=killed), checkpoint, CPU)
    resumed = course()
    begun = []
    loss = resumed.loss
    resumed.loss = lambda step: begun.append(step) or loss(step)
    progress = train(resumed, checkpoint, CPU)
    assert begun[0] == killed // 3 * 3
    assert curves(progress) == curves(expected)
    assert all(torch.equal(*pair) for pair in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_a_run_that_is_finished_is_not_trained_again(tmp_path):
    first = train(course(), tmp_path / "run.pt", CPU)
    again = train(course(killed=0), tmp_path / "run.pt", CPU)
    assert again.curves == first.curves


@pytest.mark.parametrize("spoilt", range(12))
def test_a_loss_that_is_no_number_ends_the_run_and_names_its_step(tmp_path, spoilt):
    with pytest.raises(FloatingPointError, match=rf"the loss is nan at step {spoilt}$"):
        train(course(spoilt=spoilt), tmp_path / "run.pt", CPU)


def test_whoever_watches_is_told_each_evaluation():
    told = []
    train(course(), None, CPU, told.append)
    assert [line.split(",")[0] for line in told] == ["step 3", "step 6", "step 9", "step 12"]
