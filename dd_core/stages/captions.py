"""What a caption is replaced by: in training where it is dropped, in guidance where it is led away from."""

import torch
from jaxtyping import Int
from torch import Tensor

from dd_core.cascade import CascadeState
from dd_core.devices import carry
from dd_core.text import null_tokens


def away_from(state: CascadeState, *, silent: bool) -> Int[Tensor, " b l"]:
    """The captions that guidance leads away from.

    Args:
        state: The request; its negative captions, if it has any.
        silent: Otherwise: whether to take empty captions, which a network without caption dropout has not
            learned; if not, the request's own.
    """
    if state.negative is not None:
        return state.negative
    return null_like(state.tokens) if silent else state.tokens


def null_like(tokens: Int[Tensor, " b l"]) -> Int[Tensor, " b l"]:
    """The empty caption, once per row."""
    return carry(torch.tensor(null_tokens(tokens.shape[1])), tokens.device).expand_as(tokens)
