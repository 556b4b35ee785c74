"""An update is the same however its tokens are cut up: into micro-batches, and over processes."""

import pytest
import torch
from runs import losses, records, set_up, tiny, train, two_processes

from overnight.training.train import accumulate, train_step

ROWS, ITERATIONS = 8, 20


@pytest.fixture
def cut(in_process):
    """A run whose iterations of 8 rows go through the model some rows at a time."""

    def make(micro_batch):
        shape = ("--batch.tokens_per_iter", str(ROWS * 64), "--batch.micro_batch", str(micro_batch))
        return set_up(tiny(in_process, "--name", f"cut-{micro_batch}", *shape))

    return make


def loss_and_gradients(run):
    loss = accumulate(run).item()
    gradients = {name: parameter.grad.clone() for name, parameter in run.model.named_parameters()}
    run.model.zero_grad()
    return loss, gradients


def test_1x8_2x4_and_8x1_micro_batches_have_one_loss_one_gradient_and_one_run(cut):
    one, *others = runs = [cut(micro_batch) for micro_batch in (8, 4, 1)]
    assert [run.grad_accum for run in runs] == [1, 2, 8]
    loss, gradients = loss_and_gradients(one)
    for other in others:
        its_loss, its_gradients = loss_and_gradients(other)
        assert its_loss == pytest.approx(loss, abs=1e-6)
        for name, gradient in gradients.items():
            assert (its_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    curves = [[train_step_loss(run) for _ in range(ITERATIONS)] for run in runs]
    assert curves[0][-1] < curves[0][0] - 0.5  # it learns, so there is something to differ in
    for curve in curves[1:]:
        torch.testing.assert_close(torch.tensor(curve), torch.tensor(curves[0]), rtol=0, atol=1e-5)


def train_step_loss(run):
    loss, _, updated = train_step(run)
    assert updated
    run.iteration += 1
    return loss


def test_two_processes_have_the_losses_of_one(workplace, undisturbed):
    result = train(workplace, "tiny.yaml", "--name", "two", "--threads", "1", launcher=two_processes())
    assert result.returncode == 0, result.stdout + result.stderr
    assert "x 1 accumulated x 2 processes" in result.stdout
    one, two = losses(workplace, "tiny"), losses(workplace, "two")
    assert two.keys() == one.keys()
    assert max(abs(two[iteration] - one[iteration]) for iteration in range(1, ITERATIONS + 1)) < 1e-5
    validation = [[record["loss"] for record in records(workplace, name, "val")] for name in ("tiny", "two")]
    assert validation[0][1] == pytest.approx(validation[1][1], abs=1e-5)
