"""Weights go in and out unchanged, and a file that is another than declared is refused by its key."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dd_core
from dd_core.layouts import ldm
from dd_core.layouts.adm import AdmLayout, unet_moves
from dd_core.layouts.files import weights_in
from dd_core.layouts.importing import imported, moves_of, scaled
from dd_core.layouts.moves import LayoutError, fitted, folded, inward, outward, regrouped, unfolded
from dd_core.layouts.published import published
from dd_core.layouts.unpickle import UnsafeError, pickled
from dd_core.nets.network import build
from dd_core.nets.unet import UNet, UNetSpec

SPEC = UNetSpec(width=32, channel_mult=(1, 2), blocks_per_level=1, attention_at=(2,), head_width=16)


@pytest.fixture
def net() -> UNet:
    return UNet(SPEC, in_channels=3, out_channels=3)


@pytest.mark.parametrize(
    ("change", "shape"), [(regrouped(4, 3), (24, 5)), (regrouped(4, 3), (24,)), (unfolded(1), (6, 5, 1))]
)
def test_a_change_is_undone_by_its_other_way(change: object, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    assert torch.equal(change.outward(change.inward(tensor)), tensor)  # type: ignore[attr-defined]


def test_rows_of_two_heads_are_sorted_by_query_key_and_value() -> None:
    rows = torch.tensor([11, 12, 13, 21, 22, 23])  # head, part
    assert regrouped(2, 3).inward(rows).tolist() == [11, 21, 12, 22, 13, 23]
    assert folded(2).inward(torch.ones(4, 3)).shape == (4, 3, 1, 1)


@pytest.mark.parametrize(
    "name",
    ["adm-imagenet64", "glide-upsample-inpaint", "karlo-decoder", "karlo-prior", "sd1", "sd2-unclip-h"],
)
def test_every_weight_of_a_published_network_goes_out_and_in_again(name: str) -> None:
    source = published()[name]
    with torch.device("meta"):
        net = build(source.net)
    moves = list(moves_of(net, source.layout))
    kept = {key: weight for key, weight in net.state_dict().items() if key not in ("mean", "std")}
    theirs = outward(kept, moves)
    back = fitted(net, inward(theirs, moves))
    assert {key: weight.shape for key, weight in back.items()} == {k: w.shape for k, w in kept.items()}


@pytest.mark.parametrize(
    ("name", "key", "shape"),
    [
        ("adm-imagenet64", "input_blocks.5.1.qkv.weight", (1152, 384, 1)),
        ("adm-imagenet64", "label_emb.weight", (1000, 768)),
        ("consistency-imagenet64", "input_blocks.5.1.qkv.weight", (1152, 384, 1, 1)),
        ("adm-classifier64", "out.2.positional_embedding", (512, 65)),
        ("glide-base", "input_blocks.5.1.encoder_kv.weight", (768, 512, 1)),
        ("glide-base", "padding_embedding", (128, 512)),
        ("glide-base-inpaint", "input_blocks.0.0.weight", (192, 7, 3, 3)),
        ("glide-upsample-inpaint", "input_blocks.0.0.weight", (192, 10, 3, 3)),
        ("karlo-prior", "model.positional_embedding", (1, 81, 2048)),
        ("sd1", "input_blocks.1.1.proj_in.weight", (320, 320, 1, 1)),
        ("sd2", "input_blocks.1.1.proj_in.weight", (320, 320)),
        ("sd1", "input_blocks.3.0.op.weight", (320, 320, 3, 3)),
        ("sd2-unclip-h", "label_emb.0.0.weight", (1280, 2048)),
    ],
)
def test_published_shapes_are_met(name: str, key: str, shape: tuple[int, ...]) -> None:
    source = published()[name]
    with torch.device("meta"):
        net = build(source.net)
    kept = {key: weight for key, weight in net.state_dict().items() if key not in ("mean", "std")}
    assert outward(kept, moves_of(net, source.layout))[key].shape == shape


def test_both_orders_of_an_attention_load_and_are_not_the_same(net: UNet) -> None:
    theirs = outward(net.state_dict(), unet_moves(net, AdmLayout(order="legacy")))
    new = inward(theirs, unet_moves(net, AdmLayout(order="new")))
    changed = [name for name, weight in net.state_dict().items() if not torch.equal(new[name], weight)]
    assert changed
    assert all(".qkv." in name for name in changed)


def changed(net: UNet, **changes: Tensor | None) -> dict[str, Tensor]:
    """A file with one key more, or one less."""
    theirs: dict[str, Tensor | None] = dict(outward(net.state_dict(), unet_moves(net, AdmLayout())))
    return {name: tensor for name, tensor in (theirs | changes).items() if tensor is not None}


def test_a_missing_key_one_too_many_and_a_wrong_shape_are_named(net: UNet) -> None:
    def into(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return fitted(net, inward(state, unet_moves(net, AdmLayout())))

    with pytest.raises(LayoutError, match=r"no weight 'out\.2\.bias'; declare the source"):
        into(changed(net, **{"out.2.bias": None}))
    with pytest.raises(LayoutError, match=r"'label_emb\.weight' and 0 more have no place in ours"):
        into(changed(net, **{"label_emb.weight": torch.ones(3)}))
    with pytest.raises(LayoutError, match=r"'out\.bias' has shape \(6,\), the declared source \(3,\)"):
        into(changed(net, **{"out.2.bias": torch.ones(6)}))
    with pytest.raises(LayoutError, match="a kernel of shape"):
        into(changed(net, **{"middle_block.1.proj_out.weight": torch.ones(64, 64, 3)}))


def test_half_precision_is_made_whole(net: UNet) -> None:
    theirs = {name: tensor.half() for name, tensor in changed(net).items()}
    weights = fitted(net, inward(theirs, unet_moves(net, AdmLayout())))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_averaged_weights_are_found_without_their_dots(net: UNet) -> None:
    raw = changed(net)
    state = {ldm.UNET + name: tensor for name, tensor in raw.items()}
    names = {name: f"model_ema.diffusion_model{name.replace('.', '')}" for name in raw}
    state |= {names[name]: tensor + 1 for name, tensor in raw.items()}
    state |= {
        "model_ema.decay": torch.tensor(0.5),
        "betas": torch.ones(3),
        "cond_stage_model.a": torch.ones(1),
    }
    averaged = ldm.unet_part(state, averaged=True)
    assert all(torch.equal(averaged[name], tensor + 1) for name, tensor in raw.items())
    assert ldm.left_over(state) == {"readers": 1, "averaged": len(raw) + 1, "schedule": 1}
    with pytest.raises(LayoutError, match="'what' belongs to nothing"):
        ldm.left_over(state | {"what": torch.ones(1)})
    del state[names["out.2.bias"]]
    with pytest.raises(LayoutError, match=r"'model_ema\.diffusion_modelout2bias'; take the weights"):
        ldm.unet_part(state, averaged=True)


def test_a_source_of_two_files_wants_two() -> None:
    with pytest.raises(ValueError, match="this source is 2 files, not 1"):
        imported(published()["glide-clip"], [{}], averaged=True)


ROOT = Path(dd_core.__file__).resolve().parents[1]


class Evil:
    """Runs code when it is unpickled without care."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("1 / 0",)


