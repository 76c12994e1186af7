"""A file of Stable Diffusion, imported, paints what the parts of diffusers paint with its weights.

UNet and autoencoder by diffusers' own reading of the file; captions by transformers where it is installed and
by its formulas written out here, or by open_clip; noise, caption and guidance alike.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd_core import bundle
from dd_core.cascade import requested
from dd_core.layouts.clip import OPEN_CLIP, TRANSFORMERS
from dd_core.noise import SeededNoise
from dd_core.samplers import SamplingSpec, sample
from dd_core.stages.chain_hop import ChainHop
from dd_core.text import END, tokens
from jobs import exchange
from tests.unit.jobs import tiny_stable
from tests.unit.jobs.tiny_stable import HEAD, LAYERS, LENGTH, SIDE, WIDTH

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle here and is not installed")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

CAPTIONS, SEEDS, SCALE, STEPS = ("a red circle above a star", ""), [3, 4], 5.0, 4
FORMS = {
    "sd1": {"attention_head_dim": 2, "use_linear_projection": False},
    "sd1-inpaint": {"attention_head_dim": 2, "use_linear_projection": False},
    "sd2-base": {"attention_head_dim": [2, 4], "use_linear_projection": True},
    "sd2-inpaint": {"attention_head_dim": [2, 4], "use_linear_projection": True},
    "sd2": {"attention_head_dim": [2, 4], "use_linear_projection": True},
}


class Opened(NamedTuple):
    """A file, and the hop that was imported from it."""

    state: dict[str, Tensor]
    hop: ChainHop
    how: SamplingSpec


def opened(source: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> Opened:
    found = tiny_stable.known()
    monkeypatch.setattr(exchange, "published", lambda: found)
    state = tiny_stable.file_of(source, place / "model.safetensors")
    exchange.import_weights(source, [place / "model.safetensors"], place / "cascade", averaged=False)
    cascade = bundle.load_cascade(place / "cascade")
    (hop,), (about,) = cascade.hops, cascade.spec.hops
    assert isinstance(hop, ChainHop)
    return Opened(state, hop, about.how.but(num_steps=STEPS, guidance_scale=SCALE, eta=0.0))


def padded(captions: tuple[str, ...], *, with_end: bool) -> Tensor:
    """Tokens as the tokenizer of Stable Diffusion 1 (END behind END) or 2 gives them."""
    rows = torch.tensor(tokens(captions, LENGTH))
    return rows.masked_fill(rows == 0, END) if with_end else rows


def transformers_states(state: dict[str, Tensor], rows: Tensor, *, quick: bool = True) -> Tensor:
    """`CLIPTextModel`'s last_hidden_state, written out: pre-norm, causal, sigmoid(1.702 x) x if `quick`."""
    of = {name.removeprefix(TRANSFORMERS): weight for name, weight in state.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, of[f"{name}.weight"], of[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), of[f"{name}.weight"], of[f"{name}.bias"], 1e-5)

    x = of["embeddings.token_embedding.weight"][rows] + of["embeddings.position_embedding.weight"]
    for number in range(LAYERS):
        layer, heads = f"encoder.layers.{number}", WIDTH // HEAD
        y = norm(x, f"{layer}.layer_norm1")
        query, key, value = (
            linear(y, f"{layer}.self_attn.{one}_proj").unflatten(2, (heads, HEAD)).transpose(1, 2)
            for one in "qkv"
        )
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)
        x = x + linear(seen, f"{layer}.self_attn.out_proj")
        y = linear(norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")
        x = x + linear(y * torch.sigmoid(1.702 * y) if quick else F.gelu(y), f"{layer}.mlp.fc2")
    return norm(x, "final_layer_norm")


def open_clip_states(state: dict[str, Tensor], rows: Tensor) -> Tensor:
    """The states before the last block, by open_clip's own blocks and its final norm."""
    tower = tiny_stable.open_clip_model()
    theirs = {name.removeprefix(OPEN_CLIP): weight for name, weight in state.items() if OPEN_CLIP in name}
    tower.load_state_dict(theirs, strict=False)
    x = tower.token_embedding(rows) + tower.positional_embedding
    for block in tower.transformer.resblocks[:-1]:
        x = block(x, attn_mask=tower.attn_mask)
    return tower.ln_final(x)


def states_of(source: str, state: dict[str, Tensor], captions: tuple[str, ...]) -> Tensor:
    """What the UNet is told of captions."""
    first = source.startswith("sd1")
    read = transformers_states if first else open_clip_states
    return read(state, padded(captions, with_end=first))


def networks(channels: int, *, scaling_factor: float = 0.18215, **form: Any) -> tuple[nn.Module, nn.Module]:
    """UNet and autoencoder of diffusers, very small; the UNet hears so many channels."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=channels,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        **form,
    )
    first = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        layers_per_block=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=scaling_factor,
    )
    return unet, first


def theirs(source: str, state: dict[str, Tensor]) -> tuple[nn.Module, nn.Module, Any]:
    """UNet, autoencoder and scheduler of diffusers, weights as it converts them from the file."""
    from diffusers.loaders import single_file_utils  # noqa: PLC0415

    unet, first = networks(9 if source.endswith("inpaint") else 4, **FORMS[source])
    unet.load_state_dict(single_file_utils.convert_ldm_unet_checkpoint(dict(state), unet.config))
    first.load_state_dict(single_file_utils.convert_ldm_vae_checkpoint(dict(state), first.config))
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if source == "sd2" else "epsilon",
    )
    return unet.eval(), first.eval(), scheduler


@pytest.mark.parametrize("source", FORMS)
@torch.no_grad()
def test_a_picture_is_that_of_the_pipeline_of_diffusers(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, hop, how = opened(source, tmp_path, monkeypatch)
    asked = requested(CAPTIONS, SEEDS, LENGTH, negatives=["a square", ""])
    draw = hop.start(asked, how)
    found = sample(draw.sampling, hop.denoiser(draw.rows))

    unet, first, scheduler = theirs(source, state)
    shown = []
    if source.endswith("inpaint"):  # no picture was given: all of it is hole
        gray = first.encode(torch.zeros(2, 3, 2 * SIDE, 2 * SIDE)).latent_dist.mode() * 0.18215
        shown = [torch.ones(2, 1, SIDE, SIDE), gray]
    told, not_told = (states_of(source, state, c) for c in (CAPTIONS, ("a square", "")))
    torch.testing.assert_close(draw.rows.cond.text, told, rtol=1e-4, atol=1e-4)
    x = SeededNoise(SEEDS)(torch.empty(2, 4, SIDE, SIDE)) * scheduler.init_noise_sigma
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps:
        heard = torch.cat([x, *shown], dim=1)
        with_it, without = (unet(heard, t, encoder_hidden_states=one).sample for one in (told, not_told))
        x = scheduler.step(without + SCALE * (with_it - without), t, x).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)
    image = hop.finish(asked, found).image
    assert image is not None
    torch.testing.assert_close(image, first.decode(x / 0.18215).sample.clamp(-1, 1), rtol=0, atol=1.01 / 255)


@pytest.mark.parametrize("source", ["sd1-inpaint", "sd2-inpaint"])
@torch.no_grad()
def test_a_hole_is_told_as_the_pipeline_of_diffusers_tells_it(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 in the hole, then the latent of the picture whose hole is grey; nothing else keeps what is known."""
    state, hop, how = opened(source, tmp_path, monkeypatch)
    picture = torch.rand(2, 3, 2 * SIDE, 2 * SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    hole = torch.zeros(2, 1, 2 * SIDE, 2 * SIDE, dtype=torch.bool)
    hole[0, :, 5:12, 7:10], hole[1, :, :, 8:] = True, True  # the first is not aligned to latents
    asked = requested(CAPTIONS, SEEDS, LENGTH)._replace(known=picture, hole=hole)
    draw = hop.start(asked, how)
    told = draw.rows.cond.image
    unet, first, scheduler = theirs(source, state)
    values = first.encode(picture * ~hole).latent_dist.mode() * 0.18215
    mask = F.interpolate(hole.float(), (SIDE, SIDE))
    torch.testing.assert_close(told, torch.cat([mask, values], dim=1), rtol=1e-4, atol=1e-4)
    found = sample(draw.sampling, hop.denoiser(draw.rows))
    said, unsaid = (states_of(source, state, captions) for captions in (CAPTIONS, ("", "")))
    x = SeededNoise(SEEDS)(torch.empty(2, 4, SIDE, SIDE))
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps:
        heard = torch.cat([x, mask, values], dim=1)
        yes, no = (unet(heard, t, encoder_hidden_states=one).sample for one in (said, unsaid))
        x = scheduler.step(no + SCALE * (yes - no), t, x).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_states_of_a_caption_are_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = pytest.importorskip("transformers", reason="transformers reads for Stable Diffusion 1")
    state, hop, _ = opened("sd1", tmp_path, monkeypatch)
    about = peer.CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // HEAD,
        hidden_act="quick_gelu",
    )
    tower = peer.CLIPTextModel(about).eval()
    prefix = "text_model." if any(name.startswith("text_model.") for name in tower.state_dict()) else ""
    weights = {
        prefix + name.removeprefix(TRANSFORMERS): w for name, w in state.items() if TRANSFORMERS in name
    }
    tower.load_state_dict({name: w for name, w in weights.items() if "position_ids" not in name})
    wanted = tower(padded(CAPTIONS, with_end=True)).last_hidden_state
    assert hop.clip is not None
    torch.testing.assert_close(
        hop.clip.read(torch.tensor(tokens(CAPTIONS, LENGTH))).states, wanted, rtol=1e-4, atol=1e-4
    )
