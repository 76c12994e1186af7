"""The published networks: under which name each is declared, its size, its layout, how it was trained.

Sources: the READMEs, model cards and configurations beside the published code of DDIM (arXiv:2010.02502),
which has the networks of DDPM (arXiv:2006.11239), Improved DDPM (arXiv:2102.09672), ADM (arXiv:2105.05233),
GLIDE (arXiv:2112.10741), latent diffusion (arXiv:2112.10752), Stable Diffusion, Karlo and consistency
models (arXiv:2303.01469).  The ADM upsampler to 512 px is said to attend at 32, 16 and 8 px in the paper
and at 32 and 16 px in its README; its lowest map has 16 px, so that both say the same.
"""

from typing import Literal, NamedTuple

from pydantic import Field

from dd_core.denoiser import Parameterization
from dd_core.nets.autoencoder import AutoencoderNetSpec
from dd_core.nets.classifier import ClassifierSpec
from dd_core.nets.clip import ClipNetSpec
from dd_core.nets.network import DenoiserSpec, PlainSpec
from dd_core.nets.noised_clip import GlideClipSpec
from dd_core.nets.prior import CausalPriorSpec
from dd_core.nets.text import CaptionedSpec, UnclipSpec
from dd_core.nets.unet import UNetSpec
from dd_core.spec import Spec

Layout = Literal[
    "ddpm", "adm", "adm-new", "consistency", "glide", "glide-clip", "ldm", "ldm-linear",
    "karlo-decoder", "karlo-prior", "karlo-sr", "karlo-sr-last",
]  # fmt: skip


class Process(Spec):
    """The diffusion process of a published network: its noise levels, what it is told, what it predicts."""

    schedule: Literal["linear", "cosine", "sqrt_linear", "karras"] = "linear"
    """sqrt_linear: square roots of beta are evenly spaced (latent diffusion); karras: sigma itself."""
    beta_range: tuple[float, float] = (1e-4, 0.02)
    """First and last beta of 1000, if the schedule is linear or sqrt_linear."""
    timesteps: int = Field(1000, ge=1)
    rescaled_time: bool = False
    """Told t * 1000 / timesteps in place of t (Improved DDPM)."""
    predicts: Parameterization | Literal["edm", "consistency"] = "eps"
    """edm: scaled as in Karras et al. 2022 (arXiv:2206.00364), table 1, for data of deviation 0.5;
    consistency: likewise, but the identity at the smallest sigma, 0.002 (arXiv:2303.01469, appendix C)."""
    learned_variance: bool = False
    """The second half of its channels is v of Nichol & Dhariwal 2021, eq. 15."""
    last: Literal["clean", "first"] = "clean"
    """Where the last step of its sampler leads, as in `schedules.ScheduleSpec`."""
    image_size: int = Field(64, ge=1)
    """Side of x, in pixels or latents; 1 for an embedding."""


class Published(NamedTuple):
    """One published network."""

    net: DenoiserSpec
    layout: Layout
    process: Process
    autoencoder: AutoencoderNetSpec | None = None
    """Its autoencoder, in the same file, if x is a latent."""
    latent_scale: float | None = 1.0
    """Factor of its latents; None: as measured in its training, stored in its file."""
    reader: ClipNetSpec | None = None
    """The CLIP whose text tower, in the same file, gives it the states of captions."""


LADDERS: dict[int, tuple[float, ...]] = {
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}
"""ADM's `channel_mult` by the size of the image, also GLIDE's and unCLIP's."""


