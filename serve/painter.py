"""The painter: an order for images, sent down the cascade hop after hop.  Knows neither Ray nor HTTP."""

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dd_core.cascade import CascadeSpec, CascadeState, HopSpec, followed, requested
from dd_core.precision import Precision
from dd_core.samplers import SamplingSpec
from dd_core.stages import StageSpec
from dd_core.stages.asking import hears_negative, nearest_steps, refuse_request, refuse_sampling
from dd_core.text import too_long
from serve.engine import RefusedError

MOST_STEPS = 250
"""Most steps that effort may ask for; of a hop that takes more by itself, its own number."""

ANSWERED_S = 30.0
"""How long after its last state a hop counts as ready while the question whether it is waits in its queue."""


class HopLostError(RuntimeError):
    """A hop cannot be reached.

    Args:
        message: Which one and why.
        again: Whether the same request may do better later; False if it seems to be what kills replicas.
    """

    def __init__(self, message: str, *, again: bool) -> None:
        super().__init__(message)
        self.again = again


class Served(NamedTuple):
    """What a replica paints with."""

    digest: str
    """Of the cascade."""
    precision: Precision
    """As configured."""
    computes: str
    """In which its networks compute: bf16 or fp32; empty: it has none to which a precision applies."""

    def lacks(self, digest: str, precision: Precision | None) -> str:
        """Why it is not what is asked for, or nothing; a precision of None is any."""
        if digest != self.digest:
            return f"serves cascade {self.digest[:12]}, not {digest[:12]}"
        other = precision not in (None, self.precision)
        return f"was told precision {self.precision}, not {precision}" if other else ""


class Link(Protocol):
    """The connection to one hop."""

    async def advance(self, state: CascadeState, how: SamplingSpec, timeout_s: float) -> CascadeState:
        """The state after the hop; cancelling the caller cancels the work.

        Raises:
            TimeoutError: timeout_s passed first.
            HopLostError: It cannot be reached.
            RefusedError: It cannot do what the request asks.
        """
        ...

    async def ready(self) -> Served:
        """What it serves; an error or no answer if it cannot."""
        ...

    async def all_ready(self, timeout_s: float) -> list[object]:
        """What each of its running replicas serves, or its error."""
        ...


class Order(NamedTuple):
    """What is to be painted: one image per seed."""

    prompt: str
    negative: str
    """What the images should not be; empty is the empty caption."""
    seeds: Sequence[int]
    steps: int | None
    """Of the hops that follow the request; None: as each hop has it."""
    effort: float
    """Multiplies their number of steps where `steps` is None."""
    scale: float | None
    label: int | None = None
    """Class, where a hop is told one."""


