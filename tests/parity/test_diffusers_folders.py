"""Folders of diffusers: equal answers and gradients, and what is written is what diffusers reads."""

from typing import Any

import pytest
import torch

from dd_core.denoiser import Conditioning
from dd_core.layouts import diffusers_autoencoder, diffusers_config
from dd_core.layouts.diffusers_unet import unet_moves
from dd_core.layouts.moves import LayoutError, fitted, inward, outward
from dd_core.layouts.published import published
from dd_core.nets.autoencoder import Autoencoder, AutoencoderNetSpec
from dd_core.nets.network import PlainSpec
from dd_core.nets.quantiser import Quantiser
from dd_core.nets.unet import UNet, UNetSpec
from tests.parity.reference import agree, differences, randomised

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle here and is not installed")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

TIMES = torch.tensor([3.0, 871.0])
PLAIN = UNetSpec(
    width=32, channel_mult=(1, 2, 3), attention_at=(2, 4), head_width=16, level_scale=1.0
)  # fmt: skip
SD = PLAIN.but(
    attention="cross",
    resample="conv",
    scale_shift=False,
    text_width=24,
    text_at_level=False,
    attention_at=(1, 2),
)
DDPM: dict[str, Any] = {"sine_first": True, "freq_shift": 1, "pads": "after", "epsilon": 1e-6}
UNETS = {
    "adm": PLAIN,
    "adm with classes": PLAIN.but(labels=5, attention_at=(4,), blocks_per_level=1),
    "ldm": PLAIN.but(resample="conv", scale_shift=False),
    "ddpm": PLAIN.but(resample="conv", scale_shift=False, heads=1, head_width=32, **DDPM),
    "ddpm's parts, told a caption": SD.but(transformer_depth=2, **DDPM),
    "ddpm's parts, joint": PLAIN.but(text_width=24, text_at_level=False, **(DDPM | {"pads": "around"})),
    "glide": PLAIN.but(text_width=24, text_at_level=False),
    "sd1": SD.but(heads=4, head_width=32),
    "sd2": SD.but(transformer_depth=2),
    "sd x4": SD.but(text_only_at=(1,), labels=5, heads=4, head_width=32),
    "sd2 unclip": SD.but(embedding_width=7, embedding_layers=2, embedding_tokens=0),
}


def theirs_of(spec: PlainSpec, *, linear: bool = True) -> Any:
    config = diffusers_config.config_of(spec, image_size=16, linear=linear)
    kind = getattr(diffusers, config["_class_name"])
    return kind(**{name: value for name, value in config.items() if not name.startswith("_")})


@pytest.mark.parametrize("name", UNETS)
def test_a_unet_answers_and_learns_as_diffusers(name: str) -> None:
    unet = UNETS[name]
    spec = PlainSpec(unet=unet, in_channels=4, out_channels=6)
    theirs, ours = randomised(theirs_of(spec)), UNet(unet, in_channels=4, out_channels=6)
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 24)
    told: dict[str, Any] = {"encoder_hidden_states": text} if unet.text_width else {}
    embedding, label = torch.randn(2, 7), torch.tensor([4, 1])
    if unet.labels or unet.embedding_width:
        told["class_labels"] = label if unet.labels else embedding

    def ask(net: UNet) -> torch.Tensor:
        cond = Conditioning(
            text=text if unet.text_width else None,
            image_embedding=embedding if unet.embedding_width else None,
            level=net.of_class(label) if unet.labels else None,
        )
        return net(x, TIMES, cond)

    moves = list(unet_moves(ours, linear=True))
    found = differences(theirs, ours, moves, lambda theirs: theirs(x, TIMES, **told).sample, ask)
    assert max(found) <= 1e-5
    written = outward(ours.state_dict(), moves)
    assert all(torch.equal(written[name], weight) for name, weight in theirs.state_dict().items())
    assert written.keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("name", UNETS)
