"""The precision that networks compute in: bfloat16 where the device multiplies it, float32 elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["auto", "bf16", "fp32"]


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware.

    A CPU without such instructions emulates them: a product of 2048^3 runs at .2 GFLOP/s in bfloat16
    and at 77 in float32 on two cores with AVX2 (torch 2.15).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return any(here for name, here in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
    return False


def dtype_of(device: torch.device, precision: Precision) -> torch.dtype:
    """bfloat16 if that is asked for or, with auto, if the device has it; float32 otherwise."""
    half = precision == "bf16" or (precision == "auto" and has_bf16(device))
    return torch.bfloat16 if half else torch.float32


def round_products(device: torch.device, precision: Precision = "auto") -> None:
    """From now on GPUs round the factors of float32 products and convolutions to 11 bits (TF32), or do not.

    They do not where float32 is asked for; PyTorch by itself rounds those of convolutions alone.  What stays
    float32 beside bfloat16, such as a prior or the features of a perceptual distance, would else not use the
    tensor cores, which are some seven times as fast.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = precision != "fp32"


@contextmanager
def exact_products() -> Iterator[None]:
    """Inside, GPUs round no factors of float32 products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Inside, matrix products and convolutions compute in `dtype_of`."""
    half = dtype_of(device, precision) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=half)
