"""The UNet against diffusers: equal blocks, weights carried across, equal answers, losses and gradients."""

import pytest
import torch
import torch.nn.functional as F

from dd_core.denoiser import Conditioning
from dd_core.nets.unet import UNet, UNetSpec

pytest.importorskip("diffusers", reason="diffusers is the oracle here and is not installed")
from tests.parity.diffusers_unet import as_ours, peer

pytestmark = pytest.mark.parity

SPEC = UNetSpec(
    width=32,
    channel_mult=(1, 2, 3),
    blocks_per_level=2,
    attention_at=(2, 4),
    head_width=16,
    groups=8,
    level_scale=1.0,
    text_width=24,
    text_at_level=False,
)


@pytest.mark.parametrize("spec", [SPEC, SPEC.but(scale_shift=False, attention_at=(4,), blocks_per_level=1)])
@pytest.mark.parametrize("side", [16, 64])
def test_answers_losses_and_gradients_equal_those_of_diffusers(spec: UNetSpec, side: int) -> None:
    torch.manual_seed(0)
    theirs = peer(spec, in_channels=3, out_channels=6)
    ours = UNet(spec, in_channels=3, out_channels=6)
    ours.load_state_dict(as_ours(theirs.state_dict()))
    x, text = torch.randn(2, 3, side, side), torch.randn(2, 5, spec.text_width)
    target, timestep = torch.randn(2, 6, side, side), torch.tensor([3.0, 871.0])

    their_answer = theirs(x, timestep, encoder_hidden_states=text).sample
    our_answer = ours(x, timestep, Conditioning(text=text))
    their_loss, our_loss = F.mse_loss(their_answer, target), F.mse_loss(our_answer, target)
    their_loss.backward()
    our_loss.backward()

    torch.testing.assert_close(our_answer, their_answer, rtol=0, atol=1e-5)
    torch.testing.assert_close(our_loss, their_loss, rtol=0, atol=1e-5)
    gradients = as_ours({name: weight.grad for name, weight in theirs.named_parameters()})
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)
