"""Degradations of the small picture that an enlarging model is told in training, to make it robust to flaws.

`blurred` is Gaussian blur augmentation; `bsr` is the chain of blind super-resolution: blurs, noises and
compression in random order, from the large picture to the small one.  Written from the papers.

All random numbers come from torch's global generators, as in every loss; pixels are in [-1, 1].
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

BLUR_SHARE, BLUR_STD = 0.5, (0.4, 0.6)
KERNEL = 21
"""Side of the blur kernels of `bsr`, in pixels."""
ROUND_STD, LONG_VARIANCE = (0.1, 2.8), (0.5, 8.0)
"""Of its blurs, for a factor of 4: deviation of the round ones, variance along each axis of the others (the
"length of an axis" of the paper is an eigenvalue of the covariance in its code)."""
NOISE = (1 / 255, 25 / 255)
"""Deviation of its Gaussian noise, for pixels in [0, 1]."""
QUALITY = (30.0, 95.0)
SENSOR_SHARE = 0.25
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
"""JPEG's quantisation tables, those of quality 50 (ITU-T T.81, tables K.1 and K.2)."""
TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def blurred(small: Float[Tensor, " b 3 h w"]) -> Float[Tensor, " b 3 h w"]:
    """Blurs a random half of the small pictures by 3 x 3 pixels, each with its own deviation of 0.4 to 0.6.

    Source: Ho et al. 2021 (arXiv:2106.15282), section 4.2 (blurring augmentation); for unCLIP's first
    upsampler Ramesh et al. 2022 (arXiv:2204.06125), section 2.1, which names the blur but not its size.
    """
    with exact(small):
        std = uniform(*BLUR_STD, small)
        soft = filtered(small.float(), gaussians(std, std, torch.zeros_like(std), side=3))
        return torch.where(chosen(BLUR_SHARE, small), soft, small)


def bsr(picture: Float[Tensor, " b 3 h w"], factor: int) -> Float[Tensor, " b 3 i j"]:
    """The picture made `factor` times smaller, and degraded.

    Two blurs, the shrinking, Gaussian noise, sensor noise and JPEG in an order drawn for the batch, then a
    last JPEG.  Except for the way of shrinking, parameters are drawn for each picture.  The sensor noise is
    shot and read noise in linear light, without the paper's mosaic and camera colours; the code published
    with latent diffusion has no sensor noise at all.

    Otherwise the strength is that of that code's full variant (noise up to 25/255, JPEG of quality 30 to 95),
    not of its light one (one blur, a quarter as wide, noise of 1/255 or 2/255, quality 80 to 95).  In that
    code the shrinking is two steps, between which others may fall, and the first is at times a shifted blur
    of which every k-th pixel is taken; each of the two blurs is round or long by chance; the JPEG in the
    order is left out for a tenth.  Here the shrinking is one step, one blur is round and one long, and no
    JPEG is left out.

    Source: Zhang et al. 2021 (arXiv:2103.14006, BSRGAN), section 3; for unCLIP's second upsampler Ramesh et
    al. 2022, section 2.1, who refer to Rombach et al. 2022 (arXiv:2112.10752), section 4.4.
    """
    with exact(picture):
        found, steps = picture.float(), ("round", "long", "shrink", "noise", "sensor", "jpeg")
        place = dict(
            zip(steps, torch.rand(len(steps)).tolist(), strict=True)
        )  # in random order, each once even if numbers are equal
        for step in sorted(steps, key=place.__getitem__):
            match step:
                case "round":
                    std = uniform(*ROUND_STD, found)
                    found = filtered(found, gaussians(std, std, torch.zeros_like(std)))
                case "long":
                    one, other = (uniform(*LONG_VARIANCE, found).sqrt() for _ in range(2))
                    found = filtered(found, gaussians(one, other, uniform(0.0, math.pi, found)))
                case "shrink":
                    found = shrunk(found, factor)
                case "noise":
                    found = noised(found)
                case "sensor":
                    found = torch.where(chosen(SENSOR_SHARE, found), sensed(found), found)
                case _:
                    found = jpeg(found, uniform(*QUALITY, found))
        return jpeg(found, uniform(*QUALITY, found)).clamp(-1, 1)


def exact(like: Tensor) -> torch.autocast:
    """Disables autocast: the rounding of a blur in bfloat16 would add noise."""
    return torch.autocast("cpu" if like.is_meta else like.device.type, enabled=False)


def uniform(low: float, high: float, like: Float[Tensor, " b 3 h w"]) -> Float[Tensor, " b"]:
    """A uniform draw from [low, high) for each picture."""
    return low + (high - low) * torch.rand(len(like), device=like.device)


def chosen(share: float, like: Float[Tensor, " b 3 h w"]) -> Bool[Tensor, " b 1 1 1"]:
    """Which pictures are chosen, each with the probability `share`."""
    return torch.rand(len(like), 1, 1, 1, device=like.device) < share


