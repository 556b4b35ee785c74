"""The loss is the cross-entropy, however it is made: eager or compiled, in float32 or bf16, in chunks or whole."""

import argparse
import importlib

import pytest
import torch
import torch.nn.functional as F

from overnight.model.loss import compiled_softmax, softmax_, summed_loss
from overnight.planning import model_size

VOCABULARY, PADDED, WIDTH = 65, 128, 48  # nearly half of the columns are padding
CHUNK = 40
ROWS = (96, 40, 24)  # two chunks and a part of one, a chunk, a part of one
LAST_BITS = {"cpu": 2**-23, "cuda": 2**-21}  # of the largest element; Triton's exponential is not PyTorch's on CUDA


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(model_size, "LOSS_CHUNK", dict.fromkeys(model_size.LOSS_CHUNK, CHUNK))
    torch.compiler.reset()


@pytest.fixture
def benchmark(root, monkeypatch):
    """benchmarks/loss.py, and beside it the sides that it compares."""
    monkeypatch.syspath_prepend(root / "benchmarks")
    return importlib.import_module("loss")


@pytest.fixture
def chunked_eager(benchmark):
    """The loss that this one replaced, an operator at a time."""
    return importlib.import_module("loss_sides").chunked_eager


def inputs(rows, device):
    torch.manual_seed(rows)
    hidden, weight = torch.randn(rows, WIDTH), torch.randn(PADDED, WIDTH) * WIDTH**-0.5
    return hidden.to(device), weight.to(device), torch.randint(VOCABULARY, (rows,)).to(device)


def loss_and_gradients(make, hidden, weight, targets, dtype):
    """In float64 on the CPU, for comparisons; a factor of the loss reaches the gradients."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = make(hidden, weight, targets, VOCABULARY)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (loss * 0.5).backward()
    return [tensor.detach().cpu().double() for tensor in (loss, hidden.grad * 2, weight.grad * 2)]


def in_float64(hidden, weight, targets):
    def whole(hidden, weight, targets, vocabulary):
        return F.cross_entropy((hidden @ weight.T)[:, :vocabulary], targets, reduction="sum")

    return loss_and_gradients(whole, *(t.cpu() for t in (hidden.double(), weight.double(), targets)), torch.float64)


def errors(found, expected):
    """The largest difference of each, of the largest element."""
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]


def distances(found, expected):
    """The difference of each as a whole, of its size: chance has less part in it than in the largest."""
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


def made(compile):
    return lambda *arguments: summed_loss(*arguments, compile=compile)


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_value_and_gradients_are_those_of_float64(compile, dtype, within, device):
    for rows in ROWS:
        given = inputs(rows, device)
        found = loss_and_gradients(made(compile), *given, dtype)
        assert max(errors(found, in_float64(*given))) < within
        assert found[2][VOCABULARY:].abs().max() == 0


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_in_float32_the_gradients_are_those_of_the_eager_chunks_before_it(compile, device, chunked_eager):
    for rows in ROWS:
        given = inputs(rows, device)
        found, before = (loss_and_gradients(make, *given, torch.float32) for make in (made(compile), chunked_eager))
        assert max(errors(found, before)[1:]) <= LAST_BITS[device.type]


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_in_bf16_the_gradients_are_as_near_to_float64_as_those_of_the_eager_chunks_before_it(
    compile, device, chunked_eager
):
    for rows in ROWS:
        given = inputs(rows, device)
        exact = in_float64(*given)
        ours, before = (
            distances(loss_and_gradients(make, *given, torch.bfloat16), exact)
            for make in (made(compile), chunked_eager)
        )
        assert all(mine <= 1.01 * its + 1e-9 for mine, its in zip(ours, before, strict=True))


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_without_gradients_the_loss_is_the_same(compile, device):
    for rows in ROWS:
        given = inputs(rows, device)
        with_gradients, *_ = loss_and_gradients(made(compile), *given, torch.float32)
        with torch.no_grad():
            assert float(summed_loss(*given, VOCABULARY, compile=compile)) == pytest.approx(
                float(with_gradients), rel=1e-6
            )


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ties_infinities_and_whatever_stands_in_the_padding_do_no_harm(compile, dtype, device):
    logits = torch.randn(6, PADDED).to(dtype)
    logits[0] = 3.0  # all the same
    logits[1, : VOCABULARY - 1] = -torch.inf  # one is certain
    logits[2, :64] = -torch.inf  # and none of the others is in the first half
    logits[3, 5], logits[4] = 3e38, -3e38
    logits[:, VOCABULARY:] = torch.tensor([torch.nan, torch.inf, 3e38]).to(dtype).repeat(PADDED)[: PADDED - VOCABULARY]
    expected = logits[:, :VOCABULARY].double()
    there = logits.to(device)
    log_sum_exp = (compiled_softmax() if compile else softmax_)(there, VOCABULARY, True)
    torch.testing.assert_close(log_sum_exp.cpu().double(), expected.logsumexp(1, keepdim=True), rtol=1e-6, atol=1e-6)
    within = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(there[:, :VOCABULARY].cpu().double(), expected.softmax(1), rtol=within, atol=1e-9)
    assert there[:, VOCABULARY:].abs().max() == 0


def test_a_second_derivative_is_refused_and_not_wrong(device):
    hidden, weight, targets = inputs(8, device)
    hidden.requires_grad_()
    squared = summed_loss(hidden, weight, targets, VOCABULARY) ** 2
    (gradient,) = torch.autograd.grad(squared, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(("side", "expected"), [("ours", 4), ("chunked, eager", 24), ("whole logits", 40)])
def test_the_bf16_logits_are_read_once_and_written_once(side, expected, benchmark, device, monkeypatch):
    monkeypatch.setattr(
        model_size, "LOSS_CHUNK", dict.fromkeys(model_size.LOSS_CHUNK, 10_000)
    )  # all that is counted in one
    args = argparse.Namespace(device=device.type, dtype="bfloat16", vocabulary=VOCABULARY, width=WIDTH)
    loss = benchmark.sides(device.type, torch.bfloat16)[side]
    assert benchmark.bytes_a_logit(args, side, loss) == pytest.approx(expected, rel=0.05)
