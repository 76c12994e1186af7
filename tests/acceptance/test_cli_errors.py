"""Bad input, one by one: a line that says what, where and what to do, the agreed exit code, no traceback."""

import json
import os
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dd_core import sealed
from jobs.cli import main
from jobs.config import RECIPES
from jobs.failures import Code, code_of, line_of
from tests.conftest import jpg, needs_ray, room_for, write_shard

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command is given in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DDIFF_STORAGE", raising=False)


def ddiff(*words: str) -> Result:
    return CliRunner().invoke(main, words)


def refused(done: Result, code: int, *said: str) -> None:
    """One line, this code, these words."""
    assert done.exit_code == code, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr
    for words in said:
        assert words in done.stderr


def bomb() -> bytes:
    """A PNG of 67 bytes that says it is 100,000 pixels wide and as high."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", ["absent.tar", "absent/*.tar", "shard-{00..01}.tar"])
def test_a_missing_shard_is_named_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    refused(ddiff("data", "prepare", "--shards", name, "--out", "out"), 3, name.partition("{")[0][:6])
    assert not (tmp_path / "out").exists()


BAD: dict[str, tuple[dict[str, bytes], str]] = {
    "empty caption": ({"a.jpg": jpg(64, 64), "a.txt": b"  "}, "caption"),
    "no caption": ({"a.jpg": jpg(64, 64)}, "caption"),
    "decompression bomb": ({"a.png": bomb(), "a.txt": b"x"}, "1 image"),
    "no image": ({"a.jpg": b"<html>", "a.txt": b"x"}, "1 image"),
}


@pytest.mark.fault
@pytest.mark.parametrize("case", BAD)
def test_a_source_of_bad_samples_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    files, said = BAD[case]
    write_shard(tmp_path / "bad.tar", files)
    done = ddiff("data", "check", "--shards", "bad.tar")
    refused(done, 3, "1 of 1 samples", said, f"{tmp_path}/bad.tar, sample 'a': ", "--max-rejected")


@pytest.mark.fault
def test_a_truncated_tar_is_refused(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "cut.tar", {"a.jpg": jpg(64, 64), "a.txt": b"a red circle"})
    path.write_bytes(path.read_bytes()[:1500])
    refused(ddiff("data", "check", "--shards", "cut.tar"), 3, "shard", f"{tmp_path}/cut.tar, sample 'a': ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--recipe", "smoke", "--set", "stages.base.optimizer.lr=1"], "no field 'lr'"),
        (["run", "--recipe", "smok"], "did you mean 'smoke'"),
        (["run", "--config", "absent.yaml"], "absent.yaml"),
        (["run"], "--recipe"),
        (["train", "bass", "--recipe", "smoke"], "no stage 'bass'; it has clip"),
        (["train", "base", "--recipe", "smoke"], "train 'clip' first"),
        (["report", "absent"], "absent does not exist"),
        (["data", "stats", "absent"], "absent"),
        (["data", "prepare", "--shards", "x.tar", "--out", "out", "--sizes", "big"], "64,256"),
    ],
)
def test_a_wrong_configuration_ends_before_anything_is_started(
    words: list[str], said: str, tmp_path: Path
) -> None:
    refused(ddiff(*words), 2, said)
    assert not [path for path in tmp_path.rglob("*") if path.name != "runs" and path.is_file()]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["paint"], ["No such command 'paint'", "`main --help`"]),
        (["data", "chek"], ["Did you mean 'check'?", "`main data --help`"]),
        (["sample"], ["Missing option '--cascade'", "`main sample --help`"]),
        (["run", "--recip", "demo"], ["--recipe", "`main run --help`"]),
        (["serve", "--cascade", "x", "--port", "0"], ["--port", "1<=x<=65535"]),
        (["data", "check"], ["name --shards", "`main data check --help`"]),
    ],
)
def test_words_that_click_cannot_read_are_told_as_every_other_error(
    words: list[str], said: list[str]
) -> None:
    refused(ddiff(*words), 2, *said)
    answer = json.loads(ddiff(*words, "--json").stderr)
    assert answer["code"] == 2
    assert all(one in answer["error"] for one in said)


@pytest.mark.parametrize("manner", [[], ["--json"], ["-v"]])
def test_a_command_whose_words_nobody_reads_any_longer_ends_quietly(manner: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does when it has seen enough
    words = ["config", "show", "--recipe", "smoke", *manner]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *words],
        cwd=ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (Code.UNREAD, "")


def test_a_pipe_that_breaks_elsewhere_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("jobs.config.resolve", broken)  # as a store, or a worker
    refused(ddiff("config", "validate", "--recipe", "smoke"), Code.INTERNAL, "BrokenPipeError")


@pytest.mark.parametrize(
    "words", [["inspect"], ["verify"], ["sample", "a red circle", "--cascade"], ["serve", "--cascade"]]
)
@pytest.mark.parametrize(
    ("holds", "code", "said"),
    [
        (
            [],
            2,
            "x has no manifest.json: it is no bundle, cascade, checkpoint or prepared data, or its write ",
        ),
        (["README.md"], 2, "x has no manifest.json: it is no bundle, cascade, checkpoint or prepared data"),
        (["summary.json", "base/bundle/spec.json", "cascade/cascade.json"], 2, "x is a run; name x/cascade"),
        (["cascade.json"], 4, "x has no manifest.json: the write was cut short; use an older one"),
        (["shard-00001.safetensors"], 4, "x has no manifest.json: the write was cut short"),
        ([".manifest.json"], 4, "x has no manifest.json: the write was cut short"),
    ],
)
def test_what_has_no_manifest_is_a_wrong_name_or_a_cut_write(
    words: list[str], holds: list[str], code: int, said: str, tmp_path: Path
) -> None:
    (tmp_path / "x").mkdir()
    for name in holds:
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).touch()
    refused(ddiff(*words, "x"), code, said)


@pytest.mark.parametrize("words", [["inspect"], ["verify"], ["sample", "a red circle", "--cascade"]])
@pytest.mark.parametrize("text", ["[]", "null", "7", '"files"'])
def test_a_manifest_that_is_no_object_is_damaged(words: list[str], text: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text(text)
    refused(ddiff(*words, "mine"), 4, "mine/manifest.json is damaged")


@pytest.mark.parametrize("name", ["cascade.json", "spec.json"])
def test_a_damaged_spec_is_named_by_who_only_looks(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("{}")
    sealed.seal(tmp_path / "mine", sealed.digests(tmp_path / "mine"), {})
    for harmed in (b"{", b"\xfb}"):
        (tmp_path / "mine" / name).write_bytes(harmed)
        refused(ddiff("inspect", "mine"), 4, f"mine/{name} is damaged: ")


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_spec_within_a_cascade_that_has_an_unknown_field_is_named(command: str, tmp_path: Path) -> None:
    (tmp_path / "mine" / "base").mkdir(parents=True)
    (tmp_path / "mine" / "base" / "spec.json").write_text('{"kind": "clip", "nonsense": 1}')
    for place in (tmp_path / "mine" / "base", tmp_path / "mine"):
        sealed.seal(place, sealed.digests(place), {})
    refused(ddiff(command, "mine"), 4, "mine/base/spec.json", "nonsense")


@pytest.mark.parametrize(
    "words", [["inspect"], ["verify"], ["sample", "a red circle", "--cascade"], ["serve", "--cascade"]]
)
def test_a_directory_that_there_is_not_is_a_wrong_name_and_no_cut_write(words: list[str]) -> None:
    refused(ddiff(*words, "absent"), 2, "absent does not exist; name", "such as runs/demo/cascade")


@pytest.mark.fault
def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    directory = tmp_path / "step-00000003"
    directory.mkdir()
    (directory / "state.json").write_text("{}")
    sealed.seal(directory, sealed.digests(directory), {"step": 3})
    (directory / "state.json").write_text("{ }")
    refused(ddiff("verify", "step-00000003"), 4, "step-00000003/state.json: sha256")


def test_an_occupied_port_is_refused_before_ray_is_started(tmp_path: Path) -> None:
    (tmp_path / "cascade").mkdir()
    sealed.seal(tmp_path / "cascade", {}, {})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        serve = ddiff("serve", "--cascade", "cascade", "--port", port)
        run = ddiff("run", "--recipe", "smoke", "--serve", "--port", port)
    for done in (serve, run):
        refused(done, 2, f"port {port}", "another port")


@pytest.mark.parametrize(
    "words", [["run", "--recipe", "smoke", "--serve"], ["serve", "--cascade", "cascade"], ["doctor"]]
)
def test_an_empty_host_is_no_address_and_not_every_one(words: list[str]) -> None:
    refused(ddiff(*words, "--host", ""), 2, "'--host': no host is named; use 127.0.0.1, or 0.0.0.0 for every")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, the disk that is always full")
@pytest.mark.fault
def test_a_full_disk_is_said_in_one_line_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "out.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space") as raised:
        (tmp_path / "out.json").write_text("x" * 100_000)
    assert code_of(raised.value) is Code.INTERNAL
    assert line_of(raised.value).startswith("no space left on")
    assert "run the same command again" in line_of(raised.value)


@pytest.mark.fault
def test_a_place_that_runs_full_is_named_and_a_later_run_finds_nothing_that_looks_whole() -> None:
    shapes = ("data", "shapes", "--pairs", "6", "-q", "--out")
    with room_for(20_000):
        done = ddiff(*shapes, "full")
    refused(done, 70, "no space left on", "full/shapes-00000.tar for a file so large")
    assert sorted(path.name for path in Path("full").iterdir()) == [".shapes.lock", "shapes.json"]
    assert ddiff(*shapes, "full").exit_code == ddiff(*shapes, "fresh").exit_code == 0
    one, other = (Path(name, "shapes-00000.tar").read_bytes() for name in ("full", "fresh"))
    assert one == other
    assert len(one) > 20_000


def test_errors_are_json_where_json_was_asked_for_and_tracebacks_where_v_was() -> None:
    done = ddiff("train", "bass", "--recipe", "smoke", "--json")
    assert json.loads(done.stderr)["code"] == 2
    done = ddiff("train", "bass", "--recipe", "smoke", "-v")
    assert done.exit_code == 2
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("group", [[], ["data"], ["config"]])
def test_the_list_of_commands_says_what_each_is_for_to_the_end(group: list[str]) -> None:
    done = CliRunner().invoke(main, [*group, "--help"], terminal_width=80)
    _, listed, commands = done.stdout.partition("Commands:")
    assert listed
    assert [line for line in commands.splitlines() if line.endswith("...") or len(line) > 80] == []


def test_a_recipe_that_there_is_not_is_answered_as_help_says() -> None:
    for command in (["run"], ["train"], ["submit"], ["doctor"], ["manifest"], ["config", "show"]):
        said = " ".join(ddiff(*command, "--help").stdout.split())
        assert "`ddiff config recipes` lists all" in said
    refused(ddiff("run", "--recipe", "?"), 2, *(path.stem for path in RECIPES.glob("[a-z]*.py")))


def test_help_is_instant_because_it_imports_nothing() -> None:
    code = "import sys, jobs.cli; assert not {'torch', 'ray', 'mlflow', 'pydantic'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_ray
@pytest.mark.fault
def test_too_many_rejects_stop_the_job_and_leave_no_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    files = {f"{key}.jpg": jpg(64, 64) for key in "abc"} | {"a.txt": b"one", "b.txt": b"two"}
    write_shard(tmp_path / "bad.tar", dict(sorted(files.items())))
    strict = ddiff("data", "prepare", "--shards", "bad.tar", "--out", "strict")
    assert strict.exit_code == 3
    assert "1 of 3 samples rejected" in strict.stderr.strip().splitlines()[-1]
    assert "Traceback" not in strict.stderr
    assert not (tmp_path / "strict" / "manifest.json").exists()
    done = ddiff("data", "prepare", "--shards", "bad.tar", "--out", "lenient", "--max-rejected", "0.5")
    assert done.exit_code == 0, done.stderr
    manifest = json.loads((tmp_path / "lenient" / "manifest.json").read_text())
    assert (manifest["kept"], manifest["rejected"], sum(manifest["rejects"].values())) == (2, 1, 1)
    assert manifest["damaged_shards"] == []
