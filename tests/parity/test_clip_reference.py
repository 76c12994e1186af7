"""CLIP: a file of OpenAI's layout, read by us, answers as OpenAI's code and as open_clip do."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dd_core.layouts.clip import clip_moves, clip_weights, net_of
from dd_core.nets.clip import Clip, ClipNetSpec
from tests.parity.reference import checkout, differences, importing, randomised

pytestmark = pytest.mark.parity

SPEC = ClipNetSpec(
    embedding_width=16,
    image_size=16,
    patch_size=4,
    image_width=64,
    image_layers=2,
    context_length=7,
    text_width=128,
    text_layers=2,
    head_width=64,
    vocab_size=20,
    quick_gelu=True,
)
TOKENS = torch.tensor([[18, 3, 5, 19, 0, 0, 0], [18, 1, 2, 3, 4, 5, 19]])


def awake(net: nn.Module) -> nn.Module:
    net = randomised(net)
    nn.init.constant_(net.logit_scale, 1.0)
    return net


def test_answers_and_gradients_of_openai() -> None:
    """Their norms want eps 1e-5 and the attention of torch; asked in float32."""
    path = checkout("openai/CLIP", "clip/model.py")
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    ours = Clip(SPEC)
    with importing(path / "clip") as load:
        theirs = awake(load("model").CLIP(16, 16, 2, 64, 4, 7, 20, 128, 2, 2).float())

        def ask(theirs: nn.Module) -> torch.Tensor:
            pixels = ((image + 1) / 2 - ours.mean) / ours.std
            seen, read = theirs.encode_image(pixels), theirs.encode_text(TOKENS)
            return torch.cat([F.normalize(seen, dim=-1), F.normalize(read, dim=-1)])

        found = differences(
            theirs,
            ours,
            clip_moves(ours),
            ask,
            lambda ours: torch.cat([ours.embed_image(image), ours.read(TOKENS).embedding]),
        )
    assert max(found) <= 1e-5


def test_answers_of_open_clip_with_the_towers_of_the_second_stable_diffusion() -> None:
    """ViT-H has heads of 80 for images and of 64 for captions; here narrower and with two layers."""
    full = net_of("ViT-H-14")
    assert (full.image_width // full.head_width, full.text_heads) == (16, 16)
    spec = full.but(
        image_width=160, text_width=128, text_heads=2, image_layers=2, text_layers=2, vocab_size=50
    )
    vision = open_clip.model.CLIPVisionCfg(layers=2, width=160, head_width=80, patch_size=14, image_size=224)
    text = open_clip.model.CLIPTextCfg(vocab_size=50, width=128, heads=2, layers=2)
    theirs = awake(open_clip.model.CLIP(spec.embedding_width, vision, text)).eval()
    ours = Clip(spec).eval()
    ours.load_state_dict(clip_weights(spec, theirs.state_dict()))
    image, tokens = torch.rand(1, 3, 224, 224) * 2 - 1, torch.randint(1, 49, (1, 77))
    pixels = ((image + 1) / 2 - ours.mean) / ours.std
    with torch.no_grad():
        assert_same(ours.embed_image(image), theirs.encode_image(pixels, normalize=True))
        assert_same(ours.read(tokens).embedding, theirs.encode_text(tokens, normalize=True))


def assert_same(answer: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5)
