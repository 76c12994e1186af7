"""Networks compute in bfloat16 where the device has it, and where it is asked for."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dd_core.denoiser import Conditioning
from dd_core.nets.dit import DiT, DiTSpec
from dd_core.nets.prior import CausalPrior, CausalPriorSpec, PriorNet, PriorNetSpec
from dd_core.nets.quantiser import Quantiser
from dd_core.nets.unet import UNet, UNetSpec
from dd_core.precision import Precision, autocast, has_bf16, round_products
from tests.parity.reference import randomised

CPU = torch.device("cpu")


def product(precision: Precision) -> torch.dtype:
    with autocast(CPU, precision):
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


@pytest.mark.parametrize(
    ("device", "precision", "found"),
    [
        ("cpu", "auto", "highest"),
        ("cuda", "fp32", "highest"),
        ("cuda", "auto", "high"),
        ("cuda", "bf16", "high"),
    ],
)
def test_products_are_rounded_on_gpus_unless_float32_is_asked_for(
    device: str, precision: Precision, found: str
) -> None:
    try:
        round_products(torch.device(device), precision)
        assert torch.get_float32_matmul_precision() == found
        assert torch.backends.cudnn.allow_tf32 == (device == "cpu" or precision != "fp32")
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True


def test_the_nearest_vector_of_a_codebook_is_found_with_whole_factors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside = list[str]()
    argmin = torch.Tensor.argmin

    def noted(self: torch.Tensor, dim: int) -> torch.Tensor:
        inside.append(torch.get_float32_matmul_precision())
        return argmin(self, dim)

    monkeypatch.setattr(torch.Tensor, "argmin", noted)
    torch.set_float32_matmul_precision("high")
    try:
        Quantiser(8, 4)(torch.randn(1, 4, 2, 2))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert inside == ["highest"]


def test_what_is_asked_for_is_done() -> None:
    assert product("bf16") == torch.bfloat16
    assert product("fp32") == torch.float32


@pytest.mark.parametrize(
    ("instructions", "wanted"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({"avx512_f": True, "avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
    ],
)
def test_auto_follows_the_instructions_of_the_cpu(
    instructions: dict[str, bool], wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    assert product("auto") == wanted


def test_this_cpu_says_what_its_kernel_says() -> None:
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    if not flags:
        pytest.skip("no /proc/cpuinfo with x86 flags here")
    assert has_bf16(CPU) == ("avx512_bf16" in flags or "amx_bf16" in flags)


def test_a_device_that_is_not_known_computes_in_float32() -> None:
    assert not has_bf16(torch.device("meta"))


NETS: dict[str, Callable[[], nn.Module]] = {
    "level_out": lambda: UNet(
        UNetSpec(width=16, channel_mult=(1, 2), groups=4, attention_at=(2,), head_width=8),
        in_channels=3,
        out_channels=6,
    ),
    "told": lambda: DiT(
        DiTSpec(image_size=16, stem=2, conv_width=16, width=16, layers=1, head_width=8),
        in_channels=3,
        out_channels=6,
    ),
    "sigma_in": lambda: PriorNet(PriorNetSpec(embedding_width=16, text_width=16, context_length=8)),
    "level_in": lambda: CausalPrior(
        CausalPriorSpec(width=16, layers=1, heads=2, context_length=5, embedding_width=16)
    ),
}
"""What reads the noise level, or is the last to -> a network that has it."""


@pytest.mark.parametrize("reader", NETS)
def test_noise_levels_and_answers_are_not_rounded_under_autocast(reader: str) -> None:
    net = randomised(NETS[reader]())
    inside: list[torch.Tensor] = []
    (level,) = (module for name, module in net.named_modules() if name.split(".")[-1] == reader)
    level.register_forward_hook(lambda layer, given, out: inside.append(out))
    pixels = reader in ("level_out", "told")
    x = torch.randn(2, 3, 16, 16) if pixels else torch.randn(2, 16)
    width = net.sigma_in[0].out_features if isinstance(net, PriorNet) else 16
    text = torch.randn(2, 1 if isinstance(net, PriorNet) else 6, width)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        answer = net(x, torch.ones(2), Conditioning(text=None if pixels else text))
    for found in (answer, *inside):
        assert found.dtype == torch.float32
        assert not torch.equal(found, found.bfloat16().float())
