"""Re-ranking: of n pictures those that the cascade's CLIP finds nearest to the prompt, and no others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from dd_core import bundle, images
from dd_core.denoiser import Conditioning, Denoised, NetworkDenoiser
from dd_core.stages.clip import clip_of
from dd_core.text import tokens
from jobs.cli import main
from jobs.order import Order
from jobs.sample import paint
from tests.unit.serve.tiny import tiny_cascade

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    tiny_cascade(directory)
    return directory / "cascade"


def by_hand(cascade: Path, files: list[Path]) -> list[float]:
    """Cosine of each file and the prompt, by the bundle of the cascade's CLIP."""
    clip = clip_of(bundle.load(cascade / "clip").trained)
    wanted = clip.read(torch.tensor(tokens([PROMPT], 12))).embedding[0]
    pixels = [torch.tensor(images.decoded(file.read_bytes())) for file in files]
    found: list[Tensor] = [clip.embed_image(images.to_unit(one[None]))[0] for one in pixels]
    return [float(one @ wanted) for one in found]


def test_the_best_are_kept_in_their_order_and_are_what_their_seeds_paint(
    cascade: Path, tmp_path: Path
) -> None:
    all_of_them = paint(Order(PROMPT, seed=3, images=5), cascade, tmp_path / "all")
    scores = by_hand(cascade, [one.path for one in all_of_them])
    kept = paint(Order(PROMPT, seed=3, images=5, keep=2), cascade, tmp_path / "kept")
    best = sorted(range(5), key=lambda place: -scores[place])[:2]
    assert [one.path.name for one in kept] == [all_of_them[place].path.name for place in best]
    assert [one.score for one in kept] == pytest.approx([scores[place] for place in best], abs=1e-5)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == sorted(
        one.path.name for one in kept
    )
    for one, place in zip(kept, best, strict=True):
        assert (
            images.decoded(one.path.read_bytes()).tobytes()
            == images.decoded(all_of_them[place].path.read_bytes()).tobytes()
        )
        with Image.open(one.path) as picture:
            assert float(picture.info["clip"]) == pytest.approx(scores[place], abs=1e-4)
    assert all(one.score is None for one in all_of_them)


def test_the_command_says_the_scores(cascade: Path, tmp_path: Path) -> None:
    words = ["sample", PROMPT, "--cascade", str(cascade), "--out", str(tmp_path), "-n", "3", "--keep", "1"]
    done = CliRunner().invoke(main, [*words, "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert len(facts["images"]) == len(facts["scores"]) == 1
    assert [str(path) for path in tmp_path.iterdir()] == facts["images"]


def test_a_text_that_is_longer_than_the_cascade_reads_is_said_to_be_cut(
    cascade: Path, tmp_path: Path
) -> None:
    length = json.loads((cascade / "cascade.json").read_text())["context_length"]
    words = ["sample", "--cascade", str(cascade), "--out", str(tmp_path), "--json"]
    fits, long = " ".join("a" * (length - 2)), " ".join("a" * (length - 1))
    for prompt, lost in ((fits, []), (long, ["prompt"])):
        done = CliRunner().invoke(main, [*words, prompt])
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["truncated"] == lost
        assert ("is not heard; say it shorter" in done.stderr) == bool(lost)


def test_pictures_of_another_order_stay_and_those_of_the_same_are_painted_over(
    cascade: Path, tmp_path: Path
) -> None:
    (first,) = paint(Order(PROMPT), cascade, tmp_path)
    was = first.path.read_bytes()
    others = [paint(order, cascade, tmp_path)[0].path for order in (Order("a star"), Order(PROMPT, steps=2))]
    assert first.path.name == "00000000.png"
    assert len({first.path, *others}) == 3
    assert all(path.name.startswith("00000000-") for path in others)
    assert first.path.read_bytes() == was
    for order, path in ((Order(PROMPT), first.path), (Order("a star"), others[0])):
        assert paint(order, cascade, tmp_path)[0].path == path
    (kept,) = paint(Order(PROMPT, keep=1), cascade, tmp_path)
    assert kept.path == first.path  # the same picture, and its score
    foreign = tmp_path / "00000005.png"
    foreign.write_bytes(b"no PNG")
    assert paint(Order(PROMPT, seed=5), cascade, tmp_path)[0].path != foreign
    assert foreign.read_bytes() == b"no PNG"
    assert len(list(tmp_path.iterdir())) == 5


def test_more_cannot_be_kept_than_painted(cascade: Path, tmp_path: Path) -> None:
    words = ["sample", PROMPT, "--cascade", str(cascade), "--out", str(tmp_path / "none"), "--keep", "3"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert "paint more, -n 3 at least" in done.stderr
    assert not (tmp_path / "none").exists()


def test_nothing_is_nearest_to_an_empty_prompt(cascade: Path, tmp_path: Path) -> None:
    order = Order("&nbsp;", images=2, keep=1, image=tmp_path / "a.png", vary=1.0)
    with pytest.raises(ValueError, match="the prompt is empty"):
        paint(order, cascade, tmp_path / "none")


def test_a_picture_that_is_not_finite_is_an_error_and_no_file(
    cascade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = NetworkDenoiser.forward

    def lost(self: NetworkDenoiser[Any], x: Tensor, sigma: Tensor, cond: Conditioning) -> Denoised:
        found = told(self, x, sigma, cond)
        return found._replace(x0=found.x0 * float("nan"))

    monkeypatch.setattr(NetworkDenoiser, "forward", lost)
    words = ["sample", PROMPT, "--cascade", str(cascade), "--out", str(tmp_path / "none"), "--seed", "3"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 5
    assert "seed 3: the network's answer is not finite; change the prompt or the guidance" in done.stderr
    assert not list((tmp_path / "none").glob("*.png"))


def test_seeds_that_would_give_the_pictures_of_others_are_refused(cascade: Path, tmp_path: Path) -> None:
    paint(Order(PROMPT, seed=2**32 - 1), cascade, tmp_path)
    for seed, count in ((2**32, 1), (2**32 - 1, 2)):
        with pytest.raises(ValueError, match=f"--seed {seed}: pictures come again from {2**32} on"):
            paint(Order(PROMPT, seed=seed, images=count), cascade, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