def test_a_spec_comes_back_from_its_config(name: str) -> None:
    spec = PlainSpec(unet=UNETS[name], in_channels=4, out_channels=6)
    config = diffusers_config.config_of(spec, image_size=16)
    told = {"embedding_tokens": 0, "text_at_level": False}
    assert diffusers_config.spec_of(config).unet.but(**told) == spec.unet.but(**told)
    theirs = dict(theirs_of(spec).config) | {"_class_name": config["_class_name"]}
    assert diffusers_config.spec_of(theirs).unet.but(**told) == spec.unet.but(**told)


OLD = {
    "_class_name": "UNet2DModel",
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "out_channels": 3,
    "time_embedding_type": "positional",
}
"""What the networks of DDPM say of themselves there, but for the sizes of their levels."""
LEVELS = {"cifar10-32": ((1, 2, 2, 2), 1, 16), "celebahq-256": ((1, 1, 2, 2, 4, 4), 4, 32)}
"""Factors of their widths, which level attends, and a side small enough to be asked here."""


@pytest.mark.parametrize("name", LEVELS)
def test_a_network_of_ddpm_answers_and_learns_as_in_diffusers(name: str) -> None:
    mult, attends, side = LEVELS[name]
    kinds = ["AttnDownBlock2D" if at == attends else "DownBlock2D" for at in range(len(mult))]
    config: dict[str, Any] = OLD | {
        "block_out_channels": [32 * factor for factor in mult],
        "down_block_types": kinds,
        "up_block_types": [kind.replace("Down", "Up") for kind in kinds[::-1]],
        "sample_size": side,
    }
    spec = diffusers_config.spec_of(config)
    written = diffusers_config.config_of(spec, image_size=side)
    assert {field: written[field] for field in config} == config
    theirs = randomised(diffusers.UNet2DModel(**{k: v for k, v in config.items() if k != "_class_name"}))
    ours = UNet(spec.unet, in_channels=3, out_channels=3)
    x = torch.randn(2, 3, side, side)
    agree(
        theirs,
        ours,
        unet_moves(ours, linear=True),
        lambda theirs: theirs(x.to(theirs.dtype), TIMES.to(theirs.dtype)).sample,
        lambda ours: ours(x.to(theirs.dtype), TIMES.to(theirs.dtype), Conditioning()),
    )


X4 = {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": 8,
    "block_out_channels": [256, 512, 512, 1024],
    "cross_attention_dim": 1024,
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 3],
    "dual_cross_attention": False,
    "in_channels": 7,
    "layers_per_block": 2,
    "num_class_embeds": 1000,
    "only_cross_attention": [True, True, True, False],
    "out_channels": 4,
    "sample_size": 128,
    "up_block_types": [*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"],
    "use_linear_projection": True,
}
"""What the x4 upscaler of Stable Diffusion says of itself there."""


def test_the_x4_upscaler_is_the_published_network_in_both_formats() -> None:
    spec, source = diffusers_config.spec_of(X4), published()["sd-x4-upscaler"].net
    assert isinstance(source, PlainSpec)
    unsaid = {"image_channels": 3, "head_width": 32, "embedding_tokens": 0}
    assert spec.unet.but(**unsaid) == source.unet.but(**unsaid)
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**{k: v for k, v in X4.items() if not k.startswith("_")})
        ours = UNet(spec.unet, in_channels=spec.in_channels, out_channels=spec.out_channels)
    fitted(ours, inward(theirs.state_dict(), unet_moves(ours, linear=True)))
    assert sum(weight.numel() for weight in theirs.parameters()) == 473_398_020


def test_a_middle_that_never_looks_at_pixels_is_refused() -> None:
    for said in ({"only_cross_attention": True}, {"mid_block_only_cross_attention": True}):
        with pytest.raises(LayoutError, match="in the middle, which ours cannot do"):
            diffusers_config.spec_of(X4 | said)
    with pytest.raises(LayoutError, match="there are 4 levels"):
        diffusers_config.spec_of(X4 | {"only_cross_attention": [True]})


