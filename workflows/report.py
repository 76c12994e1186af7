"""report.html: what a run has learned, on one self-contained page.

Pictures are painted here from the bundles of the run; figures come from the journals, from the facts
in the bundles and from summary.json.  Sections for which a run has nothing yet are left out.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import TypeAdapter, ValidationError

from dd_core import bundle, sealed
from dd_core.bundle import Cascade
from dd_core.devices import nearest
from dd_core.stages import StageSpec
from workflows import clip_page, pictures
from workflows.curves import chart
from workflows.evaluation import ATTRIBUTES, GROUPS, VERDICTS
from workflows.journal import JOURNAL, curves
from workflows.markup import anchor, bar, details, figure, image, png, quoted, strip, svg
from workflows.pictures import Frame, Painted, Rebuilt
from workflows.samples import heading
from workflows.storage import Home
from workflows.superseded import MADE_OF

SHEETS = ("prompts", "denoising", "noising", "reconstructions")
"""What the page shows, each as NAME.png in a run's directory, for MLflow."""
SCORES = ("all", *GROUPS)
SIGNS = ("summary.json", JOURNAL, "cascade", f"*/{MADE_OF}", "*/checkpoints", "*/bundle")
"""A run's directory has at least one of these as soon as the run is begun."""

T = TypeVar("T")


class Section(NamedTuple):
    """One chapter of the page."""

    title: str
    note: str
    body: str


class Shown(NamedTuple):
    """What is painted for the page; empty where a run has nothing to paint it by yet."""

    painted: list[Painted]
    frames: list[Frame]
    """Of the sampling of the first prompt."""
    noised: list[tuple[float, bytes]]
    rebuilt: list[Rebuilt]


def write_report(run: Path, *, prompts: Sequence[str] = (), seed: int = 1) -> Path:
    """Write `report.html`, and those of SHEETS that have content, into a run directory.

    Args:
        run: The directory of the run.
        prompts: What to paint at every size; without any, captions of the prepared data.
        seed: Of the first picture; each next picture has the next seed.

    Returns:
        The file; it is replaced whole.

    Raises:
        sealed.SealError: The cascade is there but damaged.
        FileNotFoundError: The directory does not exist, or is no run's; nothing has been written.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"{run} does not exist; `ddiff run` makes it")
    if not any(any(run.glob(sign)) for sign in SIGNS):
        raise FileNotFoundError(f"{run} is no run; name one, such as runs/demo")
    summary = summary_of(run)
    cascade, classes = None, 0
    if (run / "cascade").exists():
        cascade = bundle.load_cascade(run / "cascade", device=nearest(), precision="auto")
        classes = bundle.classes_of(run / "cascade", cascade.spec)
    data = data_of(run, summary)
    known = prompts or pictures.prepared_captions(data, pictures.SHOWN)
    shown = Shown(
        pictures.painted(cascade, known, seed=seed, classes=classes) if cascade is not None else [],
        pictures.trajectory(cascade, known[0], seed=seed, classes=classes) if cascade and known else [],
        noised(data),
        rebuilt(run, data),
    )
    save_sheets(run, shown)
    parts = [
        painted_section(cascade, shown.painted),
        judged_section(run, summary),
        found_section(run, summary),
        trajectory_section(known, shown.frames),
        noising_section(shown.noised),
        training_section(run),
        reconstruction_section(shown.rebuilt),
        time_section(run, summary),
        origin_section(run, cascade),
    ]
    page = document(run.name, summary, [part for part in parts if part is not None])
    draft = run / ".report.html"
    draft.write_text(page)
    os.replace(draft, run / "report.html")
    return run / "report.html"


def summary_of(run: Path) -> dict[str, Any]:
    """The summary that the run wrote at its end; empty before."""
    path = run / "summary.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def data_of(run: Path, summary: Mapping[str, Any]) -> Path:
    """The prepared data of a run, or this machine's copy; within the run if the summary names no place."""
    named = summary.get("data")
    return Home.of(named).here if named else run / "data" / "prepared"


