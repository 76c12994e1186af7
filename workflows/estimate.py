"""The memory that a worker of a stage will need, found by running the real stage on fake tensors.

Nothing is allocated and nothing computed: PyTorch carries only shapes and types through the
training's own modules, optimizers and forward (workflows.hollow), and the bytes that it would
keep are added up.  Where a value would decide (a random crop, a mask), the case that needs most is
taken.  The check costs a second, and there is no formula for memory to keep up to date by hand.
"""

import math
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dd_core import ranks
from dd_core.devices import imagined
from dd_core.precision import autocast
from dd_core.stage import PairBatch, Stage, Trained
from dd_core.stages import build_stage
from dd_core.stages.clip import ClipSpec, sized
from dd_core.training import TrainState
from workflows.hollow import Hollowing, storage
from workflows.parents import outline, parent_home
from workflows.storage import Home
from workflows.train_spec import TrainSpec

OPS = torch.ops.aten
COMES_UP_TO = (OPS.ge.Scalar, OPS.gt.Scalar)
FILLS = (OPS.uniform_.default, OPS.normal_.default, OPS.fill_.Scalar, OPS.zero_.default, OPS.copy_.default)
"""In-place operations that change nothing but the content of a tensor: they are skipped."""


class Need(NamedTuple):
    """What one worker holds in memory while it trains, in bytes; `parameters` is a count."""

    parameters: int
    """Of the model that ships."""
    bundle: int
    """Its weights, as shipped."""
    state: int
    """Weights, optimizers and averages: what a checkpoint holds."""
    gradients: int
    frozen: int
    """Parents inside the stage, and their bundles beside it."""
    activations: int
    """What forward keeps for backward, for a micro-batch, in the precision of this machine's CPU."""
    activations_on_gpu: int
    """The same on a GPU, where precision `auto` is bfloat16.  If a stage is sure to train on one kind of
    device, both fields are what it needs there."""

    @property
    def total(self) -> int:
        """All of it, on a CPU."""
        return self.state + self.gradients + self.frozen + self.activations

    @property
    def total_on_gpu(self) -> int:
        """All of it, on a GPU."""
        return self.total - self.activations + self.activations_on_gpu


class Content(TorchDispatchMode):
    """Supplies values where code asks fake tensors, which have none, for their content.

    Floats answer 1 (RAdam divides by a function of its step count), other numbers 0.  A mask selects every
    row.  A count has reached any threshold, so that a prior has measured enough images and learns, and the
    discriminator of an autoencoder trains.
    """

    def __init__(self) -> None:
        super().__init__()
        self.arrived = list[Tensor]()
        """Results of comparing a count with a threshold."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in FILLS:
            return args[0]
        return self.answer(func, args, kwargs or {})

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The result of an operation."""
        if func is OPS._local_scalar_dense.default:
            if any(args[0] is answer for answer in self.arrived):
                return True
            return 1.0 if args[0].is_floating_point() else 0
        if func is OPS.nonzero.default and args[0].ndim == 1:
            return torch.arange(len(args[0]), device=args[0].device)[:, None]
        if func is OPS._unique2.default:
            return args[0].flatten(), torch.zeros_like(args[0]), torch.zeros_like(args[0].flatten())
        if func is OPS.index.Tensor:
            source, places, *rest = args
            args = (source, [all_rows(place) for place in places], *rest)
        answer = func(*args, **kwargs)
        if func in COMES_UP_TO and not args[0].ndim and not args[0].is_floating_point():
            self.arrived.append(answer)
        return answer


def all_rows(place: Tensor | None) -> Tensor | None:
    """For a mask of rows, as many indices as if it selected all; anything else as it is."""
    if place is None or place.dtype is not torch.bool or place.ndim != 1:
        return place
    return torch.zeros(len(place), dtype=torch.long, device=place.device)


def needs(
    stages: list[TrainSpec], *, context_length: int, run: Home | Path, gpus: float | None = None
) -> dict[str, Need]:
    """The memory that each stage needs; parents come before their children.

    Args:
        stages: In the order of training.
        context_length: Tokens of a caption.
        run: Where parents that are none of these stages are looked for first.
        gpus: How many there are; None: unknown, so a stage may train on either kind of device.

    Raises:
        ValueError: A parent is missing, or does not fit its child or the captions.
        dd_core.sealed.SealError: A parent that was trained before is damaged.
    """
    trained: dict[str, Trained] = {}
    found: dict[str, Need] = {}
    with Hollowing(), Content():
        for spec in stages:
            parents = {role: parent(spec, role, trained, run) for role in spec.parents}
            refuse_length(spec, parents, context_length)
            stage = sized(spec.stage) if isinstance(spec.stage, ClipSpec) else spec.stage
            fresh = not (isinstance(stage, ClipSpec) and stage.pretrained)
            state = TrainState(build_stage(stage, parents), spec.optimizer)
            trained[spec.name] = Trained(stage, state.average)
            on = {spec.on_gpu(there) for there in ([0, math.inf] if gpus is None else [gpus])}
            found[spec.name] = need(spec, state, parents, context_length if fresh else 0, on)
    return found


