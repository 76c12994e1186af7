"""Perceptual distances are distances, stay frozen and in eval mode; the discriminator judges patches."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dd_core.nets.clip import Clip, ClipNetSpec
from dd_core.nets.perceptual import ClipFeatures, Lpips, PatchGan, PatchGanSpec, load_lpips

CLIP = ClipNetSpec(
    embedding_width=16,
    image_size=32,
    patch_size=8,
    image_width=32,
    image_layers=4,
    context_length=8,
    text_width=16,
    text_layers=1,
    head_width=16,
    vocab_size=64,
)


def lpips() -> nn.Module:
    torch.manual_seed(0)
    net = Lpips()
    for weight in net.weights:
        nn.init.uniform_(weight)
    return net


def clip_features() -> nn.Module:
    torch.manual_seed(0)
    return ClipFeatures(Clip(CLIP)).eval()


DISTANCES = pytest.mark.parametrize("build", [lpips, clip_features])


@DISTANCES
def test_equal_images_are_not_apart_and_the_order_does_not_matter(build: Callable[[], nn.Module]) -> None:
    distance, (x, y) = build(), torch.rand(2, 3, 3, 48, 48) * 2 - 1
    assert torch.equal(distance(x, x), torch.zeros(3))
    assert (distance(x, y) > 0).all()
    torch.testing.assert_close(distance(x, y), distance(y, x))


@DISTANCES
def test_a_distance_depends_on_its_own_pair_alone(build: Callable[[], nn.Module]) -> None:
    distance, (x, y) = build(), torch.rand(2, 3, 3, 32, 32) * 2 - 1
    alone = torch.cat([distance(x[i : i + 1], y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(distance(x, y), alone, rtol=1e-4, atol=1e-6)


@DISTANCES
def test_neighbouring_images_are_as_far_apart_inside_autocast(build: Callable[[], nn.Module]) -> None:
    distance, x = build(), torch.rand(2, 3, 32, 32) * 2 - 1
    y = x + 0.001 * torch.randn_like(x)
    expected = distance(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(distance(x, y), expected, rtol=1e-4, atol=0.0)
        halves = distance(x.bfloat16(), x.bfloat16())
    assert halves.dtype == torch.float32


def test_average_pooling_stands_where_the_maxima_were_and_nothing_else_changes() -> None:
    """As `replace_pooling` of piq.LPIPS does; the first stage, before any pooling, sees the same."""
    own, mean = lpips(), Lpips(pooling="average")
    mean.load_state_dict(own.state_dict())
    for before, after in zip(own.modules(), mean.modules(), strict=True):
        if isinstance(before, nn.MaxPool2d):
            assert isinstance(after, nn.AvgPool2d)
            assert (after.kernel_size, after.stride) == (before.kernel_size, before.stride)
        else:
            assert type(before) is type(after)
    x, y = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert float(own(x, y)) != pytest.approx(float(mean(x, y)), rel=1e-3)


def test_lpips_stays_in_eval_mode_inside_a_module_in_training() -> None:
    parent = nn.Sequential(lpips())
    parent.train()
    assert not any(module.training for module in parent[0].modules())


def test_the_first_half_of_the_blocks_of_clip_is_compared() -> None:
    distance, image = ClipFeatures(Clip(CLIP)), torch.rand(1, 3, 32, 32)
    assert [tuple(features.shape) for features in distance.patches(image)] == [(1, 16, 32)] * 2


@pytest.mark.parametrize(("layers", "side", "millions"), [(3, 30, 2.766), (2, 62, 0.663)])
def test_the_published_discriminators_have_as_many_logits_and_parameters(
    layers: int, side: int, millions: float
) -> None:
    with torch.device("meta"):
        judge = PatchGan(PatchGanSpec(layers=layers))
        assert judge(torch.empty(1, 3, 256, 256)).shape == (1, 1, side, side)
    assert sum(p.numel() for p in judge.parameters()) / 1e6 == pytest.approx(millions, abs=0.0005)


def test_a_judgement_does_not_depend_on_the_batch() -> None:
    judge, image = PatchGan(PatchGanSpec(width=8, layers=2)), torch.rand(4, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(judge(image)[1:2], judge(image[1:2]))


def test_lpips_weights_are_refused_with_the_file_and_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    with pytest.raises(ValueError, match=r"no file .*weights.safetensors"):
        load_lpips(path)
    path.write_bytes(b"half of a file")
    with pytest.raises(ValueError, match=r"lpips_weights: .*weights.safetensors is damaged.*fetch it again"):
        load_lpips(path)
    save_file({"net.slice1.0.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"weights.safetensors has no tensor 'net.slice1.0.bias'"):
        load_lpips(path)
