"""The precision that networks compute in: bfloat16 where the device multiplies it, float32 elsewhere."""

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
    """From now on GPUs round the factors of float32 products to 11 bits (TF32), unless float32 is asked for.

    As PyTorch lets their convolutions; without it what stays float32 beside bfloat16, such as the features of
    a perceptual distance, would not use the tensor cores, which are some seven times as fast.
    """
    if device.type == "cuda" and precision != "fp32":
        torch.set_float32_matmul_precision("high")


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Inside, matrix products and convolutions compute in `dtype_of`."""
    half = dtype_of(device, precision) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=half)