def test_pickled_files_are_read_and_those_that_run_code_are_not(tmp_path: Path) -> None:
    linear = nn.Linear(2, 3)
    torch.save({"state_dict": linear.state_dict(), "epoch": 3}, tmp_path / "good.pt")
    found = weights_in(tmp_path / "good.pt")
    assert found.keys() == {"weight", "bias"}
    assert torch.equal(found["weight"], linear.weight)
    torch.save({"weight": torch.ones(2), "more": Evil()}, tmp_path / "evil.pt")
    names_it = r"evil\.pt is not safe to read, or no file of weights: it names eval, which is no weight; conv"
    with pytest.raises(LayoutError, match=names_it):
        weights_in(tmp_path / "evil.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(LayoutError, match="is damaged or no safetensors file"):
        weights_in(tmp_path / "broken.safetensors")
    with pytest.raises(FileNotFoundError):
        weights_in(tmp_path / "absent.pt")


def test_a_pickled_file_of_torch_before_1_6_is_read_with_the_same_care(tmp_path: Path) -> None:
    weights = {"weight": torch.arange(6.0).view(2, 3)}
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(weights_in(tmp_path / "old.pt")["weight"], weights["weight"])
    torch.save(weights | {"more": Evil()}, tmp_path / "evil.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(LayoutError, match=r"evil\.pt is not safe to read.*it names eval, which is no weight"):
        weights_in(tmp_path / "evil.pt")


def test_what_is_no_file_of_weights_is_called_that_and_nobody_is_advised_to_read_it_all_the_same(
    tmp_path: Path,
) -> None:
    torch.save({"weight": torch.ones(2000)}, tmp_path / "cut.pt")
    files = {
        "cut.pt": (tmp_path / "cut.pt").read_bytes()[:-2000],
        "text.pt": b"<html>not found</html>",
        "picture.pt": b"\x89PNG\r\n\x1a\n" + bytes(99),
        "empty.pt": b"",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnsafeError, match=r"torch\.save has not written it") as told:
            pickled(tmp_path / name)
        assert "weights_only" not in str(told.value)
    with pytest.raises(LayoutError, match=r"text\.pt is not safe .*: torch\.save has not"):
        weights_in(tmp_path / "text.pt")


def test_what_lies_beside_a_pickled_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "good.pt")
    for name in ("safetensors.py", "torch.py"):
        (tmp_path / name).write_text("open('PWNED', 'w').close()")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # not `.`, if it was that
    monkeypatch.chdir(tmp_path)
    assert torch.equal(weights_in(Path("good.pt"))["weight"], torch.ones(2))
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0, -1.0])
def test_latents_have_no_scale_that_is_no_number_above_zero(scale: float) -> None:
    with pytest.raises(LayoutError, match="it must be a number above 0"):
        scaled(scale)
