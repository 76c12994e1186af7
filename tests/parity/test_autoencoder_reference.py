"""The autoencoder, its codebook and its losses against latent diffusion and taming transformers."""

import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dd_core import images
from dd_core.layouts.ldm import autoencoder_moves
from dd_core.nets.autoencoder import Autoencoder, AutoencoderNetSpec
from dd_core.nets.perceptual import PatchGan, PatchGanSpec
from dd_core.nets.quantiser import Quantiser
from dd_core.stage import PairBatch
from dd_core.stages.autoencoder import AutoencoderSpec, AutoencoderStage
from tests.parity.reference import checkout, differences, importing, randomised

pytestmark = pytest.mark.parity


class Theirs(nn.Module):
    """Their two halves and what lies between, as their class of another framework holds them."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, encoded: int, channels: int) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.quant_conv = nn.Conv2d(encoded, encoded, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        latent = self.quant_conv(self.encoder(image))
        mean = latent[:, : self.post_quant_conv.in_channels]
        return self.decoder(self.post_quant_conv(mean))


@pytest.mark.parametrize(
    "spec",
    [
        AutoencoderNetSpec(width=32, channel_mult=(1, 2, 2), latent_channels=3),
        AutoencoderNetSpec(width=32, channel_mult=(1, 1, 2), latent_channels=4, attention_levels=(1, 2)),
        AutoencoderNetSpec(width=32, channel_mult=(1, 2), latent_channels=3, codes=16, mid_attention=False),
    ],
)
def test_both_halves(spec: AutoencoderNetSpec) -> None:
    pytest.importorskip("einops", reason="latent diffusion needs einops")
    pytest.importorskip("omegaconf", reason="latent diffusion needs omegaconf")
    path = checkout("CompVis/latent-diffusion", "ldm/modules/diffusionmodules/model.py")
    options = {
        "ch": spec.width,
        "out_ch": 3,
        "ch_mult": spec.channel_mult,
        "num_res_blocks": spec.blocks,
        "attn_resolutions": [16 // 2**level for level in spec.attention_levels],
        "attn_type": "vanilla" if spec.mid_attention else "none",
        "in_channels": 3,
        "resolution": 16,
        "z_channels": spec.latent_channels,
        "double_z": not spec.codes,
    }
    shims = {"ldm.util": {"instantiate_from_config": None}}
    with importing(path, shims=shims) as load:
        module = load("ldm.modules.diffusionmodules.model")
        halves = module.Encoder(**options), module.Decoder(**options)
        theirs = randomised(Theirs(*halves, spec.encoded_channels, spec.latent_channels))
        ours = Autoencoder(spec)
        image = torch.rand(2, 3, 16, 16) * 2 - 1

        def ask(ours: Autoencoder) -> torch.Tensor:
            latent = ours.quant_conv(ours.encoder(image))[:, : spec.latent_channels]
            return ours.generate(latent, quantise=False)

        moves = [move for move in autoencoder_moves(ours) if "quantiser" not in move.ours]
        ours.quantiser = None  # it learns by a loss of its own
        found = differences(theirs, ours, moves, lambda theirs: theirs(image), ask)
    assert max(found) <= 1e-5


def test_the_codebook() -> None:
    pytest.importorskip("einops", reason="taming transformers needs einops")
    pytest.importorskip("omegaconf", reason="taming transformers needs omegaconf")
    path = checkout("CompVis/taming-transformers", "taming/modules/vqvae/quantize.py")
    latent = torch.randn(3, 4, 6, 5)
    with importing(path) as load:
        theirs = load("taming.modules.vqvae.quantize").VectorQuantizer2(32, 4, beta=0.25)
        nn.init.normal_(theirs.embedding.weight)
        vectors, _, (_, _, codes) = theirs(latent)
    ours = Quantiser(32, 4)
    ours.vectors.load_state_dict(theirs.embedding.state_dict())
    assert torch.equal(ours(latent).codes.flatten(), codes)
    torch.testing.assert_close(ours(latent).vectors, vectors, rtol=0, atol=1e-6)


SPEC = AutoencoderSpec(
    net=AutoencoderNetSpec(width=16, channel_mult=(1, 2), blocks=1, groups=8, latent_channels=4),
    image_size=32,
    crop=32,
    kl_weight=1e-3,
    discriminator=PatchGanSpec(width=8, layers=2),
    disc_weight=0.6,
    disc_start=3,
    commitment="legacy",
)


@contextmanager
def their_losses() -> Iterator[tuple[Any, Any, Any]]:
    """Their losses of a Gaussian and of a codebook, and their Gaussian; LPIPS on a VGG16 of chance."""
    taming = checkout("CompVis/taming-transformers", "taming/modules/losses/vqperceptual.py")
    ldm = checkout("CompVis/latent-diffusion", "ldm/modules/losses/contperceptual.py")
    vgg = pytest.importorskip("torchvision", reason="LPIPS needs torchvision").models.vgg

    def random_vgg16(*, pretrained: bool) -> types.SimpleNamespace:
        features = vgg.make_layers(vgg.cfgs["D"])
        for layer in features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        return types.SimpleNamespace(features=features)

    with ExitStack() as stack:
        load = stack.enter_context(importing(taming))
        of_ldm = stack.enter_context(importing(ldm))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        lpips = load("taming.modules.losses.lpips")
        patch.setattr(lpips, "models", types.SimpleNamespace(vgg16=random_vgg16))
        patch.setattr(lpips.LPIPS, "load_from_pretrained", lambda self: None)
        of_codes = load("taming.modules.losses.vqperceptual").VQLPIPSWithDiscriminator
        of_gaussian = of_ldm("ldm.modules.losses.contperceptual").LPIPSWithDiscriminator
        gaussian = of_ldm("ldm.modules.distributions.distributions").DiagonalGaussianDistribution
        yield of_gaussian, of_codes, gaussian


def prepared(loss: Any, ours: PatchGan, file: Path) -> Any:
    """Their loss with a discriminator of our weights, and its LPIPS, which is also written to a file.

    The norms of the discriminator are ours, which do not see the rest of the batch; and LPIPS is put in eval
    mode, for training brings its dropout to life.
    """
    loss.perceptual_loss.eval()
    for name, weight in loss.perceptual_loss.named_parameters():
        if name.startswith("lin"):  # no channel counts for less than nothing
            weight.data.abs_()
    save_file({name: t.clone() for name, t in loss.perceptual_loss.state_dict().items()}, file)
    theirs = type(loss.discriminator)(3, ndf=SPEC.discriminator.width, n_layers=SPEC.discriminator.layers)
    for place, layer in enumerate(theirs.main):
        if isinstance(layer, nn.BatchNorm2d):
            theirs.main[place] = nn.GroupNorm(8, layer.num_features)
    theirs.main.load_state_dict(ours.layers.state_dict())
    loss.discriminator = theirs
    return loss


def gradients(net: nn.Module) -> list[torch.Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    largest = max(grad.abs().max().item() for grad in expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("batches", [1, 7], ids=["before", "after"])
@pytest.mark.parametrize("faint", [1.0, 1e-5], ids=["balanced", "clamped"])
@pytest.mark.parametrize("codes", [0, 16], ids=["gaussian", "codebook"])
def test_losses_and_gradients_of_both_players(codes: int, faint: float, batches: int, tmp_path: Path) -> None:
    """Before and after the discriminator takes part; with a weight of it within its limit and at it."""
    batch = PairBatch(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), torch.ones(2, 6).long())
    discriminator, file = PatchGan(SPEC.discriminator), tmp_path / "lpips.safetensors"
    with torch.no_grad():
        discriminator.layers[-1].weight.mul_(faint)
    with their_losses() as (of_gaussian, of_codes, gaussian):
        weights = {"disc_start": SPEC.disc_start, "disc_weight": SPEC.disc_weight}
        loss = of_codes(**weights) if codes else of_gaussian(kl_weight=SPEC.kl_weight, **weights)
        prepared(loss, discriminator, file)
        spec = SPEC.but(net=SPEC.net.but(codes=codes), perceptual="lpips", lpips_weights=str(file))
        stage = AutoencoderStage(spec)
        stage.discriminator.load_state_dict(discriminator.state_dict())
        stage.batches.fill_(batches)
        model, values = stage.model, 1 if codes else 3 * 32 * 32
        torch.manual_seed(7)
        image = images.crops(images.to_unit(batch.image), 32)
        if codes:
            squeezed = stage.bottleneck(image)
            latent, between = squeezed.latent, squeezed.cost
        else:
            between = gaussian(model.quant_conv(model.encoder(image)))
            latent = between.sample()
        x0_hat = model.generate(latent, quantise=False)
        given = (between, image, x0_hat) if codes else (image, x0_hat, between)
        told = {"global_step": batches, "last_layer": model.decoder.conv_out.weight}
        painting, _ = loss(*given, 0, **told)
        judging, _ = loss(*given, 1, **told)
        (painting / values).backward()
        painted = gradients(model)
        loss.discriminator.zero_grad()
        judging.backward()
        judged = gradients(loss.discriminator)
    for phase, wanted, expected in (
        ("discriminator", judging, judged),
        ("model", painting / values, painted),
    ):
        stage.zero_grad()
        torch.manual_seed(7)
        total = stage(batch, phase).total
        total.backward()
        torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-8)
        assert_same(gradients(getattr(stage, phase)), expected)
