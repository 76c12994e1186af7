"""Everything that can be wrong with shards, in one run: nothing is lost, nothing stops it, all is counted."""

import gzip
import io
import json
import struct
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.conftest import RAY_MARKS, file_of, jpg, photo, write_shard
from workflows.pairs import PairsSpec
from workflows.prepare import prepare_pairs

pytestmark = [pytest.mark.fault, *RAY_MARKS]
JPG = jpg(64, 48)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(99)))
        + chunk(b"IEND", b"")
    )


def saved(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


GREY = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))
GOOD_IMAGES = {
    "jpg": JPG,
    "JPG": JPG,
    "jpeg": jpg(33, 40),
    "png": file_of(photo(40, 40), "PNG"),
    "webp": file_of(photo(40, 40), "WEBP"),
    "cmyk.jpg": saved(Image.fromarray(GREY).convert("CMYK"), "JPEG"),
    "palette.png": saved(Image.fromarray(GREY).convert("P")),
    "rgba.png": saved(Image.fromarray(GREY).convert("RGBA")),
    "la.png": saved(Image.fromarray(GREY).convert("LA")),
    "16.png": saved(Image.fromarray(GREY.astype(np.uint16) * 257)),
    "1.png": saved(Image.fromarray(GREY > 99)),
    "misnamed.jpg": file_of(photo(40, 40), "PNG"),
}
BAD_IMAGES = {
    "cut.jpg": ("image-broken", JPG[:-300]),
    "empty.jpg": ("image-broken", b""),
    "html.jpg": ("image-format", b"<html>not found</html>"),
    "gif.jpg": ("image-format", saved(Image.fromarray(GREY), "GIF")),
    "cut.png": ("image-broken", file_of(photo(40, 40), "PNG")[:900]),
    "rows.png": ("image-broken", bomb(40, 40)),
    "bomb.png": ("image-large", bomb(1, 100_000_000)),
    "wide.png": ("image-large", bomb(9400, 9400)),
    "small.jpg": ("image-small", jpg(4, 40)),
    "tiff.png": ("image-format", saved(Image.fromarray(GREY), "TIFF")),
}
BAD_CAPTIONS = {
    "empty": ("caption-empty", b""),
    "blank": ("caption-empty", b" \n\t"),
    "nul": ("caption-broken", b"a\0b"),
    "latin": ("caption-broken", b"caf\xe9"),
    "utf16": ("caption-broken", "a".encode("utf-16")),
    "endless": ("caption-long", b"x" * 20_000),
}


def images_shard(path: Path) -> Counter[str]:
    """Every kind of image, each with a caption."""
    files = {}
    for number, (name, data) in enumerate(GOOD_IMAGES.items()):
        files |= {f"dir.v1/g{number}.{name.rpartition('.')[2]}": data, f"dir.v1/g{number}.txt": b"good"}
    for number, (name, (_, data)) in enumerate(BAD_IMAGES.items()):
        files |= {f"../b{number}.{name.rpartition('.')[2]}": data, f"../b{number}.txt": b"bad"}
    write_shard(path, files)
    return Counter([""] * len(GOOD_IMAGES) + [reason for reason, _ in BAD_IMAGES.values()])


def captions_shard(path: Path) -> Counter[str]:
    """Every kind of caption and of missing part."""
    files = {}
    for name, (_, data) in BAD_CAPTIONS.items():
        files |= {f"{name}.jpg": JPG, f"{name}.txt": data}
    files |= {"no_caption.jpg": JPG, "no_image.txt": b"a", "other.gif": b"GIF89a", "other.txt": b"a"}
    files |= {"json.jpg": JPG, "json.txt": b"a", "json.json": b'{"broken'}
    files |= {"emoji.jpg": JPG, "emoji.txt": "\U0001f600 \u202eabc e\u0301 &amp;".encode()}
    files |= {"whole.jpg": JPG, "whole.txt": b"a", "whole.json": json.dumps({"width": 64}).encode()}
    write_shard(path, files)
    reasons = [reason for reason, _ in BAD_CAPTIONS.values()]
    return Counter([*reasons, "caption-missing", "image-missing", "image-missing", "json-broken", "", ""])