def save_sheets(run: Path, shown: Shown) -> None:
    """Write those of SHEETS that have content."""
    cells: list[list[tuple[str, Sequence[bytes]]]] = [
        [(one.prompt, one.pngs) for one in shown.painted],
        [(f"sigma {frame.sigma:.3g}", (frame.noisy, frame.estimate)) for frame in shown.frames],
        [(f"sigma {sigma:g}", (png,)) for sigma, png in shown.noised],
        [(f"{pair.psnr:.1f} dB", (pair.original, pair.rebuilt)) for pair in shown.rebuilt],
    ]
    for name, some in zip(SHEETS, cells, strict=True):
        if some:
            pictures.sheet(some).save(run / f"{name}.png")


def painted_section(cascade: Cascade | None, painted: Sequence[Painted]) -> Section | None:
    """Every prompt as the base draws it and as the upsampler finishes it."""
    if cascade is None or not painted:
        return None
    cells = []
    for one in painted:
        *small, large = one.pngs
        before = f'<img class="before" alt="" src="{png(small[-1])}">' if small else ""
        picture = f'<img alt="{quoted(one.prompt)}" src="{png(large)}">'
        cells.append(figure(picture, f"{before}{quoted(one.prompt)}<br>seed {one.seed}"))
    sizes = f"{cascade.spec.image_size} px"
    note = f"Painted at {sizes}; below each, at its own size, what the base made of the caption."
    return Section("Pictures", note, f'<div class="grid">{"".join(cells)}</div>')


def judged_section(run: Path, summary: Mapping[str, Any]) -> Section | None:
    """What the oracle found true of pictures painted through the endpoint."""
    oracle = summary.get("oracle")
    if not oracle:
        return None
    known = [name for name in (*SCORES, *ATTRIBUTES) if oracle.get(name) is not None]
    rows = [score_row(name, oracle[name], oracle.get("intervals", {}).get(name)) for name in known]
    note = (
        f"{oracle['n']:,} captions that training never saw, painted over HTTP and read back by geometry "
        "alone. “All” is right only if every attribute of every object is, and no object is too many."
    )
    if oracle.get("failed"):
        note += f" {oracle['failed']:,} of them did not come and count as wrong: this is no judgement."
    head = "<tr><th>right</th><th></th><th class=number>share</th><th class=number>95 % interval</th></tr>"
    return Section("Judged by the oracle", note, f"<table>{head}{''.join(rows)}</table>{judged_grid(run)}")


def found_section(run: Path, summary: Mapping[str, Any]) -> Section | None:
    """How a CLIP scores pictures painted from a user's own captions, beside the true pictures."""
    if not (clip := summary.get("clip")):
        return None
    some = thinned(verdicts_of(run), 64)
    body = clip_page.table(clip) + clip_page.grid(run / "evaluation", some)
    return Section("Judged by a CLIP", clip_page.note(clip), body)


def score_row(name: str, share: float, interval: Sequence[float] | None) -> str:
    """One score as a bar."""
    between = "{:.1%} to {:.1%}".format(*interval) if interval else ""
    return (
        f"<tr><td>{quoted(name.replace('_', ' '))}</td><td>{bar(share, interval or ())}</td>"
        f"<td class=number>{share:.1%}</td><td class=number>{between}</td></tr>"
    )


def judged_grid(run: Path, count: int = 64) -> str:
    """Some of the pictures that were judged, of every group, with the verdict; empty if none were kept."""
    if not (verdicts := verdicts_of(run)):
        return ""
    some = thinned(verdicts, count)
    cells = [judged_cell(run / "evaluation" / one["picture"], one) for one in some]
    return f'<h3>{len(some)} of them, evenly chosen</h3><div class="grid">{"".join(cells)}</div>'


