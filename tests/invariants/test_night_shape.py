"""The night's width and vocabulary under bf16 with fused attention are near float64; on CUDA they are compiled."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from overnight.model.gpt2 import LanguageModel, published
from overnight.recipe.schema import Model

SHAPE = Model(n_layer=2)  # 384 wide, 50,257 columns, 50,304 while training
BATCH = {"cpu": (1, 128), "cuda": (9, 1024)}  # rows x tokens; CUDA's are more than a chunk of the loss
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
ROUNDING = 2**-8  # of bf16


@pytest.fixture(scope="module")
def model(pytestconfig):
    device = pytestconfig.getoption("--device")
    torch.manual_seed(0)
    return LanguageModel(SHAPE, SHAPE.vocab_size - 1, compile=device == "cuda").to(device)


@pytest.fixture(scope="module")
def tokens(model):
    device = model.gpt2.device
    rows, length = BATCH[device.type]
    drawn = torch.randint(SHAPE.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(1)).to(device)
    return drawn[:, :-1], drawn[:, 1:]


@pytest.fixture(scope="module")
def in_bf16(model, tokens):
    """Loss and gradients as the trainer makes them; SDPA raises where only another kernel would take its inputs."""
    with sdpa_kernel(FUSED), torch.autocast(tokens[0].device.type, torch.bfloat16):
        loss = model(*tokens)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.gpt2.transformer.named_parameters()}


@pytest.fixture(scope="module")
def in_float64(model, tokens):
    """The stock model's, row by row."""
    stock = published(model, SHAPE)
    exact = type(stock)(stock.config).to(tokens[0].device, torch.float64)
    exact.load_state_dict(stock.state_dict())
    total = 0.0
    for ids, targets in zip(*tokens, strict=True):
        loss = F.cross_entropy(exact(ids[None]).logits[0], targets, reduction="sum")
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad for name, parameter in exact.transformer.named_parameters()}


def test_the_loss_is_that_of_float64(in_bf16, in_float64):
    assert in_bf16[0] == pytest.approx(in_float64[0], rel=2e-4)


def test_every_gradient_is_that_of_float64_to_the_rounding_of_bf16(in_bf16, in_float64):
    for name, exact in in_float64[1].items():
        ours = in_bf16[1][name][: len(exact)]
        assert (ours - exact).norm() <= 4 * ROUNDING * exact.norm(), name


def test_the_padded_columns_take_no_part(in_bf16):
    padded = in_bf16[1]["wte.weight"][SHAPE.vocab_size :]
    assert len(padded) == 50_304 - 50_257 and not padded.any()
