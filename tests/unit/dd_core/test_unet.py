"""Laws of the UNet: what it is told reaches it, what it is not told is refused, sizes are what they say."""

import pytest
import torch
from torch import Tensor, nn

from dd_core.denoiser import Conditioning
from dd_core.nets.unet import UNet, UNetSpec

SPEC = UNetSpec(width=16, channel_mult=(1, 2), blocks_per_level=1, attention_at=(2,), head_width=8, groups=4)
TOLD = SPEC.but(text_width=6, embedding_width=5, image_channels=2)


def awake(spec: UNetSpec, *, out_channels: int = 3) -> UNet:
    """A network whose zeroed layers have been given random weights."""
    torch.manual_seed(0)
    network = UNet(spec, in_channels=3, out_channels=out_channels)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network


def told(batch: int) -> Conditioning:
    """Everything that TOLD hears."""
    return Conditioning(torch.randn(batch, 4, 6), torch.randn(batch, 5), torch.randn(batch, 2, 8, 8))


def level(batch: int) -> Tensor:
    return torch.linspace(-2, 2, batch)


def test_a_new_network_answers_zero() -> None:
    network = UNet(TOLD, in_channels=3, out_channels=6)
    out = network(torch.randn(2, 3, 8, 8), level(2), told(2))
    assert out.shape == (2, 6, 8, 8)
    assert not out.any()


@pytest.mark.parametrize("stem", [{}, {"stem": "unshuffle", "stem_factor": 2, "attention_at": (4,)}])
def test_every_weight_takes_part(stem: dict[str, object]) -> None:
    network = awake(TOLD.but(**stem))
    network(torch.randn(2, 3, 8, 8), level(2), told(2)).square().mean().backward()
    idle = [
        name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()
    ]
    assert idle == []


@pytest.mark.parametrize("field", Conditioning._fields)
def test_everything_it_is_told_changes_the_answer_of_that_sample_alone(field: str) -> None:
    network, x, cond = awake(TOLD), torch.randn(3, 3, 8, 8), told(3)
    part = getattr(cond, field).clone()
    part[1] += 1
    change = network(x, level(3), cond) - network(x, level(3), cond._replace(**{field: part}))
    assert change[1].abs().max() > 1e-3
    assert not change[[0, 2]].any()


def test_the_noise_level_changes_the_answer() -> None:
    network, x = awake(SPEC), torch.randn(1, 3, 8, 8).expand(2, -1, -1, -1)
    low, high = network(x, torch.tensor([-1.0, 1.0]), Conditioning())
    assert (low - high).abs().max() > 1e-3


@pytest.mark.parametrize("field", Conditioning._fields)
def test_what_is_missing_and_what_was_not_asked_for_are_refused_by_name(field: str) -> None:
    x, cond = torch.randn(2, 3, 8, 8), told(2)
    with pytest.raises(ValueError, match=rf"is told {field}, but Conditioning.{field} is None"):
        awake(TOLD)(x, level(2), cond._replace(**{field: None}))
    with pytest.raises(ValueError, match=f"is not told {field}; leave Conditioning.{field} None"):
        awake(SPEC)(x, level(2), Conditioning(**{field: getattr(cond, field)}))


def test_sides_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="9 x 8, but the sides must divide by 2"):
        awake(SPEC)(torch.randn(1, 3, 9, 8), level(1), Conditioning())


def test_an_image_need_not_be_square_nor_of_the_size_it_was_trained_at() -> None:
    network = awake(SPEC)
    assert network(torch.randn(1, 3, 12, 4), level(1), Conditioning()).shape == (1, 3, 12, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_at": (3,)}, r"attention_at 3, but the levels are at \(1, 2\)"),
        ({"groups": 5}, "16 channels at 1 do not split into groups=5"),
        ({"head_width": 12}, "32 channels at 2 do not split into heads of head_width=12"),
        ({"stem_factor": 2}, "stem 'conv' with stem_factor 2"),
        ({"stem": "unshuffle"}, "stem 'unshuffle' with stem_factor 1"),
    ],
)
def test_a_size_that_cannot_be_built_is_refused_before_it_is(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SPEC.but(**changes)


def test_channels_innermost_or_outermost_makes_no_difference_to_the_caller() -> None:
    network, x = awake(SPEC), torch.randn(2, 3, 8, 8)
    plain = network(x, level(2), Conditioning())
    turned = network.to(memory_format=torch.channels_last)(
        x.contiguous(memory_format=torch.channels_last), level(2), Conditioning()
    )
    torch.testing.assert_close(turned, plain)


def test_bfloat16_weights_answer_in_the_dtype_they_are_asked_in() -> None:
    network, x = awake(TOLD), torch.randn(2, 3, 8, 8)
    cond = told(2)
    exact = network(x, level(2), cond)
    rounded = network.bfloat16()(x, level(2), cond)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() <= 0.03 * exact.norm()


def test_the_paper_sizes_have_the_papers_number_of_weights() -> None:
    adm = UNetSpec(
        width=192, channel_mult=(1, 2, 3, 4), blocks_per_level=3, attention_at=(2, 4, 8), head_width=64
    )
    with torch.device("meta"):
        network = UNet(adm, in_channels=3, out_channels=6)
    count = sum(parameter.numel() for parameter in network.parameters())
    labels = 1000 * 4 * 192  # ADM's 64 px model hears a class, by an embedding of that size
    assert count + labels == pytest.approx(295.9e6, abs=0.05e6)