def verdicts_of(run: Path) -> list[dict[str, Any]]:
    """What was said of each picture; empty if nothing was kept."""
    path = run / "evaluation" / VERDICTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def judged_cell(picture: Path, one: Mapping[str, Any]) -> str:
    """A picture, its caption and what is wrong in it."""
    wrong = [name for name, right in one["truth"].items() if not right and name != "all"]
    verdict = f'<span class="wrong">✗ {", ".join(wrong)}</span>' if wrong else '<span class="right">✓</span>'
    shown = (
        f'<img alt="" src="{png(picture.read_bytes())}">' if picture.exists() else "<p>no picture came</p>"
    )
    return figure(shown, f"{quoted(one['caption'])} {verdict}")


def trajectory_section(prompts: Sequence[str], frames: Sequence[Frame]) -> Section | None:
    """One sampling, query by query."""
    if not frames:
        return None
    noisy = [figure(image(frame.noisy), f"σ = {frame.sigma:.3g}") for frame in frames]
    clean = [figure(image(frame.estimate), "") for frame in frames]
    note = (
        f"“{quoted(prompts[0])}”, from noise to picture. Above, what the sampler asked about; "
        "below, what the network took for the clean image behind it."
    )
    return Section("Denoising, step by step", note, strip(noisy) + "<p></p>" + strip(clean))


def noised(data: Path) -> list[tuple[float, bytes]]:
    """A training image under more and more noise, each with its level; empty before data are prepared."""
    if not (sizes := pictures.prepared_sizes(data)):
        return []
    original, _ = pictures.prepared_images(data, min(sizes), 1)
    return pictures.noising(original)


def noising_section(noised: Sequence[tuple[float, bytes]]) -> Section | None:
    """The forward process on a training image."""
    if not noised:
        return None
    frames = [figure(image(png), f"σ = {sigma:g}") for sigma, png in noised]
    return Section(
        "Noising", "The way that sampling walks back: one training image under noise.", strip(frames)
    )


def training_section(run: Path) -> Section | None:
    """The curves of every stage and the sample grids over steps."""
    charts, grids = [], []
    for journal in sorted(run.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime):
        found = {name: list(points.items()) for name, points in curves(journal).items()}
        name = journal.parent.name
        losses = {key.removeprefix("train/"): value for key, value in found.items() if is_loss(key)}
        if losses:
            charts.append(figure(f'<img alt="{name}" src="{svg(chart(losses))}">', name))
        steps = {int(path.stem[5:]): path for path in (journal.parent / "samples").glob("step-*.png")}
        shown = [
            figure(image(steps[step].read_bytes()), f"step {step:,}") for step in thinned(sorted(steps), 6)
        ]
        grids += (
            [f"<h3>{name} while it learned: {grids_of(journal.parent)}</h3>{strip(shown)}"] if shown else []
        )
    if not charts:
        return None
    note = "Losses of every stage over optimizer steps, on a logarithmic scale; means since the last report."
    return Section("Training", note, f'<div class="charts">{"".join(charts)}</div>{"".join(grids)}')


def grids_of(stage: Path) -> str:
    """What the sample grids of a stage show, by the spec that it was begun with."""
    made_of = json.loads((stage / MADE_OF).read_text()) if (stage / MADE_OF).exists() else {}
    try:
        return heading(TypeAdapter(StageSpec).validate_python(made_of.get("spec", {}).get("stage")))
    except ValidationError:  # of a version with other specs
        return "sample grids"


def is_loss(name: str) -> bool:
    """Whether a metric belongs on the chart of a stage."""
    return name.startswith("train/") and not name.endswith(("lr", "grad_norm", "skipped"))


