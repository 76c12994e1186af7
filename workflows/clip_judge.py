"""How well a cascade paints captions of a user's own data: a CLIP compares pictures and captions.

Two figures, each beside that of the true pictures of the same captions, which is the most to be hoped for:
the mean cosine of a picture and its caption, and R-precision, the share of pictures that are nearer to their
own caption than to all of some others.  The CLIP that the cascade was trained with flatters it, since the
cascade has adapted to it; one that was not part of its training judges better.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dd_core import bundle, images, metrics, sealed, text
from dd_core.devices import nearest
from dd_core.layouts.clip import net_of
from dd_core.nets.clip import Clip
from dd_core.stages.clip import ClipSpec, clip_of, published
from workflows.evaluation import keep_pictures, wilson, write_down
from workflows.evaluation_spec import EvaluationSpec
from workflows.painting_client import NO_PICTURE, Wish, answered, computed_in, missing, pixels
from workflows.parts import data_digest
from workflows.storage import Home
from workflows.true_pairs import chosen, true_pictures

UNREADABLE = "unreadable picture"


class OwnData(NamedTuple):
    """Prepared pairs of a user's own, and the CLIP that judges the pictures painted from their captions."""

    data: str
    """Address."""
    clip: str
    """Address of a bundle, or a CLIP of open_clip as `ClipSpec.pretrained` names one."""
    taught: bool = False
    """Whether the cascade was trained with this CLIP."""

    def digest(self) -> str:
        """Digest of data and CLIP, on which the figures depend besides the spec (seed, captions, among).

        Raises:
            ValueError: There is no such CLIP, or no such data.
        """
        facts = Home.of(self.data).facts(sealed.MANIFEST)
        if not facts:
            raise ValueError(f"{self.data} is no finished prepared data; `ddiff data prepare` makes some")
        return sealed.digest_of({"data": data_digest(facts), "clip": clip_digest(self.clip)})


class Judge(NamedTuple):
    """The two encoders of a loaded CLIP, from pictures and from captions to unit vectors."""

    pictures: Callable[[Float[Tensor, " b 3 h w"]], Float[Tensor, " b d"]]
    captions: Callable[[Sequence[str]], Float[Tensor, " b d"]]


class Verdict(NamedTuple):
    """The judge's verdict on one painted picture, and on the true picture of its caption."""

    caption: str
    cosine: float
    nearest: bool
    """Nearer to its own caption than to all of the others."""
    true_cosine: float
    true_nearest: bool
    failure: str = ""


def clip_digest(named: str) -> str:
    """Identity of a CLIP: its bundle's digest, MODEL:sha256 of its file or open_clip's name; loads nothing.

    Raises:
        ValueError: There is no such CLIP.
    """
    if digest := Home.of(named).facts(sealed.MANIFEST).get("digest"):
        return str(digest)
    model, colon, file = named.partition(":")
    if colon and not Path(file).is_file():
        raise ValueError(f"evaluation.judge: {named!r} is no bundle, and there is no file {file!r}")
    try:
        net_of(model.partition("/")[0])
    except ValueError as error:
        raise ValueError(f"evaluation.judge: {named!r} is no bundle: {error}") from None
    return f"{model}:{sealed.sha256(Path(file))}" if colon else named


def judge_of(named: str) -> Judge:
    """A CLIP, loaded onto the GPU if there is one.

    Raises:
        ValueError: There is no such CLIP, its weights cannot be had, or the bundle is no CLIP.
        sealed.SealError: The bundle is damaged.
    """
    home = Home.of(named)
    if home.has(sealed.MANIFEST):
        trained = bundle.load(home.fetched()).trained
    else:
        clip_digest(named)
        trained = published(ClipSpec(pretrained=named), "evaluation.judge")
    return reading(clip_of(trained).to(nearest()))


def reading(clip: Clip) -> Judge:
    """The encoders of a CLIP; each input is encoded alone, so that no result depends on its batch."""
    device = clip.mean.device

    @torch.inference_mode()
    def captions(some: Sequence[str]) -> Float[Tensor, " b d"]:
        rows = torch.tensor(text.tokens(some, clip.spec.context_length), device=device)
        return torch.cat([clip.read(row[None]).embedding.cpu() for row in rows])

    @torch.inference_mode()
    def pictures(some: Float[Tensor, " b 3 h w"]) -> Float[Tensor, " b d"]:
        return torch.cat([clip.embed_image(one[None].to(device)).cpu() for one in some])

    return Judge(pictures, captions)


