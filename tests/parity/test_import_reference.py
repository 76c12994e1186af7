"""Published code and what was imported from its file draw the same picture from the same noise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dd_core import bundle
from dd_core.cascade import requested
from dd_core.layouts.published import Published, published
from dd_core.nets.classifier import ClassifierSpec
from dd_core.nets.network import PlainSpec
from dd_core.nets.unet import UNetSpec
from dd_core.samplers import SamplingSpec, sample
from jobs import exchange
from tests.parity.reference import SHIMS, checkout, importing, randomised

pytestmark = pytest.mark.parity

SIZES = {
    "image_size": 16,
    "in_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_head_channels": 16,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
UNET = UNetSpec(
    width=32, channel_mult=(1, 2), blocks_per_level=1, attention_at=(2,), head_width=16, level_scale=1
)
LABEL = torch.tensor([3, 0])


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, Published]:
    """The sources, of which some are very small."""
    found = published()
    for name in ("adm-imagenet64", "consistency-imagenet64"):
        net = found[name].net
        assert isinstance(net, PlainSpec)
        process = found[name].process.but(image_size=16)
        found[name] = found[name]._replace(net=net.but(unet=UNET.but(labels=5)), process=process)
    classifier = ClassifierSpec(unet=UNET, image_size=16, classes=5)
    process = found["adm-classifier64"].process.but(image_size=16)
    found["adm-classifier64"] = found["adm-classifier64"]._replace(net=classifier, process=process)
    monkeypatch.setattr(exchange, "published", lambda: found)
    return found


def saved(net: nn.Module, path: Path) -> Path:
    """The file of a network, as its authors wrote it."""
    torch.save(net.state_dict(), path)
    return path


def painted(cascade: Path, how: Callable[[SamplingSpec], SamplingSpec]) -> tuple[Tensor, Tensor, float]:
    """By the base of a cascade: its first x, the picture, and the level of the first."""
    opened = bundle.load_cascade(cascade)
    hop, chosen = opened.hops[0], how(opened.spec.hops[0].how)
    state = requested(["", ""], [1, 2], 77)._replace(label=LABEL)
    first = next(hop.start(state, chosen).sampling)
    draw = hop.start(state, chosen)
    return first.x, sample(draw.sampling, hop.denoiser(draw.rows)), float(first.levels()[0])


def test_adm_is_led_by_its_classifier_to_the_picture_of_the_published_code(
    known: dict[str, Published], tmp_path: Path
) -> None:
    path = checkout("openai/guided-diffusion", "guided_diffusion/unet.py")
    with importing(path, shims=SHIMS) as load:
        code = load("guided_diffusion.unet")
        new = SIZES | {"use_new_attention_order": True}
        net = randomised(code.UNetModel(**new, out_channels=6, num_classes=5)).eval()
        classifier = randomised(code.EncoderUNetModel(**SIZES, out_channels=5, pool="attention")).eval()
        diffusion = load("guided_diffusion.script_util").create_gaussian_diffusion(
            learn_sigma=True, noise_schedule="cosine", timestep_respacing="ddim5"
        )
    more = exchange.More(classifier=saved(classifier, tmp_path / "classifier.pt"))
    base = saved(net, tmp_path / "base.pt")
    exchange.import_weights("adm-imagenet64", [base], tmp_path / "cascade", averaged=True, more=more)
    fast: dict[str, Any] = {"sampler": "ddim", "num_steps": 5, "spacing": "ddim_leading"}
    x, picture, sigma = painted(tmp_path / "cascade", lambda how: how.but(**fast))

    def leading(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            at = x.detach().requires_grad_(True)
            chosen = classifier(at, t).log_softmax(-1)[range(2), y].sum()
            return torch.autograd.grad(chosen, at)[0]

    with torch.no_grad():
        theirs = diffusion.ddim_sample_loop(
            net,
            x.shape,
            noise=x / (1 + sigma**2) ** 0.5,
            cond_fn=leading,
            model_kwargs={"y": LABEL},
            device="cpu",
        )
    torch.testing.assert_close(picture, theirs, rtol=0, atol=2e-3)


def test_a_consistency_model_jumps_to_the_picture_of_the_published_code(
    known: dict[str, Published], tmp_path: Path
) -> None:
    path = checkout("openai/consistency_models", "cm/unet.py")
    with importing(path, shims=SHIMS) as load:
        code, karras = load("cm.unet"), load("cm.karras_diffusion")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(code, "QKVFlashAttention", lambda width, heads: code.QKVAttention(heads))
            net = randomised(code.UNetModel(**SIZES, out_channels=3, num_classes=5)).eval()
        diffusion = karras.KarrasDenoiser(sigma_data=0.5, distillation=True, loss_norm="l2")
        base = saved(net, tmp_path / "base.pt")
        exchange.import_weights("consistency-imagenet64", [base], tmp_path / "cascade", averaged=True)
        x, picture, sigma = painted(tmp_path / "cascade", lambda how: how)
        assert np.isclose(sigma, 80)
        with torch.no_grad():
            theirs = diffusion.denoise(net, x, torch.full((2,), 80.0), y=LABEL)[1].clamp(-1, 1)
    torch.testing.assert_close(picture, theirs, rtol=0, atol=2e-4)
