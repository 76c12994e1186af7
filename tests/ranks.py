"""Processes of a distributed group, one for each rank."""

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

PRELOADED = ["dd_core.checkpoint", "dd_core.stages.upsampler", "dd_core.training"]


def run_ranks(main: Callable[..., None], args: tuple[Any, ...], world: int) -> None:
    """Call main(rank, *args) in `world` processes, forked from one that has done the slow imports."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    mp.start_processes(main, args, nprocs=world, start_method="forkserver")
