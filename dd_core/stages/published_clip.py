"""GLIDE's noised CLIP as a guide: told sigma like the others, with an image and a text tower of its own.

It reads captions as tokens of CLIP's vocabulary at its own length, however the network that it guides does.

Source: Nichol et al. 2022 (arXiv:2112.10741), sections 2.4 and 5.3, and the published code (CLIPModel).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dd_core.layouts.published import Process
from dd_core.nets.noised_clip import GlideClip, GlideClipSpec
from dd_core.noise import spread
from dd_core.schedules import Clock, ScheduleSpec
from dd_core.stage import Trained
from dd_core.stages.network import NetworkSpec
from dd_core.stages.start import levels_of
from dd_core.text import END, tokens


class PublishedClip(nn.Module):
    """Both towers, asked in the sigma frame.

    Args:
        spec: Of the networks.
        process: The chain whose timesteps the image tower was trained at.

    Raises:
        ValueError: The process has no timesteps, or more than the network has learned.
    """

    def __init__(self, spec: GlideClipSpec, process: Process) -> None:
        super().__init__()
        levels = levels_of(process)
        if not isinstance(levels, ScheduleSpec) or levels.num_timesteps > spec.timesteps:
            raise ValueError(
                f"a noised CLIP of {spec.timesteps} timesteps is not of a {process.schedule} process of "
                f"{process.timesteps}; import it again"
            )
        self.spec = spec
        self.network, self.tell = GlideClip(spec), Clock(levels)

    def embed_image(self, x: Float[Tensor, " b 3 h w"], sigma: Float[Tensor, " b"]) -> Float[Tensor, " b d"]:
        """Noisy images x0 + sigma eps -> unit vectors, differentiable in x.

        Raises:
            ValueError: x is not of the size of the tower.
        """
        return self.network.embed_image(self.seen(x, sigma), self.timesteps(sigma))

    def features(
        self, x: Float[Tensor, " b 3 h w"], sigma: Float[Tensor, " b"]
    ) -> list[Float[Tensor, " b c rows columns"]]:
        """Noisy images -> one map of the patches after each layer, differentiable in x.

        Raises:
            ValueError: x is not of the size of the tower.
        """
        return self.network.image.features(self.seen(x, sigma), self.timesteps(sigma))

    def seen(self, x: Float[Tensor, " b 3 h w"], sigma: Float[Tensor, " b"]) -> Float[Tensor, " b 3 h w"]:
        """The images as DDPM scales them, x / sqrt(1 + sigma**2)."""
        size = self.spec.image_size
        if x.shape[2:] != (size, size):
            raise ValueError(
                f"the noised CLIP reads {size} px and got {tuple(x.shape[2:])}; paint at that size"
            )
        return x * torch.rsqrt(1 + spread(sigma, x) ** 2)

    def timesteps(self, sigma: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
        """The timestep nearest to each level."""
        return self.tell(sigma).round().long()

    def read(self, captions: Sequence[str]) -> Float[Tensor, " b d"]:
        """Captions -> unit vectors; what is longer than the tower reads is cut."""
        rows = torch.tensor(tokens(captions, self.spec.context_length))
        lengths = rows.shape[1] - (rows == END).int().flip(1).argmax(1)
        device = self.network.text.places.device
        with torch.no_grad():
            return self.network.embed_text(rows.to(device), lengths.to(device))

    def logit_scale(self) -> Float[Tensor, ""]:
        """The factor that turns cosines into logits."""
        return torch.tensor(self.spec.logit_scale)


def published_clip_of(trained: Trained) -> PublishedClip | None:
    """An imported noised CLIP, ready to guide; None if `trained` is not one."""
    match trained.spec:
        case NetworkSpec(net=GlideClipSpec() as net, process=Process() as process):
            model = PublishedClip(net, process)
            model.network.load_state_dict(trained.weights)
            return model.eval().requires_grad_(False)
        case _:
            return None
