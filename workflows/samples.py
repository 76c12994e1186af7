"""Sample grids: what a stage draws while it is trained, for fixed prompts, seeds and pictures of the data."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dd_core import images
from dd_core.cascade import CascadeState, run
from dd_core.stage import PairBatch, Trained
from dd_core.stages import load_hop
from dd_core.stages.autoencoder import AutoencoderSpec, autoencoder_of
from dd_core.stages.base import BaseSpec
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.clip import ClipSpec, clip_of, embedding_of
from dd_core.stages.consistency import ConsistencySpec
from dd_core.stages.upsampler import UpsamplerSpec
from dd_core.text import tokens
from workflows.train_spec import SamplesSpec


def drawn(
    trained: Trained,
    parents: Mapping[str, Trained],
    what: SamplesSpec,
    known: PairBatch,
) -> Float[Tensor, " n 3 h w"] | None:
    """Pictures in [-1, 1] that show how far a stage is; None if a stage of its kind draws none.

    Args:
        trained: The stage as it is now, with averaged weights.
        parents: Role -> what it stands on.
        what: Prompts, first seed, and how to sample.
        known: Pairs of the data: those that an upsampler, an autoencoder or a base from drafts is shown, with
            the embeddings that the base is trained on.

    Returns:
        base and consistency: one for each prompt; where they start from drafts, which a prompt alone does
        not give, and upsampler and autoencoder: known and made pictures in turn.
    """
    truth = images.to_unit(known.image)
    match trained.spec:
        case (BaseSpec(from_draft=True) as base) | ConsistencySpec(base=BaseSpec(from_draft=True) as base):
            told = embedding_of(clip_of(parents["clip"]), known, base.embedded_at)
            state = CascadeState(seeds=seeds(what, len(truth)), tokens=known.tokens, image_embedding=told)
            return in_turn(truth, run_alone(trained, parents, state, what))
        case (ChainSpec() as spec) | ConsistencySpec(base=ChainSpec() as spec):
            return painted(spec, trained, parents, what, truth)
        case BaseSpec() | ConsistencySpec() if what.prompts:
            clip = parents["clip"].spec
            assert isinstance(clip, ClipSpec)
            caption = torch.tensor(tokens(what.prompts, clip.net.context_length))
            state = CascadeState(seeds=seeds(what, len(caption)), tokens=caption)
            return run_alone(trained, parents, state, what)
        case UpsamplerSpec() as spec:
            small = F.avg_pool2d(truth, spec.factor)
            nothing = torch.zeros(len(truth), 1, dtype=torch.long)
            state = CascadeState(seeds=seeds(what, len(truth)), tokens=nothing, image=small)
            return in_turn(truth, run_alone(trained, parents, state, what))
        case AutoencoderSpec():
            model = autoencoder_of(trained).to(device())
            with torch.no_grad():
                return in_turn(truth, model.reconstruct(truth.to(device())).float().cpu())
        case _:
            return None


def device() -> torch.device:
    """Where the training runs, which these pictures interrupt."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_alone(
    trained: Trained, parents: Mapping[str, Trained], state: CascadeState, what: SamplesSpec
) -> Float[Tensor, " n 3 h w"]:
    """What a stage paints as the only hop."""
    made = run(load_hop(trained, parents, device=device(), precision="auto"), state, what.how).image
    assert made is not None
    return made


def painted(
    spec: ChainSpec,
    trained: Trained,
    parents: Mapping[str, Trained],
    what: SamplesSpec,
    truth: Float[Tensor, " b 3 h w"],
) -> Float[Tensor, " n 3 h w"] | None:
    """What a chain, or a model of few steps, paints: one for each prompt; enlarged ones beside the true."""
    count = len(truth) if spec.factor > 1 else len(what.prompts)
    if not count:
        return None
    length = spec.context_length
    if not length and "clip" in parents:
        clip = parents["clip"].spec
        assert isinstance(clip, ClipSpec)
        length = clip.net.context_length
    prompts = [*what.prompts, *[""] * count][:count]
    state = CascadeState(seeds=seeds(what, count), tokens=torch.tensor(tokens(prompts, length or 2)))
    if spec.labels:
        state = state._replace(label=torch.arange(count) % spec.classes)
    if spec.factor > 1:
        state = state._replace(image=F.avg_pool2d(truth, spec.factor))
    made = run_alone(trained, parents, state, what)
    return in_turn(truth, made) if spec.factor > 1 else made


def seeds(what: SamplesSpec, count: int) -> list[int]:
    """The same for every grid of a run."""
    return [what.seed + place for place in range(count)]


def in_turn(one: Float[Tensor, " b 3 h w"], other: Float[Tensor, " b 3 h w"]) -> Float[Tensor, " n 3 h w"]:
    """One, other, one, other, ..."""
    return torch.stack([one, other], 1).flatten(0, 1)


def save_grid(image: Float[Tensor, " b 3 h w"], path: Path) -> None:
    """Pictures in [-1, 1] as one PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(image).save(path)


def grid(image: Float[Tensor, " b 3 h w"], columns: int = 0) -> Image.Image:
    """Pictures in [-1, 1] side by side, row by row, two pixels of white between them."""
    columns = columns or 2 * math.ceil(math.sqrt(len(image)) / 2)
    rows, side = math.ceil(len(image) / columns), image.shape[-1] + 2
    sheet = Image.new("RGB", (columns * side - 2, rows * side - 2), "white")
    for place, pixels in enumerate(images.to_bytes(image)):
        tile = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
        sheet.paste(tile, (place % columns * side, place // columns * side))
    return sheet
