"""GLIDE against the published code: text transformer, UNet and noised CLIP."""

import types
from typing import Any

import numpy as np
import pytest
import torch

from dd_core import schedules
from dd_core.denoiser import Conditioning
from dd_core.layouts.glide import captioned_moves, noised_clip_moves
from dd_core.layouts.moves import Move, fitted, inward
from dd_core.layouts.published import published
from dd_core.nets.noised_clip import GlideClip, GlideClipSpec
from dd_core.nets.text import CaptionedSpec, CaptionedUNet, TextSpec
from dd_core.nets.unet import UNetSpec
from dd_core.schedules import ScheduleSpec
from dd_core.stages.guides import Leaders
from dd_core.stages.published_clip import PublishedClip
from dd_core.steering import Pull, score_of
from dd_core.text import tokens
from tests.parity.reference import agree, checkout, differences, importing, randomised

pytestmark = pytest.mark.parity

TIMES = torch.tensor([3.0, 871.0])
SPEC = CaptionedSpec(
    unet=UNetSpec(
        width=32,
        channel_mult=(1, 2),
        blocks_per_level=1,
        attention_at=(2,),
        head_width=16,
        level_scale=1.0,
        text_width=32,
    ),
    text=TextSpec(width=32, layers=2, heads=4, context_length=8, vocab_size=40),
)
THEIRS: dict[str, Any] = {
    "text_ctx": 8,
    "xf_width": 32,
    "xf_layers": 2,
    "xf_heads": 4,
    "xf_final_ln": True,
    "xf_padding": True,
    "tokenizer": types.SimpleNamespace(n_vocab=40),
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 6,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_head_channels": 16,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
TOKENS = torch.tensor([[5, 3, 7, 39, 39, 39, 39, 39], [1, 2, 3, 4, 5, 6, 7, 8]])
HEARD = torch.tensor([[True] * 3 + [False] * 5, [True] * 8])
SMALL, KNOWN = torch.rand(2, 3, 4, 4) * 2 - 1, torch.rand(2, 3, 16, 16) * 2 - 1
MASK = (torch.rand(2, 1, 16, 16) < 0.5).float()
LARGE = torch.nn.functional.interpolate(SMALL, (16, 16), mode="bilinear")


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        ("Text2ImUNet", {}, None),
        ("SuperResText2ImUNet", {"low_res": SMALL}, LARGE),
        (
            "InpaintText2ImUNet",
            {"inpaint_image": KNOWN, "inpaint_mask": MASK},
            torch.cat([KNOWN * MASK, MASK], 1),
        ),
        (
            "SuperResInpaintText2ImUnet",
            {"inpaint_image": KNOWN, "inpaint_mask": MASK, "low_res": SMALL},
            torch.cat([KNOWN * MASK, MASK, LARGE], 1),
        ),
    ],
)
def test_base_and_upsampler_with_and_without_inpainting(
    kind: str, options: dict[str, Any], told: torch.Tensor | None
) -> None:
    path = checkout("openai/glide-text2im", "glide_text2im/text2im_model.py")
    x = torch.randn(2, 3, 16, 16)
    with importing(path) as load:
        theirs = randomised(getattr(load("glide_text2im.text2im_model"), kind)(**THEIRS))
        unet = SPEC.unet.but(image_channels=0 if told is None else told.shape[1])
        net = CaptionedUNet(SPEC.but(unet=unet))

        def ours(net: CaptionedUNet) -> torch.Tensor:
            return net(x, TIMES, net.read(TOKENS, HEARD)._replace(image=told))

        agree(
            theirs,
            net,
            captioned_moves(net),
            lambda theirs: theirs(x, TIMES, tokens=TOKENS, mask=HEARD, **options),
            ours,
        )


def test_tokens_that_do_not_count_are_ignored_exactly() -> None:
    net = randomised(CaptionedUNet(SPEC))
    other = torch.where(HEARD, TOKENS, 17)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        one, two = (net(x, TIMES, net.read(tokens, HEARD)) for tokens in (TOKENS, other))
    assert torch.equal(one, two)


CLIP = GlideClipSpec(
    image_size=8,
    patch_size=4,
    image_width=32,
    image_layers=2,
    timesteps=10,
    vocab_size=40,
    context_length=8,
    text_width=32,
    text_layers=2,
    head_width=16,
    embedding_width=12,
)


def tower(moves: list[Move], name: str) -> list[Move]:
    """The moves of one tower alone, under the names of its own file."""
    mine = [move for move in moves if move.ours.startswith(name)]
    return [
        move._replace(theirs=(move.theirs[0].removeprefix(name),), ours=move.ours.removeprefix(name))
        for move in mine
    ]


