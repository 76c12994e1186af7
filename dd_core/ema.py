"""Averaged weights: what ships is the mean of the model over its last steps, not its last step."""

import torch
from torch import Tensor, nn


def averaged_init(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the whole state of a model (in training its weights are float32)."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def update(
    average: dict[str, Tensor], model: nn.Module, *, images_seen: int, images: int, horizon: int
) -> None:
    """Move the average towards the model by one step, in place; buffers, which are not learned, are copied.

    The decay is exp(-images / horizon), and less at the beginning, so that the initial weights are forgotten:
    after n images the average spans about min(horizon, n / 10) of them.

    Args:
        average: From `averaged_init`, changed in place.
        model: The model after the step.
        images_seen: Images trained on before this step.
        images: Images of this step.
        horizon: Images the average spans in the long run.

    Source: Karras et al. 2024 (arXiv:2312.02696), section 3.1 (an average over a share of the run).
    """
    span = min(horizon, max(images, images_seen / 10))
    weight = 1 - float(torch.exp(torch.tensor(-images / span, dtype=torch.float64)))
    now = model.state_dict()
    learned = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    torch._foreach_lerp_(
        [average[name] for name in learned], [now[name].detach() for name in learned], weight
    )
    for name in average.keys() - set(learned):
        average[name].copy_(now[name])
