"""Weights that fit in every shape are no start where they were told otherwise; what is told fits them."""

import pytest
import torch
import torch.nn.functional as F

from dd_core.layouts.published import Process
from dd_core.nets.clip import Clip, ClipNetSpec
from dd_core.nets.network import PlainSpec
from dd_core.nets.unet import UNetSpec
from dd_core.schedules import ScheduleSpec
from dd_core.stage import Trained
from dd_core.stages import build_stage
from dd_core.stages.chain_spec import ChainSpec, network_of
from dd_core.stages.chain_told import seen
from dd_core.stages.clip import ClipSpec
from dd_core.stages.network import NetworkSpec

TOWERS = ClipNetSpec(
    embedding_width=16,
    image_size=16,
    patch_size=8,
    image_width=16,
    image_layers=1,
    context_length=6,
    text_width=16,
    text_layers=3,
    head_width=8,
)
UNET = UNetSpec(
    width=8, channel_mult=(1,), blocks_per_level=1, attention_at=(1,), head_width=8, groups=4, level_scale=1
)
TOLD = ChainSpec(
    net=PlainSpec(unet=UNET.but(attention="cross", text_width=16, text_at_level=False)), image_size=8
)
ENLARGING = ChainSpec(
    net=PlainSpec(unet=UNET.but(image_channels=3)),
    image_size=8,
    factor=2,
    told_dropout=0.0,
    schedule=ScheduleSpec(betas="cosine"),
)


def network(source: str, spec: ChainSpec, **process: object) -> Trained:
    """Published weights of this network."""
    about = NetworkSpec(source=source, net=spec.net, process=Process.model_validate(process))  # type: ignore[arg-type]
    return Trained(about, dict(network_of(spec).state_dict()))


@pytest.mark.parametrize(
    ("source", "as_read", "said"),
    [
        (
            "sd1",
            {"text_layers": 12, "quick_gelu": True},
            "net.pads_with of its CLIP is 'end' and 'zero' here",
        ),
        ("sd1", {"text_layers": 12, "pads_with": "end"}, "net.quick_gelu of its CLIP is True and False here"),
        ("sd2", {"text_layers": 24}, "net.states of its CLIP is 'penultimate' and 'last' here"),
        ("sd2", {"states": "penultimate"}, "net.text_layers of its CLIP is 24 and 3 here"),
        ("ldm-text256", {}, "was told what no CLIP says"),
    ],
)
def test_weights_that_were_told_captions_otherwise_are_no_start(
    source: str, as_read: dict[str, object], said: str
) -> None:
    towers = ClipSpec(net=TOWERS.but(**as_read))
    clip = Trained(towers, dict(Clip(towers.net).state_dict()))
    with pytest.raises(ValueError, match=said):
        build_stage(TOLD, {"clip": clip, "start": network(source, TOLD)})


def test_weights_that_were_told_captions_alike_are_a_start() -> None:
    towers = ClipSpec(net=TOWERS.but(text_layers=12, quick_gelu=True, pads_with="end"))
    clip = Trained(towers, dict(Clip(towers.net).state_dict()))
    start = network("sd1", TOLD)
    begun = build_stage(TOLD, {"clip": clip, "start": start}).model.state_dict()
    assert all(torch.equal(begun[f"network.{name}"], weight) for name, weight in start.weights.items())


def test_weights_that_were_told_another_enlargement_are_no_start() -> None:
    start = network("karlo-sr", ENLARGING, schedule="cosine")
    with pytest.raises(ValueError, match="enlarged_by is 'bicubic' there and 'bilinear' here"):
        build_stage(ENLARGING, {"start": start})
    build_stage(ENLARGING.but(enlarged_by="bicubic"), {"start": start})
    plain = ENLARGING.but(net=PlainSpec(unet=UNET), factor=1)
    build_stage(ENLARGING.but(enlarged_by="bicubic"), {"start": network("adm", plain, schedule="cosine")})
    with pytest.raises(ValueError, match="enlarged_by bicubic is for a model that enlarges"):
        plain.but(enlarged_by="bicubic")


def test_a_smaller_picture_is_enlarged_as_the_spec_says() -> None:
    """Karlo: torchvision's bicubic resize with antialias, whose curve is Pillow's."""
    small = torch.rand(2, 3, 4, 4) * 2 - 1
    about = {"small": small, "known": torch.zeros(2, 3, 8, 8), "hole": None}
    for spec, mode in ((ENLARGING, "bilinear"), (ENLARGING.but(enlarged_by="bicubic"), "bicubic")):
        found = seen(spec, None, **about)  # type: ignore[arg-type]
        assert found is not None
        torch.testing.assert_close(found, F.interpolate(small, (8, 8), mode=mode, antialias=True))


@torch.no_grad()
def test_a_caption_is_read_as_stable_diffusion_reads_it() -> None:
    """The first hears END again where a caption has ended, the second what the last layer but one says."""
    torch.manual_seed(0)
    plain = Clip(TOWERS).eval()
    first, second = Clip(TOWERS.but(pads_with="end")).eval(), Clip(TOWERS.but(states="penultimate")).eval()
    first.load_state_dict(plain.state_dict())
    second.load_state_dict(plain.state_dict())
    tokens = torch.tensor([[49406, 5, 49407, 0, 0, 0], [49406, 7, 8, 9, 10, 49407]])
    ended = torch.tensor([[49406, 5, 49407, 49407, 49407, 49407], [49406, 7, 8, 9, 10, 49407]])
    read = plain.read(tokens)
    torch.testing.assert_close(first.read(tokens).states, plain.read(ended).states)
    towers = plain.towers
    x = towers.token_embedding(tokens) + towers.positional_embedding
    for block in list(towers.transformer.resblocks)[:-1]:
        x = block(x, attn_mask=towers.attn_mask)
    torch.testing.assert_close(second.read(tokens).states, towers.ln_final(x))
    for clip in (first, second):
        torch.testing.assert_close(clip.read(tokens).embedding, read.embedding)
        packed = clip.read_packed(tokens)
        states = packed.packing.unpack(packed.states)
        torch.testing.assert_close(states[0, :3], clip.read(tokens).states[0, :3], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(packed.embedding, read.embedding, rtol=1e-4, atol=1e-5)