def test_convolutions_and_linear_layers_into_a_transformer_are_the_same() -> None:
    spec = PlainSpec(unet=SD, in_channels=4, out_channels=4)
    theirs, ours = randomised(theirs_of(spec, linear=False)), UNet(SD, in_channels=4, out_channels=4)
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 24)
    found = differences(
        theirs,
        ours,
        unet_moves(ours, linear=False),
        lambda theirs: theirs(x, TIMES, encoder_hidden_states=text).sample,
        lambda ours: ours(x, TIMES, Conditioning(text=text)),
    )
    assert max(found) <= 1e-5


SMALL = AutoencoderNetSpec(width=16, channel_mult=(1, 2, 2), groups=8)


@pytest.mark.parametrize("codes", [0, 12])
def test_an_autoencoder_answers_and_learns_as_diffusers(codes: int) -> None:
    spec = SMALL.but(codes=codes)
    config = diffusers_autoencoder.config_of(spec, scale=0.5)
    kind = getattr(diffusers, config["_class_name"])
    theirs = randomised(kind(**{name: value for name, value in config.items() if not name.startswith("_")}))
    ours = Autoencoder(spec)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    moves = list(diffusers_autoencoder.autoencoder_moves(ours))

    def painted(theirs: Any) -> torch.Tensor:
        if codes:
            return theirs.decode(theirs.encode(x).latents, force_not_quantize=True).sample
        return theirs.decode(theirs.encode(x).latent_dist.mean).sample

    def ask(ours: Autoencoder) -> torch.Tensor:
        latent = ours.unquantised(x) if codes else ours.posterior(x).mean
        return ours.generate(latent, quantise=False)

    found = differences(theirs, ours, moves, painted, ask)
    assert max(found) <= 1e-5
    assert diffusers_autoencoder.spec_of(config) == spec
    kept = {name: weight for name, weight in ours.state_dict().items() if name not in ("moments", "observed")}
    written = outward(kept, moves)
    assert all(torch.equal(written[name], weight) for name, weight in theirs.state_dict().items())
    if codes:
        with torch.no_grad():
            latent = torch.randn(2, 4, 4, 4)
            torch.testing.assert_close(ours.generate(latent), theirs.decode(latent).sample, rtol=0, atol=1e-5)


def test_the_codebook_finds_what_that_of_diffusers_finds() -> None:
    from diffusers.models.autoencoders.vq_model import VectorQuantizer  # noqa: PLC0415

    theirs, ours = VectorQuantizer(32, 4, beta=0.25, legacy=False), Quantiser(32, 4)
    torch.nn.init.normal_(theirs.embedding.weight)
    ours.vectors.load_state_dict(theirs.embedding.state_dict())
    latent = torch.randn(3, 4, 6, 5)
    vectors, _, (_, _, codes) = theirs(latent)
    found = ours(latent)
    assert torch.equal(found.codes.flatten(), codes)
    torch.testing.assert_close(found.vectors, vectors, rtol=0, atol=1e-6)
    (found.vectors * latent).sum().backward()
    assert ours.vectors.weight.grad is not None


def test_files_of_latent_diffusion_are_read_as_diffusers_reads_them() -> None:
    """Its own converters are asked what becomes of a key of CompVis."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint  # noqa: PLC0415

    from dd_core.layouts import ldm  # noqa: PLC0415
    from dd_core.layouts.adm import AdmLayout  # noqa: PLC0415

    net = randomised(UNet(SD.but(heads=4, blocks_per_level=2), in_channels=4, out_channels=4))
    compvis = outward(net.state_dict(), ldm.ldm_unet_moves(net, AdmLayout()))
    spec = PlainSpec(unet=net.spec, in_channels=4, out_channels=4)
    config = diffusers_config.config_of(spec, image_size=16, linear=False)
    prefixed = {f"model.diffusion_model.{name}": weight for name, weight in compvis.items()}
    converted = convert_ldm_unet_checkpoint(prefixed, config)
    back = fitted(net, inward(converted, unet_moves(net, linear=False)))
    assert all(torch.equal(back[name], weight) for name, weight in net.state_dict().items())
