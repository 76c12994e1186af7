"""Every published network, built at full size by its authors' own code: names and shapes are those we read.

On the meta device, which holds no numbers.  What the sizes are is said by their manuals and configurations:
the flags below are of the README beside the code, YAML files are read from the checkout.
"""

import inspect
import types
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from dd_core.layouts.clip import OPEN_CLIP
from dd_core.layouts.importing import imported, moves_of
from dd_core.layouts.ldm import AUTOENCODER, UNET, autoencoder_moves
from dd_core.layouts.moves import fitted, inward
from dd_core.layouts.published import AUTOENCODERS, published
from dd_core.nets.autoencoder import Autoencoder
from dd_core.nets.network import build
from dd_core.towers import open_clip
from tests.parity.reference import SHIMS, checkout, importing, settings_of_ddpm

pytestmark = pytest.mark.parity

BLOCKS = {"num_channels": 256, "num_res_blocks": 2, "learn_sigma": True, "resblock_updown": True}
ADM = BLOCKS | {"attention_resolutions": "32,16,8", "use_scale_shift_norm": True}
WIDE = ADM | {"num_head_channels": 64}
LARGE = WIDE | {"image_size": 256}
SR = ADM | {"num_channels": 192, "class_cond": True}
IMAGENET64 = WIDE | {"image_size": 64, "num_channels": 192, "num_res_blocks": 3, "class_cond": True}
PLAIN = {"learn_sigma": False}


def of_arguments(make: Any, flags: dict[str, Any], defaults: dict[str, Any]) -> nn.Module:
    """A network of published code, by those of all its flags that its function takes."""
    wanted = inspect.signature(make).parameters
    return make(**{key: value for key, value in (defaults | flags).items() if key in wanted})


def assert_read(name: str, theirs: dict[str, Tensor]) -> None:
    """Each of their weights becomes one of ours of its shape, and none of ours is left without."""
    source = published()[name]
    with torch.device("meta"):
        net = build(source.net)
    fitted(net, inward(theirs, moves_of(net, source.layout)))


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("adm-imagenet64", IMAGENET64 | {"use_new_attention_order": True, "dropout": 0.1}),
        ("adm-imagenet128", ADM | {"image_size": 128, "num_heads": 4, "class_cond": True}),
        ("adm-imagenet256", LARGE | {"class_cond": True}),
        ("adm-imagenet256-uncond", LARGE),
        ("adm-imagenet512", WIDE | {"image_size": 512, "class_cond": True}),
        ("adm-lsun256", LARGE | {"dropout": 0.1}),
        ("adm-upsampler-64-256", SR | {"num_heads": 4, "large_size": 256, "small_size": 64}),
        (
            "adm-upsampler-128-512",
            SR
            | {"attention_resolutions": "32,16", "num_head_channels": 64}
            | {"large_size": 512, "small_size": 128},
        ),
    ],
)
def test_guided_diffusion(name: str, flags: dict[str, Any]) -> None:
    path = checkout("openai/guided-diffusion", "guided_diffusion/script_util.py")
    larger = "upsampler" in name
    with importing(path, shims=SHIMS) as load, torch.device("meta"):
        code = load("guided_diffusion.script_util")
        defaults = code.sr_model_and_diffusion_defaults() if larger else code.model_and_diffusion_defaults()
        theirs = of_arguments(code.sr_create_model if larger else code.create_model, flags, defaults)
    assert_read(name, theirs.state_dict())
    assert (published()[name].layout == "adm-new") == flags.get("use_new_attention_order", False)


@pytest.mark.parametrize(("size", "depth"), [(64, 4), (128, 2), (256, 2), (512, 2)])
def test_classifiers_of_guided_diffusion(size: int, depth: int) -> None:
    path = checkout("openai/guided-diffusion", "guided_diffusion/script_util.py")
    with importing(path, shims=SHIMS) as load, torch.device("meta"):
        code = load("guided_diffusion.script_util")
        flags = code.classifier_defaults() | {"image_size": size, "classifier_depth": depth}
        theirs = of_arguments(code.create_classifier, flags, {})
    assert_read(f"adm-classifier{size}", theirs.state_dict())


