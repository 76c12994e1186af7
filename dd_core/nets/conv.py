"""A convolution that may add its answer to features; a CPU lays out the weights of a frozen one once.

oneDNN multiplies weights in an order of its own.  PyTorch's `conv2d` brings them into it at every call, which
at 8 and 16 px takes as long as the convolution, and reads and writes the answer once more to add it to
something.  Both can be left to oneDNN by calls that torch.compile makes too.
"""

import platform
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dd_core.devices import kind_of
from dd_core.precision import has_bf16


@cache
def kinds() -> tuple[torch.dtype, ...]:
    """Of numbers that oneDNN convolves here by the processor's instructions; none where untried."""
    if not torch.backends.mkldnn.is_available() or platform.machine() != "x86_64":
        return ()
    return (torch.float32, torch.bfloat16) if has_bf16(torch.device("cpu")) else (torch.float32,)


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether nothing wants PyTorch's own call: gradients, autocast, compiling, another device or dtype."""
    asked = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    return (
        not asked
        and type(x) is Tensor  # not one without content
        and kind_of(x) == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in kinds()
        and bool(torch.backends.mkldnn.enabled)
        and x.numel() > 0
    )


class Conv(nn.Conv2d):
    """torch.nn.Conv2d around zeros, whose answer is added to `onto` if there is one.

    Frozen weights are laid out for the size of the first call, and anew where they were changed in place or
    replaced, but not where that was hidden from autograd, through `weight.data`.
    """

    _laid_out: tuple[tuple[object, ...], Tensor] | None = None

    def forward(
        self, x: Float[Tensor, " b i h w"], onto: Float[Tensor, " b o h2 w2"] | None = None
    ) -> Float[Tensor, " b o h2 w2"]:
        if not by_onednn(x, self.weight):
            out = super().forward(x)
            return out if onto is None else onto + out
        learns = self.weight.requires_grad or self.weight.is_inference()  # that one counts no changes
        weight = self.weight if learns else self.laid_out(x)
        where: tuple[Any, ...] = (self.bias, self.padding, self.stride, self.dilation, self.groups)
        if onto is None:
            return torch.ops.mkldnn._convolution_pointwise(x, weight, *where, "none", [], "")
        onto = onto.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, onto, weight, *where, "add", 1.0, None, [], None
        )

    def laid_out(self, x: Tensor) -> Tensor:
        """The weights as oneDNN wants them, made anew where they have changed."""
        made_of = (self.weight.data_ptr(), self.weight._version, self.weight.dtype)
        if self._laid_out is None or self._laid_out[0] != made_of:
            self._laid_out = (
                made_of,
                torch.ops.mkldnn._reorder_convolution_weight(
                    self.weight, self.padding, self.stride, self.dilation, self.groups, list(x.shape)
                ),
            )
        return self._laid_out[1]

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be laid out again, and cannot be copied."""
        return {name: part for name, part in self.__dict__.items() if name != "_laid_out"}
