"""How published models are sampled: the cascade of a source that paints, as its authors sampled it.

Sources: Song et al. 2021 (arXiv:2010.02502), Dhariwal & Nichol 2021 (arXiv:2105.05233, table 14 and appendix
H), Nichol & Dhariwal 2021 (arXiv:2102.09672, section 4), Karras et al. 2022 (arXiv:2206.00364), Song et al.
2023 (arXiv:2303.01469), Rombach et al. 2022 (arXiv:2112.10752, appendix); the READMEs beside their published
code.
"""

from dd_core.cascade import CascadeSpec, HopSpec, Role
from dd_core.samplers import SamplingSpec
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.consistency_spec import ConsistencySpec
from dd_core.steering import GradientSpec

ANCESTRAL = SamplingSpec(sampler="ddpm", num_steps=250, spacing="linspace", guidance_scale=1.0)
ROOMS = ANCESTRAL.but(spacing="sections", sections=(90, 60, 60, 20, 20))
"""ADM on LSUN."""
EULER_HEUN = SamplingSpec(sampler="heun", num_steps=40, guidance_scale=1.0)
JUMP = SamplingSpec(sampler="consistency", num_steps=1, guidance_scale=1.0)
LATENT = SamplingSpec(sampler="ddim", num_steps=200, eta=1.0, spacing="ldm_plus_one", guidance_scale=1.0)
"""For bedrooms and the faces of FFHQ; the model of CelebA-HQ was sampled with eta 0."""
CHURCHES = LATENT.but(num_steps=500, eta=0.0)
"""Published as 400 steps, for which its code takes every second of the 1000 timesteps."""
DDPM = {
    "ddpm-cifar10": ANCESTRAL.but(num_steps=1000, variance="fixed_large"),
    "ddpm-lsun256": ANCESTRAL.but(num_steps=1000, variance="fixed_small"),
}
"""All timesteps; their variance as in the configurations beside the code of DDIM."""
DDIM50 = SamplingSpec(sampler="ddim", num_steps=50, spacing="ddim_leading", guidance_scale=1.0)
"""As the pipelines of diffusers for DDPM and DDIM."""

STABLE = {"sd1": 7.5, "sd1-inpaint": 7.5, "sd2-base": 9.0, "sd2": 9.0, "sd2-inpaint": 10.0}
"""Guidance scale of Stable Diffusion, in 50 steps of DDIM: as in the scripts beside the published code; of
others 7.5, as in the pipelines of diffusers."""
CLASSIFIERS = {
    "adm-imagenet64": ("adm-classifier64", 1.0),
    "adm-imagenet128": ("adm-classifier128", 0.5),
    "adm-imagenet256": ("adm-classifier256", 1.0),
    "adm-imagenet256-uncond": ("adm-classifier256", 10.0),
    "adm-imagenet512": ("adm-classifier512", 4.0),
}
"""Base -> the classifier that leads it, and the weight of its gradient in 250 steps."""
UPSAMPLERS = {
    "adm-imagenet64": "adm-upsampler-64-256",
    "adm-imagenet128": "adm-upsampler-128-512",
    "improved-imagenet64-cond": "improved-upsampler-64-256",
}
"""Base -> the upsampler that enlarges its pictures four times."""
CONTEXT = 77
"""Tokens of a caption; most of these models take no caption."""