def evaluate_own(
    url: str, spec: EvaluationSpec, own: OwnData, *, keep: Path | None = None, digest: str = ""
) -> dict[str, Any]:
    """Paint captions of own data through an endpoint and have the pictures judged.

    A picture that is missing counts among `failed`, as one whose cosine is 0 and whose caption is not found.

    Args:
        url: Of the server, such as http://127.0.0.1:8000.
        spec: How many captions, and which.
        own: The data and the judge.
        keep: Directory for the pictures (00000.png), the true ones (00000-true.png) and verdicts.jsonl.
        digest: Of the cascade that is to paint them; empty: any one.

    Returns:
        cosine, r_precision, true_cosine, true_r_precision; intervals: name -> [low, high] at 95 %; n; failed;
        among: how many captions each is compared with, its own included; held_out: whether no stage was
        trained on these captions with this data; judge: name, digest, taught.

    Raises:
        NoPainterError: No server that paints answers there, or another cascade; nothing has been judged.
        ValueError: There is no such judge.
        DataError: The data is damaged, or has no two captions that differ.
        StorageError: A store is away.
    """
    data, judge = Home.of(own.data), judge_of(own.clip)
    places, held_out = chosen(data, spec.captions, seed=spec.seed, label=spec.label)
    captions = [place.caption for place in places]
    answers = answered(url, [Wish(place.caption, place.label) for place in places], spec, digest=digest)
    painted = [answer.png for answer in answers]
    truth = true_pictures(data, places, side_of(painted))
    if keep is not None:
        keep_pictures(keep, answers)
        for number, png in enumerate(truth):
            (keep / f"{number:05d}-true.png").write_bytes(png)
    verdicts = [
        one._replace(failure=answer.failure or one.failure)
        for one, answer in zip(judged(judge, captions, painted, truth, spec), answers, strict=True)
    ]
    missing(answers)
    if keep is not None:
        write_down(keep, [verdict._asdict() for verdict in verdicts])
    about = {"name": own.clip, "digest": clip_digest(own.clip), "taught": own.taught}
    asked = {"among": among(spec, len(captions)), "held_out": held_out, "judge": about}
    return {**scores(verdicts), **asked, "precision": computed_in(answers)}


def readable(png: bytes) -> Float[Tensor, " 1 3 h w"] | None:
    """A picture in [-1, 1]; None if it cannot be read."""
    try:
        return unit(png)
    except NO_PICTURE:
        return None


def side_of(pngs: Sequence[bytes]) -> int:
    """Side of the first picture that can be read; 1 if none can."""
    pictures = (readable(png) for png in pngs)
    return next((picture.shape[-1] for picture in pictures if picture is not None), 1)


def unit(png: bytes) -> Float[Tensor, " 1 3 h w"]:
    """A PNG in [-1, 1]."""
    return images.to_unit(torch.from_numpy(pixels(png).transpose(2, 0, 1).copy())[None])


def among(spec: EvaluationSpec, count: int) -> int:
    """How many captions a picture is compared with, where there are `count` in all."""
    return min(spec.among, count)


def judged(
    judge: Judge,
    captions: Sequence[str],
    painted: Sequence[bytes],
    truth: Sequence[bytes],
    spec: EvaluationSpec,
) -> list[Verdict]:
    """A verdict for each caption; the true pictures are compared with the same captions as the painted.

    Pictures are PNGs, decoded one at a time.
    """
    wanted = judge.captions(captions)
    drawn = metrics.others(len(captions), among(spec, len(captions)), seed=spec.seed)
    own = [read(judge, png) for png in painted]
    nothing = torch.zeros_like(wanted[:1])
    found = []
    for rows in (own, [judge.pictures(unit(png)) for png in truth]):
        seen = torch.cat([nothing if row is None else row for row in rows])
        cosines, nearest = metrics.cosines(seen, wanted), metrics.found_own(seen, wanted, drawn)
        found.append(list(zip(cosines.tolist(), nearest.tolist(), strict=True)))
    failures = [UNREADABLE * (row is None) for row in own]
    return [
        Verdict(caption, *ours, *true)._replace(failure=failure)
        for caption, ours, true, failure in zip(captions, *found, failures, strict=True)
    ]


def read(judge: Judge, png: bytes) -> Float[Tensor, " 1 d"] | None:
    """The judge's embedding of a picture; None if it cannot be read."""
    picture = readable(png)
    return None if picture is None else judge.pictures(picture)


def scores(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Means, shares and intervals."""
    found: dict[str, float] = {}
    intervals: dict[str, list[float]] = {}
    for name in ("cosine", "true_cosine"):
        mean, low, high = metrics.mean_of(torch.tensor([getattr(one, name) for one in verdicts]))
        found[name], intervals[name] = mean, [low, high]
    for name, verdict in {"r_precision": "nearest", "true_r_precision": "true_nearest"}.items():
        right = sum(getattr(one, verdict) for one in verdicts)
        found[name], intervals[name] = right / len(verdicts), list(wilson(right, len(verdicts)))
    failed = sum(bool(one.failure) for one in verdicts)
    return {**found, "n": len(verdicts), "failed": failed, "intervals": intervals}