def gaussians(
    long: Float[Tensor, " b"], thin: Float[Tensor, " b"], angle: Float[Tensor, " b"], side: int = KERNEL
) -> Float[Tensor, " b k k"]:
    """Kernels that sum to 1.

    Args:
        long: Deviation along the direction `angle`, in pixels.
        thin: Deviation across it.
        angle: In radians, 0 along the rows.
        side: Of the kernels, odd.
    """
    at = torch.arange(side, device=long.device) - side // 2
    y, x = at[:, None], at[None, :]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    along, across = cos * x + sin * y, cos * y - sin * x
    exponent = (along / long[:, None, None]).square() + (across / thin[:, None, None]).square()
    return (-exponent / 2).flatten(1).softmax(1).unflatten(1, (side, side))


def filtered(image: Float[Tensor, " b 3 h w"], kernels: Float[Tensor, " b k k"]) -> Float[Tensor, " b 3 h w"]:
    """Each picture convolved with its own kernel; border pixels are replicated outwards."""
    edge = kernels.shape[-1] // 2
    padded = F.pad(image, (edge, edge, edge, edge), mode="replicate").flatten(0, 1)[None]
    weight = kernels.repeat_interleave(3, 0)[:, None]
    return F.conv2d(padded, weight, groups=weight.shape[0])[0].unflatten(0, (-1, 3))


def shrunk(image: Float[Tensor, " b 3 h w"], factor: int) -> Float[Tensor, " b 3 i j"]:
    """Shrunk by nearest, bilinear or bicubic interpolation, directly or, by chance, to less and up again."""
    how = ("nearest-exact", "bilinear", "bicubic")[int(torch.randint(3, ()))]
    height, width = image.shape[2] // factor, image.shape[3] // factor
    if torch.rand(()) < 0.25:
        share = 0.5 + 0.5 * float(torch.rand(()))
        small = (max(1, round(share * height)), max(1, round(share * width)))
        image = F.interpolate(image, small, mode="bilinear")
        how = "bicubic" if how == "bicubic" else "bilinear"
    return F.interpolate(image, (height, width), mode=how)


def noised(image: Float[Tensor, " b 3 h w"]) -> Float[Tensor, " b 3 h w"]:
    """Gaussian noise: alike in all channels for 2/5 of the pictures, independent for 2/5, else correlated."""
    white, kind = torch.randn_like(image), torch.rand(len(image), 1, 1, 1, device=image.device)
    mix = F.normalize(torch.randn(len(image), 3, 3, device=image.device), dim=2)
    coloured = torch.einsum("bij,bjhw->bihw", mix, white)
    noise = torch.where(kind < 0.4, white[:, :1], torch.where(kind < 0.8, white, coloured))
    return image + 2 * uniform(*NOISE, image)[:, None, None, None] * noise


def sensed(image: Float[Tensor, " b 3 h w"]) -> Float[Tensor, " b 3 h w"]:
    """As a sensor sees it: in linear light, noise whose variance grows with the light.

    Source: Brooks et al. 2019 (arXiv:1811.11127), section 3.1, for the range of both variances.
    """
    light = ((image.clamp(-1, 1) + 1) / 2) ** 2.2
    shot = uniform(math.log(1e-4), math.log(0.012), image).exp()[:, None, None, None]
    read = (2.18 * shot.log() + 1.2).exp()
    light = light + (shot * light + read).sqrt() * torch.randn_like(light)
    return 2 * light.clamp(0, 1) ** (1 / 2.2) - 1


def jpeg(image: Float[Tensor, " b 3 h w"], quality: Float[Tensor, " b"]) -> Float[Tensor, " b 3 h w"]:
    """A picture after JPEG compression without chroma subsampling.

    Args:
        image: In [-1, 1]; values outside are clipped.
        quality: In 1..100 on libjpeg's scale, one for each picture.

    Source: ITU-T T.81, annex A (transform) and K (quantisation tables).
    """
    height, width = image.shape[2:]
    values = (image.clamp(-1, 1) + 1) * 127.5
    values = F.pad(values, (0, -width % 8, 0, -height % 8), mode="replicate")
    to_ycc = torch.tensor(TO_YCC, device=image.device)
    ycc = torch.einsum("ij,bjhw->bihw", to_ycc, values).round()
    ycc = ycc - torch.tensor([128.0, 0, 0], device=image.device)[:, None, None]
    blocks = ycc.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
    waves = cosines(image.device)
    scale = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)
    tables = torch.tensor((LUMINANCE, CHROMINANCE, CHROMINANCE), device=image.device)
    steps = ((scale[:, None, None, None] * tables + 50) / 100).floor().clamp(1, 255)[:, :, None, None]
    coded = (waves @ blocks @ waves.mT / steps).round() * steps
    ycc = (waves.mT @ coded @ waves).transpose(3, 4).flatten(4, 5).flatten(2, 3).round()
    ycc = ycc + torch.tensor([128.0, 0, 0], device=image.device)[:, None, None]
    back = torch.linalg.inv(torch.tensor(TO_YCC)).to(image.device)
    rgb = torch.einsum("ij,bjhw->bihw", back, ycc)[:, :, :height, :width]
    return (rgb / 127.5 - 1).clamp(-1, 1)


def cosines(device: torch.device) -> Float[Tensor, " 8 8"]:
    """The matrix of the orthonormal cosine transform (DCT-II) of eight values."""
    at = torch.arange(8, device=device)
    waves = torch.cos(math.pi / 8 * at[:, None] * (at + 0.5)) / 2
    return torch.where(at[:, None] == 0, 1 / math.sqrt(8), waves)
