"""A whole cascade in miniature: prior, base and upsampler with random weights, sealed on disk."""

from pathlib import Path

import torch

from dd_core import bundle
from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.nets.clip import ClipNetSpec
from dd_core.nets.dit import DiTSpec
from dd_core.nets.prior import PriorNetSpec
from dd_core.nets.unet import UNetSpec
from dd_core.samplers import SamplingSpec
from dd_core.stage import Trained
from dd_core.stages import StageSpec, build_stage
from dd_core.stages.base import BaseSpec
from dd_core.stages.clip import ClipSpec
from dd_core.stages.prior import PriorSpec
from dd_core.stages.upsampler import UpsamplerSpec

CLIP = ClipSpec(
    net=ClipNetSpec(
        embedding_width=16,
        image_size=16,
        patch_size=8,
        image_width=16,
        image_layers=1,
        context_length=12,
        text_width=16,
        text_layers=1,
        head_width=8,
    )
)
STAGES: dict[str, StageSpec] = {
    "clip": CLIP,
    "prior": PriorSpec(
        net=PriorNetSpec(
            width=16, layers=1, head_width=8, text_width=16, embedding_width=16, context_length=12
        )
    ),
    "base": BaseSpec(
        net=DiTSpec(
            image_size=16,
            conv_width=16,
            conv_blocks=1,
            width=16,
            layers=1,
            head_width=8,
            text_width=16,
            embedding_width=16,
        ),
        image_size=16,
    ),
    "upsampler": UpsamplerSpec(
        net=UNetSpec(
            width=8,
            channel_mult=(1,),
            blocks_per_level=1,
            attention_at=(),
            attention_in_middle=False,
            head_width=8,
            groups=8,
            image_channels=3,
        ),
        image_size=64,
        crop=16,
    ),
}
PARENTS = {"prior": ("clip",), "base": ("clip",)}
CASCADE = CascadeSpec(
    name="tiny",
    hops=(
        HopSpec(stage="prior", how=SamplingSpec(num_steps=3, guidance_scale=2.0, draws=2)),
        HopSpec(stage="base", how=SamplingSpec(num_steps=4), follows_request=True),
        HopSpec(stage="upsampler", how=SamplingSpec(num_steps=2, guidance_scale=1.0)),
    ),
    context_length=12,
    image_size=64,
)


def tiny_cascade(directory: Path, *, seed: int = 0, cascade: CascadeSpec = CASCADE) -> str:
    """Write a cascade to directory/cascade and return its digest; another seed is another training."""
    torch.manual_seed(seed)
    trained: dict[str, Trained] = {}
    digests: dict[str, str] = {}
    for name, spec in STAGES.items():
        parents = {role: trained[role] for role in PARENTS.get(name, ())}
        model = build_stage(spec, parents).model
        for weight in model.parameters():  # new networks answer zero everywhere
            torch.nn.init.normal_(weight, std=0.3)
        trained[name] = Trained(spec, model.state_dict())
        digests[name] = bundle.save(
            directory / name,
            spec,
            trained[name].weights,
            parents={role: digests[role] for role in parents},
            facts={},
        )
    hops = {hop.stage for hop in cascade.hops}
    needed = hops.union(*(PARENTS.get(name, ()) for name in hops))
    bundles = {name: directory / name for name in STAGES if name in needed}
    return bundle.save_cascade(directory / "cascade", cascade, bundles, card="tiny")
