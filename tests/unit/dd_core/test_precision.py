"""Networks compute in bfloat16 where the device has it, and where it is asked for."""

from pathlib import Path

import pytest
import torch

from dd_core.precision import Precision, autocast, has_bf16

CPU = torch.device("cpu")


def product(precision: Precision) -> torch.dtype:
    with autocast(CPU, precision):
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


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
