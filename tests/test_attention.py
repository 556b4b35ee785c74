"""Attention in training is a fused kernel without a mask where the device has one, and the table says what ran."""

import pytest
import torch

from overnight.errors import InputError
from overnight.model.attention import AttentionReport, attention_report, kernel_of_device, refuse_another
from overnight.model.gpt2 import LanguageModel
from overnight.recipe.schema import Batch, Model, Recipe

SHAPE = Model(n_layer=2, n_head=2, n_embd=64, n_positions=32, vocab_size=100)
CPU, FLASH = torch.device("cpu"), "_scaled_dot_product_flash_attention_for_cpu"


@pytest.fixture
def tokens():
    torch.manual_seed(1)
    return torch.randint(0, 100, (3, 32))


def recipe(**model):
    return Recipe(model=SHAPE.model_copy(update=model), batch=Batch(sequence_length=32))


def report_of(model, tokens):
    model(tokens, tokens).backward()  # compiles, if there is anything to compile
    return attention_report(lambda: model(tokens, tokens))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_sdpa_runs_flash_without_a_mask(compiled, tokens):
    report = report_of(LanguageModel(SHAPE, 0, compile=compiled), tokens)
    assert (report.kernels, report.calls, report.masks) == ((FLASH,), SHAPE.n_layer, 0)
    assert report.fused


@pytest.mark.parametrize(
    ("kernel", "fused"),
    [
        (FLASH, True),
        ("_scaled_dot_product_flash_attention", True),
        ("_scaled_dot_product_cudnn_attention", True),  # torch takes it first on Hopper and Blackwell's large cards
        ("_scaled_dot_product_efficient_attention", False),
        ("_scaled_dot_product_attention_math", False),
    ],
)
def test_flash_and_cudnn_are_fused_kernels_and_no_other_and_none_with_a_mask(kernel, fused):
    assert AttentionReport((kernel,), masks=0, calls=12).fused == fused
    assert not AttentionReport((kernel,), masks=1, calls=12).fused
    assert not AttentionReport((kernel, "_scaled_dot_product_attention_math"), masks=0, calls=12).fused
    assert not AttentionReport((), masks=0, calls=0).fused


def test_a_device_without_a_fused_kernel_runs_what_it_has_unless_flash_is_asked_for_by_name():
    slow = kernel_of_device(recipe(dropout=0.1), CPU, torch.float32)  # on a CPU dropout has no fused kernel
    assert slow.kernels == ("_scaled_dot_product_attention_math",)
    refuse_another(slow, slow)
    with pytest.raises(InputError, match="'auto' would work"):
        kernel_of_device(recipe(dropout=0.1, attention="flash"), CPU, torch.float32)
    assert kernel_of_device(recipe(attention="flash"), CPU, torch.float32).kernels == (FLASH,)


def test_what_a_model_runs_beside_the_fused_kernel_of_its_device_is_refused(tokens):
    of_device = kernel_of_device(recipe(), CPU, torch.float32)
    refuse_another(report_of(LanguageModel(SHAPE, 0, compile=False), tokens), of_device)
    dropped = report_of(LanguageModel(SHAPE.model_copy(update={"dropout": 0.1}), 0, compile=False), tokens)
    with pytest.raises(InputError, match=r"flash_attention_for_cpu, but under the model it ran .*math"):
        refuse_another(dropped, of_device)


def test_a_mask_would_be_seen(tokens):
    language_model = LanguageModel(SHAPE, 0, compile=False)
    language_model.gpt2.set_attn_implementation("sdpa")
    mask = torch.tril(torch.ones(3, 1, 32, 32, dtype=torch.bool))
    language_model.training_body = lambda ids: (
        language_model.gpt2.transformer(ids, use_cache=False, attention_mask=mask).last_hidden_state
    )
    report = report_of(language_model, tokens)
    assert report.masks == SHAPE.n_layer
    with pytest.raises(InputError, match="a mask in 2 of 2 calls"):
        refuse_another(report, kernel_of_device(recipe(), CPU, torch.float32))


def test_training_attention_with_a_cache_raises_instead_of_being_wrong():
    model = LanguageModel(SHAPE, 0, compile=False)
    with pytest.raises(ValueError, match="no key-value cache"):
        model.gpt2.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, use_cache=True, pad_token_id=0)
