"""Published code as an oracle: read from a folder of checkouts, compared by answers and gradients."""

import importlib
import logging
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dd_core.layouts.moves import Move, fitted, inward

log = logging.getLogger(__name__)
FOLDER = "DD_REFERENCE_DIR"
SHIMS: Mapping[str, Mapping[str, object]] = {
    "mpi4py": {"MPI": None},
    "piq": {"LPIPS": None},
    "blobfile": {},
    "torchvision": {},
    "torchvision.transforms": {"RandomCrop": None},
}
"""What the published code of OpenAI imports and does not need here."""


def checkout(repository: str, file: str) -> Path:
    """`$DD_REFERENCE_DIR/<owner>/<repository>`; the test is skipped, by name, where the file is not there."""
    folder = os.environ.get(FOLDER)
    if not folder:
        pytest.skip(f"{FOLDER} is not set; {repository} is read from there")
    path = Path(folder) / repository
    if not (path / file).is_file():
        pytest.skip(f"there is no {path / file}")
    return path


@contextmanager
def importing(
    path: Path, *, shims: Mapping[str, Mapping[str, object]] | None = None
) -> Iterator[Callable[[str], Any]]:
    """An importer of modules of a checkout; what it imported is forgotten afterwards."""
    before = set(sys.modules)
    for name, content in (shims or {}).items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        sys.modules.setdefault(name, module)
    sys.path.insert(0, str(path))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(path))
        for name in set(sys.modules) - before:
            where = str(getattr(sys.modules[name], "__file__", None) or "")
            if where.startswith(str(path)) or name in (shims or {}):
                del sys.modules[name]


def settings_of_ddpm(side: int, **changes: object) -> types.SimpleNamespace:
    """The configuration from which the code of DDIM makes a network of DDPM; that of CIFAR-10, changed."""
    model = {
        "type": "simple",
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 2, 2, 2],
        "num_res_blocks": 2,
        "attn_resolutions": [16],
        "dropout": 0.0,
        "resamp_with_conv": True,
    }
    return types.SimpleNamespace(
        model=types.SimpleNamespace(**model | changes),
        data=types.SimpleNamespace(image_size=side),
        diffusion=types.SimpleNamespace(num_diffusion_timesteps=1000),
    )


def randomised(module: nn.Module) -> nn.Module:
    """Weights that are all awake: none is zero, signals keep about their size."""
    torch.manual_seed(0)
    for name, weight in module.named_parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        else:
            nn.init.normal_(weight, mean=0.0 if name.endswith(("bias", ".b")) else 1.0, std=0.2)
    return module


class Differences(NamedTuple):
    """Largest differences, over the largest value."""

    answer: float
    gradient: float


def differences(
    theirs: nn.Module,
    ours: nn.Module,
    moves: Iterable[Move],
    ask: Callable[[nn.Module], Tensor],
    our_ask: Callable[[Any], Tensor],
) -> Differences:
    """Give our network their weights, ask both, and compare answers and the gradient of every weight."""
    moves = list(moves)
    ours.load_state_dict(fitted(ours, inward(dict(theirs.state_dict()), moves)), strict=False)
    answer, our_answer = ask(theirs), our_ask(ours)
    target = torch.randn(answer.shape, generator=torch.Generator().manual_seed(1))
    (answer * target).mean().backward()
    (our_answer * target).mean().backward()
    grads = {name: grad_of(weight) for name, weight in theirs.named_parameters()}
    expected = inward(grads, [move for move in moves if set(move.theirs) <= grads.keys()])
    apart = [(grad_of(weight) - expected[name]).abs().max() for name, weight in ours.named_parameters()]
    largest = max(grad.abs().max().item() for grad in expected.values())
    found = Differences(
        ((answer - our_answer).abs().max() / answer.abs().max()).item(), max(apart).item() / largest
    )
    log.info("answers %.1e, gradients %.1e apart", *found)
    return found


def agree(
    theirs: nn.Module,
    ours: nn.Module,
    moves: Iterable[Move],
    ask: Callable[[nn.Module], Tensor],
    our_ask: Callable[[Any], Tensor],
) -> None:
    """Answers and gradients are theirs: to 1e-5 in float32, where each side rounds in an order of its own,
    and to 1e-6 in float64, where only the formulas are left."""
    moves = list(moves)
    assert max(differences(theirs, ours, moves, ask, our_ask)) <= 1e-5
    for net in (theirs, ours):
        net.zero_grad()
    with in_float64(theirs, ours):
        assert max(differences(theirs, ours, moves, ask, our_ask)) <= 1e-6


@contextmanager
def in_float64(*nets: nn.Module) -> Iterator[None]:
    """A world where code that asks for float32, as published norms and embeddings do, gets float64."""
    before = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        for net in nets:
            net.double().register_forward_pre_hook(told_in_float64, with_kwargs=True)
            for module in net.modules():
                if getattr(module, "dtype", None) is torch.float32:  # what they cast their input to
                    patch.setattr(module, "dtype", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(torch, "float32", torch.float64)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def told_in_float64(net: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
    """What a network is asked with, its numbers in float64."""
    return tree_map(widened, (given, named))


def widened(value: Any) -> Any:
    """A tensor of real numbers in float64; anything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def grad_of(weight: Tensor) -> Tensor:
    """Its gradient, or zeros."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad
