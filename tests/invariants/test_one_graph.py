"""The compiled body is one graph whose attention is causal without a mask, and nothing in it is read by the host.

So is the compiled loss, which few compilations serve in all sizes.
"""

from collections import defaultdict
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from overnight.model.gpt2 import LanguageModel
from overnight.model.loss import compiled_softmax, summed_loss
from overnight.planning import model_size
from overnight.recipe.schema import Model

SHAPE = Model(n_layer=3, n_head=2, n_embd=64, n_positions=32, vocab_size=100)
HOST_READS = ("item", "tolist", "_local_scalar_dense", "numpy", "nonzero", "all")  # `all` asks whether a mask is needed


@pytest.fixture
def graphs(monkeypatch):
    """By the compiled function's name, every graph that is captured from here on; they run as they are."""
    captured, compile = defaultdict(list), torch.compile

    def record(name, graph, inputs):
        captured[name].append(graph)
        return graph.forward

    def recorded(function, **options):
        return compile(function, backend=partial(record, function.__name__), **options)

    monkeypatch.setattr(torch, "compile", recorded)
    torch._dynamo.reset()
    compiled_softmax.cache_clear()
    counters.clear()
    yield captured
    compiled_softmax.cache_clear()
    torch._dynamo.reset()


class Operators(TorchDispatchMode):
    """Collects the names of the operators that really run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def step(attention):
    """One forward and backward of a compiled model with this attention; the model."""
    model = LanguageModel(SHAPE, 0, compile=True)
    model.gpt2.set_attn_implementation(attention)
    ids = torch.randint(0, SHAPE.vocab_size, (2, 32))
    model(ids, ids).backward()
    return model


def problems(graphs):
    """What is wrong with the captured graphs, in words; empty for the body that we want."""
    found = [f"{len(graphs)} graphs"] if len(graphs) != 1 else []
    found += [f"graph break: {reason}" for reason in counters["graph_break"]]
    nodes = [node for graph in graphs for node in graph.graph.nodes if node.op.startswith("call")]
    names = [node.target if isinstance(node.target, str) else node.target.__name__ for node in nodes]
    found += [f"host read: {name}" for name in names if name in HOST_READS]
    attention = [node for node, name in zip(nodes, names, strict=True) if name == "scaled_dot_product_attention"]
    found += [f"{len(attention)} attention calls"] if len(attention) != SHAPE.n_layer else []
    for node in attention:
        mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
        found += [f"mask {mask}"] if mask is not None else []
        found += ["not causal"] if node.kwargs.get("is_causal") is not True else []
    return found


def test_the_compiled_body_is_one_graph_with_causal_attention_no_mask_and_no_host_read(graphs):
    step("causal_only")
    assert problems(graphs["body"]) == []


def test_stock_sdpa_would_not_pass(graphs):
    step("sdpa")
    found = problems(graphs["body"])
    assert sum(problem.startswith("mask") for problem in found) == found.count("not causal") == SHAPE.n_layer


def test_a_second_size_is_compiled_for_itself_and_stays_one_graph(graphs):
    model = step("causal_only")
    ids = torch.randint(0, SHAPE.vocab_size, (4, 32))
    model(ids, ids).backward()
    bodies = graphs["body"]
    assert len(bodies) == 2
    shapes = [node.meta["example_value"].shape for body in bodies for node in body.graph.find_nodes(op="placeholder")]
    assert all(isinstance(side, int) for shape in shapes for side in shape)
    assert problems(bodies[1:]) == []


def test_a_graph_break_in_the_body_ends_the_start_instead_of_slowing_the_night(monkeypatch):
    def broken(model, ids):
        hidden = model.gpt2.transformer(ids, use_cache=False).last_hidden_state
        torch._dynamo.graph_break()
        return hidden

    monkeypatch.setattr(LanguageModel, "body", broken)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        step("causal_only")


def test_the_compiled_loss_is_one_graph_for_each_use_however_its_chunks_are_cut(graphs, monkeypatch):
    monkeypatch.setattr(model_size, "LOSS_CHUNK", dict.fromkeys(model_size.LOSS_CHUNK, 32))
    weight = torch.randn(128, 8)
    for gradients in (True, False):
        for rows in (64, 32, 40, 16, 7, 63, 31, 2, 5, 1, 33):
            hidden, targets = torch.randn(rows, 8, requires_grad=True), torch.randint(100, (rows,))
            with torch.set_grad_enabled(gradients):
                summed_loss(hidden, weight, targets, 100, compile=True)
    assert not counters["graph_break"]
    assert (
        len(graphs["softmax_to_compile_"]) <= 3 * 2
    )  # a first size, any other, a single row; with gradients and without


@pytest.mark.parametrize(("attention", "reads"), [("causal_only", False), ("sdpa", True)])
def test_the_host_reads_nothing_in_a_training_forward_where_stock_sdpa_reads_once(attention, reads):
    model = LanguageModel(SHAPE, 0, compile=False)
    model.gpt2.set_attn_implementation(attention)
    ids = torch.randint(0, SHAPE.vocab_size, (2, 32))
    with Operators() as operators:
        model(ids, ids).backward()
    assert operators.names > {"addmm"}
    assert ("_local_scalar_dense" in operators.names) == reads
