"""Laws of the UNet: what it is told reaches it, what it is not told is refused, sizes are what they say."""

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from dd_core.denoiser import Conditioning, NetworkDenoiser
from dd_core.nets.unet import UNet, UNetSpec

SPEC = UNetSpec(width=16, channel_mult=(1, 2), blocks_per_level=1, attention_at=(2,), head_width=8, groups=4)
TOLD = SPEC.but(text_width=6, embedding_width=5, image_channels=2, level_told=True)
FIELDS = ("text", "image_embedding", "image", "level")
"""What a network is told or not; `heard` only says how much of the text."""


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
    return Conditioning(
        text=torch.randn(batch, 4, 6),
        image_embedding=torch.randn(batch, 5),
        image=torch.randn(batch, 2, 8, 8),
        level=torch.randn(batch, 64),
    )


def level(batch: int) -> Tensor:
    return torch.linspace(-2, 2, batch)


@pytest.mark.parametrize("attention", ["joint", "cross"])
@pytest.mark.parametrize("some", [True, False])
def test_a_caption_read_before_is_heard_as_one_read_at_every_call(
    attention: Literal["joint", "cross"], some: bool
) -> None:
    network = awake(TOLD.but(attention=attention))
    x, cond = torch.randn(3, 3, 8, 8), told(3)
    if some:
        cond = cond._replace(heard=torch.arange(4) < torch.tensor([[1], [3], [4]]))
    before = network.prepared(cond)
    assert before.read is not None
    assert network.prepared(before) is before
    expected = network(x, level(3), cond)
    torch.testing.assert_close(network(x, level(3), before), expected)
    rows = torch.tensor([2, 0])
    picked = network(x[rows], level(3)[rows], before.pick(rows))
    torch.testing.assert_close(picked, expected[rows], rtol=1e-4, atol=1e-5)
    assert cond.text is not None
    other = cond.text.clone()
    other[:, :-1] += 1  # the last state is heard with the level
    assert torch.equal(network(x, level(3), before._replace(text=other)), network(x, level(3), before))


def test_a_new_network_answers_zero() -> None:
    network = UNet(TOLD, in_channels=3, out_channels=6)
    out = network(torch.randn(2, 3, 8, 8), level(2), told(2))
    assert out.shape == (2, 6, 8, 8)
    assert not out.any()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stem": "unshuffle", "stem_factor": 2, "attention_at": (4,)},
        {"resample": "conv", "heads": 2, "embedding_layers": 2},
        {"attention": "cross", "transformer_depth": 2, "scale_shift": False},
    ],
)
def test_every_weight_takes_part(changes: dict[str, object]) -> None:
    network = awake(TOLD.but(**changes))
    network(torch.randn(2, 3, 8, 8), level(2), told(2)).square().mean().backward()
    idle = [
        name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()
    ]
    assert idle == []


@pytest.mark.parametrize("field", FIELDS)
def test_everything_it_is_told_changes_the_answer_of_that_sample_alone(field: str) -> None:
    network, x, cond = awake(TOLD), torch.randn(3, 3, 8, 8), told(3)
    part = getattr(cond, field).clone()
    part[1] += 1
    change = network(x, level(3), cond) - network(x, level(3), cond._replace(**{field: part}))
    assert change[1].abs().max() > 1e-3
    assert not change[[0, 2]].any()


@pytest.mark.parametrize("attention", ["joint", "cross"])
def test_tokens_that_do_not_count_change_nothing(attention: str) -> None:
    spec = TOLD.but(attention=attention, text_at_level=False)
    network, x, cond = awake(spec), torch.randn(2, 3, 8, 8), told(2)
    assert cond.text is not None
    heard = torch.tensor([[True, True, False, True], [True, False, False, False]])
    other = torch.where(heard[:, :, None], cond.text, torch.randn(2, 4, 6))
    answer = network(x, level(2), cond._replace(heard=heard))
    assert torch.equal(answer, network(x, level(2), cond._replace(heard=heard, text=other)))
    assert not torch.equal(answer, network(x, level(2), cond))


def test_a_class_is_told_as_a_level_of_its_own() -> None:
    network, x = awake(SPEC.but(labels=3)), torch.randn(1, 3, 8, 8).expand(2, -1, -1, -1)
    one, other = network(x, torch.zeros(2), Conditioning(level=network.of_class(torch.tensor([0, 2]))))
    assert (one - other).abs().max() > 1e-3
    with pytest.raises(ValueError, match="not told classes"):
        awake(SPEC).of_class(torch.tensor([0]))


def test_the_noise_level_changes_the_answer() -> None:
    network, x = awake(SPEC), torch.randn(1, 3, 8, 8).expand(2, -1, -1, -1)
    low, high = network(x, torch.tensor([-1.0, 1.0]), Conditioning())
    assert (low - high).abs().max() > 1e-3


@pytest.mark.parametrize("field", FIELDS)
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
        ({"heads": 3}, "32 channels at 2 do not split into 3 heads"),
        ({"attention": "cross"}, "looks at a caption, but text_width is 0"),
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


def test_a_learned_variance_is_the_second_half_of_the_answer() -> None:
    network, x, sigma = awake(SPEC, out_channels=6), torch.randn(2, 3, 8, 8), torch.tensor([0.5, 2.0])
    eps, between = network(x / (1 + sigma**2).sqrt()[:, None, None, None], sigma.log(), Conditioning()).chunk(
        2, 1
    )
    answer = NetworkDenoiser(network, "eps", learns_variance=True)(x, sigma, Conditioning())
    assert answer.variance_fraction is not None
    torch.testing.assert_close(answer.x0, x - sigma[:, None, None, None] * eps)
    torch.testing.assert_close(answer.variance_fraction, (between + 1) / 2)


def test_channels_come_back_from_what_they_are_over_the_width() -> None:
    for width in range(8, 513, 8):
        levels = range(width, 2049, 8)
        spec = UNetSpec(
            width=width,
            channel_mult=tuple(out / width for out in levels),
            groups=8,
            attention_at=(),
            attention_in_middle=False,
        )
        assert spec.channels() == tuple(levels)
