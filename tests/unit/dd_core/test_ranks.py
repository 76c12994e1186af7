"""Two ranks with half a batch each learn what one learns from the whole batch, where samples are compared."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from dd_core.labels import UNLABELLED
from dd_core.likelihood import TimestepSampler
from dd_core.nets.autoencoder import Autoencoder, AutoencoderNetSpec
from dd_core.ranks import gathered
from dd_core.stage import Budget, OptimizerSpec, PairBatch, Stage, Trained
from dd_core.stages.classifier import ClassifierStage
from dd_core.stages.clip import ClipStage
from dd_core.stages.noised_clip import NoisedClipSpec, NoisedClipStage
from dd_core.text import tokens
from dd_core.training import TrainState, train, wrapping
from tests.ranks import run_ranks
from tests.unit.dd_core.test_classifier_stage import SPEC as CLASSIFIER
from tests.unit.dd_core.test_stages import CLIP

OPTIMIZER = OptimizerSpec(learning_rate=1e-3, precision="fp32")
PLAIN = CLIP.but(captioner_layers=0)  # the captioner's words compete on their own rank

COMPARING = ("clip", "noised_clip", "classifier")
LABELS = torch.tensor([0, 1, UNLABELLED, 1])
"""One rank knows both of its pictures, the other one."""


def stage_of(kind: str) -> Stage:
    torch.manual_seed(0)
    if kind == "classifier":
        return ClassifierStage(CLASSIFIER.but(log_sigma_mean=-20.0, log_sigma_std=1e-6))
    clip = ClipStage(PLAIN)
    if kind == "clip":
        return clip
    clear = NoisedClipSpec(net=PLAIN.net, log_sigma_mean=-20.0)  # so that the noise of a rank does not matter
    return NoisedClipStage(clear, Trained(PLAIN, clip.model.state_dict()))


def batch() -> PairBatch:
    captions = ["a red circle", "a blue star", "a red circle", "two crosses"]  # one twice, on both ranks
    image = torch.randint(
        0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    return PairBatch(image, torch.tensor(tokens(captions, 12)), LABELS)


def learned(stage: Stage, net: torch.nn.Module, of: PairBatch) -> dict[str, Tensor]:
    """Gradients, and what the loss tells where it is told of all ranks."""
    loss = net(of)
    loss.total.backward()
    found = {name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None}
    if isinstance(stage, ClassifierStage):
        return found
    return (
        found | {"total": loss.total.detach()} | {f"part.{name}": value for name, value in loss.parts.items()}
    )


def norm_of_accumulated(net: torch.nn.Module, parts: list[list[int]], *, ranks: int, rank: int = 0) -> float:
    """Of the gradient of one step of several batches, these samples each."""
    state = TrainState(net, OPTIMIZER, rank=rank, ranks=ranks)
    given = [PairBatch(batch().image[one], batch().tokens[one]) for one in parts]
    budget = Budget(steps=1, checkpoint_every=1)
    (report,) = train(state, given, optimizer=OPTIMIZER, budget=budget, accumulate=len(parts))
    return report.read()["grad_norm"]


def accumulated_by(rank: int) -> dict[str, Any]:
    """What this rank learns from two batches in one step, and how often the ranks add up for it."""
    stage, sums = stage_of("noised_clip"), []
    net = DistributedDataParallel(stage, **wrapping(stage))

    def added_up(asked: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        sums.append(bucket.index())
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]

    net.register_comm_hook(None, added_up)
    norm = norm_of_accumulated(net, [[2 * rank], [2 * rank + 1]], ranks=2, rank=rank)
    weights = {name: value.detach() for name, value in stage.named_parameters()}
    return {"sums": sums.count(0), "norm": norm, "weights": weights}


def observed_in(latents: Tensor) -> Autoencoder:
    """An autoencoder that has seen two batches of latents, whose moments are its scale."""
    net = Autoencoder(AutoencoderNetSpec(width=8, channel_mult=(1,), blocks=1, groups=8))
    for batch in latents:
        net.observe(batch)
    return net


def two_batches() -> Tensor:
    """Of latents, b c h w each; the second half of each is another distribution than the first."""
    drawn = torch.randn(2, 4, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    return torch.cat([0.1 * drawn[:, :2], 5 + 2 * drawn[:, 2:]], 1)


def rank_main(rank: int, root: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(root / "store"), 2), rank=rank, world_size=2)
    mine = slice(2 * rank, 2 * rank + 2)
    for kind in COMPARING:
        stage = stage_of(kind)
        net = DistributedDataParallel(stage, **wrapping(stage))
        half = PairBatch(batch().image[mine], batch().tokens[mine], LABELS[mine])
        torch.save(learned(stage, net, half), root / f"{kind}.{rank}.pt")
    torch.save(accumulated_by(rank), root / f"accumulated.{rank}.pt")
    levels = TimestepSampler(3, history=2)
    levels.observe(*map(gathered, (torch.tensor([rank, rank + 1]), torch.tensor([1.0, 2.0]) + rank)))
    torch.save(levels.state_dict(), root / f"levels.{rank}.pt")
    seen = observed_in(two_batches()[:, mine])
    torch.save({"moments": seen.moments, "scale": seen.scale()}, root / f"latents.{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo on CPU sometimes aborts in its own teardown


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns_from_the_whole_batch(tmp_path: Path) -> None:
    run_ranks(rank_main, (tmp_path,), 2)
    for kind in COMPARING:
        alone = stage_of(kind)
        expected = learned(alone, alone, batch())
        for rank in range(2):
            found = torch.load(tmp_path / f"{kind}.{rank}.pt")
            assert {name for name in found if found[name].any()} == {n for n in expected if expected[n].any()}
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-4)
    ours, theirs = (torch.load(tmp_path / f"accumulated.{rank}.pt") for rank in range(2))
    assert ours["sums"] == theirs["sums"] == 1
    expected_norm = norm_of_accumulated(stage_of("noised_clip"), [[0, 2], [1, 3]], ranks=1)
    assert ours["norm"] == theirs["norm"] == pytest.approx(expected_norm, rel=1e-4)
    assert all(torch.equal(ours["weights"][name], value) for name, value in theirs["weights"].items())
    alike = TimestepSampler(3, history=2)
    alike.observe(torch.tensor([0, 1, 1, 2]), torch.tensor([1.0, 2.0, 2.0, 3.0]))
    for rank in range(2):
        found = torch.load(tmp_path / f"levels.{rank}.pt")
        assert all(torch.equal(found[name], value) for name, value in alike.state_dict().items())
    whole = observed_in(two_batches())
    assert whole.observed == 2
    for rank in range(2):
        found = torch.load(tmp_path / f"latents.{rank}.pt")
        torch.testing.assert_close(found["moments"], whole.moments)
        torch.testing.assert_close(found["scale"], whole.scale())
