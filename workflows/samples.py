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
from dd_core.devices import nearest
from dd_core.stage import LearnedSpec, LearnsEmbeddings, PairBatch, Trained
from dd_core.stages import load_hop
from dd_core.stages.autoencoder import AutoencoderSpec, autoencoder_of
from dd_core.stages.base import BaseSpec
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.clip import ClipSpec, clip_of, embedding_of
from dd_core.stages.consistency_spec import ConsistencySpec
from dd_core.stages.draft import DraftSpec, draft_of
from dd_core.stages.draft import drawn as decoded
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
        parents: Role -> parent.
        what: Prompts, first seed, and how to sample.
        known: Pairs of the data, with the embeddings that the stage is trained on; see `heading`.

    Returns:
        What `heading` says of a stage of this kind: one for each prompt, or known and made ones alternating.
    """
    match trained.spec:
        case (ChainSpec() as spec) | ConsistencySpec(base=ChainSpec() as spec) if not spec.always_embedded:
            return painted(spec, trained, parents, what, images.to_unit(known.image))
        case (BaseSpec() as base) | ConsistencySpec(base=BaseSpec() as base) if not by_embedding(base):
            return prompted(trained, parents, what)
    made = remade(trained, parents, what, known)
    return None if made is None else in_turn(images.to_unit(known.image), made)


def heading(spec: LearnedSpec) -> str:
    """What the grids of such a stage show."""
    match spec:
        case ConsistencySpec():
            return heading(spec.base)
        case BaseSpec() | ChainSpec() if by_embedding(spec):
            beside = "what it paints of the embedding, by the same seeds"
        case UpsamplerSpec() | ChainSpec() if spec.factor > 1:
            beside = "what it makes of the same one made small, by the same seeds"
        case AutoencoderSpec():
            beside = "what comes back of it from the latents"
        case DraftSpec():
            beside = "what its embedding is decoded to"
        case LearnsEmbeddings():
            beside = "the one of them that is nearest to what is drawn for its caption, by the same seeds"
        case _:
            return "the same prompts and seeds"
    return f"pictures of the data and, beside each, {beside}"


def by_embedding(spec: BaseSpec | ChainSpec) -> bool:
    """Whether a stage paints from image embeddings: it starts from drafts, or was never trained without."""
    return spec.always_embedded or (isinstance(spec, BaseSpec) and spec.from_draft)


def remade(
    trained: Trained, parents: Mapping[str, Trained], what: SamplesSpec, known: PairBatch
) -> Float[Tensor, " b 3 h w"] | None:
    """What a stage makes of pictures of the data or of their embeddings; None if its kind makes nothing."""
    truth, made = images.to_unit(known.image), None
    state = CascadeState(seeds=seeds(what, len(truth)), tokens=known.tokens, label=known.label)
    match trained.spec:
        case (BaseSpec() | ChainSpec() as base) | ConsistencySpec(base=(BaseSpec() | ChainSpec() as base)):
            told = embedding_of(clip_of(parents["clip"]), known, base.embedded_at)
            small = F.avg_pool2d(truth, base.factor if isinstance(base, ChainSpec) else 1)
            state = state._replace(image_embedding=told, image=small)
            made = run_alone(trained, parents, state, what).image
        case UpsamplerSpec() as spec:
            small = F.avg_pool2d(truth, spec.factor)
            made = run_alone(trained, parents, state._replace(image=small), what).image
        case AutoencoderSpec():
            model = autoencoder_of(trained).to(nearest())
            with torch.no_grad():
                made = model.reconstruct(truth.to(nearest())).float().cpu()
        case DraftSpec() as spec:
            told = embedding_of(clip_of(parents["clip"]), known, spec.embedded_at)
            made = decoded(draft_of(trained).to(nearest()), told.to(nearest())).cpu()
        case LearnsEmbeddings():
            found = run_alone(trained, parents, state, what).image_embedding
            assert found is not None
            made = truth[(found @ embedding_of(clip_of(parents["clip"]), known).T).argmax(-1)]
    return made


def prompted(
    trained: Trained, parents: Mapping[str, Trained], what: SamplesSpec
) -> Float[Tensor, " n 3 h w"] | None:
    """What a base that needs nothing but captions paints of the prompts; None if there are none."""
    if not what.prompts:
        return None
    clip = parents["clip"].spec
    assert isinstance(clip, ClipSpec)
    caption = torch.tensor(tokens(what.prompts, clip.net.context_length))
    return run_alone(trained, parents, CascadeState(seeds(what, len(caption)), caption), what).image


def run_alone(
    trained: Trained, parents: Mapping[str, Trained], state: CascadeState, what: SamplesSpec
) -> CascadeState:
    """What a stage makes as the only hop."""
    return run(load_hop(trained, parents, device=nearest(), precision="auto"), state, what.how)


def painted(
    spec: ChainSpec,
    trained: Trained,
    parents: Mapping[str, Trained],
    what: SamplesSpec,
    truth: Float[Tensor, " b 3 h w"],
) -> Float[Tensor, " n 3 h w"] | None:
    """What a chain, or a consistency model of it, paints: one for each prompt; enlarged beside true ones."""
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
    made = run_alone(trained, parents, state, what).image
    assert made is not None
    return in_turn(truth, made) if spec.factor > 1 else made


def seeds(what: SamplesSpec, count: int) -> list[int]:
    """Consecutive seeds, the same for every grid of a run."""
    return [what.seed + place for place in range(count)]


def in_turn(one: Float[Tensor, " b 3 h w"], other: Float[Tensor, " b 3 h w"]) -> Float[Tensor, " n 3 h w"]:
    """One, other, one, other, ..."""
    return torch.stack([one, other], 1).flatten(0, 1)


def save_grid(image: Float[Tensor, " b 3 h w"], path: Path) -> None:
    """Pictures in [-1, 1] as one PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(image).save(path)


def grid(image: Float[Tensor, " b 3 h w"]) -> Image.Image:
    """Pictures in [-1, 1] side by side, row by row, two pixels of white between them."""
    columns = 2 * math.ceil(math.sqrt(len(image)) / 2)
    rows, side = math.ceil(len(image) / columns), image.shape[-1] + 2
    sheet = Image.new("RGB", (columns * side - 2, rows * side - 2), "white")
    for place, pixels in enumerate(images.to_bytes(image)):
        tile = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
        sheet.paste(tile, (place % columns * side, place // columns * side))
    return sheet