def members_shard(path: Path) -> Counter[str]:
    """Links, twins, strays, long names and an oversized member."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, data: bytes = b"a", kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            info.size = len(data) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(data))

        add("folder", kind=tarfile.DIRTYPE)
        add("n" * 300 + ".jpg", JPG)
        add("n" * 300 + ".txt")
        add("soft.jpg", kind=tarfile.SYMTYPE, target="/etc/passwd")
        add("soft.txt")
        add("hard.jpg", kind=tarfile.LNKTYPE, target="n" * 300 + ".jpg")
        add("hard.txt")
        add("twin.jpg", JPG)
        add("twin.jpg", JPG)
        add("twin.txt")
        add("stray.jpg", JPG)
        add("/abs\n.jpg", JPG)
        add("/abs\n.txt")
        add("stray.txt")
        add("large.jpg", bytes(2**20))
        add("large.txt")
    return Counter(
        ["", "member-link", "member-link", "member-twice", "caption-missing", "", "key-split", "member-large"]
    )


def cut_shard(path: Path) -> Counter[str]:
    """Six samples, cut in the picture of the fifth: four are whole."""
    write_shard(path, {f"{i}.{ext}": data for i in range(6) for ext, data in (("jpg", JPG), ("txt", b"a"))})
    with tarfile.open(path) as tar:
        cut = tar.getmember("4.jpg").offset_data + 700
    path.write_bytes(path.read_bytes()[:cut])
    return Counter({"": 4, "shard": 1})


def packed_shard(path: Path) -> Counter[str]:
    """A good shard, packed."""
    path.write_bytes(gzip.compress(write_shard(path, {"0.jpg": JPG, "0.txt": b"a"}).read_bytes()))
    return Counter({"shard": 1})


def empty_shard(path: Path) -> Counter[str]:
    """No members, and whole."""
    write_shard(path, {})
    return Counter()


def good_shard(path: Path) -> Counter[str]:
    """Two hundred good samples, so that there is more than one row group."""
    write_shard(path, {f"{i}.{ext}": data for i in range(200) for ext, data in (("jpg", JPG), ("txt", b"a"))})
    return Counter({"": 200})


SHARDS = (images_shard, captions_shard, members_shard, cut_shard, packed_shard, empty_shard, good_shard)


def test_kept_and_rejected_add_up_to_the_truth(local_ray: None, tmp_path: Path) -> None:
    truth = [make(tmp_path / f"{number:05d}.tar") for number, make in enumerate(SHARDS)]
    spec = PairsSpec(
        shards=(str(tmp_path / "*.tar"),),
        destination=str(tmp_path / "out"),
        sizes=(16, 32),
        context_length=8,
        min_side=8,
        max_reject_fraction=0.5,
    )
    done = prepare_pairs(spec.but(limits=spec.limits.but(member_bytes=2**19)), progress=False)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    total = sum(truth, Counter[str]())
    assert manifest["kept"] == total[""]
    assert manifest["rejects"] == {reason: count for reason, count in total.items() if reason}
    assert manifest["kept"] + manifest["rejected"] == total.total()
    assert [Path(shard["shard"]).name for shard in manifest["damaged_shards"]] == ["00003.tar", "00004.tar"]
    for number, (file, counts) in enumerate(zip(done.files, truth, strict=True)):
        rows = pq.read_table(file, page_checksum_verification=True).to_pylist()
        assert Counter(row["reject"].partition(":")[0] for row in rows) == counts
        assert [(row["shard"], row["place"]) for row in rows] == [
            (number, place) for place in range(len(rows))
        ]
        for row in rows:
            usable = not row["reject"]
            assert usable == all(
                row[name] is not None for name in ("caption", "tokens", "image16", "image32")
            )
            assert usable or row["reject"].partition(": ")[2]
    assert {path.name for path in tmp_path.iterdir()} == {
        "out",
        *(f"0000{n}.tar" for n in range(len(SHARDS))),
    }
