"""Where there is a compiler it compiles every loop in C: no test of one is skipped because it is broken."""

import shutil
import subprocess
from pathlib import Path

import pytest

from dd_core.compiled import compiled
from dd_core.nets import attention, norm, winograd
from tests.unit.dd_core.nets.built import BFLOAT16, needs_x86

LOOPS = pytest.mark.parametrize(
    ("source", "defined"),
    [(norm.SOURCE, ()), (attention.SOURCE, ()), (winograd.SOURCE, ()), (winograd.SOURCE, ("HALF",))],
    ids=["norm", "attention", "winograd", "winograd-half"],
)


@LOOPS
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc here")
def test_a_loop_compiles_for_this_processor(source: Path, defined: tuple[str, ...]) -> None:
    assert compiled.__wrapped__(source, *defined) is not None


@pytest.mark.slow
@LOOPS
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", BFLOAT16])
def test_a_loop_compiles_for_processors_that_are_not_here(
    source: Path, defined: tuple[str, ...], processor: str
) -> None:
    words = [needs_x86(), "-O1", "-fopenmp", f"-march={processor}", *(f"-D{name}" for name in defined)]
    done = subprocess.run(
        [*words, "-S", "-o", "/dev/null", source], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