def cascade_of(
    source: str,
    stage: ChainSpec | ConsistencySpec,
    *,
    name: str = "base",
    led: bool = False,
    enlarged: ChainSpec | None = None,
) -> CascadeSpec:
    """A base that paints from noise, sampled as published.

    Args:
        source: The name under which it was imported.
        stage: The base.
        name: Of the base in the cascade.
        led: Whether the classifier of `CLASSIFIERS` leads it, as stage "classifier".
        enlarged: The stage "upsampler" behind it; None: there is none.
    """
    how, guides = sampling_of(source, stage), dict[Role, str]()
    if led:
        how = how.but(gradient=GradientSpec(classes=CLASSIFIERS[source][1]))
        guides["classifier"] = "classifier"
    # those of text and DDIM50 refuse steps that do not divide 1000, linspace more than there are timesteps
    follows = how.takes_any_steps() or hears(stage) or how == DDIM50 or how.spacing == "linspace"
    hops = [HopSpec(stage=name, how=how, guides=guides, follows_request=follows)]
    if enlarged is not None:
        hops.append(HopSpec(stage="upsampler", how=ANCESTRAL))
    side = stage.image_size if enlarged is None else enlarged.image_size
    return CascadeSpec(name=source, hops=tuple(hops), context_length=CONTEXT, image_size=side)


def sampling_of(source: str, stage: ChainSpec | ConsistencySpec) -> SamplingSpec:
    """How the authors of a source sampled it."""
    if isinstance(stage, ConsistencySpec):
        return JUMP
    if hears(stage):
        eta = 1.0 if isinstance(stage, ChainSpec) and stage.inpaints else 0.0
        return LATENT.but(num_steps=50, eta=eta, guidance_scale=STABLE.get(source, 7.5))
    if stage.latent_channels:
        return CHURCHES if source == "ldm-churches256" else LATENT
    if stage.predicts == "edm":
        return EULER_HEUN
    if not stage.learns_variance:
        return DDPM.get(source, DDIM50)
    return ROOMS if source == "adm-lsun256" else ANCESTRAL


def hears(stage: ChainSpec | ConsistencySpec) -> bool:
    """Whether it is told captions and paints latents, as Stable Diffusion does."""
    return isinstance(stage, ChainSpec) and bool(stage.latent_channels and stage.text_width)


def filling(cascade: CascadeSpec) -> CascadeSpec:
    """GLIDE's cascade as its networks for inpainting are sampled: guidance 5, both hops ancestral."""
    base, upsampler = cascade.hops
    hops = (
        base.but(how=base.how.but(guidance_scale=5.0)),
        upsampler.but(how=upsampler.how.but(sampler="ddpm")),
    )
    return cascade.but(name=f"{cascade.name}_inpaint", hops=hops)


def led_by_clip(cascade: CascadeSpec) -> CascadeSpec:
    """GLIDE's cascade, its base led by the noised CLIP (stage "noised_clip"), without guiding itself.

    Source: Nichol et al. 2022 (arXiv:2112.10741), section 2.4; weight 3: the published notebook (the paper's
    raters liked 2 best).
    """
    base, upsampler = cascade.hops
    how = base.how.but(guidance_scale=1.0, gradient=GradientSpec(caption=3.0))
    led = base.but(how=how, guides={"noised_clip": "noised_clip", "clip": "noised_clip"})
    return cascade.but(name=f"{cascade.name}_clip", hops=(led, upsampler))


def card_of(source: str, stage: ChainSpec | ConsistencySpec, *, led: bool) -> str:
    """The README of such a cascade."""
    if hears(stage):
        shown = "--image A.png --mask HOLE.png " if isinstance(stage, ChainSpec) and stage.inpaints else ""
        return (
            f"# {source}\n\nPublished weights: imported, not trained here.  Captions are read by the CLIP of "
            f'the same file:\n\n    ddiff sample "an astronaut riding a horse" {shown}--cascade DIR\n\n'
            "Sampled as published: see cascade.json.\n"
        )
    told = "is told a class" if stage.classes else "is told nothing"
    asked = "--label 0 " if stage.classes or led else ""
    return (
        f"# {source}\n\nPublished weights: imported, not trained here.  It {told}"
        f"{', and led to one by a classifier' if led else ''}; no caption is heard:\n\n"
        f'    ddiff sample "no caption" {asked}--cascade DIR\n\n'
        "Sampled as published: see cascade.json.\n"
    )
