"""A device that is not the CPU, on machines without one: what is left behind on the CPU is an error there.

What is on the CPU is computed.  Tensors elsewhere have a shape, a type and a device but no content
(workflows.hollow), and PyTorch refuses to mix them with tensors of the CPU, as it does with a GPU's.
Code that reads one of their values gets one of `workflows.estimate.Content`.

PyTorch cannot forget a kind of device, so all of this is for a process of its own.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves

from workflows.estimate import Content
from workflows.hollow import Hollow, Hollowing

ATEN = torch.ops.aten
KIND = "elsewhere"
MADE_OF_NUMBERS = (torch.tensor, torch.as_tensor, Tensor.new_tensor)


class Backend(backend_registration._DummyBackendModule):
    """What autocast asks of a kind of device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class MadeHere(TorchFunctionMode):
    """Tensors of given numbers are made on the CPU and copied: PyTorch's own way passes by the modes."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in MADE_OF_NUMBERS:
            return func(*args, **(kwargs or {}))
        named = dict(kwargs or {})
        like = args[0] if func is Tensor.new_tensor else None
        device = named.pop("device", None) or (torch.device("cpu") if like is None else like.device)
        if like is not None:
            named.setdefault("dtype", like.dtype)
        return torch.tensor(args[-1], **named).to(device)


class Elsewhere(Content):
    """Hands what concerns the other device to Hollowing; the rest is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.hollowing = Hollowing()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        goes = getattr(named.get("device"), "type", "cpu") == KIND
        if not goes and not any(isinstance(one, Hollow) for one in tree_leaves((args, named))):
            return func(*args, **named)
        if func is ATEN.equal.default:
            return False
        with self.hollowing:
            return super().__torch_dispatch__(func, types, args, named)


def carried(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` that puts new parameters in place of the old: fake ones cannot change in place."""
    del recurse
    for child in module.children():
        child._apply(fn)
    for name, before in module._parameters.items():
        if before is not None:
            with torch.no_grad():
                after = fn(before)
            module._parameters[name] = nn.Parameter(after, before.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else fn(buffer)
    return module


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """The other device, while the block runs."""
    if backend_registration.torch._C._get_privateuse1_backend_name() != KIND:
        backend_registration._setup_privateuseone_for_python_backend(KIND, Backend())
    library = torch.library.Library("_", "IMPL")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    with mock.patch.object(nn.Module, "_apply", carried), MadeHere(), Elsewhere():
        yield torch.device(KIND, 0)
