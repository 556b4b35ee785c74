"""The training model is the stock GPT-2 in value and gradient: chunked loss, flash, compiled, padded vocabulary."""

import pytest
import torch
import torch.nn.functional as F

from overnight.model.gpt2 import LanguageModel, published
from overnight.planning import model_size
from overnight.recipe.schema import Model

SHAPE = Model(n_layer=2, n_head=2, n_embd=64, n_positions=32, vocab_size=100)  # 128 rows while training
CHUNK = 40  # of the 96 rows of `tokens`: two whole chunks and a part


@pytest.fixture
def language_model(monkeypatch, device):
    monkeypatch.setattr(model_size, "LOSS_CHUNK", dict.fromkeys(model_size.LOSS_CHUNK, CHUNK))
    return build(device)


def build(device, *, compile=False):
    torch.manual_seed(0)
    return LanguageModel(SHAPE, 0, compile=compile).to(device)


@pytest.fixture
def tokens(device):
    torch.manual_seed(1)
    rows = torch.randint(0, SHAPE.vocab_size, (3, 33)).to(device)
    return rows[:, :-1], rows[:, 1:]


def loss_and_gradients(model, loss):
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return loss.detach(), gradients


def assert_same(found, expected):
    """Losses and every gradient within 1e-5, relative to the size of each."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_the_chunked_loss_is_the_stock_loss_in_value_and_gradients(language_model, tokens):
    ids, targets = tokens
    ours = loss_and_gradients(language_model.gpt2, language_model(ids, targets))
    logits = language_model.gpt2(ids, use_cache=False).logits[..., : SHAPE.vocab_size]
    stock = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert_same(ours, loss_and_gradients(language_model.gpt2, stock))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_flash_attention_is_stock_attention_in_value_and_gradients(language_model, tokens, implementation):
    flash = loss_and_gradients(language_model, language_model(*tokens))
    language_model.gpt2.set_attn_implementation(implementation)
    assert_same(flash, loss_and_gradients(language_model, language_model(*tokens)))


def test_the_compiled_model_is_the_eager_one_in_value_and_gradients(language_model, tokens, device):
    compiled = build(device, compile=True)
    assert_same(
        loss_and_gradients(compiled, compiled(*tokens)),
        loss_and_gradients(language_model, language_model(*tokens)),
    )


def test_the_padded_vocabulary_is_the_exact_one_in_value_and_gradients(language_model, tokens):
    ids, targets = tokens
    loss, gradients = loss_and_gradients(language_model.gpt2.transformer, language_model(ids, targets))
    exact = published(language_model, SHAPE).train().requires_grad_()
    logits = exact(ids, use_cache=False).logits
    assert logits.shape[-1] == SHAPE.vocab_size
    stock = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    expected = loss_and_gradients(exact.transformer, stock)
    gradients["wte.weight"] = gradients["wte.weight"][: SHAPE.vocab_size]
    assert_same((loss, gradients), expected)


@pytest.mark.parametrize("planted", [1e4, -1e4, 1e30])
def test_padded_rows_take_no_part_in_any_chunk_whatever_stands_in_them(language_model, tokens, planted):
    weight = language_model.gpt2.transformer.wte.weight
    assert len(weight) > SHAPE.vocab_size
    before = loss_and_gradients(language_model, language_model(*tokens))
    with torch.no_grad():
        weight[SHAPE.vocab_size :] = planted
    after = loss_and_gradients(language_model, language_model(*tokens))
    assert torch.equal(before[0], after[0])
    assert all(torch.equal(before[1][name], gradient) for name, gradient in after[1].items())
    of_rows = after[1]["gpt2.transformer.wte.weight"].abs().amax(dim=1)
    assert of_rows[SHAPE.vocab_size :].max() == 0 and of_rows[: SHAPE.vocab_size].min() > 0
