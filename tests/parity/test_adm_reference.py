"""UNets and classifiers against the published code: one state dict, equal answers, equal gradients."""

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

from dd_core.denoiser import Conditioning
from dd_core.layouts import ddpm, ldm
from dd_core.layouts.adm import AdmLayout, classifier_moves, unet_moves
from dd_core.layouts.published import published
from dd_core.nets.classifier import Classifier, ClassifierSpec
from dd_core.nets.unet import UNet, UNetSpec
from tests.parity.reference import (
    SHIMS,
    agree,
    checkout,
    differences,
    importing,
    randomised,
    settings_of_ddpm,
)

pytestmark = pytest.mark.parity

TIMES = torch.tensor([3.0, 871.0])
SMALL = UNetSpec(
    width=32, channel_mult=(1, 2, 3), attention_at=(2, 4), head_width=16, level_scale=1.0
)  # fmt: skip
THEIRS = {
    "image_size": 32,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 6,
    "num_res_blocks": 2,
    "attention_resolutions": (2, 4),
    "channel_mult": (1, 2, 3),
}
HALF = {"num_head_channels": 16, "use_scale_shift_norm": True, "resblock_updown": True}


def image(channels: int = 3, side: int = 32) -> torch.Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("changes", "theirs"),
    [
        ({}, HALF),
        ({}, HALF | {"use_new_attention_order": True}),
        ({"heads": 4}, HALF | {"num_head_channels": -1, "num_heads": 4}),
        ({"resample": "conv", "scale_shift": False}, {"num_head_channels": 16}),
        ({"labels": 7}, HALF | {"num_classes": 7}),
    ],
)
def test_adm(changes: dict[str, Any], theirs: dict[str, Any]) -> None:
    path = checkout("openai/guided-diffusion", "guided_diffusion/unet.py")
    order = "new" if theirs.get("use_new_attention_order") else "legacy"
    with importing(path, shims=SHIMS) as load:
        their_net = randomised(load("guided_diffusion.unet").UNetModel(**THEIRS | theirs))
        net = UNet(SMALL.but(**changes), in_channels=3, out_channels=6)
        label = torch.tensor([5, 0])
        told = {"y": label} if "labels" in changes else {}

        def ours(net: UNet) -> torch.Tensor:
            return net(image(), TIMES, Conditioning(level=net.of_class(label) if told else None))

        agree(
            their_net,
            net,
            unet_moves(net, AdmLayout(order=order)),
            lambda theirs: theirs(image(), TIMES, **told),
            ours,
        )


