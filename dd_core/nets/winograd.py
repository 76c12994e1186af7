"""3 x 3 convolution by Winograd's algorithm, in float32 and bfloat16, on CPUs.

Where oneDNN convolves at the highest speed of the processor's products, only fewer products help: 16 for
every 36.  Their factors are sums of pixels and of taps.  In float32 the error of an output is that of oneDNN
or less, of a gradient of kernels up to three times that, 4e-7.  In bfloat16, to which the sums are rounded,
the deviation of either is .0043 of its size, where the definition's is .0017, the rounding of the result.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from dd_core.compiled import compiled, constant, pointers
from dd_core.devices import kind_of

DTYPES = (torch.float32, torch.bfloat16)
LANES = 16
"""Channels have to be a multiple of this: of the numbers in the largest register of winograd.c."""
POINTS = 16
"""Of a transformed kernel, 3 x 3 before."""
SOURCE = Path(__file__).with_name("winograd.c")
PLAIN: dict[str, Any] = {
    "kernel_size": (3, 3),
    "stride": (1, 1),
    "padding": (1, 1),
    "dilation": (1, 1),
    "groups": 1,
    "padding_mode": "zeros",
}
"""The convolutions that this is an algorithm for."""


def loops(dtype: torch.dtype) -> ctypes.CDLL | None:
    """winograd.c for one of DTYPES."""
    return compiled(SOURCE, *(["HALF"] if dtype == torch.bfloat16 else []))


@constant
def runs(dtype: torch.dtype) -> bool:
    """Whether winograd.c can be compiled here, and the processor has its instructions."""
    found = loops(dtype)
    return found is not None and bool(found.winograd_runs())


def suited(conv: nn.Conv2d, x: Tensor) -> torch.dtype | None:
    """The dtype in which `convolve` takes a layer's place; None: it does not.

    It does on CPUs, for the kernels that this is an algorithm for, channels in LANES and even sides.
    """
    if x.dim() != 4 or kind_of(x) != "cpu" or x.device.type != "cpu" or conv.weight.device != x.device:
        return None
    cast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if cast else x.dtype
    known = dtype in DTYPES and x.dtype in DTYPES and (cast or conv.weight.dtype == dtype)
    height, width = x.shape[2:]
    sizes = not (conv.in_channels % LANES or conv.out_channels % LANES or height % 2 or width % 2)
    fits = known and sizes and x.numel() > 0 and all(getattr(conv, name) == of for name, of in PLAIN.items())
    return dtype if fits and runs(dtype) else None


def laid(
    weight: Float[Tensor, " o i 3 3"], dtype: torch.dtype, *, turned: bool = False
) -> Float[Tensor, " n"]:
    """Kernels at their points, as winograd.c reads them; n = POINTS o i.

    Args:
        weight: Kernels.
        dtype: Of the features they are for.
        turned: Those that take gradients of the output to gradients of the input.
    """
    made: Tensor = torch.ops.ddiff.winograd_kernels(weight.detach(), dtype, turned)
    return made


def convolve(
    x: Float[Tensor, " b i h w"],
    weight: Float[Tensor, " o i 3 3"],
    bias: Float[Tensor, " o"] | None,
    onto: Float[Tensor, " b o h w"] | None,
    kernels: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, " b o h w"]:
    """The convolution of a layer that it is `suited` to, in channels_last; it can be differentiated once.

    Args:
        x: Features, in the dtype that `suited` names.
        weight: Kernels.
        bias: Of each output channel.
        onto: What the result is added to, in the dtype of x.
        kernels: `laid(weight, x.dtype)`, if that is at hand.
    """
    if torch.is_grad_enabled():
        return _Convolution.apply(x, weight, bias, onto, kernels)
    kernels = laid(weight, x.dtype) if kernels is None else kernels
    found: Tensor = torch.ops.ddiff.convolution(x, kernels, len(weight), bias, onto)
    return found


class Task(ctypes.Structure):
    """The struct of winograd.c: sizes, threads and whether the bias is bfloat16."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("batch", "height", "width", "from", "to")),
        *((name, ctypes.c_int) for name in ("threads", "half_bias")),
    )


def room_of_kernels(weight: Tensor, dtype: torch.dtype, turned: bool) -> Tensor:
    """An empty tensor for kernels at their points."""
    return weight.new_empty(POINTS * weight.shape[0] * weight.shape[1], dtype=dtype)


def kernels_at_points(weight: Tensor, dtype: torch.dtype, turned: bool) -> Tensor:
    """`laid` by winograd.c.

    Raises:
        ValueError: Sizes or dtypes do not match, so that the loop would read beyond its tensors.
    """
    made = room_of_kernels(weight, dtype, turned)
    if (
        weight.shape[2:] != (3, 3)
        or weight.shape[0] % LANES
        or weight.shape[1] % LANES
        or dtype not in DTYPES
    ):
        raise ValueError(
            f"kernels of 3 x 3, channels a multiple of {LANES}, for float32 or bfloat16; got"
            f" {tuple(weight.shape)} for {dtype}"
        )
    weight = weight.float()
    out, into, down, across = weight.stride()
    first = weight.data_ptr()
    strides, sizes = (out, into, down, across), weight.shape[1::-1]
    if turned:
        first += 4 * 2 * (down + across)  # the last tap
        strides, sizes = (into, out, -down, -across), weight.shape[:2]
    found = loops(dtype)
    assert found is not None
    found.winograd_lay(
        ctypes.c_void_p(first),
        (ctypes.c_long * 4)(*strides),
        *(ctypes.c_long(size) for size in sizes),
        torch.get_num_threads(),
        *pointers(made),
    )
    return made


