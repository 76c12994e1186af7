"""Every published network has the published number of weights, exactly, under as many keys."""

import pytest
import torch

from dd_core.layouts.clip import clip_moves, transformers_moves
from dd_core.layouts.importing import moves_of
from dd_core.layouts.published import AUTOENCODERS, published
from dd_core.nets.autoencoder import Autoencoder
from dd_core.nets.clip import Clip
from dd_core.nets.network import build

WEIGHTS = {
    "adm-imagenet64": (295_904_454, 541),
    "adm-imagenet128": (421_529_606, 493),
    "adm-imagenet256": (553_838_086, 567),
    "adm-imagenet256-uncond": (552_814_086, 566),
    "adm-imagenet512": (558_997_638, 645),
    "adm-lsun256": (552_814_086, 566),
    "adm-upsampler-64-256": (311_795_910, 567),
    "adm-upsampler-128-512": (308_835_270, 537),
    "adm-classifier64": (65_438_568, 307),
    "adm-classifier128": (42_568_040, 221),
    "adm-classifier256": (54_096_360, 249),
    "adm-classifier512": (54_448_360, 281),
    "edm-imagenet64": (295_899_267, 541),
    "edm-lsun256": (526_304_771, 566),
    "consistency-imagenet64": (295_899_267, 541),
    "consistency-lsun256": (526_304_771, 566),
    "ddpm-cifar10": (35_746_307, 328),
    "ddpm-lsun256": (113_673_219, 450),
    "improved-imagenet64": (121_063_942, 450),
    "improved-imagenet64-cond": (273_049_350, 451),
    "improved-cifar10": (52_546_438, 446),
    "improved-upsampler-64-256": (279_792_390, 457),
    "improved-lsun256": (113_676_678, 426),
    "glide-base": (385_030_726, 783),
    "glide-base-inpaint": (385_037_638, 783),
    "glide-upsample": (398_361_286, 797),
    "glide-upsample-inpaint": (398_368_198, 797),
    "glide-clip": (158_123_264, 373),
    "karlo-prior": (1_022_028_544, 256),
    "karlo-decoder": (893_318_086, 595),
    "karlo-sr": (691_579_523, 408),
    "karlo-sr-last": (691_579_523, 408),
    "ldm-faces256": (274_056_163, 368),
    "ldm-bedrooms256": (274_056_163, 368),
    "ldm-churches256": (294_966_916, 520),
    "ldm-cin256": (400_920_579, 688),
    "ldm-text256": (872_300_484, 686),
    "sd1": (859_520_964, 686),
    "sd1-inpaint": (859_535_364, 686),
    "sd2-base": (865_910_724, 686),
    "sd2": (865_910_724, 686),
    "sd2-inpaint": (865_925_124, 686),
    "sd2-unclip-h": (870_173_124, 690),
    "sd2-unclip-l": (869_517_764, 690),
    "sd-x4-upscaler": (473_398_020, 687),
}
"""Weights, and keys of the published files: without tables and what the file holds beside the network."""

FIRST_STAGES = {
    "ldm-kl-f4": 55_312_063,
    "ldm-kl-f8": 83_653_863,
    "ldm-kl-f16": 69_610_963,
    "ldm-kl-f32": 103_880_131,
    "ldm-vq-f4": 55_322_782,
    "ldm-vq-f4-noattn": 53_219_486,
    "ldm-vq-f8": 67_717_295,
    "ldm-vq-f8-n256": 67_652_783,
    "ldm-vq-f16": 69_593_371,
}


@pytest.mark.parametrize("name", published())
def test_a_network_has_the_published_number_of_weights_and_keys_and_a_layout_that_fits(name: str) -> None:
    source = published()[name]
    with torch.device("meta"):
        net = build(source.net)
    moves = list(moves_of(net, source.layout))
    assert {move.ours for move in moves} == net.state_dict().keys() - {"mean", "std"}
    keys = [key for move in moves for key in move.theirs]
    assert len(set(keys)) == len(keys)
    counts = sum(weight.numel() for weight in net.parameters()), len(keys)
    assert counts == WEIGHTS[name]


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_an_autoencoder_has_the_published_number_of_weights(name: str) -> None:
    with torch.device("meta"):
        net = Autoencoder(AUTOENCODERS[name])
    assert sum(weight.numel() for weight in net.parameters()) == FIRST_STAGES[name]


def test_the_towers_of_the_noised_clip_have_the_published_numbers_of_weights() -> None:
    with torch.device("meta"):
        net = build(published()["glide-clip"].net)
    counts = [sum(weight.numel() for weight in tower.parameters()) for tower in (net.image, net.text)]
    assert counts == [86_443_776, 71_679_488]


def test_every_source_is_counted() -> None:
    assert published().keys() == WEIGHTS.keys()
    assert AUTOENCODERS.keys() == FIRST_STAGES.keys()


READERS = {"sd1": (123_060_480, 196), "sd2": (352_984_064, 292)}
"""CLIPTextModel of ViT-L/14, and the text tower of ViT-H/14 without its projection and its scale."""


@pytest.mark.parametrize("name", READERS)
def test_a_reader_has_the_published_number_of_weights_and_keys(name: str) -> None:
    spec = published()[name].reader
    assert spec is not None
    with torch.device("meta"):
        net = Clip(spec)
    moves = list(transformers_moves(net) if name == "sd1" else clip_moves(net))
    counts = sum(weight.numel() for weight in net.parameters()), sum(len(move.theirs) for move in moves)
    assert counts == READERS[name]
