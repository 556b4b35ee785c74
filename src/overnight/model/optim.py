"""Parameter groups, Muon, AdamW, and the learning rate as a function of the iteration."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from overnight.recipe.schema import Optim


def newton_schulz(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices (n, rows, columns) with their singular values pulled close to 1, the singular vectors kept.

    The quintic iteration of Keller Jordan's Muon (github.com/KellerJordan/Muon), in bf16 on CUDA and float32 elsewhere,
    where bf16 is emulated and coarser.
    """
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (n, side, side), side the shorter one
        x = 3.4445 * x + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ x
    return x if wide else x.mT


MatrixUpdate = tuple[Tensor, Tensor, dict]  # a parameter, its gradient, its group


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz, for hidden matrices (Keller Jordan, kellerjordan.github.io/posts/muon).

    Each parameter is cut into `blocks` along its columns (q, k and v of GPT-2's fused `c_attn` are three matrices), and
    matrices of one shape go through Newton-Schulz together. The update is scaled by 0.2 * sqrt(longer side), which
    gives it AdamW's typical size, so that learning rate and weight decay carry over (Liu 2025, arXiv 2502.16982).
    """

    def __init__(self, params, lr: float, momentum: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "blocks": 1})
        for param in (param for group in self.param_groups for param in group["params"]):
            self.state[param]["momentum"] = torch.zeros_like(param)

    def step(self, closure=None) -> None:  # type: ignore[override]  # no closure: nothing is ever re-evaluated
        """One update of every parameter that has a gradient."""
        self.prepared()()

    @torch.no_grad()
    def prepared(self) -> Callable[[], None]:
        """An update up to where weights and momentum change: a call that changes them, and takes no memory for it."""
        by_shape: dict[tuple[int, int], list[MatrixUpdate]] = defaultdict(list)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    by_shape[len(param), param.shape[1] // group["blocks"]].append((param, param.grad, group))
        return partial(self._change, [(work, self._directions(work)) for work in by_shape.values()])

    def _directions(self, work: list[MatrixUpdate]) -> Tensor:
        """(blocks of all parameters, rows, columns), for parameters whose blocks have one shape."""
        blocks: list[Tensor] = []
        for param, grad, group in work:
            average = self.state[param]["momentum"].lerp(grad, 1 - group["momentum"])
            update = grad.lerp(average, group["momentum"])  # Nesterov
            blocks += update.chunk(group["blocks"], dim=1)
        return newton_schulz(torch.stack(blocks))

    @torch.no_grad()
    def _change(self, prepared: list[tuple[list[MatrixUpdate], Tensor]]) -> None:
        for work, directions in prepared:
            scale = 0.2 * math.sqrt(max(directions.shape[1:]))
            of_each = directions.split([group["blocks"] for _, _, group in work])
            for (param, grad, group), mine in zip(work, of_each, strict=True):
                self.state[param]["momentum"].lerp_(grad, 1 - group["momentum"])
                param.mul_(1 - group["lr"] * group["weight_decay"])
                for block, direction in zip(param.chunk(group["blocks"], dim=1), mine, strict=True):
                    block.add_(direction, alpha=-scale * group["lr"])


def parameter_groups(model: nn.Module, optim: Optim) -> dict[str, dict]:
    """What is trained of a GPT-2, by kind, each with its peak learning rate and weight decay, its parameters by name.

    `matrices` of the blocks; the token `embedding`, which is also the head; `vectors`: norms, biases and positions.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kinds = {name: "vectors" if p.ndim < 2 or ".wpe." in name else "matrices" for name, p in named.items()}
    kinds |= {name: "embedding" for name in named if ".wte." in name}
    embedding_decay = optim.weight_decay if optim.embedding_weight_decay is None else optim.embedding_weight_decay
    chosen = {
        "matrices": {"lr": optim.lr, "weight_decay": optim.weight_decay},
        "embedding": {"lr": optim.embedding_lr or optim.lr, "weight_decay": embedding_decay},
        "vectors": {"lr": optim.vector_lr or optim.lr, "weight_decay": optim.vector_weight_decay},
    }
    return {kind: {"params": {n: p for n, p in named.items() if kinds[n] == kind}, **of} for kind, of in chosen.items()}


def build(model: nn.Module, optim: Optim) -> list[torch.optim.Optimizer]:
    """The optimizers of a recipe over the parameters of a GPT-2; each group remembers its `peak_lr`.

    Under `muon` the matrices of the blocks go to Muon and everything else to AdamW. The state is made here, not by the
    first update: an update changes everything or nothing, so it takes no memory halfway.
    """
    groups = parameter_groups(model, optim)
    matrices = groups.pop("matrices") if optim.name == "muon" else None
    of_adamw = [{**group, "params": list(group["params"].values())} for group in groups.values()]
    adamw = torch.optim.AdamW(of_adamw, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), fused=True)
    for param in (param for group in adamw.param_groups for param in group["params"]):
        adamw.state[param] = {"step": torch.zeros((), device=param.device)}
        adamw.state[param] |= {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if matrices:
        named = matrices.pop("params")
        fused_qkv = [p for name, p in named.items() if ".c_attn." in name]
        single = [p for name, p in named.items() if ".c_attn." not in name]
        halves = [{"params": fused_qkv, "blocks": 3}, {"params": single}]
        optimizers.append(Muon(halves, momentum=optim.momentum, **matrices))
    for group in all_groups(optimizers):
        group["peak_lr"] = group["lr"]
    return optimizers


def prepared(optimizers: list[torch.optim.Optimizer]) -> list[Callable[[], None]]:
    """An update up to where weights and state change: calls that change them, in place and without memory of their own.

    Muon's matrices are made here; the fused AdamW needs none.
    """
    return [each.prepared() if isinstance(each, Muon) else each.step for each in optimizers]


def all_groups(optimizers: list[torch.optim.Optimizer]) -> list[dict]:
    """The parameter groups of several optimizers."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def set_lr(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    """Give every group its `peak_lr` times `share`."""
    for group in all_groups(optimizers):
        group["lr"] = group["peak_lr"] * share
