"""What a run writes: how many bytes its data will take, and where in its directory it all lies."""

from collections.abc import Sequence, Set

from workflows.run_spec import RunSpec
from workflows.shape_shards import ShapesSpec, pair
from workflows.train_spec import TrainSpec

PREPARED_SHARE, PREPARED_PIXELS = 0.43, 64**2 + 256**2
"""Prepared bytes per byte of the embedded world's tars, and the pixels of an image at the sizes then;
measured: 0.43 for 400 pairs."""


def data_on_disk(spec: RunSpec) -> dict[str, int]:
    """What -> bytes of the data of a run, for a plan; empty if they are its user's, of unknown size."""
    if spec.shapes is None:
        return {}
    return {
        "data": data_bytes(spec.shapes, spec.pairs.sizes),
        "embeddings": embedding_bytes(spec.stages, spec.shapes.pairs),
    }


def data_bytes(spec: ShapesSpec, sizes: Sequence[int]) -> int:
    """Bytes of the embedded world's tars and of the data prepared from them, estimated from eight pairs.

    The bytes of prepared images are taken to be in proportion to their pixels.  In a tar each member is
    rounded up to a multiple of 512 bytes and has a header of 512 bytes.
    """
    share = PREPARED_SHARE * sum(size**2 for size in sizes) / PREPARED_PIXELS
    some = [pair(spec, number)[1] for number in range(min(8, spec.pairs))]
    padded = [sum(512 + -(-len(data) // 512) * 512 for data in members.values()) for members in some]
    return round(spec.pairs * sum(padded) / len(padded) * (1 + share))


def embedding_bytes(stages: Sequence[TrainSpec], pairs: int) -> int:
    """Bytes of the image embeddings: of each CLIP, once for each image size, in float32."""
    told = {
        (stage.parents.get(by.role), by.size): by.width for stage in stages if (by := stage.stage.embedded_by)
    }
    return 4 * pairs * sum(told.values())


def written(spec: RunSpec, stays: Set[str] = frozenset()) -> list[str]:
    """Paths within a run of the files whose bytes a plan sums up.

    What lies there before the run starts is overwritten or used, so its bytes count as free.

    Args:
        spec: The run.
        stays: Stages whose former training is moved aside and kept; their directories are left out.
    """
    own = [stage.name for stage in spec.stages if stage.name not in stays]
    names = [f"{name}/{part}" for name in own for part in ("checkpoints", "bundle")]
    names += [f"cascade/{stage.name}" for stage in spec.stages]
    if spec.shapes:
        clips = {stage.parents.get(by.role) for stage in spec.stages if (by := stage.stage.embedded_by)}
        names += ["data", ".embeddings", *(f"{clip}/embeddings" for clip in clips)]
    return names
