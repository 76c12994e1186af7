"""The demo's cascade told by OpenAI's ViT-L/14 in place of a CLIP of its own: what another CLIP changes."""

from dd_core.stages import StageSpec
from dd_core.stages.base import BaseSpec
from dd_core.stages.clip import ClipSpec
from dd_core.stages.draft import DraftSpec
from dd_core.stages.prior import PriorSpec
from jobs.recipes import demo
from jobs.recipes._hardware import any_node
from jobs.recipes.latent import paper_clip
from workflows.pairs import PairsSpec
from workflows.run_spec import RunSpec
from workflows.train_spec import TrainSpec

SIDE, TOKENS, WIDTH = 224, 77, 768
"""Of its pictures, of its captions, and of its states and embeddings."""


def run() -> RunSpec:
    """Five stages for your own tars: set pairs.shards and pairs.destination.

    open_clip downloads the CLIP (1.7 GB).  Two CPUs, no GPU; by the plan up to 6 GiB.  The budgets are
    those of the demo's flat shapes: raise them for photographs.  Planned and built, never trained: no weights
    could be downloaded where it was written.
    """
    cascade = demo.cascade().but(name="vit_l14", context_length=TOKENS)
    stages = (demo.upsampler(), demo.prior(), demo.draft(), demo.base())
    return RunSpec(
        name="vit_l14",
        pairs=PairsSpec(
            shards=("pairs/*.tar",), destination="prepared", context_length=TOKENS, sizes=(64, SIDE, 256)
        ),
        stages=(clip(), *map(told, stages)),
        cascade=cascade,
    )


def clip() -> TrainSpec:
    """The CLIP of `latent.paper`, with captions padded as it was trained, not as for Stable Diffusion."""
    taken = paper_clip()
    assert isinstance(taken.stage, ClipSpec)
    return taken.but(
        stage=taken.stage.but(net=taken.stage.net.but(pads_with="zero")), **any_node(memory_gib=4)
    )


def told(stage: TrainSpec) -> TrainSpec:
    """A stage of the demo with the widths, tokens and picture sizes of this CLIP, and room for it."""
    fitted: StageSpec = stage.stage
    match fitted:
        case PriorSpec(net=net):
            net = net.but(text_width=WIDTH, embedding_width=WIDTH, context_length=TOKENS)
            fitted = fitted.but(net=net, image_size=SIDE)
        case DraftSpec():
            fitted = fitted.but(embedding_width=WIDTH, embedded_at=SIDE)
        case BaseSpec(net=dit):
            dit = dit.but(text_width=WIDTH, caption_width=WIDTH, embedding_width=WIDTH)
            fitted = fitted.but(net=dit, embedded_at=SIDE)
        case _:
            return stage
    return stage.but(stage=fitted, **any_node(memory_gib=6))
