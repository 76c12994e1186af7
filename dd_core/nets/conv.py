"""A convolution that can add its output to features; on a CPU frozen weights are laid out only once.

3 x 3 is winograd.c's where that runs (`winograd.suited`); everything else is oneDNN's, which wants weights in
a layout of its own.  PyTorch's `conv2d` converts them at every call, which at 8 and 16 px takes as long as
the convolution, and adding its output to something reads and writes it once more.  Both can be avoided by
oneDNN's operators, which torch.compile calls too.
"""

import platform
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dd_core.devices import kind_of
from dd_core.nets import winograd
from dd_core.precision import has_bf16


@cache
def kinds() -> tuple[torch.dtype, ...]:
    """Dtypes that oneDNN convolves with native instructions here; none on platforms not tried."""
    if not torch.backends.mkldnn.is_available() or platform.machine() != "x86_64":
        return ()
    return (torch.float32, torch.bfloat16) if has_bf16(torch.device("cpu")) else (torch.float32,)


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether to call oneDNN directly: on a CPU in one of `kinds`, no gradients, autocast or compilation."""
    asked = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    return (
        not asked
        and type(x) is Tensor  # a FakeTensor has no content
        and kind_of(x) == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in kinds()
        and bool(torch.backends.mkldnn.enabled)
        and x.numel() > 0
    )


class Conv(nn.Conv2d):
    """torch.nn.Conv2d with zero padding, whose output is added to `onto` if that is given.

    Without gradients frozen weights are laid out once (for oneDNN for the input size of the first call), and
    again after they were changed in place or replaced, but not if the change was hidden from autograd, in
    `weight.data`.
    """

    _laid_out: tuple[tuple[object, ...], Tensor, Tensor] | None = None
    """What it was made of; those weights, so that no others get their address; the result."""

    def forward(
        self, x: Float[Tensor, " b i h w"], onto: Float[Tensor, " b o h2 w2"] | None = None
    ) -> Float[Tensor, " b o h2 w2"]:
        if self.weight.requires_grad:
            self._laid_out = None  # a fused optimizer counts no change of what was frozen before
        dtype = winograd.suited(self, x)
        if dtype is not None:
            return self.with_fewer_products(x.to(dtype), onto)
        if by_onednn(x, self.weight):
            return self.directly(x, onto)
        out = super().forward(x)
        return out if onto is None else onto + out

    def with_fewer_products(self, x: Tensor, onto: Tensor | None) -> Tensor:
        """The convolution by winograd.c, added to `onto`."""
        lay = partial(winograd.laid, self.weight, x.dtype)
        imagined = torch.compiler.is_compiling() or type(x) is not Tensor  # a FakeTensor has no address
        passing = torch.is_grad_enabled() or imagined or self.learns()
        kernels = lay() if passing else self.laid_out(f"winograd in {x.dtype}", lay)
        size = (len(x), self.out_channels, *x.shape[2:])
        inside = onto is not None and onto.dtype == x.dtype and onto.shape == size
        out = winograd.convolve(x, self.weight, self.bias, onto if inside else None, kernels)
        return out if onto is None or inside else onto + out

    def directly(self, x: Tensor, onto: Tensor | None) -> Tensor:
        """The convolution by oneDNN's operators, added to `onto`."""
        weight = self.weight
        where: tuple[Any, ...] = (self.padding, self.stride, self.dilation, self.groups)
        if not self.learns():
            lay = partial(torch.ops.mkldnn._reorder_convolution_weight, weight, *where, list(x.shape))
            weight = self.laid_out("onednn", lay)
        if onto is None:
            return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *where, "none", [], "")
        onto = onto.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, onto, weight, self.bias, *where, "add", 1.0, None, [], None
        )

    def learns(self) -> bool:
        """Whether the weights may change without a trace; those made in inference mode count no versions."""
        return self.weight.requires_grad or self.weight.is_inference()

    def laid_out(self, algorithm: str, lay: Callable[[], Tensor]) -> Tensor:
        """Frozen weights as an algorithm wants them, laid out again if they have changed."""
        weight, found = self.weight, self._laid_out
        made_of = (algorithm, weight.data_ptr(), weight._version, weight.dtype)
        if found is None or found[0] != made_of:
            self._laid_out = found = (made_of, weight.detach(), lay())
        return found[2]

    def __getstate__(self) -> dict[str, Any]:
        """Without the laid-out weights, which cannot be copied but can be made again."""
        return {name: part for name, part in self.__dict__.items() if name != "_laid_out"}
