"""Files of weights -> tensors by name; nothing on the way can run code.

safetensors are read here, anything pickled by `unpickle` in a process of its own.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dd_core.layouts.moves import LayoutError

READ_SECONDS = 1800


def weights_in(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, by name.

    Raises:
        LayoutError: It is no file of weights that can be read safely; the reason is told.
        FileNotFoundError: There is none.
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


def unpickled(path: Path, target: Path) -> None:
    """Write the tensors of a pickled file as safetensors, by a process of its own."""
    command = [sys.executable, "-m", "dd_core.layouts.unpickle", str(path), str(target)]
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
            f"{path} is not safe to read, or no file of weights: {reason:.300}; convert it to safetensors "
            "where it comes from"
        )
