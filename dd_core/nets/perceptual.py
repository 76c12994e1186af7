"""Perceptual distances between images, and a discriminator of patches.

A perceptual distance compares what a frozen network sees in two images instead of their pixels:
`Lpips` with a VGG16 whose weights must be given, `ClipFeatures` with a CLIP tower trained here.  Both compute
in float32 even inside autocast: for images a hundredth apart bfloat16 gives ten times the distance of CLIP's
features, TF32, in which GPUs may multiply (`precision.round_products`), 1.03 times.
"""

from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dd_core.nets.clip import Clip
from dd_core.nets.conv import Conv
from dd_core.spec import Spec

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Widths of the convolutions of each stage of VGG16; a pooling separates two stages."""
Pooling = Literal["max", "average"]
"""max: VGG's own, with which LPIPS was fitted to human judgements; average: as in the training of consistency
models, by piq.LPIPS with replace_pooling."""


class PerceptualDistance(Protocol):
    """Two batches of images in [-1, 1] -> one distance per pair, zero for equal images."""

    def __call__(
        self, image: Float[Tensor, " b 3 h w"], reference: Float[Tensor, " b 3 h w"]
    ) -> Float[Tensor, " b"]: ...


class Lpips(nn.Module):
    """LPIPS on VGG16: squared differences of unit feature vectors, weighted as people judged them.

    There is no dropout in it, and it stays in eval mode whatever its parents do: in published
    training code `.train()` re-enabled the dropout of this loss.

    Source: Zhang et al. 2018 (arXiv:1801.03924), eq. 1.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, pooling: Pooling = "max") -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        pool = nn.MaxPool2d if pooling == "max" else nn.AvgPool2d
        before = 3
        for index, widths in enumerate(VGG16):
            layers: list[nn.Module] = [pool(2)] if index else []
            for width in widths:
                layers += [Conv(before, width, 3, padding=1), nn.ReLU()]
                before = width
            self.stages.append(nn.Sequential(*layers))
        self.weights = nn.ParameterList(torch.zeros(widths[-1]) for widths in VGG16)
        """One weight per channel of each stage; not negative."""
        shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])
        self.register_buffer("shift", shift.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", scale.view(1, 3, 1, 1), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> "Lpips":
        """Stay in eval mode, whatever `mode` is."""
        return super().train(mode=False)

    def forward(
        self, image: Float[Tensor, " b 3 h w"], reference: Float[Tensor, " b 3 h w"]
    ) -> Float[Tensor, " b"]:
        total = torch.zeros(len(image), device=image.device)
        with torch.autocast(image.device.type, enabled=False):
            x, y = ((picture.float() - self.shift) / self.scale for picture in (image, reference))
            for stage, weight in zip(self.stages, self.weights, strict=True):
                x, y = stage(x), stage(y)
                apart = (unit(x, dim=1) - unit(y, dim=1)).square()
                total = total + torch.einsum("bchw,c->bhw", apart, weight).mean((1, 2))
        return total


def load_lpips(path: Path, pooling: Pooling = "max") -> Lpips:
    """LPIPS with published weights, from a safetensors file of `lpips.LPIPS(net="vgg").state_dict()`.

    Args:
        path: Names as in that package: `net.slice{1-5}.{layer}.weight`, `.bias`, `lin{0-4}.model.1.weight`.
        pooling: Between two stages; there are no weights in it.

    Raises:
        ValueError: There is no such file, it is damaged, or a weight is missing or of another size.
    """
    if not path.is_file():
        raise ValueError(f"lpips_weights: there is no file {path}; name one or set perceptual: clip")
    try:
        given, lpips = load_file(path), Lpips(pooling)
    except SafetensorError as error:
        raise ValueError(
            f"lpips_weights: {path} is damaged or no safetensors file: {error}; fetch it again"
        ) from None
    found: dict[str, Tensor] = {}
    layer = 0
    for index, stage in enumerate(lpips.stages):
        for position, module in enumerate(stage.children()):
            if isinstance(module, nn.Conv2d):
                for name in ("weight", "bias"):
                    key = f"net.slice{index + 1}.{layer}.{name}"
                    found[f"stages.{index}.{position}.{name}"] = taken(given, key, path)
            layer += 1
        found[f"weights.{index}"] = taken(given, f"lin{index}.model.1.weight", path).flatten()
    try:
        lpips.load_state_dict(found)
    except RuntimeError as error:
        raise ValueError(
            f"lpips_weights: {path} is not of VGG16: {str(error).splitlines()[1].strip()}"
        ) from None
    return lpips


def taken(tensors: dict[str, Tensor], name: str, path: Path) -> Tensor:
    """One of the tensors of a file, or an error that names it."""
    if name not in tensors:
        raise ValueError(f"lpips_weights: {path} has no tensor {name!r}; it must be LPIPS on VGG16")
    return tensors[name]


class ClipFeatures(nn.Module):
    """Perceptual distance by the image tower of a CLIP that was trained on the same data.

    Squared distance of the unit feature vectors of every patch, mean over patches and blocks.  The first
    half of the blocks is compared: they see edges and colours, and the others would double the cost.

    Source: none; LPIPS (Zhang et al. 2018, eq. 1) with equal weights and another network.

    Args:
        clip: Frozen by whoever holds this; used in eval mode.
    """

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.clip = clip
        self.blocks = list(range(max(1, clip.spec.image_layers // 2)))

    def forward(
        self, image: Float[Tensor, " b 3 h w"], reference: Float[Tensor, " b 3 h w"]
    ) -> Float[Tensor, " b"]:
        with torch.autocast(image.device.type, enabled=False):
            seen = zip(self.patches(image.float()), self.patches(reference.float()), strict=True)
        apart = [(unit(x, dim=-1) - unit(y, dim=-1)).square().sum(-1).mean(1) for x, y in seen]
        return torch.stack(apart).mean(0)

    def patches(self, image: Float[Tensor, " b 3 h w"]) -> list[Float[Tensor, " b l d"]]:
        """A vector per patch after each of the first half of the blocks."""
        clip, size = self.clip, self.clip.spec.image_size
        if image.shape[-1] != size:
            image = F.interpolate(image, (size, size), mode="bicubic", antialias=True)
        seen = clip.towers.visual.forward_intermediates(
            ((image + 1) / 2 - clip.mean) / clip.std,
            indices=self.blocks,
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
        )
        features: list[Tensor] = seen["image_intermediates"]
        return features


def unit(x: Float[Tensor, " *s"], *, dim: int) -> Float[Tensor, " *s"]:
    """Vectors of length one; a vector of zeros stays zero (eps is under the root, for its gradient)."""
    return x * (x.square().sum(dim, keepdim=True) + 1e-8).rsqrt()


class PatchGanSpec(Spec):
    """Size of the discriminator; the defaults are those of latent diffusion (2.77 M parameters)."""

    width: int = Field(64, multiple_of=8)
    layers: int = Field(3, ge=1)
    """Halvings; 3 judges patches of 70 px, 2 of 34 px."""


class PatchGan(nn.Module):
    """Judges every patch of an image: positive is real.

    GroupNorm replaces the original's BatchNorm, so that the output depends neither on the other images of
    the batch nor on how many ranks share it; the number of parameters is the same.

    Source: Isola et al. 2017 (arXiv:1611.07004), section 3.2.2 and appendix 6.1 (initialisation).
    """

    def __init__(self, spec: PatchGanSpec) -> None:
        super().__init__()
        widths = [spec.width * min(2**index, 8) for index in range(spec.layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, spec.width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for index, (before, after) in enumerate(pairwise(widths), start=1):
            stride = 2 if index < spec.layers else 1
            layers.append(nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False))
            layers += [nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.GroupNorm):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, image: Float[Tensor, " b 3 h w"]) -> Float[Tensor, " b 1 i j"]:
        return self.layers(image).float()
