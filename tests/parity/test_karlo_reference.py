"""Karlo against the published code, and against diffusers: one state dict, equal answers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dd_core.denoiser import Conditioning
from dd_core.layouts.karlo import decoder_moves, prior_moves, upsampler_moves
from dd_core.layouts.moves import Move
from dd_core.nets.prior import CausalPrior, CausalPriorSpec
from dd_core.nets.text import UnclipSpec, UnclipUNet
from dd_core.nets.unet import UNet, UNetSpec
from tests.parity.reference import checkout, differences, grad_of, importing, randomised

pytestmark = pytest.mark.parity

TIMES = torch.tensor([3.0, 871.0])
STATES, CAPTION, EMBEDDING = torch.randn(2, 6, 16), torch.randn(2, 16), torch.randn(2, 16)
HEARD = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
UNET = UNetSpec(
    width=32,
    channel_mult=(1, 2),
    blocks_per_level=1,
    attention_at=(2,),
    head_width=16,
    level_scale=1.0,
)
PRIOR = CausalPriorSpec(width=32, layers=2, heads=4, context_length=6, embedding_width=16)
THEIRS: dict[str, Any] = {
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 6,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_head_channels": 16,
    "resblock_updown": True,
}


def without_prefix(moves: list[Move], prefix: str) -> list[Move]:
    """The same, for the network that their file wraps."""
    return [move._replace(theirs=tuple(name.removeprefix(prefix) for name in move.theirs)) for move in moves]


def test_decoder() -> None:
    path = checkout("kakaobrain/karlo", "karlo/modules/unet.py")
    x = torch.randn(2, 3, 16, 16)
    unet = UNET.but(text_width=24, text_at_level=False, level_told=True, embedding_width=16)
    net = UnclipUNet(UnclipSpec(unet=unet, states_width=16))
    options = {"use_scale_shift_norm": True, "clip_dim": 16, "clip_emb_mult": 4, "clip_emb_drop": 0.1}
    with importing(path) as load:
        module = load("karlo.modules.unet")
        theirs = randomised(module.PLMImUNet(text_ctx=6, xf_width=24, **THEIRS | options))
        told = {"txt_feat": CAPTION, "txt_feat_seq": STATES, "mask": HEARD, "y": EMBEDDING}
        found = differences(
            theirs,
            net,
            without_prefix(list(decoder_moves(net)), "model."),
            lambda theirs: theirs(x, TIMES, **told),
            lambda net: net(x, TIMES, net.read(STATES, CAPTION, HEARD, EMBEDDING)),
        )
    assert max(found) <= 1e-5


def test_upsampler() -> None:
    path = checkout("kakaobrain/karlo", "karlo/modules/unet.py")
    x, small = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    net = UNet(
        UNET.but(attention_at=(), attention_in_middle=False, scale_shift=False, image_channels=3),
        in_channels=3,
        out_channels=3,
    )
    options = {"attention_resolutions": (), "use_middle_attention": False, "out_channels": 3}
    with importing(path) as load:
        theirs = randomised(load("karlo.modules.unet").SuperResUNetModel(**THEIRS | options))
        found = differences(
            theirs,
            net,
            without_prefix(list(upsampler_moves(net, "part")), "part."),
            lambda theirs: theirs(x, TIMES, low_res=small),
            lambda ours: ours(x, TIMES, Conditioning(image=small)),
        )
    assert max(found) <= 1e-5


def test_prior() -> None:
    path = checkout("kakaobrain/karlo", "karlo/modules/xf.py")
    x, net = torch.randn(2, 16), CausalPrior(PRIOR)
    causal = torch.full((1, 10, 10), -torch.inf).triu(1)
    told = {"text_emb": CAPTION, "text_enc": STATES, "mask": HEARD, "causal_mask": causal}
    with importing(path) as load:
        kind = load("karlo.modules.xf").PriorTransformer
        theirs = randomised(
            kind(text_ctx=6, xf_width=32, xf_layers=2, xf_heads=4, xf_final_ln=True, clip_dim=16)
        )
        found = differences(
            theirs,
            net,
            without_prefix(list(prior_moves(net)), "model."),
            lambda theirs: theirs(x, TIMES, **told),
            lambda net: net(x, TIMES, net.read(STATES, CAPTION, HEARD)),
        )
    assert max(found) <= 1e-5


def test_prior_of_diffusers() -> None:
    """Theirs sorts query, key and value apart and names everything otherwise."""
    diffusers = pytest.importorskip("diffusers")
    peer = randomised(
        diffusers.PriorTransformer(
            num_attention_heads=4, attention_head_dim=8, num_layers=2, embedding_dim=16, num_embeddings=6
        )
    )
    net, x = CausalPrior(PRIOR), torch.randn(2, 16)
    state = {name: weight for name, weight in peer.state_dict().items()}
    names = {
        "time_embedding.linear_1": "level_in",
        "time_embedding.linear_2": "level_out",
        "proj_in": "noised_in",
        "embedding_proj": "caption_in",
        "encoder_hidden_states_proj": "text_in",
        "norm_out": "norm",
        "proj_to_clip_embeddings": "out",
    }
    ours = {"query": state["prd_embedding"], "places": state["positional_embedding"]}
    for part in ("weight", "bias"):
        ours |= {f"{mine}.{part}": state[f"{name}.{part}"] for name, mine in names.items()}
        for index in range(2):
            block, mine = f"transformer_blocks.{index}", f"blocks.{index}"
            ours[f"{mine}.qkv.{part}"] = torch.cat([state[f"{block}.attn1.to_{c}.{part}"] for c in "qkv"])
            inner = {
                "norm1": "norm_attention",
                "attn1.to_out.0": "out",
                "norm3": "norm_alone",
                "ff.net.0.proj": "alone_in",
                "ff.net.2": "alone_out",
            }
            ours |= {f"{mine}.{to}.{part}": state[f"{block}.{name}.{part}"] for name, to in inner.items()}
    net.load_state_dict(ours | {"mean": net.mean, "std": net.std})
    expected = peer(
        x, TIMES, proj_embedding=CAPTION, encoder_hidden_states=STATES, attention_mask=HEARD
    ).predicted_image_embedding
    answer = net(x, TIMES, net.read(STATES, CAPTION, HEARD))
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5)
    F.mse_loss(answer, torch.ones_like(answer)).backward()
    F.mse_loss(expected, torch.ones_like(expected)).backward()
    torch.testing.assert_close(net.query.grad, peer.prd_embedding.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.text_in.weight.grad, peer.encoder_hidden_states_proj.weight.grad)


def test_decoder_of_diffusers() -> None:
    """Theirs is two networks: one projects what CLIP says, the other is told it as class and context."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel  # noqa: PLC0415

    from tests.parity.diffusers_unet import as_ours, options_of  # noqa: PLC0415

    spec = UNET.but(
        channel_mult=(1, 2, 3),
        attention_at=(2, 4),
        text_width=24,
        text_at_level=False,
        level_told=True,
        embedding_width=16,
    )
    peer = diffusers.UNet2DConditionModel(
        **options_of(spec), in_channels=3, out_channels=6, class_embed_type="identity"
    )
    projected = UnCLIPTextProjModel(
        clip_embeddings_dim=16, time_embed_dim=4 * spec.width, cross_attention_dim=spec.text_width
    )
    peer, projected = randomised(peer), randomised(projected)
    net, x = UnclipUNet(UnclipSpec(unet=spec, states_width=16)), torch.randn(2, 3, 16, 16)
    net.load_state_dict(joined(as_ours(peer.state_dict()), dict(projected.state_dict())))

    def theirs(*, unguided: bool) -> torch.Tensor:
        both = (lambda one: torch.cat([one, one])) if unguided else lambda one: one
        states, level = projected(
            image_embeddings=EMBEDDING,
            prompt_embeds=both(CAPTION),
            text_encoder_hidden_states=both(STATES),
            do_classifier_free_guidance=unguided,
        )
        heard = F.pad(both(HEARD), (projected.clip_extra_context_tokens, 0), value=True)
        told = {"encoder_hidden_states": states, "class_labels": level, "attention_mask": heard}
        return peer(both(x), both(TIMES), **told).sample

    expected, answer = theirs(unguided=False), net(x, TIMES, net.read(STATES, CAPTION, HEARD, EMBEDDING))
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5)
    without = net(x, TIMES, net.read(STATES, CAPTION, HEARD, None))
    torch.testing.assert_close(without, theirs(unguided=True)[:2], rtol=0, atol=1e-5)
    for found in (answer, expected):
        F.mse_loss(found, torch.ones_like(found)).backward()
    grads = [{name: grad_of(p) for name, p in one.named_parameters()} for one in (peer, projected)]
    for name, grad in joined(as_ours(grads[0]), grads[1]).items():
        torch.testing.assert_close(grad_of(net.get_parameter(name)), grad, rtol=1e-4, atol=1e-5, msg=name)


def joined(unet: dict[str, torch.Tensor], projected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of their two networks under the names of our one."""
    names = {
        "clip_image_embeddings_project_to_time_embeddings": "unet.hearing.embedding",
        "embedding_proj": "caption",
        "encoder_hidden_states_proj": "states",
        "text_encoder_hidden_states_norm": "norm",
    }
    ours = {f"unet.{name}": tensor for name, tensor in unet.items()}
    ours["no_embedding"] = projected["learned_classifier_free_guidance_embeddings"]
    for part in ("weight", "bias"):
        ours |= {f"{mine}.{part}": projected[f"{name}.{part}"] for name, mine in names.items()}
        apart = projected[f"clip_extra_context_tokens_proj.{part}"].unflatten(0, (-1, 4))  # a token's last
        ours[f"unet.hearing.tokens.{part}"] = apart.transpose(0, 1).flatten(0, 1)
    return ours