def refuse_length(spec: TrainSpec, parents: Mapping[str, Trained], context_length: int) -> None:
    """Raises ValueError if a stage reads captions by a CLIP of another context length."""
    clip = parents["clip"].spec if "clip" in parents else None
    needs = spec.stage.clip_needs
    if not isinstance(clip, ClipSpec) or needs is None or not needs.captions:
        return
    if (length := clip.net.context_length) != context_length:
        raise ValueError(
            f"{spec.name}: its clip {spec.parents['clip']!r} reads {length} tokens, pairs.context_length is "
            f"{context_length}; make them equal"
        )


def parent(spec: TrainSpec, role: str, trained: Mapping[str, Trained], run: Home | Path) -> Trained:
    """A parent as fake tensors: one of these stages, else the existing bundle by its shapes."""
    if (named := spec.parents[role]) in trained:
        return trained[named]
    there = outline(parent_home(spec, role, run))
    shapes = {name: torch.empty(like.shape, dtype=like.dtype) for name, like in there.weights.items()}
    return there._replace(weights=shapes)


def need(
    spec: TrainSpec, state: TrainState, parents: Mapping[str, Trained], context_length: int, on: Set[bool]
) -> Need:
    """What a stage needs on a CPU, on a GPU or on both.

    With a context length of 0 the stage, a pretrained CLIP, is taken as it is and not trained.
    """
    stage = state.stage
    assert isinstance(stage, Stage)
    weights = sum(size(tensor) for tensor in state.average.values())
    count = sum(parameter.numel() for parameter in stage.model.parameters())
    if not context_length:
        return Need(count, weights, weights, 0, 0, 0, 0)
    gradients = sum(size(parameter) for parameter in stage.parameters() if parameter.requires_grad)
    frozen = [tensor for part in stage.frozen for tensor in part.state_dict(keep_vars=True).values()]
    beside = sum(size(tensor) for known in parents.values() for tensor in known.weights.values())
    phases = stage.phases
    activations = {
        gpu: max(kept(spec, stage, phase, context_length, gpu=gpu) for phase in phases) for gpu in on
    }
    return Need(
        parameters=count,
        bundle=weights,
        state=sum(size(tensor) for tensor in state.tensors().values()),
        gradients=gradients,
        frozen=sum(map(size, frozen)) + beside,
        activations=activations[min(on)],
        activations_on_gpu=activations[max(on)],
    )


def kept(spec: TrainSpec, stage: Stage, phase: str, context_length: int, *, gpu: bool) -> int:
    """Bytes that one forward keeps for backward beside the parameters."""
    batch = nothing(spec, spec.micro_batch_size or spec.batch_size // spec.num_workers, context_length)
    own = {id(storage(tensor)) for tensor in stage.state_dict(keep_vars=True).values()}
    seen: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        there = storage(tensor)
        seen[id(there)] = there  # holding it, so that no other gets its id
        return tensor

    stage.train()
    kept_by = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    where = imagined("cuda" if gpu else "cpu")
    with kept_by, numbers(spec, gpu=gpu), where, ranks.among(spec.num_workers):
        stage(batch, phase)
    return sum(there.nbytes() for number, there in seen.items() if number not in own)


def nothing(spec: TrainSpec, rows: int, context_length: int) -> PairBatch:
    """A batch of the shapes that a stage is trained on, all zeros."""
    by = spec.stage.embedded_by
    side = spec.stage.image_size if by is None or spec.stage.sees_images else 0
    return PairBatch(
        torch.zeros(rows, 3, side, side, dtype=torch.uint8),
        torch.zeros(rows, context_length, dtype=torch.long),
        torch.zeros(rows, dtype=torch.long) if spec.label else None,
        torch.zeros(rows, by.width) if by else None,
    )


def numbers(spec: TrainSpec, *, gpu: bool) -> torch.autocast:
    """The autocast that forward runs under on a GPU or a CPU."""
    precision = spec.optimizer.precision
    if gpu and precision == "auto":
        precision = "bf16"
    return autocast(torch.device("cpu"), precision)


def size(tensor: Tensor) -> int:
    """Bytes of a tensor."""
    return tensor.numel() * tensor.element_size()