def room(x: Tensor, kernels: Tensor, channels: int, bias: Tensor | None, onto: Tensor | None) -> Tensor:
    """An empty tensor for the result."""
    size = (len(x), channels, *x.shape[2:])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def convolution(
    x: Tensor, kernels: Tensor, channels: int, bias: Tensor | None, onto: Tensor | None
) -> Tensor:
    """`convolve` by winograd.c.

    Raises:
        ValueError: Sizes or dtypes do not match, so that the loop would read beyond its tensors.
    """
    out = room(x, kernels, channels, bias, onto)
    batch, into, height, width = x.shape
    fits = x.dtype == kernels.dtype and x.dtype in DTYPES and kernels.shape == (POINTS * into * channels,)
    fits = fits and into > 0 and not (into % LANES or channels % LANES or height % 2 or width % 2)
    fits = fits and (bias is None or bias.shape == (channels,))
    if not fits or (onto is not None and (onto.shape, onto.dtype) != (out.shape, out.dtype)):
        raise ValueError(
            f"features {tuple(x.shape)} in float32 or bfloat16, of even sides, to {channels} channels, all a"
            f" multiple of {LANES}, want {POINTS * into * channels} numbers of kernels in the same, a bias of"
            f" ({channels},) and to be added to {tuple(out.shape)} in the same; got {x.dtype},"
            f" {tuple(kernels.shape)} in {kernels.dtype}, {None if bias is None else tuple(bias.shape)},"
            f" {None if onto is None else (tuple(onto.shape), onto.dtype)}"
        )
    if not out.numel():
        return out
    x, kernels = x.contiguous(memory_format=torch.channels_last), kernels.contiguous()
    half = bias is not None and bias.dtype == x.dtype == torch.bfloat16
    if bias is not None:
        bias = (bias if half else bias.float()).contiguous()
    if onto is not None:
        onto = onto.contiguous(memory_format=torch.channels_last)
    task = Task(batch, height, width, into, channels, torch.get_num_threads(), half)
    found = loops(x.dtype)
    assert found is not None
    found.winograd(*pointers(x, kernels, bias, onto, out), task)
    return out


def room_of_gradients(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Empty tensors for the gradients of kernels and bias."""
    out = grad.shape[1]
    sizes = (out, x.shape[1], 3, 3), (out,)
    kernels, bias = (x.new_empty(size, dtype=torch.float32) for size in sizes)
    return kernels, bias


def gradients(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of kernels `o i 3 3` and of the bias `o`, in float32, from that of the output.

    Raises:
        ValueError: Sizes or dtypes do not match, so that the loop would read beyond its tensors.
    """
    (batch, into, height, width), channels = x.shape, grad.shape[1]
    fits = grad.shape == (batch, channels, height, width) and x.dtype == grad.dtype and x.dtype in DTYPES
    fits = fits and into > 0 and channels > 0
    if not fits or into % LANES or channels % LANES or height % 2 or width % 2:
        raise ValueError(
            f"features and gradients of one size and dtype, float32 or bfloat16, of even sides, channels a"
            f" multiple of {LANES}; got {tuple(x.shape)} and {tuple(grad.shape)}, {x.dtype} and {grad.dtype}"
        )
    x, grad = (of.contiguous(memory_format=torch.channels_last) for of in (x, grad))
    made = room_of_gradients(x, grad)
    task = Task(batch, height, width, into, channels, torch.get_num_threads(), False)
    found = loops(x.dtype)
    assert found is not None
    found.winograd_gradients(*pointers(x, grad, *made), task)
    return made


class _Convolution(torch.autograd.Function):
    """`convolve`, with its gradients by the same algorithm."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        onto: Tensor | None,
        kernels: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.of_bias = None if bias is None else bias.dtype  # type: ignore[attr-defined]
        kernels = laid(weight, x.dtype) if kernels is None else kernels
        found: Tensor = torch.ops.ddiff.convolution(x, kernels, len(weight), bias, onto)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        of_x, of_weight, of_bias, of_onto, _ = ctx.needs_input_grad  # type: ignore[attr-defined]
        d_x = d_weight = d_bias = None
        if of_x:
            turned = laid(weight, x.dtype, turned=True)
            d_x = torch.ops.ddiff.convolution(grad, turned, x.shape[1], None, None)
        if of_weight or of_bias:
            d_weight, d_bias = torch.ops.ddiff.convolution_gradients(x, grad)
            d_weight = d_weight.to(weight.dtype) if of_weight else None
            d_bias = d_bias.to(ctx.of_bias) if of_bias else None  # type: ignore[attr-defined]
        return d_x, d_weight, d_bias, grad if of_onto else None, None


OPERATIONS = torch.library.Library("ddiff", "FRAGMENT")
OPERATIONS.define("winograd_kernels(Tensor weight, ScalarType dtype, bool turned) -> Tensor")
OPERATIONS.impl("winograd_kernels", kernels_at_points, "CPU")
torch.library.register_fake("ddiff::winograd_kernels", room_of_kernels, lib=OPERATIONS)
OPERATIONS.define("convolution(Tensor x, Tensor kernels, int channels, Tensor? bias, Tensor? onto) -> Tensor")
OPERATIONS.impl("convolution", convolution, "CPU")
torch.library.register_fake("ddiff::convolution", room, lib=OPERATIONS)
OPERATIONS.define("convolution_gradients(Tensor x, Tensor grad) -> (Tensor, Tensor)")
OPERATIONS.impl("convolution_gradients", gradients, "CPU")
torch.library.register_fake("ddiff::convolution_gradients", room_of_gradients, lib=OPERATIONS)