def thinned(items: Sequence[T], most: int) -> list[T]:
    """At most so many items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def rebuilt(run: Path, data: Path) -> list[Rebuilt]:
    """Images before and after the autoencoder, of the side that it learned; empty without it or such data."""
    path = next((path.parent for path in run.glob("*/bundle/spec.json") if is_autoencoder(path)), None)
    if path is None:
        return []
    size: int = json.loads((path / "spec.json").read_text())["image_size"]
    if size not in pictures.prepared_sizes(data):
        return []
    originals, _ = pictures.prepared_images(data, size, 6)
    return pictures.reconstructions(path, originals)


def reconstruction_section(pairs: Sequence[Rebuilt]) -> Section | None:
    """Images before and after the autoencoder."""
    if not pairs:
        return None
    above = [figure(image(pair.original), "original") for pair in pairs]
    below = [figure(image(pair.rebuilt), f"{pair.psnr:.1f} dB") for pair in pairs]
    mean = sum(pair.psnr for pair in pairs) / len(pairs)
    note = f"Through the latents and back; the mean of these is {mean:.1f} dB PSNR."
    return Section("Autoencoder", note, strip(above) + "<p></p>" + strip(below))


def is_autoencoder(spec: Path) -> bool:
    """Whether the spec in a bundle is an autoencoder's."""
    return bool(json.loads(spec.read_text())["kind"] == "autoencoder")


def time_section(run: Path, summary: Mapping[str, Any]) -> Section | None:
    """Where the time went."""
    seconds = dict(summary.get("seconds", {}))
    if not seconds:
        return None
    total = seconds.pop("total", sum(seconds.values()))
    rows = [
        f"<tr><td>{quoted(name)}</td><td>{bar(value / max(total, 1e-9))}</td>"
        f"<td class=number>{value:,.1f} s</td></tr>"
        for name, value in seconds.items()
    ]
    side_by_side = sum(seconds.values()) > 1.02 * total
    note = f"{total / 60:.1f} minutes in all{', some steps side by side' if side_by_side else ''}."
    return Section("Time", note, f"<table>{''.join(rows)}</table>")


def origin_section(run: Path, cascade: Cascade | None) -> Section | None:
    """Specs and digests: what exactly this was."""
    blocks = []
    if cascade is not None:
        blocks.append(f"<p>Cascade <code>{cascade.digest}</code></p>")
        blocks.append(details("cascade.json", cascade.spec.model_dump(mode="json")))
    for path in sorted(run.glob(f"*/bundle/{sealed.MANIFEST}")):
        body = json.loads(path.read_text())
        title = f"{path.parent.parent.name} <code>{body['digest'][:16]}</code>"
        blocks.append(details(title, body))
    note = "Every bundle names the digests of its parents, so that no cascade mixes trainings."
    return Section("Specs and digests", note, "".join(blocks)) if blocks else None


def document(name: str, summary: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """The whole page."""
    style = Path(__file__).with_name("report.css").read_text()
    links = " ".join(f'<a href="#{anchor(part.title)}">{part.title}</a>' for part in sections)
    chapters = "".join(
        f'<section id="{anchor(part.title)}"><h2>{part.title}</h2>'
        f'<p class="soft">{part.note}</p>{part.body}</section>'
        for part in sections
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{quoted(name)} · ddiff</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{style}</style></head><body>'
        f"<h1>{quoted(name)}</h1><p class=soft>A text-to-image cascade, trained and served by ddiff.</p>"
        f"<nav>{links}</nav>{headline(summary)}{chapters}</body></html>"
    )


def headline(summary: Mapping[str, Any]) -> str:
    """The figures that matter, large."""
    oracle, seconds = summary.get("oracle", {}), summary.get("seconds", {})
    cells = [
        (f"{oracle[key]:.1%}", f"{key.replace('_', ' ')} right")
        for key in SCORES
        if oracle.get(key) is not None
    ]
    if clip := summary.get("clip"):
        cells += [
            (f"{clip[name]:{shown}}", f"{title} (true pictures {clip[f'true_{name}']:{shown}})")
            for name, (title, shown) in clip_page.FOUND.items()
        ]
    if "total" in seconds:
        cells.append((f"{seconds['total'] / 60:.1f} min", "from data to scores"))
    body = "".join(f"<div><b>{value}</b><span>{label}</span></div>" for value, label in cells)
    return f'<div class="heads">{body}</div>' if cells else "<p>Not evaluated yet.</p>"
