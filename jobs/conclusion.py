"""The conclusion of a run: what it came to, written down, reported and told.

<run>/summary.json  scores, seconds, addresses: what scripts read
<run>/report.html   what people look at
"""

import json
from typing import Any

from dd_core.sealed import MANIFEST
from jobs.evaluate import Way, refuse_parts, score_tags, verdict_of, whole
from workflows.journal import JOURNAL, Journal, entries
from workflows.pairs import HELD_OUT
from workflows.pictures import SHOWN, last_parts
from workflows.pipeline import RunResult, seconds_of, timed
from workflows.registry import CURRENT
from workflows.report import SHEETS, write_report
from workflows.run_spec import RunSpec
from workflows.storage import Home
from workflows.superseded import MADE_OF


def judged_before(home: Home, made: RunResult, way: Way) -> dict[str, Any] | None:
    """The scores of an earlier start, if they are whole, of this cascade and judged in this way."""
    facts = home.facts("summary.json")
    if (facts.get("digest"), facts.get("evaluation")) == (made.digest, way.fingerprint()):
        scores = facts.get(way.by) or {}
        return scores if scores and whole(scores) else None
    return None


def concluded(
    home: Home, spec: RunSpec, made: RunResult, way: Way, scores: dict[str, Any], journal: Journal
) -> dict[str, Any]:
    """Write a run's summary, and its report unless an earlier start has; returns the facts of summary.json.

    Raises:
        UnjudgedError: Pictures did not come; everything else is written.
    """
    shown = home.facts("summary.json")
    facts = write_summary(home, spec, made, way, scores)
    known = all(shown.get(name) == facts[name] for name in ("digest", "evaluation", way.by))
    if not known or not home.has("report.html") or not told_scores(journal, facts, way):
        report(home, spec, journal, facts, way)
        facts = write_summary(home, spec, made, way, scores)  # with the seconds of the report
    remedy = f"see {home.at('evaluation').address} and run the same command again to ask for them all"
    refuse_parts(scores, remedy)
    return facts


def write_summary(
    home: Home, spec: RunSpec, made: RunResult, way: Way, scores: dict[str, Any]
) -> dict[str, Any]:
    """Replace summary.json as a whole; its scores stand under the name of the judge.

    Without scores, those of the same cascade that somebody has recorded meanwhile stay.
    """
    before = home.facts("summary.json")
    same = (before.get("digest"), before.get("evaluation")) == (made.digest, way.fingerprint())
    facts = {
        "run": spec.name,
        way.by: scores or (before.get(way.by, {}) if same else {}),
        "seconds": seconds_of(home),
        "data": data_of(home, spec).address,
        "bundle": made.cascade.address,
        "digest": made.digest,
        "stages": {name: home.at(f"{name}/bundle").address for name in made.bundles},
        "evaluation": way.fingerprint(),
        "report": home.at("report.html").address,
    }
    home.write("summary.json", json.dumps(facts, indent=2))
    return facts


def data_of(home: Home, spec: RunSpec) -> Home:
    """The prepared data: within the run where the run makes it, else where pairs.destination says."""
    return home.at("data/prepared") if spec.shapes is not None else Home.of(spec.pairs.destination)


def report(home: Home, spec: RunSpec, journal: Journal, facts: dict[str, Any], way: Way) -> None:
    """Write the page, then log it and the scores to MLflow; the model's line is last, see `told_scores`."""
    with timed(home, "report", "total"):
        gather(home, spec)
        path = write_report(home.here, prompts=prompts_of(spec))
    home.send("report.html")
    for name in SHEETS:
        if (home.here / f"{name}.png").exists():
            home.send(f"{name}.png")
            journal.picture(name, f"{name}.png", 0)
    if whole(facts[way.by]):
        shares = {f"{way.by}/{name}": it for name, it in facts[way.by].items() if isinstance(it, float)}
        journal.log(shares, 0)
    for file in (path.name, "summary.json"):
        journal.artifact(file)
    journal.model(spec.cascade.name, home.at("cascade").address, alias=CURRENT, tags=version_tags(facts, way))


def told_scores(journal: Journal, facts: dict[str, Any], way: Way) -> bool:
    """Whether an earlier start has written all of its report into the journal: the line of the model too."""
    tags = version_tags(facts, way)
    return any(entry.kind == "model" and entry.value["tags"] == tags for entry in entries(journal.path))


def version_tags(facts: dict[str, Any], way: Way) -> dict[str, str]:
    """Tags of a registered version."""
    return {"bundle_sha256": facts["digest"]} | score_tags(way, facts[way.by])


def gather_data(home: Home, spec: RunSpec) -> None:
    """Fetch the parts of prepared data that the page shows, if the data are in a store."""
    data = Home.of(data_of(home, spec).address)
    if data.stored:
        shown = {*last_parts(data, SHOWN), *last_parts(data, SHOWN, HELD_OUT)}
        data.fetch(MANIFEST, *sorted(shown))


def gather(home: Home, spec: RunSpec) -> None:
    """Fetch from a store what the report needs and this machine may lack: data, cascade, journals, grids."""
    gather_data(home, spec)
    if not home.stored:
        return
    home.at("cascade").fetched()
    for stage in spec.stages:
        grids = home.at(f"{stage.name}/samples")
        home.fetch(f"{stage.name}/{JOURNAL}", f"{stage.name}/{MADE_OF}")
        grids.fetch(*grids.names())


def prompts_of(spec: RunSpec, count: int = 16) -> list[str]:
    """Captions for the report, some of every judged group; none of own data: the report finds them itself."""
    if spec.shapes is None:
        return []
    asked = spec.evaluation.cases()
    step = max(1, len(asked) // count)
    return [case.caption for case in asked[::step]][:count]


def told(home: Home, facts: dict[str, Any], way: Way, url: str) -> str:
    """The scores, and where everything is, for people."""
    scores, seconds = facts[way.by], facts["seconds"]
    lines = [
        f"{'painted right:' if way.by == 'oracle' else 'judged:       '} {verdict_of(way, scores)}",
        f"seconds:       {seconds['total']:,.0f} in all",
        f"cascade:       {facts['bundle']}",
        f"report:        {facts['report']}",
    ]
    if scores:
        lines.append(f"pictures:      {home.at('evaluation').address}")
    if facts["mlflow"]:
        lines.append(f"mlflow:        {facts['mlflow']}")
    if not scores:
        own = f" --data {way.own.data} --judge {way.own.clip}" if way.own else ""
        how = f"to judge it:   deploy it, then `ddiff eval --url http://HOST:PORT{own}`"
        lines += [how] if way.possible else []
    if url:
        body = '{"prompt": "a red circle above a small blue square"}'
        call = f"curl {url}/v1/images/generations -H content-type:application/json -d '{body}'"
        lines += [f"endpoint:      {url}, until `ddiff stop --run {home.here}`", f"try:           {call}"]
    return "\n".join(lines)