def test_noised_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their biases of queries and values learn wrongly, a third of each not at all: left out."""
    path = checkout("openai/glide-text2im", "glide_text2im/clip/encoders.py")
    pytest.importorskip("attr", reason="the noised CLIP needs attrs")
    monkeypatch.setattr(np, "bool", np.bool_, raising=False)
    cpu = torch.device("cpu")
    shared = {"n_embd": 12, "n_head": 2, "n_xf_blocks": 2, "n_head_state": 16, "device": cpu}
    x, t = torch.rand(2, 3, 8, 8) * 2 - 1, torch.tensor([1, 7])
    lengths = torch.tensor([3, 8])
    with importing(path) as load:
        module = load("glide_text2im.clip.encoders")
        monkeypatch.setattr(load("glide_text2im.clip.utils"), "zero_key_bias_grad", lambda bias: bias)
        monkeypatch.setattr(module, "zero_key_bias_grad", lambda bias: bias)
        image = randomised(module.ImageEncoder(image_size=8, patch_size=4, n_timestep=10, **shared))
        text = randomised(module.TextEncoder(n_bpe_vocab=40, max_text_len=8, **shared))
        for blocks in (image.blocks, text.blocks):
            for inner in blocks.modules():
                if hasattr(inner, "bias_filter_fn"):
                    inner.bias_filter_fn = lambda bias: bias
        net = GlideClip(CLIP)
        moves = list(noised_clip_moves(net))
        seen = differences(
            image,
            net.image,
            tower(moves, "image."),
            lambda theirs: theirs((x + 1) * 127.5, t),
            lambda ours: ours(x, t),
        )
        read = differences(
            text,
            net.text,
            tower(moves, "text."),
            lambda theirs: theirs(TOKENS, lengths),
            lambda ours: ours(TOKENS, lengths),
        )
    assert max(*seen, *read) <= 1e-5


def test_the_noised_clip_leads_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their cond_fn: tokens of captions, and the gradient of the score by the picture that DDPM sees."""
    path = checkout("openai/glide-text2im", "glide_text2im/clip/model_creation.py")
    pytest.importorskip("attr", reason="the noised CLIP needs attrs")
    monkeypatch.setattr(np, "bool", np.bool_, raising=False)
    cpu, scale, captions = torch.device("cpu"), 3.0, ["a star", "A red circle above a small blue square, ok?"]
    spec = CLIP.but(vocab_size=49_408, timesteps=1000)
    ours = PublishedClip(spec, published()["glide-clip"].process).requires_grad_(False)
    shared = {"n_embd": 12, "n_head": 2, "n_xf_blocks": 2, "n_head_state": 16, "device": cpu}
    with importing(path) as load:
        module = load("glide_text2im.clip.model_creation")
        image = randomised(module.ImageEncoder(image_size=8, patch_size=4, n_timestep=1000, **shared))
        text = randomised(module.TextEncoder(n_bpe_vocab=49_408, max_text_len=8, **shared))
        for name, theirs in (("image", image), ("text", text)):
            net = getattr(ours.network, name)
            moves = tower(list(noised_clip_moves(ours.network)), f"{name}.")
            net.load_state_dict(fitted(net, inward(dict(theirs.state_dict()), moves)), strict=False)
        tokenizer, logit_scale = module.SimpleTokenizer(), torch.tensor(np.log(100.0), dtype=torch.float32)
        theirs = module.CLIPModel({}, text, image, logit_scale, cpu, tokenizer)
        rows, lengths = theirs.encode_prompts(captions)
        assert rows.tolist() == tokens(captions, 8)
        assert lengths.tolist() == [4, 8]
        x, t = torch.randn(2, 3, 8, 8), torch.tensor([40, 700])
        wanted = theirs.cond_fn(captions, scale)(x, t)
    sigma = schedules.sigmas(ScheduleSpec(betas="cosine"))[t].float()
    pull = Pull(
        torch.tensor([[0, scale, 0, 0, 0]] * 2), t, ours.read(captions), torch.zeros(2), torch.zeros(2)
    )
    score = score_of(pull, Leaders(noised_clip=ours).guides())
    level = (1 + sigma**2).sqrt().view(2, 1, 1, 1)
    leaf = (x * level).requires_grad_()
    (found,) = torch.autograd.grad(score(leaf, sigma).sum(), leaf)
    assert (found * level - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_the_caption_is_told_by_conditioning_alone() -> None:
    net = CaptionedUNet(SPEC)
    with pytest.raises(ValueError, match="is told text"):
        net(torch.randn(2, 3, 16, 16), TIMES, Conditioning())
