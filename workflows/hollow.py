"""Tensors that have a shape, a type and a storage but no content, and cost little to compute with.

PyTorch's own (FakeTensorMode) take half a millisecond an operation, most of it to find what they remember of
an equal one.  Here FakeTensorMode is asked once for each operation on arguments of the same shapes, and what
it says is kept.
"""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

CPU, META = torch.device("cpu"), torch.device("meta")


class Hollow(Tensor):
    """A tensor without content.

    Args:
        meta: Its shape, strides, type and storage; views of one tensor share a storage.
        device: Where it seems to be.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    meta: Tensor

    def __new__(cls, meta: Tensor, device: torch.device) -> "Hollow":
        made = Tensor._make_wrapper_subclass(
            cls,
            meta.size(),
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=device,
        )
        made.meta = meta
        return made

    def tolist(self) -> Any:
        """Its items, each of which is asked for: PyTorch would read the memory that is not there."""
        return [one.tolist() for one in self] if self.ndim else self.item()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        raise RuntimeError(f"{func}: a hollow tensor is computed with inside Hollowing alone")


class Like(NamedTuple):
    """What is kept of a result."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Hollowing(TorchDispatchMode):
    """Inside, every tensor that is made is hollow; others may be computed with as if they were.

    An operation fails as in FakeTensorMode if it asks for content, or on tensors that do not go together.
    """

    known: ClassVar[dict[Any, Any]] = {}
    """What FakeTensorMode has answered, here or elsewhere in this process: it follows from the key."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode()
        self.fake.cache_enabled = False
        self.filled: dict[int, tuple[Tensor, Tensor]] = {}
        """Tensors with content that were met, by id, each with its counterpart without."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named, result = dict(kwargs or {}), result_of(func)
        if result == "view":
            named = {name: self.metas(value) for name, value in named.items()}
            return hollow(func(*self.metas(args), **named), device_of(args))
        if result == "reshaped":
            func(*self.metas(args), **named)
            with no_dispatch():
                return func(*args, **named)
        if result == "fact":
            return self.asked(func, args, named)
        key = (func, signature(args), *((name, signature(value)) for name, value in named.items()))
        if key not in self.known:
            self.known[key] = likes(self.asked(func, args, named))
        return args[0] if result == "first" else hollow(self.known[key])

    def asked(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What FakeTensorMode answers."""
        with self.fake:
            return func(*self.fakes(args), **{name: self.fakes(value) for name, value in kwargs.items()})

    def metas(self, one: Any) -> Any:
        """An argument, its tensors without content."""
        if isinstance(one, Hollow):
            return one.meta
        if isinstance(one, Tensor):
            known = self.filled.get(id(one))
            if known is None:  # the tensor is kept as well, so that no other gets its id
                known = self.filled[id(one)] = one, empty(like(one))
            return known[1]
        return type(one)(map(self.metas, one)) if isinstance(one, (list, tuple)) else one

    def fakes(self, one: Any) -> Any:
        """An argument, its tensors as FakeTensorMode has them."""
        if isinstance(one, Tensor):
            meta = one.meta if isinstance(one, Hollow) else empty(like(one))
            return FakeTensor(self.fake, meta, one.device)
        return type(one)(map(self.fakes, one)) if isinstance(one, (list, tuple)) else one


@functools.cache
def result_of(func: Any) -> str:
    """What an operation returns.

    That is its `first` argument with other content, or `reshaped`, a `view`, something `new` (or nothing,
    after it has changed a list of tensors), or a `fact`: no tensor.
    """
    schema = func._schema
    marks = [argument.alias_info for argument in schema.arguments]
    returned = [one.alias_info for one in schema.returns]
    if torch.Tag.inplace_view in func.tags:
        return "reshaped"
    if marks and marks[0] and marks[0].is_write and len(returned) == 1:
        return "first"
    if any(returned):
        return "view"
    return "new" if any(marks) or any("Tensor" in str(one.type) for one in schema.returns) else "fact"


def signature(one: Any) -> Any:
    """What of an argument decides the shape of the result."""
    if isinstance(one, Tensor):
        return like(one)
    return tuple(map(signature, one)) if isinstance(one, (list, tuple)) else (type(one), one)


def likes(answer: Any) -> Any:
    """What is kept of an answer of FakeTensorMode."""
    if isinstance(answer, Tensor):
        return like(answer)
    return type(answer)(map(likes, answer)) if isinstance(answer, (list, tuple)) else answer


def like(tensor: Tensor) -> Like:
    """What is kept of a tensor."""
    return Like(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def device_of(args: tuple[Any, ...]) -> torch.device:
    """Where the first tensor among arguments is."""
    return next((one.device for one in args if isinstance(one, Tensor)), CPU)


def hollow(answer: Any, device: torch.device = CPU) -> Any:
    """The same with hollow tensors; those that have only a shape so far are put on the device."""
    match answer:
        case Like():
            return Hollow(empty(answer), answer.device)
        case Tensor():
            return Hollow(answer, device)
        case list() | tuple():
            return type(answer)(hollow(one, device) for one in answer)
    return answer


def empty(like: Like) -> Tensor:
    """A tensor without content, and a storage of its own."""
    return torch.empty_strided(like.shape, like.strides, dtype=like.dtype, device=META)


def storage(tensor: Tensor) -> torch.UntypedStorage:
    """Where a tensor lies, hollow or not; it may be asked for its size, and holds nothing of a hollow one."""
    return (tensor.meta if isinstance(tensor, Hollow) else tensor).untyped_storage()
