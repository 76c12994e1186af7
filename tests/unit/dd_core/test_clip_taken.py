"""A CLIP that is taken from elsewhere reads captions as its spec says, in weights that are not its own."""

import re
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from dd_core.layouts.published import Process
from dd_core.nets.clip import Clip, ClipNetSpec
from dd_core.nets.network import PlainSpec
from dd_core.stage import Trained
from dd_core.stages import build_stage
from dd_core.stages.chain_spec import ChainSpec, network_of
from dd_core.stages.clip import ClipSpec, clip_of, published
from dd_core.stages.network import NetworkSpec
from dd_core.text import tokens
from jobs.recipes import latent
from tests.unit.dd_core.test_start import UNET
from workflows.clip_judge import judge_of

LAYERS = 12
CONFIG = {
    "embed_dim": 8,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 9, "vocab_size": 49408, "width": 16, "heads": 2, "layers": LAYERS},
}
TAKERS: dict[str, Callable[[str], object]] = {
    "clip.pretrained": lambda named: published(ClipSpec(pretrained=named)),
    "evaluation.judge": judge_of,
}
"""Setting -> what takes a CLIP by the name that stands there."""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights of a model that open_clip knows as "tiny"."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", CONFIG)
    torch.manual_seed(0)
    weights = open_clip.create_model("tiny").state_dict()
    save_file({name: weight.clone() for name, weight in weights.items()}, tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def test_it_pads_and_answers_as_the_spec_says_and_is_what_the_model_is_in_all_else(file: Path) -> None:
    told = ClipNetSpec(pads_with="end", states="penultimate", image_size=32, mean=(0.0, 0.0, 0.0))
    taken = published(ClipSpec(net=told, pretrained=f"tiny:{file}"))
    plain = published(ClipSpec(pretrained=f"tiny:{file}"))
    assert isinstance(plain.spec, ClipSpec)
    assert isinstance(taken.spec, ClipSpec)
    assert taken.spec.net == plain.spec.net.but(pads_with="end", states="penultimate")
    assert (plain.spec.net.pads_with, plain.spec.net.states) == ("zero", "last")
    assert (taken.spec.net.image_size, taken.spec.net.mean) == (16, ClipNetSpec().mean)
    by_hand = Clip(taken.spec.net)
    by_hand.load_state_dict(plain.weights)
    caption = torch.tensor(tokens(["a star"], 9))
    states = clip_of(taken).read(caption).states
    assert torch.equal(states, by_hand.eval().read(caption).states)
    assert not torch.allclose(states, clip_of(plain).read(caption).states)


def test_as_the_recipe_of_stable_diffusion_takes_it_it_reads_for_published_weights(file: Path) -> None:
    """What `latent.paper` asks of its CLIP is what `sd1` as a start wants."""
    asked = latent.paper_clip().stage
    assert isinstance(asked, ClipSpec)
    clip = published(asked.but(pretrained=f"tiny:{file}"))
    net = PlainSpec(unet=UNET.but(attention="cross", text_width=16, text_at_level=False))
    chain = ChainSpec(net=net, image_size=8)
    process = Process(schedule="linear", beta_range=(1e-4, 0.02))
    start = Trained(NetworkSpec(source="sd1", net=net, process=process), dict(network_of(chain).state_dict()))
    begun = build_stage(chain, {"clip": clip, "start": start}).model.state_dict()
    assert all(torch.equal(begun[f"network.{name}"], weight) for name, weight in start.weights.items())


@pytest.mark.fault
@pytest.mark.parametrize("setting", TAKERS)
@pytest.mark.parametrize("name", ["page.pt", "empty.pt", "empty.bin", "cut.pt", "cut.safetensors"])
def test_a_file_that_is_cut_empty_or_a_page_is_named_and_is_to_be_fetched_again(
    name: str, setting: str, file: Path
) -> None:
    torch.save(load_file(file), file.with_name("whole.pt"))
    whole = file if name.endswith("safetensors") else file.with_name("whole.pt")
    content = {"page": b"<!DOCTYPE html><title>404</title>", "empty": b""}
    damaged = file.with_name(name)
    damaged.write_bytes(content.get(damaged.stem, whole.read_bytes()[:-100]))
    wanted = f"^{setting}: {re.escape(str(damaged))} is damaged or no file of weights; fetch it again$"
    with pytest.raises(ValueError, match=wanted):
        TAKERS[setting](f"tiny:{damaged}")