@pytest.mark.parametrize(
    ("name", "side", "mult"), [("ddpm-cifar10", 32, [1, 2, 2, 2]), ("ddpm-lsun256", 256, [1, 1, 2, 2, 4, 4])]
)
def test_ddpm(name: str, side: int, mult: list[int]) -> None:
    path = checkout("ermongroup/ddim", "models/diffusion.py")
    with importing(path) as load, torch.device("meta"):
        theirs = load("models.diffusion").Model(settings_of_ddpm(side, ch_mult=mult))
    assert_read(name, theirs.state_dict())


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("improved-imagenet64", {"image_size": 64, "num_channels": 128, "num_res_blocks": 3}),
        ("improved-cifar10", {"image_size": 32, "num_channels": 128, "num_res_blocks": 3, "dropout": 0.3}),
        (
            "improved-imagenet64-cond",
            {"image_size": 64, "num_channels": 192, "num_res_blocks": 3, "class_cond": True},
        ),
        (
            "improved-lsun256",
            {"image_size": 256, "num_channels": 128, "num_res_blocks": 2, "num_heads": 1}
            | {"use_scale_shift_norm": False, "attention_resolutions": "16"},
        ),
        ("improved-upsampler-64-256", {"num_channels": 192, "num_res_blocks": 2, "class_cond": True}),
    ],
)
def test_improved_ddpm(name: str, flags: dict[str, Any]) -> None:
    path = checkout("openai/improved-diffusion", "improved_diffusion/script_util.py")
    larger = "upsampler" in name
    with importing(path, shims=SHIMS) as load, torch.device("meta"):
        code = load("improved_diffusion.script_util")
        defaults = code.sr_model_and_diffusion_defaults() if larger else code.model_and_diffusion_defaults()
        make = code.sr_create_model if larger else code.create_model
        theirs = of_arguments(make, flags | {"learn_sigma": True}, defaults)
    assert_read(name, theirs.state_dict())


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("edm-imagenet64", IMAGENET64 | PLAIN | {"dropout": 0.1}),
        ("consistency-imagenet64", IMAGENET64 | PLAIN),
        ("edm-lsun256", LARGE | PLAIN | {"use_scale_shift_norm": False, "dropout": 0.1}),
        ("consistency-lsun256", LARGE | PLAIN | {"use_scale_shift_norm": False}),
    ],
)
def test_consistency_models(name: str, flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their attention in half precision, which has no weights, is made of nothing here: it needs a GPU."""
    path = checkout("openai/consistency_models", "cm/script_util.py")
    with importing(path, shims=SHIMS) as load, torch.device("meta"):
        monkeypatch.setattr(load("cm.unet"), "QKVFlashAttention", lambda width, heads: nn.Identity())
        code = load("cm.script_util")
        theirs = of_arguments(code.create_model, flags, code.model_and_diffusion_defaults())
    assert_read(name, theirs.state_dict())


@pytest.mark.parametrize("inpaint", [False, True])
@pytest.mark.parametrize("name", ["glide-base", "glide-upsample"])
def test_glide(name: str, inpaint: bool) -> None:
    path = checkout("openai/glide-text2im", "glide_text2im/model_creation.py")
    with importing(path) as load, torch.device("meta"):
        code = load("glide_text2im.model_creation")
        larger = name == "glide-upsample"
        flags = (
            code.model_and_diffusion_defaults_upsampler() if larger else code.model_and_diffusion_defaults()
        )
        theirs = of_arguments(code.create_model, flags | {"inpaint": inpaint}, {})
    assert_read(name + ("-inpaint" if inpaint else ""), theirs.state_dict())


def test_the_noised_clip_of_glide(monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkout("openai/glide-text2im", "glide_text2im/clip/config.yaml")
    pytest.importorskip("attr", reason="the noised CLIP needs attrs")
    monkeypatch.setattr(np, "bool", np.bool_, raising=False)
    with importing(path) as load:
        clip = load("glide_text2im.clip.model_creation").create_clip_model(device=torch.device("cpu"))
    towers = {"image": clip.image_encoder, "text": clip.text_encoder}
    parts = {name: tower.state_dict() for name, tower in towers.items()}
    assert_read("glide-clip", {f"{name}.{key}": t for name in parts for key, t in parts[name].items()})


def karlo_config(name: str) -> types.SimpleNamespace:
    """A configuration of Karlo, as another repository keeps it."""
    path = checkout("Stability-AI/stablediffusion", f"configs/karlo/{name}.yaml")

    def spaced(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return types.SimpleNamespace(**{key: spaced(one) for key, one in value.items()})

    return spaced(yaml.safe_load((path / f"configs/karlo/{name}.yaml").read_text()))


@pytest.mark.parametrize(
    ("names", "config", "module", "kind"),
    [
        (("karlo-decoder",), "decoder_900M_vit_l", "decoder_model", "Text2ImModel"),
        (("karlo-prior",), "prior_1B_vit_l", "prior_model", "PriorDiffusionModel"),
        (
            ("karlo-sr", "karlo-sr-last"),
            "improved_sr_64_256_1.4B",
            "sr_64_256",
            "ImprovedSupRes64to256ProgressiveModel",
        ),
    ],
)
def test_karlo(names: tuple[str, ...], config: str, module: str, kind: str) -> None:
    path = checkout("kakaobrain/karlo", f"karlo/models/{module}.py")
    nothing = torch.zeros(1), torch.zeros(1)
    tokenizer = types.SimpleNamespace(padded_tokens_and_mask=lambda texts, length: nothing)
    embedded = torch.zeros(768), torch.ones(768)
    given = {"decoder_model": (tokenizer,), "prior_model": (tokenizer, *embedded)}.get(module, ())
    settings = karlo_config(config)
    with importing(path) as load, torch.device("meta"):
        theirs = getattr(load(f"karlo.models.{module}"), kind)(settings, *given).state_dict()
    more = [{"0": embedded[0], "1": embedded[1]}] if module == "prior_model" else []
    for name in names:
        assert imported(published()[name], [theirs, *more], averaged=False).weights


CONFIGS = {
    "ldm-faces256": ("CompVis/latent-diffusion", "models/ldm/celeba256/config.yaml"),
    "ldm-bedrooms256": ("CompVis/latent-diffusion", "models/ldm/lsun_beds256/config.yaml"),
    "ldm-churches256": ("CompVis/latent-diffusion", "models/ldm/lsun_churches256/config.yaml"),
    "ldm-cin256": ("CompVis/latent-diffusion", "configs/latent-diffusion/cin256-v2.yaml"),
    "ldm-text256": ("CompVis/latent-diffusion", "configs/latent-diffusion/txt2img-1p4B-eval.yaml"),
    "sd1": ("CompVis/stable-diffusion", "configs/stable-diffusion/v1-inference.yaml"),
    "sd2-base": ("Stability-AI/stablediffusion", "configs/stable-diffusion/v2-inference.yaml"),
    "sd2": ("Stability-AI/stablediffusion", "configs/stable-diffusion/v2-inference-v.yaml"),
    "sd2-inpaint": ("Stability-AI/stablediffusion", "configs/stable-diffusion/v2-inpainting-inference.yaml"),
    "sd2-unclip-h": (
        "Stability-AI/stablediffusion",
        "configs/stable-diffusion/v2-1-stable-unclip-h-inference.yaml",
    ),
    "sd2-unclip-l": (
        "Stability-AI/stablediffusion",
        "configs/stable-diffusion/v2-1-stable-unclip-l-inference.yaml",
    ),
    "sd-x4-upscaler": ("Stability-AI/stablediffusion", "configs/stable-diffusion/x4-upscaling.yaml"),
}
STUBS = {
    "ldm.util": {
        "exists": lambda value: value is not None,
        "default": lambda value, other: other if value is None else value,
        "instantiate_from_config": None,
    }
}


class Halves(nn.Module):
    """An autoencoder as their class of another framework holds it."""

    def __init__(self, code: Any, params: dict[str, Any]) -> None:
        super().__init__()
        sizes = params["ddconfig"]
        self.encoder, self.decoder = code.Encoder(**sizes), code.Decoder(**sizes)
        encoded = sizes["z_channels"] * (2 if sizes["double_z"] else 1)
        latent = params["embed_dim"] * (2 if sizes["double_z"] else 1)
        self.quant_conv = nn.Conv2d(encoded, latent, 1)
        self.post_quant_conv = nn.Conv2d(params["embed_dim"], sizes["z_channels"], 1)
        if "n_embed" in params:
            self.quantize = nn.Module()
            self.quantize.embedding = nn.Embedding(params["n_embed"], params["embed_dim"])


@pytest.mark.parametrize("name", CONFIGS)
def test_latent_and_stable_diffusion(name: str) -> None:
    """UNet and autoencoder of the configuration, and open_clip's text tower where it reads, in one file.

    The text tower of Stable Diffusion 1 is transformers'; tests/parity/test_stable_diffusion.py reads that.
    """
    pytest.importorskip("einops", reason="latent diffusion needs einops")
    pytest.importorskip("omegaconf", reason="latent diffusion needs omegaconf")
    repository, config = CONFIGS[name]
    path = checkout(repository, config)
    model = yaml.safe_load((path / config).read_text())["model"]["params"]
    unet = model["unet_config"]["params"]
    with importing(path, shims=STUBS) as load, torch.device("meta"):
        theirs = load("ldm.modules.diffusionmodules.openaimodel").UNetModel(**unet).state_dict()
        first = Halves(load("ldm.modules.diffusionmodules.model"), model["first_stage_config"]["params"])
    state = {UNET + key: t for key, t in theirs.items()}
    state |= {AUTOENCODER + key: t for key, t in first.state_dict().items()}
    source = published()[name]
    source = source._replace(latent_scale=source.latent_scale or 1.0)
    if source.layout == "ldm":
        source = source._replace(reader=None)
    if source.reader is not None:
        with torch.device("meta"):
            tower = open_clip().CLIP(**open_clip().get_model_config("ViT-H-14")).state_dict()
        state |= {OPEN_CLIP + key: t for key, t in tower.items() if not key.startswith("visual.")}
    found = imported(source, [state], averaged=False)
    assert found.weights
    assert found.autoencoder
    assert (found.reader is None) == (source.reader is None)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_the_first_stages_of_latent_diffusion(name: str) -> None:
    pytest.importorskip("einops", reason="latent diffusion needs einops")
    pytest.importorskip("omegaconf", reason="latent diffusion needs omegaconf")
    config = f"models/first_stage_models/{name.removeprefix('ldm-')}/config.yaml"
    path = checkout("CompVis/latent-diffusion", config)
    params = yaml.safe_load((path / config).read_text())["model"]["params"]
    with importing(path, shims=STUBS) as load, torch.device("meta"):
        theirs = Halves(load("ldm.modules.diffusionmodules.model"), params).state_dict()
        net = Autoencoder(AUTOENCODERS[name])
    fitted(net, inward(theirs, autoencoder_moves(net)))