def adm(size: int, width: int, blocks: int = 2) -> UNetSpec:
    """ADM's UNet: attention at 32, 16 and 8 px, heads of 64, told timesteps."""
    return UNetSpec(
        width=width,
        channel_mult=LADDERS[size],
        blocks_per_level=blocks,
        attention_at=(size // 32, size // 16, size // 8),
        head_width=64,
        level_scale=1.0,
    )


def ldm_unet(width: int, mult: tuple[float, ...], attention_at: tuple[int, ...]) -> UNetSpec:
    """Latent diffusion's UNet: resized by convolutions, told timesteps and nothing else."""
    return UNetSpec(
        width=width,
        channel_mult=mult,
        attention_at=attention_at,
        resample="conv",
        scale_shift=False,
        level_scale=1.0,
    )


def crossed(unet: UNetSpec, text_width: int) -> UNetSpec:
    """The same, attending to a caption by transformers."""
    return unet.but(attention="cross", text_width=text_width, text_at_level=False)


ADM = Process(learned_variance=True)
EDM = Process(schedule="karras", predicts="edm")
LDM = Process(schedule="sqrt_linear", beta_range=(0.0015, 0.0195), last="first")
SD = Process(schedule="sqrt_linear", beta_range=(0.00085, 0.012), last="first")
FIRST_READER = ClipNetSpec(
    towers="text",
    embedding_width=768,
    text_width=768,
    text_layers=12,
    quick_gelu=True,
    states="last",
    pads_with="end",
)
"""OpenAI's ViT-L/14, as Stable Diffusion 1 uses it: with transformers' tokenizer, which pads with END."""
SECOND_READER = ClipNetSpec(
    towers="text",
    embedding_width=1024,
    text_width=1024,
    text_layers=24,
    quick_gelu=False,
    states="penultimate",
    pads_with="zero",
)
"""open_clip's ViT-H/14, as Stable Diffusion 2 uses it."""
LEARNED = {"in_channels": 3, "out_channels": 6}
F4 = AutoencoderNetSpec(channel_mult=(1, 2, 4), latent_channels=3)
F8 = AutoencoderNetSpec()
F16 = AutoencoderNetSpec(channel_mult=(1, 1, 2, 2, 4), latent_channels=16, attention_levels=(4,))
F32 = AutoencoderNetSpec(channel_mult=(1, 1, 2, 2, 4, 4), latent_channels=64, attention_levels=(4, 5))
VQ_F4 = F4.but(codes=8192)
VQ_F8 = AutoencoderNetSpec(channel_mult=(1, 2, 2, 4), attention_levels=(3,), codes=16384)
VQ_F16 = AutoencoderNetSpec(
    channel_mult=(1, 1, 2, 2, 4), latent_channels=8, attention_levels=(4,), codes=16384
)
AUTOENCODERS: dict[str, AutoencoderNetSpec] = {
    "ldm-kl-f4": F4,
    "ldm-kl-f8": F8,
    "ldm-kl-f16": F16,
    "ldm-kl-f32": F32,
    "ldm-vq-f4": VQ_F4,
    "ldm-vq-f4-noattn": VQ_F4.but(mid_attention=False),
    "ldm-vq-f8": VQ_F8,
    "ldm-vq-f8-n256": VQ_F8.but(codes=256),
    "ldm-vq-f16": VQ_F16,
}
"""First stages that were published by themselves."""


def of_ddpm() -> dict[str, Published]:
    """The networks of DDPM; one size for bedrooms, cats, churches and the faces of CelebA-HQ."""
    small = UNetSpec(
        width=128,
        channel_mult=(1, 2, 2, 2),
        attention_at=(2,),
        heads=1,
        resample="conv",
        pads="after",
        scale_shift=False,
        epsilon=1e-6,
        level_scale=1.0,
        sine_first=True,
        freq_shift=1,
        dropout=0.1,
    )
    large = small.but(channel_mult=LADDERS[256], attention_at=(16,), dropout=0.0)
    return {
        "ddpm-cifar10": Published(PlainSpec(unet=small), "ddpm", Process(image_size=32)),
        "ddpm-lsun256": Published(PlainSpec(unet=large), "ddpm", Process(image_size=256)),
    }


def of_adm() -> dict[str, Published]:
    """The networks of guided-diffusion and of consistency models."""
    cosine = ADM.but(schedule="cosine")
    in64, in256 = adm(64, 192, 3).but(dropout=0.1, labels=1000), adm(256, 256)
    lsun = PlainSpec(unet=in256.but(scale_shift=False))
    in128 = adm(128, 256).but(heads=4, labels=1000)
    sr256 = adm(256, 192).but(heads=4, image_channels=3, labels=1000)
    sr512 = sr256.but(heads=0, attention_at=(16, 32))
    found = {
        "adm-imagenet64": Published(PlainSpec(unet=in64, **LEARNED), "adm-new", cosine),
        "adm-imagenet128": Published(PlainSpec(unet=in128, **LEARNED), "adm", ADM.but(image_size=128)),
        "adm-imagenet256": plain256(in256.but(labels=1000)),
        "adm-imagenet256-uncond": plain256(in256),
        "adm-imagenet512": Published(
            PlainSpec(unet=adm(512, 256).but(labels=1000), **LEARNED), "adm", ADM.but(image_size=512)
        ),
        "adm-lsun256": plain256(in256.but(dropout=0.1)),
        "adm-upsampler-64-256": plain256(sr256),
        "adm-upsampler-128-512": Published(PlainSpec(unet=sr512, **LEARNED), "adm", ADM.but(image_size=512)),
        "edm-imagenet64": Published(PlainSpec(unet=in64), "consistency", EDM),
        "edm-lsun256": Published(lsun, "consistency", EDM.but(image_size=256)),
        "consistency-imagenet64": Published(
            PlainSpec(unet=in64.but(dropout=0.0)), "consistency", EDM.but(predicts="consistency")
        ),
        "consistency-lsun256": Published(
            lsun, "consistency", EDM.but(predicts="consistency", image_size=256)
        ),
    }
    for size, depth in ((64, 4), (128, 2), (256, 2), (512, 2)):
        net = ClassifierSpec(unet=adm(size, 128, depth), image_size=size)
        process = (cosine if size == 64 else ADM).but(image_size=size)
        found[f"adm-classifier{size}"] = Published(net, "adm", process)
    return found


def plain256(unet: UNetSpec) -> Published:
    """A network of ADM at 256 px."""
    return Published(PlainSpec(unet=unet, **LEARNED), "adm", ADM.but(image_size=256))


def of_improved() -> dict[str, Published]:
    """The networks of Improved DDPM; those trained on the variational bound alone have the same shapes."""
    base = adm(64, 128, 3).but(attention_at=(4, 8), heads=4, resample="conv")
    small = base.but(channel_mult=(1, 2, 2, 2), attention_at=(2, 4), dropout=0.3)
    large = base.but(width=192, blocks_per_level=2, channel_mult=LADDERS[256], attention_at=(16, 32))
    rooms = large.but(width=128, heads=1, attention_at=(16,), scale_shift=False)
    plain = ADM.but(timesteps=4000)
    cosine = plain.but(schedule="cosine")
    named: tuple[tuple[str, UNetSpec, Process], ...] = (
        ("improved-imagenet64", base, cosine.but(rescaled_time=True)),
        ("improved-imagenet64-cond", base.but(width=192, labels=1000), cosine),
        ("improved-cifar10", small, cosine.but(rescaled_time=True, image_size=32)),
        ("improved-upsampler-64-256", large.but(image_channels=3, labels=1000), plain.but(image_size=256)),
        ("improved-lsun256", rooms, ADM.but(image_size=256)),
    )
    return {name: Published(PlainSpec(unet=unet, **LEARNED), "adm", process) for name, unet, process in named}


def of_glide() -> dict[str, Published]:
    """The networks of GLIDE (filtered); those for inpainting are also told picture and mask."""
    cosine, linear = ADM.but(schedule="cosine"), ADM.but(image_size=256)
    base = adm(64, 192, 3).but(text_width=512, dropout=0.1)
    upsampler = adm(256, 192).but(text_width=512, dropout=0.1, image_channels=3)
    found = {"glide-clip": Published(GlideClipSpec(), "glide-clip", cosine)}
    for name, unet, process in (("glide-base", base, cosine), ("glide-upsample", upsampler, linear)):
        found[name] = Published(CaptionedSpec(unet=unet), "glide", process)
        told = unet.but(image_channels=unet.image_channels + 4)
        found[f"{name}-inpaint"] = Published(CaptionedSpec(unet=told), "glide", process)
    return found


def of_karlo() -> dict[str, Published]:
    """The networks of Karlo."""
    process = Process(schedule="cosine")
    decoder = adm(64, 320, 3).but(
        text_width=1536, text_at_level=False, level_told=True, embedding_width=768, dropout=0.1
    )
    upsampler = adm(64, 320, 3).but(
        attention_at=(), attention_in_middle=False, scale_shift=False, image_channels=3
    )
    large = process.but(image_size=256)
    return {
        "karlo-prior": Published(CausalPriorSpec(), "karlo-prior", process.but(predicts="x0", image_size=1)),
        "karlo-decoder": Published(
            UnclipSpec(unet=decoder), "karlo-decoder", process.but(learned_variance=True)
        ),
        "karlo-sr": Published(PlainSpec(unet=upsampler), "karlo-sr", large),
        "karlo-sr-last": Published(PlainSpec(unet=upsampler), "karlo-sr-last", large),
    }


def of_ldm() -> dict[str, Published]:
    """The networks of latent diffusion and Stable Diffusion."""
    faces = PlainSpec(unet=ldm_unet(224, (1, 2, 3, 4), (2, 4, 8)).but(head_width=32))
    church = ldm_unet(192, (1, 2, 2, 4, 4), (1, 2, 4, 8)).but(heads=8, scale_shift=True, resample="residual")
    classes = PlainSpec(unet=crossed(ldm_unet(192, (1, 2, 3, 5), (2, 4, 8)).but(heads=1), 512))
    text = ldm_unet(320, (1, 2, 4, 4), (1, 2, 4)).but(heads=8)
    latent = {"in_channels": 4, "out_channels": 4}
    sd1, sd2 = crossed(text, 768), crossed(text.but(heads=0, head_width=64), 1024)
    v768 = SD.but(predicts="v", image_size=96)
    unclip = sd2.but(embedding_width=2048, embedding_layers=2, embedding_tokens=0)
    found = {
        "ldm-faces256": Published(faces, "ldm", LDM, VQ_F4),
        "ldm-bedrooms256": Published(faces, "ldm", LDM, VQ_F4),
        "ldm-churches256": Published(
            PlainSpec(unet=church, **latent),
            "ldm",
            LDM.but(beta_range=(0.0015, 0.0155), image_size=32),
            F8,
            None,
        ),
        "ldm-cin256": Published(classes, "ldm", LDM, VQ_F4),
        "ldm-text256": Published(
            PlainSpec(unet=crossed(text, 1280), **latent), "ldm", SD.but(image_size=32), F8, 0.18215
        ),
    }
    named: tuple[tuple[str, UNetSpec, Layout, Process], ...] = (
        ("sd1", sd1, "ldm", SD),
        ("sd1-inpaint", sd1.but(image_channels=5), "ldm", SD),
        ("sd2-base", sd2, "ldm-linear", SD),
        ("sd2", sd2, "ldm-linear", v768),
        ("sd2-inpaint", sd2.but(image_channels=5), "ldm-linear", SD),
        ("sd2-unclip-h", unclip, "ldm-linear", v768),
        ("sd2-unclip-l", unclip.but(embedding_width=1536), "ldm-linear", v768),
    )
    for name, unet, layout, process in named:
        reader = FIRST_READER if name.startswith("sd1") else SECOND_READER
        found[name] = Published(PlainSpec(unet=unet, **latent), layout, process, F8, 0.18215, reader)
    enlarging = crossed(ldm_unet(256, (1, 2, 2, 4), (2, 4, 8)).but(heads=8), 1024)
    enlarging = enlarging.but(text_only_at=(2, 4), image_channels=3, labels=1000)  # labels: levels of noise
    found["sd-x4-upscaler"] = Published(
        PlainSpec(unet=enlarging, **latent),
        "ldm-linear",
        SD.but(predicts="v", beta_range=(1e-4, 0.02), image_size=128),
        F4.but(latent_channels=4),
        0.08333,
        SECOND_READER,
    )
    return found


def published() -> dict[str, Published]:
    """All of them, by the names under which they are declared."""
    return of_ddpm() | of_adm() | of_improved() | of_glide() | of_karlo() | of_ldm()
