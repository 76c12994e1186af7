"""TorchScript archives, as OpenAI's CLIP was published, are read to the bit, and nothing in them runs."""

import pickle
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import pytest
import torch
from torch import nn

from dd_core import bundle
from dd_core.layouts import clip
from dd_core.layouts.files import weights_in
from dd_core.layouts.moves import LayoutError
from dd_core.layouts.scripted import scripted_tensors
from dd_core.nets.clip import Clip, ClipNetSpec
from dd_core.stages.clip import clip_of
from jobs import exchange

SPEC = ClipNetSpec(
    embedding_width=8,
    image_size=8,
    patch_size=4,
    image_width=16,
    image_layers=1,
    context_length=5,
    text_width=16,
    text_layers=1,
    head_width=8,
    vocab_size=20,
)
IMAGE, TOKENS = torch.zeros(1, 3, 8, 8), torch.tensor([[18, 3, 19, 0, 0]])


@pytest.fixture
def towers() -> nn.Module:
    """OpenAI's names, halves beside the float32 of the norms, and the numbers that they store as weights."""
    torch.manual_seed(0)
    found = Clip(SPEC).towers.eval()
    for name, number in zip(clip.NUMBERS, (8, 5, 20), strict=True):
        found.__dict__.pop(name, None)  # open_clip keeps two of them as plain numbers
        found.register_buffer(name, torch.tensor(number))
    return found


def archived(towers: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """The archive of a traced model and the weights in it; traced in float32, stored as published."""
    scripted = torch.jit.trace(towers, (IMAGE, TOKENS), check_trace=False)
    for name, weight in scripted.named_parameters():
        if "ln_" not in name:
            weight.data = weight.data.half()
    torch.jit.save(scripted, path)
    return dict(scripted.state_dict())


@pytest.mark.filterwarnings("ignore")  # of torch.jit, which is of yesterday as these files are
def test_a_file_of_openai_becomes_a_stage_with_its_weights_to_the_bit(
    towers: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = archived(towers, tmp_path / "ViT.pt")
    read = scripted_tensors(tmp_path / "ViT.pt")
    assert read.keys() == theirs.keys()
    assert all(torch.equal(read[name], weight) for name, weight in theirs.items())
    assert {read[name].dtype for name in read} == {torch.float16, torch.float32, torch.int64}
    monkeypatch.setattr(clip, "net_of", lambda name: SPEC)
    exchange.import_weights("openai-clip:tiny", [tmp_path / "ViT.pt"], tmp_path / "clip", averaged=True)
    found = clip_of(bundle.load(tmp_path / "clip").trained)
    assert found.spec.quick_gelu
    for name, weight in found.towers.state_dict().items():
        assert torch.equal(weight, theirs[name].float())


class Evil:
    """Runs code when it is unpickled without care."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("1 / 0",)


@pytest.mark.fault
@pytest.mark.filterwarnings("ignore")
def test_what_would_run_code_or_is_damaged_is_refused(towers: nn.Module, tmp_path: Path) -> None:
    with ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("evil/constants.pkl", pickle.dumps(()))
        archive.writestr("evil/data.pkl", pickle.dumps({"weight": Evil()}))
    with pytest.raises(
        LayoutError, match=r"evil\.pt is not safe to read.*names \w+\.eval, which is no weight"
    ):
        weights_in(tmp_path / "evil.pt")
    archived(towers, tmp_path / "whole.pt")
    content = bytearray((tmp_path / "whole.pt").read_bytes())
    content[content.index(scripted_tensors(tmp_path / "whole.pt")["visual.proj"].numpy().tobytes())] ^= 1
    (tmp_path / "flipped.pt").write_bytes(content)
    with pytest.raises(BadZipFile, match="Bad CRC-32"):
        scripted_tensors(tmp_path / "flipped.pt")
    with ZipFile(tmp_path / "whole.pt") as whole, ZipFile(tmp_path / "cut.pt", "w") as cut:
        for name in whole.namelist():
            cut.writestr(name, whole.read(name)[: 1 if name.endswith("data/0") else None])
    with pytest.raises(pickle.UnpicklingError, match="storage 0 has 1 bytes for"):
        scripted_tensors(tmp_path / "cut.pt")