@pytest.mark.parametrize("at", [16, 8])
def test_ddpm(at: int) -> None:
    path = checkout("ermongroup/ddim", "models/diffusion.py")
    unet = published()["ddpm-cifar10"].net.unet  # type: ignore[union-attr]
    small = unet.but(width=32, channel_mult=(1, 2, 3), attention_at=(32 // at,), dropout=0.0)
    config = settings_of_ddpm(32, ch=32, ch_mult=[1, 2, 3], attn_resolutions=[at])
    with importing(path) as load:
        their_net = randomised(load("models.diffusion").Model(config))
        net = UNet(small, in_channels=3, out_channels=3)
        agree(
            their_net,
            net,
            ddpm.unet_moves(net),
            lambda theirs: theirs(image().to(next(theirs.parameters())), TIMES),
            lambda net: net(image().to(next(net.parameters())), TIMES, Conditioning()),
        )


@pytest.mark.parametrize(
    ("changes", "theirs"),
    [
        ({}, {"num_heads": 4, "use_scale_shift_norm": True}),
        ({"labels": 7}, {"num_heads": 4, "use_scale_shift_norm": True, "num_classes": 7}),
        ({"heads": 1, "attention_at": (4,), "scale_shift": False}, {"attention_resolutions": (4,)}),
    ],
    ids=["plain", "classes", "lsun"],
)
def test_improved_ddpm(changes: dict[str, Any], theirs: dict[str, Any]) -> None:
    path = checkout("openai/improved-diffusion", "improved_diffusion/unet.py")
    with importing(path, shims=SHIMS) as load:
        sizes = {name: value for name, value in THEIRS.items() if name != "image_size"} | theirs
        their_net = randomised(load("improved_diffusion.unet").UNetModel(**sizes))
        spec = SMALL.but(**{"heads": 4, "resample": "conv"} | changes)
        net = UNet(spec, in_channels=3, out_channels=6)
        label = torch.tensor([5, 0])
        told = {"y": label} if "labels" in changes else {}
        agree(
            their_net,
            net,
            unet_moves(net, AdmLayout()),
            lambda theirs: theirs(image(), TIMES, **told),
            lambda net: net(image(), TIMES, Conditioning(level=net.of_class(label) if told else None)),
        )


def test_a_wrong_attention_order_loads_and_is_wrong() -> None:
    path = checkout("openai/guided-diffusion", "guided_diffusion/unet.py")
    with importing(path, shims=SHIMS) as load:
        their_net = randomised(load("guided_diffusion.unet").UNetModel(**THEIRS | HALF))
        net = UNet(SMALL, in_channels=3, out_channels=6)
        found = differences(
            their_net,
            net,
            unet_moves(net, AdmLayout(order="new")),
            lambda theirs: theirs(image(), TIMES),
            lambda ours: ours(image(), TIMES, Conditioning()),
        )
    assert found.answer > 1e-4


def test_adm_upsampler() -> None:
    path = checkout("openai/guided-diffusion", "guided_diffusion/unet.py")
    small, large = image(3, 8), torch.nn.functional.interpolate(image(3, 8), (32, 32), mode="bilinear")
    with importing(path, shims=SHIMS) as load:
        their_net = randomised(load("guided_diffusion.unet").SuperResModel(**THEIRS | HALF))
        net = UNet(SMALL.but(image_channels=3), in_channels=3, out_channels=6)
        agree(
            their_net,
            net,
            unet_moves(net, AdmLayout()),
            lambda theirs: theirs(image(), TIMES, low_res=small),
            lambda ours: ours(image(), TIMES, Conditioning(image=large)),
        )


def test_adm_classifier() -> None:
    path = checkout("openai/guided-diffusion", "guided_diffusion/unet.py")
    with importing(path, shims=SHIMS) as load:
        options = THEIRS | HALF | {"out_channels": 10, "pool": "attention"}
        their_net = randomised(load("guided_diffusion.unet").EncoderUNetModel(**options))
        net = Classifier(ClassifierSpec(unet=SMALL, image_size=32, classes=10))
        agree(
            their_net,
            net,
            classifier_moves(net, AdmLayout()),
            lambda theirs: theirs(image(), TIMES),
            lambda ours: ours(image(), TIMES),
        )


def test_consistency_models() -> None:
    """Asked without their half-precision attention, which needs a GPU."""
    path = checkout("openai/consistency_models", "cm/unet.py")
    with importing(path, shims=SHIMS) as load:
        module = load("cm.unet")
        with contextlib.ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(module, "QKVFlashAttention", lambda width, heads: module.QKVAttention(heads))
            their_net = randomised(module.UNetModel(**THEIRS | HALF))
        net = UNet(SMALL, in_channels=3, out_channels=6)
        agree(
            their_net,
            net,
            unet_moves(net, AdmLayout(order="new", attention_dims=2)),
            lambda theirs: theirs(image(), TIMES),
            lambda ours: ours(image(), TIMES, Conditioning()),
        )


@pytest.mark.parametrize(
    ("changes", "theirs", "layout"),
    [
        ({"resample": "conv", "scale_shift": False}, {"num_head_channels": 16}, AdmLayout()),
        ({"heads": 4}, {"num_heads": 4, "use_scale_shift_norm": True, "resblock_updown": True}, AdmLayout()),
        (
            {"resample": "conv", "scale_shift": False, "heads": 4, "attention": "cross"}
            | {"text_width": 24, "text_at_level": False, "transformer_depth": 2},
            {"num_heads": 4, "use_spatial_transformer": True, "context_dim": 24, "transformer_depth": 2},
            AdmLayout(),
        ),
    ],
)
def test_latent_diffusion(changes: dict[str, Any], theirs: dict[str, Any], layout: AdmLayout) -> None:
    pytest.importorskip("einops", reason="latent diffusion needs einops")
    pytest.importorskip("omegaconf", reason="latent diffusion needs omegaconf")
    path = checkout("CompVis/latent-diffusion", "ldm/modules/diffusionmodules/openaimodel.py")
    text = torch.randn(2, 5, 24) if "context_dim" in theirs else None
    with importing(path) as load:
        options = THEIRS | theirs
        their_net: nn.Module = load("ldm.modules.diffusionmodules.openaimodel").UNetModel(**options)
        for module in their_net.modules():
            if hasattr(module, "checkpoint"):
                module.checkpoint = False
        randomised(their_net)
        net = UNet(SMALL.but(**changes), in_channels=3, out_channels=6)
        agree(
            their_net,
            net,
            ldm.ldm_unet_moves(net, layout),
            lambda theirs: theirs(image(), TIMES, context=text),
            lambda ours: ours(image(), TIMES, Conditioning(text=text)),
        )


@pytest.mark.parametrize("vector", [False, True])
def test_the_second_stable_diffusion(vector: bool) -> None:
    """Linear layers into its transformers, and a vector beside the timestep for its unCLIP."""
    pytest.importorskip("einops", reason="Stable Diffusion needs einops")
    pytest.importorskip("omegaconf", reason="Stable Diffusion needs omegaconf")
    path = checkout("Stability-AI/stablediffusion", "ldm/modules/diffusionmodules/openaimodel.py")
    x, text, embedding = image(), torch.randn(2, 5, 24), torch.randn(2, 7)
    options = {"num_head_channels": 16, "use_spatial_transformer": True, "context_dim": 24, "legacy": False}
    options |= {"use_linear_in_transformer": True, "use_checkpoint": False}
    spec = SMALL.but(
        resample="conv", scale_shift=False, attention="cross", text_width=24, text_at_level=False
    )
    if vector:
        options |= {"num_classes": "sequential", "adm_in_channels": 7}
        spec = spec.but(embedding_width=7, embedding_layers=2, embedding_tokens=0)
    shims = {"ldm.util": {"exists": lambda value: value is not None, "instantiate_from_config": None}}
    with importing(path, shims=shims) as load:
        theirs = randomised(load("ldm.modules.diffusionmodules.openaimodel").UNetModel(**THEIRS | options))
        net = UNet(spec, in_channels=3, out_channels=6)
        told = embedding if vector else None
        agree(
            theirs,
            net,
            ldm.ldm_unet_moves(net, AdmLayout(projection="linear")),
            lambda theirs: theirs(x, TIMES, context=text, y=told),
            lambda ours: ours(x, TIMES, Conditioning(text=text, image_embedding=told)),
        )
