"""Muon orthogonalises, every parameter has one optimizer, and the learning rate is a function of the iteration."""

import pytest
import torch

from overnight.model import optim
from overnight.model.gpt2 import LanguageModel
from overnight.recipe.schedule import lr_at
from overnight.recipe.schema import Model, Optim, Schedule

SHAPE = Model(n_layer=2, n_head=2, n_embd=64, n_positions=32, vocab_size=100)


def test_the_learning_rate_warms_up_stays_and_falls_linearly_to_zero():
    schedule = Schedule(kind="wsd", max_iters=100, warmup_iters=10, decay_fraction=0.2)
    rates = [lr_at(iteration, schedule) for iteration in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert set(rates[9:81]) == {1.0}
    assert rates[80:] == pytest.approx([1 - i / 20 for i in range(21)])
    assert rates[100] == 0.0


def test_cosine_ends_at_its_floor():
    schedule = Schedule(kind="cosine", max_iters=100, warmup_iters=0, final_lr_fraction=0.1)
    assert lr_at(0, schedule) == 1.0
    assert lr_at(50, schedule) == pytest.approx(0.55)
    assert lr_at(100, schedule) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("bias", [True, False])
def test_every_parameter_that_is_trained_belongs_to_exactly_one_group(name, bias):
    model = LanguageModel(SHAPE.model_copy(update={"bias": bias}), 0, compile=False)
    grouped = [id(p) for group in optim.all_groups(optim.build(model, Optim(name=name))) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_each_kind_of_parameter_has_its_own_rate_and_weight_decay(name):
    model = LanguageModel(SHAPE, 0, compile=False)
    names = {id(p): name for name, p in model.named_parameters()}

    def chosen(**keys):
        groups = optim.all_groups(optim.build(model, Optim(name=name, lr=1e-3, weight_decay=0.2, **keys)))
        return {names[id(p)]: (g["peak_lr"], g["weight_decay"]) for g in groups for p in g["params"]}

    plain = chosen()
    assert {n for n, (_, decay) in plain.items() if decay} == {
        n for n, p in model.named_parameters() if p.ndim == 2 and "wpe" not in n
    }
    assert {rate for rate, _ in plain.values()} == {1e-3}
    apart = chosen(embedding_lr=2e-3, embedding_weight_decay=0.0, vector_lr=4e-3, vector_weight_decay=0.01)
    for parameter, found in apart.items():
        kind = "embedding" if ".wte." in parameter else "matrix" if plain[parameter][1] else "vector"
        assert found == {"embedding": (2e-3, 0.0), "matrix": (1e-3, 0.2), "vector": (4e-3, 0.01)}[kind]


def test_newton_schulz_keeps_singular_vectors_and_levels_singular_values():
    torch.manual_seed(0)
    matrices = torch.randn(3, 24, 40)
    out = optim.newton_schulz(matrices)
    values = torch.linalg.svdvals(out)
    assert 0.6 < values.min() and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    off = u.mT @ out @ v.mT
    assert (off - torch.diag_embed(torch.diagonal(off, dim1=1, dim2=2))).abs().max() < 1e-3
    torch.testing.assert_close(optim.newton_schulz(matrices.mT), out.mT)


def test_muon_equals_torch_on_a_matrix_that_is_not_split():
    torch.manual_seed(0)
    start, gradients = torch.randn(32, 48), [torch.randn(32, 48) for _ in range(3)]
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    mine = optim.Muon([ours], lr=0.02, momentum=0.95, weight_decay=0.1)
    other = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        other.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() / moved < 0.02  # torch iterates in bf16: three digits


def test_q_k_and_v_are_orthogonalised_apart():
    torch.manual_seed(0)
    fused = torch.nn.Parameter(torch.zeros(16, 48))
    fused.grad = torch.cat([torch.randn(16, 16) * scale for scale in (1.0, 100.0, 1e-2)], dim=1)
    optimizer = optim.Muon([{"params": [fused], "blocks": 3}], lr=1.0, momentum=0.0, weight_decay=0.0)
    optimizer.step()
    for block in (-fused.detach() / (0.2 * 4)).chunk(3, dim=1):
        assert 0.6 < torch.linalg.svdvals(block).min() and torch.linalg.svdvals(block).max() < 1.3
