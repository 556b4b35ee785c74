"""The compiled body is one graph whose attention is causal without a mask, and nothing in it is read by the host."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from overnight.model import LanguageModel
from overnight.recipe import Model

SHAPE = Model(n_layer=3, n_head=2, n_embd=64, n_positions=32, vocab_size=100)
HOST_READS = ("item", "tolist", "_local_scalar_dense", "numpy", "nonzero", "all")  # `all` asks whether a mask is needed


@pytest.fixture
def graphs(monkeypatch):
    """Records every graph that torch.compile captures from here on, and runs it as it is."""
    captured, compile = [], torch.compile

    def record(graph, inputs):
        captured.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=record, **options))
    torch._dynamo.reset()
    counters.clear()
    yield captured
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
    assert problems(graphs) == []


def test_stock_sdpa_would_not_pass(graphs):
    step("sdpa")
    found = problems(graphs)
    assert sum(problem.startswith("mask") for problem in found) == found.count("not causal") == SHAPE.n_layer


def test_a_second_size_is_compiled_for_itself_and_stays_one_graph(graphs):
    model = step("causal_only")
    ids = torch.randint(0, SHAPE.vocab_size, (4, 32))
    model(ids, ids).backward()
    assert len(graphs) == 2
    shapes = [node.meta["example_value"].shape for graph in graphs for node in graph.graph.find_nodes(op="placeholder")]
    assert all(isinstance(side, int) for shape in shapes for side in shape)
    assert problems(graphs[1:]) == []


@pytest.mark.parametrize(("attention", "reads"), [("causal_only", False), ("sdpa", True)])
def test_the_host_reads_nothing_in_a_training_forward_where_stock_sdpa_reads_once(attention, reads):
    model = LanguageModel(SHAPE, 0, compile=False)
    model.gpt2.set_attn_implementation(attention)
    ids = torch.randint(0, SHAPE.vocab_size, (2, 32))
    with Operators() as operators:
        model(ids, ids).backward()
    assert operators.names > {"addmm"}
    assert ("_local_scalar_dense" in operators.names) == reads
