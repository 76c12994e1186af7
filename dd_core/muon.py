"""Muon: the momentum of a matrix, made orthogonal, is its step; kernels are matrices [out, in * k * k].

torch's own multiplies in bfloat16 on every device; a CPU without bfloat16 emulates that at a four-hundredth
of the speed, so that Muon took three quarters of a training step there.  This one uses bfloat16 only where
the device has it.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn, optim

from dd_core.precision import has_bf16

QUINTIC = (3.4445, -4.7750, 2.0315)
"""a, b, c of a s + b s^3 + c s^5, which drives the singular values s of (0, 1] to about 1."""
ITERATIONS = 5


class Muon(optim.Optimizer):
    """Muon with steps as large as AdamW's, so that both may share a learning rate.

    Args:
        params: Matrices and kernels of convolutions.
        lr: Learning rate.
        weight_decay: Decoupled, as AdamW's.
        momentum: Of the running average of gradients, with Nesterov's look-ahead.

    Source: Jordan et al. 2024 (Muon), with the scale of Liu et al. 2025 (arXiv:2502.16982, section 2.2).
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, *, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of every weight that has a gradient; a closure is called first, and its loss returned."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.step_one(param, param.grad, group)
        return loss

    def step_one(self, param: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        """One step of one weight."""
        rate, momentum, state = group["lr"], group["momentum"], self.state[param]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(param)
        average: Tensor = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        ahead = grad.lerp(average, momentum).flatten(1)
        param.mul_(1 - rate * group["weight_decay"])
        param.add_(orthogonal(ahead).reshape(param.shape), alpha=-rate * 0.2 * max(ahead.shape) ** 0.5)


def orthogonal(matrix: Float[Tensor, " rows columns"]) -> Float[Tensor, " rows columns"]:
    """U V^T of U S V^T, roughly: singular values that are not tiny end between .7 and 1.2.

    In bfloat16 where the device has it, else in the matrix's own dtype.

    Source: Jordan et al. 2024 (Muon): five Newton-Schulz iterations.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    if has_bf16(x.device):
        x = x.bfloat16()
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
