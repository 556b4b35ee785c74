"""What is published of the training model is the stock GPT-2.

That both compute the same, in value and gradient, stands in invariants/test_one_function.py.
"""

import pytest
import torch
import torch.nn.functional as F

from overnight.model import optim
from overnight.model.gpt2 import LanguageModel, published
from overnight.recipe.schema import Model, Optim

SHAPE = Model(n_layer=2, n_head=2, n_embd=64, n_positions=32, vocab_size=100)


@pytest.fixture
def language_model():
    torch.manual_seed(0)
    return LanguageModel(SHAPE, 0, compile=False)


@pytest.fixture
def tokens():
    torch.manual_seed(1)
    return torch.randint(0, 100, (3, 33))


def stock_loss(language_model, ids, targets):
    logits = published(language_model, SHAPE)(ids).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def test_b7_targets_are_not_shifted_a_second_time(language_model):
    ids, targets = torch.tensor([[5, 6, 7]]), torch.tensor([[6, 7, 8]])
    with torch.no_grad():
        log_probabilities = published(language_model, SHAPE)(ids).logits.log_softmax(-1)
        by_hand = -sum(log_probabilities[0, place, target] for place, target in enumerate([6, 7, 8]))
        torch.testing.assert_close(language_model(ids, targets), by_hand)


def test_the_published_model_has_the_exact_vocabulary_and_the_same_loss(language_model, tokens):
    ids, targets = tokens[:, :-1], tokens[:, 1:]
    stock = published(language_model, SHAPE)
    assert stock.config.vocab_size == stock.lm_head.weight.shape[0] == 100
    assert stock.lm_head.weight.data_ptr() == language_model.gpt2.transformer.wte.weight.data_ptr()
    assert stock.config._attn_implementation == "sdpa"
    with torch.no_grad():
        torch.testing.assert_close(language_model(ids, targets), stock_loss(language_model, ids, targets))


def test_without_biases_those_of_the_linear_layers_stay_zero_and_all_else_is_trained(tokens):
    torch.manual_seed(0)
    model = LanguageModel(SHAPE.model_copy(update={"bias": False}), 0, compile=False)
    before = {name: parameter.clone() for name, parameter in model.gpt2.named_parameters()}
    for update in [each.step for each in optim.build(model, Optim()) for _ in range(2)]:
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        update()
    for name, parameter in published(model, SHAPE).named_parameters():
        if name.endswith(".bias") and ".ln_" not in name:
            assert not parameter.any(), name
        else:
            assert not torch.equal(parameter, before[name][: len(parameter)]), name
