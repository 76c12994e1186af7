"""A layout as a list of moves: which of their weights becomes which of ours, and how, both ways."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class LayoutError(ValueError):
    """A file is not laid out as its declared source says."""


class Change(NamedTuple):
    """What happens to a tensor on its way to us, and back."""

    inward: Callable[[Tensor], Tensor]
    outward: Callable[[Tensor], Tensor]


class Move(NamedTuple):
    """One tensor of ours and where it comes from."""

    theirs: tuple[str, ...]
    """One name, or several whose rows are concatenated in ours, equally many of each."""
    ours: str
    change: Change


def same(tensor: Tensor) -> Tensor:
    """No change."""
    return tensor


SAME = Change(same, same)
TURNED = Change(Tensor.t, Tensor.t)
"""Transposed."""


def regrouped(outer: int, inner: int) -> Change:
    """Rows in `outer` groups of `inner` parts -> `inner` groups of `outer` parts; also for a bias.

    The attention of ADM's first order keeps query, key and value of each head together: that is
    (heads, 3, width); ours keeps all queries together: (3, heads, width).
    """

    def swapped(first: int, second: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor.unflatten(0, (first, second, -1)).transpose(0, 1).flatten(0, 2)

    return Change(swapped(outer, inner), swapped(inner, outer))


def unfolded(dims: int) -> Change:
    """The kernel of a convolution over one pixel -> a matrix; a bias stays as it is."""

    def folded(tensor: Tensor) -> Tensor:
        return tensor if tensor.dim() == 1 else tensor.reshape(*tensor.shape, *[1] * dims)

    def matrix(tensor: Tensor) -> Tensor:
        if tensor.dim() > 1 and tensor.shape[2:] != (1,) * dims:
            raise LayoutError(f"a kernel of shape {tuple(tensor.shape)} where {dims} ones should end it")
        return tensor.flatten(1) if tensor.dim() > 1 else tensor

    return Change(matrix, folded)


def folded(dims: int) -> Change:
    """The inverse of `unfolded`."""
    return Change(*reversed(unfolded(dims)))


def both(first: Change, then: Change) -> Change:
    """One change after the other."""
    return Change(
        lambda tensor: then.inward(first.inward(tensor)), lambda tensor: first.outward(then.outward(tensor))
    )


def layer(theirs: str | tuple[str, ...], ours: str, change: Change = SAME) -> Iterator[Move]:
    """Weight and bias of a layer."""
    names = (theirs,) if isinstance(theirs, str) else theirs
    for part in ("weight", "bias"):
        yield Move(tuple(f"{name}.{part}" for name in names), f"{ours}.{part}", change)


def layers(names: Mapping[str, str], theirs: str = "", ours: str = "") -> Iterator[Move]:
    """Weights and biases of several layers, their names -> ours, within parts with these prefixes."""
    for their_name, our_name in names.items():
        yield from layer(theirs + their_name, ours + our_name)


def weight(theirs: str, ours: str, change: Change = SAME) -> Move:
    """The weight of a layer without bias."""
    return tensor(f"{theirs}.weight", f"{ours}.weight", change)


def tensor(theirs: str, ours: str, change: Change = SAME) -> Move:
    """A tensor by its full names."""
    return Move((theirs,), ours, change)


def within(moves: Iterable[Move], *, theirs: str = "", ours: str = "") -> Iterator[Move]:
    """The same moves for a network that is a part of theirs and of ours, by prefixes."""
    for move in moves:
        yield Move(tuple(theirs + name for name in move.theirs), ours + move.ours, move.change)


def inward(theirs: Mapping[str, Tensor], moves: Iterable[Move]) -> dict[str, Tensor]:
    """Their tensors under our names.

    Raises:
        LayoutError: A key is missing, left over, or of a wrong shape; it is named.
    """
    left, ours = dict(theirs), dict[str, Tensor]()
    for move in moves:
        for name in move.theirs:
            if name not in left:
                raise LayoutError(f"there is no weight {name!r}; declare the source that the file comes from")
        parts = [left.pop(name) for name in move.theirs]
        try:
            ours[move.ours] = move.change.inward(torch.cat(parts) if len(parts) > 1 else parts[0])
        except RuntimeError as error:
            shape = tuple(parts[0].shape)
            raise LayoutError(f"weight {move.theirs[0]!r} of shape {shape}: {error}") from None
    if left:
        raise LayoutError(
            f"weight {min(left)!r} and {len(left) - 1} more have no place in ours; declare another source"
        )
    return ours


def outward(ours: Mapping[str, Tensor], moves: Iterable[Move]) -> dict[str, Tensor]:
    """Our tensors under their names.

    Raises:
        LayoutError: A key is missing or left over; it is named.
    """
    left, theirs = dict(ours), dict[str, Tensor]()
    for move in moves:
        if move.ours not in left:
            raise LayoutError(f"there is no weight {move.ours!r}; is the bundle of that network?")
        changed = move.change.outward(left.pop(move.ours))
        parts = changed.chunk(len(move.theirs)) if len(move.theirs) > 1 else (changed,)
        theirs.update(zip(move.theirs, (part.contiguous() for part in parts), strict=True))
    if left:
        raise LayoutError(f"weight {min(left)!r} and {len(left) - 1} more have no place in that format")
    return theirs


def fitted(network: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights that fit a network in name and shape, floats as float32; buffers, being ours, may be absent.

    Raises:
        LayoutError: A weight is missing, left over, or has another shape; it is named.
    """
    state: dict[str, Any] = network.state_dict()
    buffers = {name for name, _ in network.named_buffers()}
    for name, tensor in weights.items():
        if name not in state:
            raise LayoutError(f"weight {name!r} has no place in the network")
        if tensor.shape != state[name].shape:
            raise LayoutError(
                f"weight {name!r} has shape {tuple(tensor.shape)}, the declared source "
                f"{tuple(state[name].shape)}; declare the size that the file has"
            )
    if missing := sorted(state.keys() - weights.keys() - buffers):
        raise LayoutError(f"weight {missing[0]!r} and {len(missing) - 1} more are not in the file")
    return {name: t.float() if t.is_floating_point() else t for name, t in weights.items()}
