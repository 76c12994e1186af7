"""`ddiff init`: a configuration to start from, a file whose comments say what each field is."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jobs.config import ConfigError, run_spec, shown, traced
from jobs.explained import explained

ENDINGS = (".yaml", ".yml")


class Written(NamedTuple):
    """What has been written."""

    facts: dict[str, Any]
    text: str


def write_config(recipe: str, out: Path, changes: Sequence[str] = ()) -> Written:
    """Write the configuration of a whole run, named after the file, so that no other run is changed by it.

    Args:
        recipe: Of a run, such as `demo`.
        out: A file that is not there yet, and ends in .yaml or .yml.
        changes: As of `jobs.config.resolve`; `name=...` names the run otherwise.

    Raises:
        ConfigError: There is such a file, or no such recipe of a run, or a value is refused.
        OSError: The file cannot be written.
    """
    if out.suffix not in ENDINGS:
        raise ConfigError(f"--out {out}: let its name end in .yaml, by which other commands know it")
    named = any(change.startswith("name=") for change in changes)
    every = changes if named else (f"name={json.dumps(out.stem)}", *changes)
    name = run_spec(recipe, None, every).name
    spec, origins = traced(recipe, None, every)
    source = f"recipe {recipe}, unless a comment names another source"
    text = explained(shown(spec, source, origins), spec)
    head = f"# Edit it, then `ddiff run --config {out}`.  A field that is left out has its default.\n"
    try:
        with out.open("x") as file:
            file.write(head + text)
    except FileExistsError:
        raise ConfigError(f"{out} is there already; name another file with --out, or delete it") from None
    following = {
        f"ddiff config diff {recipe} {out}": "what you have changed",
        f"ddiff run --config {out} --dry-run": "the plan, and whether it fits",
        f"ddiff run --config {out}": "the whole chain; again to continue",
    }
    widest = max(map(len, following))
    lines = [f"  {command:{widest}}  # {what}" for command, what in following.items()]
    told = "\n".join([f"wrote {out}: recipe {recipe} as run {name}; edit it, then", *lines])
    return Written({"config": str(out), "recipe": recipe, "run": name, "next": list(following)}, told)
