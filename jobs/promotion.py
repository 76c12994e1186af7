"""`ddiff promote`: an alias to a cascade that paints better than the one that holds it."""

from typing import Any

from jobs.deploy import DeployError, registry
from jobs.evaluate import judge_endpoint, score_tags, way_in, whole
from serve import running
from workflows.registry import split


def promote(wanted: str, alias: str, *, force: bool, url: str = "") -> dict[str, Any]:
    """Move an alias to a cascade that paints better than the one that holds it.

    Args:
        wanted: The candidate, NAME@ALIAS.
        alias: To move.
        force: Move it whatever the scores say.
        url: An endpoint that serves the candidate: it is judged there first, as its run is judged.

    Raises:
        PromotionError: The candidate is not better, has never been judged, or was judged in another way.
        ValueError: There is no judge for it.
        DeployError: The endpoint serves another cascade, or not all pictures came.
    """
    models = registry(split(wanted)[0])
    candidate = models.version(wanted)
    if url:
        if why := running.missing(url.rstrip("/"), candidate.digest):
            raise DeployError(f"{url} does not serve {wanted}: {why}")
        way = way_in(candidate.tags)
        scores = judge_endpoint(url, way, digest=candidate.digest)
        if not whole(scores):
            raise DeployError(f"{url}: {scores['failed']} of {scores['n']} pictures did not come; try again")
        candidate = models.note(candidate, score_tags(way, scores))
    holder = models.promote(candidate, alias, force=force)
    return {
        "alias": f"{candidate.name}@{alias}",
        "now": candidate.says(),
        "was": holder.says() if holder else "nobody",
        "digest": candidate.digest,
    }
