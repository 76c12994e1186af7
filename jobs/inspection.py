"""`ddiff inspect` and `ddiff verify`: what a sealed directory holds, and whether it still does."""

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from dd_core import bundle, sealed
from dd_core.cascade import CascadeSpec
from jobs.environment import colours


def described(path: Path) -> dict[str, Any]:
    """What a directory is and what is in it, by its manifest; only specs are checked, no byte is compared.

    Raises:
        sealed.SealError: It has no readable manifest, or a spec that this version does not know.
    """
    body = manifest(path)
    check_specs(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {
        "path": str(path),
        "kind": kind_of(path),
        "digest": body.get("digest"),
        "bytes": sum(file.stat().st_size for file in files),
        "files": {file.relative_to(path).as_posix(): file.stat().st_size for file in files},
        "facts": {name: fact for name, fact in body.items() if name not in ("files", "digest", "parts")},
        "spec": spec_of(path),
    }


def verified(path: Path) -> dict[str, Any]:
    """Every byte compared with the manifest, every spec read strictly, also those of nested bundles.

    Of prepared data only the listed files are checked: the next data may be in the making beside them.

    Raises:
        sealed.SealError: Something is missing, changed, not listed or refused; it is named.
    """
    has_parts = any(path.glob("*.parquet")) and kind_of(path) == "prepared data"
    seal = sealed.verify(path, listed_only=has_parts)
    inner = nested(path)
    for stage in inner:
        sealed.verify(stage)
    check_specs(path)
    return {
        "path": str(path),
        "kind": kind_of(path),
        "digest": seal.digest,
        "stages": [s.name for s in inner],
    }


def nested(path: Path) -> list[Path]:
    """The bundles in a cascade."""
    return sorted(found.parent for found in path.glob(f"*/{sealed.MANIFEST}"))


def check_specs(path: Path) -> None:
    """Raises sealed.SealError for a spec of a bundle or cascade that is damaged or has an unknown field."""
    for stage in (path, *nested(path)):
        if (stage / "spec.json").exists():
            bundle.checked(bundle.SPEC, stage / "spec.json")
    if (path / "cascade.json").exists():
        bundle.checked(TypeAdapter(CascadeSpec), path / "cascade.json")


def manifest(path: Path) -> dict[str, Any]:
    """The manifest as it stands."""
    try:
        body = json.loads((path / sealed.MANIFEST).read_text())
    except FileNotFoundError:
        raise sealed.unsealed(path) from None
    except ValueError as error:
        raise sealed.SealError(
            f"{path}/{sealed.MANIFEST} is damaged: {error}; restore it from a copy"
        ) from None
    if not isinstance(body, dict):
        raise sealed.SealError(f"{path}/{sealed.MANIFEST} is damaged: no object; restore it from a copy")
    return body


def kind_of(path: Path) -> str:
    """Which kind of directory of ours it is, by the files in it."""
    for name, kind in (("cascade.json", "cascade"), ("spec.json", "bundle"), ("state.json", "checkpoint")):
        if (path / name).exists():
            return kind
    return "prepared data" if any(path.glob("*.parquet")) else "sealed directory"


def spec_of(path: Path) -> dict[str, Any]:
    """The spec in a bundle or a cascade."""
    for name in ("cascade.json", "spec.json"):
        if (path / name).exists():
            try:
                spec: dict[str, Any] = json.loads((path / name).read_text())
            except ValueError as error:
                raise sealed.SealError(f"{path / name} is damaged: {error}; restore it from a copy") from None
            return spec
    return {}


def table(facts: dict[str, Any]) -> str:
    """The same for people."""
    sheet = Table(title=f"{facts['path']}: {facts['kind']}", title_justify="left", show_header=False)
    sheet.add_row("digest", str(facts["digest"]))
    sheet.add_row("size", f"{facts['bytes']:,} bytes in {len(facts['files'])} files")
    for name, value in {**facts["facts"], **facts["spec"]}.items():
        sheet.add_row(name, value if isinstance(value, str) else json.dumps(value))
    for name, size in facts["files"].items():
        sheet.add_row(f"  {name}", f"{size:,}")
    console = Console(no_color=not colours(), width=120)
    with console.capture() as captured:
        console.print(sheet)
    return captured.get().rstrip()