class Painter:
    """Paints with one cascade.

    Args:
        cascade: Its hops and how each is sampled.
        digest: Which cascade the links must serve.
        links: One per stage.
        precision: In which numbers the links must serve it.
        by_class: Whether a hop is conditioned on classes, or guided to them.
        stages: The specs of the hops and their guides, so that, before a hop is asked, what it cannot do is
            refused and effort is rounded to steps that it can take; a hop whose spec is not there refuses
            by itself.
    """

    def __init__(
        self,
        cascade: CascadeSpec,
        digest: str,
        links: Mapping[str, Link],
        *,
        precision: Precision,
        by_class: bool = False,
        stages: Mapping[str, StageSpec] | None = None,
    ) -> None:
        self.cascade, self.digest, self.links, self.by_class = cascade, digest, links, by_class
        self.stages, self.precision = stages or {}, precision
        self.known: dict[str, Served] = {}
        """What each stage last said it serves."""
        self.answered: dict[str, float] = {}
        """When each last handed on a state, on the loop's clock."""

    async def paint(self, order: Order, timeout_s: float) -> list[Tensor]:
        """The images, each [1, 3, h, w] in [-1, 1]; when one fails the others are cancelled.

        Raises:
            TimeoutError, HopLostError, RefusedError: As the links do; the last also before any of
                them is asked.
        """
        plan = self.plan(order)
        until = asyncio.get_running_loop().time() + timeout_s
        async with asyncio.timeout_at(until):
            asked = await asyncio.to_thread(self.asked, order)  # long texts take long to read
            self.refuse(asked, plan)
            states = (asked._replace(seeds=[seed]) for seed in order.seeds)
            tasks = [asyncio.create_task(self.image(state, plan, until)) for state in states]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

    def asked(self, order: Order) -> CascadeState:
        """What every image of an order begins with, its seed aside."""
        negatives = [order.negative] if order.negative else []
        state = requested([order.prompt], [], self.cascade.context_length, negatives=negatives)
        return state if order.label is None else state._replace(label=torch.tensor([order.label]))

    def refuse(self, state: CascadeState, plan: Sequence[SamplingSpec]) -> None:
        """Refuse at once what a hop would refuse only after those before it had painted.

        Raises:
            RefusedError: The request lacks what a hop needs, or names what it does not know.
        """
        for hop, how in zip(self.cascade.hops, plan, strict=True):
            if (stage := self.stages.get(hop.stage)) is None:
                continue
            guides = {role: self.stages[name] for role, name in hop.guides.items() if name in self.stages}
            try:
                refuse_request(stage, how, guides, state)
            except ValueError as error:
                raise RefusedError(f"hop {hop.stage}: {error}") from None

    async def image(self, state: CascadeState, plan: Sequence[SamplingSpec], until: float) -> Tensor:
        """One image through every hop."""
        clock = asyncio.get_running_loop().time
        for hop, how in zip(self.cascade.hops, plan, strict=True):
            state = await self.links[hop.stage].advance(state, how, until - clock())
            self.answered[hop.stage] = clock()
        if state.image is None:
            raise ValueError(f"cascade {self.cascade.name} ends without an image: its last hop draws none")
        return state.image

    def plan(self, order: Order) -> list[SamplingSpec]:
        """How each hop is sampled for an order.

        Raises:
            ValueError: A hop that follows it cannot; with what to ask instead.
        """
        return [chosen(hop, order, self.stages.get(hop.stage)) for hop in self.cascade.hops]

    def blamed(self, order: Order) -> str | None:
        """The parameter of a request without which a hop could do what an order asks; None: no single one."""
        without = {
            "num_inference_steps": order._replace(steps=None),
            "guidance_scale": order._replace(scale=None),
        }
        for name, other in without.items():
            try:
                self.plan(other)
            except ValueError:
                continue
            return name
        return None

    def paced(self, order: Order) -> bool:
        """Whether another effort would change the steps of a hop."""
        usual, *others = (self.plan(order._replace(steps=None, effort=effort)) for effort in (1, 0.5, 4))
        return any(other != usual for other in others)

    def follows(self) -> bool:
        """Whether a hop follows the steps and the guidance of orders."""
        return any(hop.follows_request for hop in self.cascade.hops)

    def guided(self, order: Order) -> bool | None:
        """Whether a hop is guided away from a negative prompt; None: none would be at any scale of a request.

        A hop whose spec is not there is assumed to read captions.
        """
        stages = [self.stages.get(hop.stage) for hop in self.cascade.hops]
        reads = [stage is None or hears_negative(stage) for stage in stages]
        if any(read and how.guidance_scale != 1 for read, how in zip(reads, self.plan(order), strict=True)):
            return True
        follow = (hop.follows_request for hop in self.cascade.hops)
        return False if any(read and follows for read, follows in zip(reads, follow, strict=True)) else None

    def cut(self, order: Order) -> list[str]:
        """The texts of an order that are longer than the model reads."""
        texts = {"prompt": order.prompt, "negative_prompt": order.negative}
        return [name for name, text in texts.items() if too_long(text, self.cascade.context_length)]

    async def replacing(self, timeout_s: float, *, patient: bool = True) -> bool:
        """Whether a replica serves something else: until none does, that is not replaced.

        One that runs and does not answer in time has its hands full, with the work of another cascade: unless
        it is not `patient` any more.
        """
        found = list((await self.served(timeout_s)).values())  # after that the replicas are known
        every = (link.all_ready(timeout_s) for link in self.links.values())
        running: list[object] = []
        for told in await asyncio.gather(*every, return_exceptions=True):
            running += told if isinstance(told, list) else [told]
        if patient and any(isinstance(one, TimeoutError) for one in running):
            return True
        return any(self.lacks(one) for one in found + running if not isinstance(one, BaseException))

    def unready(self, found: Mapping[str, object]) -> dict[str, str]:
        """Stage -> why it cannot serve now; empty when all can.  `found` comes from `served`."""
        return {stage: why for stage, one in found.items() if (why := self.lacks(one))}

    def computes(self, found: Mapping[str, object]) -> str:
        """What networks compute in: bf16, fp32, bf16+fp32 where devices differ; unknown until all say."""
        if self.unready(found):
            return "unknown"
        return "+".join(sorted({one.computes for one in found.values() if isinstance(one, Served)} - {""}))

    async def served(self, timeout_s: float) -> dict[str, object]:
        """What each stage serves, or why that is not known; for a busy one, what it said last."""
        asked = (asyncio.wait_for(link.ready(), timeout_s) for link in self.links.values())
        told = await asyncio.gather(*asked, return_exceptions=True)
        found: dict[str, object] = dict(zip(self.links, told, strict=True))
        busy_since = asyncio.get_running_loop().time() - ANSWERED_S
        for stage, one in found.items():
            if isinstance(one, Served):
                self.known[stage] = one
            elif isinstance(one, TimeoutError) and self.answered.get(stage, -math.inf) > busy_since:
                found[stage] = self.known.get(stage, one)
        return found

    def lacks(self, found: object) -> str:
        """Why one of these cannot serve now, or nothing."""
        match found:
            case Served():
                return found.lacks(self.digest, self.precision)
            case TimeoutError():
                return "no answer yet"
            case Exception():
                return type(found).__name__
            case _:
                return "serves by other code"


def chosen(hop: HopSpec, order: Order, stage: StageSpec | None = None) -> SamplingSpec:
    """The sampling of a hop: its own, changed by the order where the hop follows it.

    Effort asks for at most MOST_STEPS, or the hop's own number if that is larger, and for the nearest number
    that the hop can take.

    Raises:
        ValueError: The hop cannot do what the order asks.
    """
    own, steps = hop.how.num_steps, order.steps
    if steps is None and order.effort != 1 and hop.follows_request:
        most = max(MOST_STEPS, own)
        steps = min(most, max(1, round(own * order.effort)))
        if stage is not None:
            steps = nearest_steps(stage, hop.how, steps, most)
    how = followed(hop, steps=steps, scale=order.scale)
    if stage is not None and how != hop.how:
        try:
            refuse_sampling(stage, how, hop.guides)
        except ValueError as error:
            raise ValueError(f"hop {hop.stage}: {error}") from None
    return how
