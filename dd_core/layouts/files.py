"""Files of weights -> tensors by name; nothing on the way can run code.

safetensors are read here, anything pickled by `unpickle` in a process of its own.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dd_core.layouts.moves import LayoutError

READ_SECONDS = 1800
WEIGHTS = "diffusion_pytorch_model.safetensors"
"""Name of the weights in the folder of a component of diffusers."""
SCHEDULER = "scheduler_config.json"
"""Name of the config in the folder of a scheduler."""


def weights_in(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, by name.

    Raises:
        LayoutError: It is no file of weights that can be read safely; the reason is told.
        FileNotFoundError: There is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(2, "there is no such file of weights", str(path))
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise LayoutError(f"{path} is damaged or no safetensors file: {error}") from None
    with tempfile.TemporaryDirectory(prefix="ddiff-") as directory:
        target = Path(directory) / "weights.safetensors"
        unpickled(path, target)
        return load_file(target)


def weights_in_folder(folder: Path, name: str) -> dict[str, Tensor]:
    """All tensors of a component of diffusers: one file, or the several that an index names.

    Args:
        folder: Of the component.
        name: Of the one file, such as `diffusion_pytorch_model.safetensors`; its index ends in .index.json.

    Raises:
        LayoutError: A file is damaged, or has other tensors than the index says; the tensor is named.
        FileNotFoundError: There is neither file nor index, or a part is missing.
    """
    index = folder / f"{name}.index.json"
    if (folder / name).is_file() or not index.is_file():
        return weights_in(folder / name)
    places = placed(index)
    found: dict[str, Tensor] = {}
    for part in sorted(set(places.values())):
        tensors = weights_in(folder / part)
        listed = {tensor for tensor, place in places.items() if place == part}
        if odd := sorted(listed ^ tensors.keys()):
            where = "is not in it" if odd[0] in listed else "is in it as well"
            raise LayoutError(f"{folder / part}: {index.name} places {odd[0]!r} otherwise: it {where}")
        found |= tensors
    return found


def placed(index: Path) -> dict[str, str]:
    """Name of tensor -> name of file, from an index; every file lies in the folder of the index."""
    try:
        content = json.loads(index.read_bytes())
    except ValueError as error:
        raise LayoutError(f"{index} is damaged: {error}") from None
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise LayoutError(f"{index} has no weight_map; fetch it again")
    for place in places.values():
        if not isinstance(place, str) or Path(place).name != place or not place.endswith(".safetensors"):
            raise LayoutError(f"{index}: {place!r} is no safetensors file of its folder")
    return places


def unpickled(path: Path, target: Path) -> None:
    """Write the tensors of a pickled file as safetensors, in a separate process.

    That process imports nothing from the directory it is in (-P), which may be where the file came from.
    """
    command = [sys.executable, "-P", "-m", "dd_core.layouts.unpickle", str(path), str(target)]
    try:
        done = subprocess.run(  # noqa: S603 our own interpreter, paths as arguments
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=READ_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise LayoutError(
            f"{path} could not be read in {READ_SECONDS} s; convert it to safetensors"
        ) from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"the reader ended with code {done.returncode}"]
        reason = next((line for line in reversed(said) if "Error" in line), said[-1])
        raise LayoutError(
            f"{path} is not safe to read, or no file of weights: {reason.removeprefix('Error: '):.300}; "
            "convert it to safetensors where it comes from"
        )
