"""The diffusion prior as unCLIP has it: a causal transformer on a discrete chain, for whitened embeddings.

It takes the place of `prior`, which is smaller and knows all noise levels.  The network predicts the clean
embedding.  Embeddings are whitened, value by value, by the mean and the standard deviation of the first
training images; results are transformed back.  Karlo's weights are of this network, but cannot start it: the
CLIP features they were trained on are not unit vectors (`start.refuse_features`).

Training records the error of the estimates at each noise level.  The errors ship with the weights, and from
them the ancestral sampler computes the best variance of any step (`noise.analytic_std`).

Sources: Ramesh et al. 2022 (arXiv:2204.06125), section 2.2 and table 3 (64 steps of analytic variance); Bao
et al. 2022 (arXiv:2201.06503); the published code of Karlo (whitening, bound).
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from dd_core import losses, schedules
from dd_core.cascade import CascadeState, Draw
from dd_core.denoiser import Conditioning, Denoised, Denoiser, NetworkDenoiser
from dd_core.guidance import Rows, classifier_free, clip_x0
from dd_core.nets.clip import Clip
from dd_core.nets.packed import upto_end
from dd_core.nets.prior import CausalPrior, CausalPriorSpec
from dd_core.noise import SeededNoise, from_vp, spread
from dd_core.ranks import gathered
from dd_core.samplers import SamplingSpec, begin, sigmas_of
from dd_core.schedules import Clock, ScheduleSpec
from dd_core.spec import Spec
from dd_core.stage import ClipNeeds, LearnsEmbeddings, Losses, PairBatch, Stage, Trained
from dd_core.stages.captions import null_like
from dd_core.stages.clip import clip_for, embedding_of
from dd_core.stages.draft import draft_of
from dd_core.stages.draws import Chooser, rows_of_draws, seeds_of_draws
from dd_core.stages.refusals import refuse_unheard, refuse_unlearned
from dd_core.stages.start import asked, refuse_features, refuse_other, widened

BOUND = 10.0
"""Largest absolute value of an estimate, whitened; beyond it is clipped (Karlo)."""
BINS = 32
"""Equal parts of the chain; errors are averaged in each."""
HORIZON = 200_000
"""Images over which errors are averaged in the long run; at first over a quarter of those seen.  They are
errors of the current weights, a little larger than those of the averaged weights that ship."""
MEASURED = ("errors", "counts", "seen")


class CausalPriorStageSpec(LearnsEmbeddings):
    """Diffusion prior on the embeddings of the parent CLIP, as published."""

    kind: Literal["causal_prior"] = "causal_prior"
    net: CausalPriorSpec
    """Told timesteps: its level_scale is 1."""
    schedule: ScheduleSpec = ScheduleSpec(betas="cosine")
    measured_images: int = Field(2048, ge=2)
    """The first so many training images, whose embeddings fix mean and deviation; until these are seen
    nothing is learned and the loss is 0."""

    @model_validator(mode="after")
    def _fits(self) -> "CausalPriorStageSpec":
        if self.schedule.last != "clean":
            raise ValueError(
                f"a prior ends without noise, not at schedule.last {self.schedule.last}; leave that out"
            )
        return self

    @property
    def clip_needs(self) -> ClipNeeds:
        """Its network takes states and embeddings of one width."""
        width = {"net.embedding_width": self.net.embedding_width}
        return ClipNeeds(
            width,
            width,
            self.tokens,
            captions=True,
            remedy="make them equal, or take kind prior if the clip's text_width and embedding_width differ",
        )

    @property
    def looks_at(self) -> int:
        """Images whose embeddings fix mean and deviation."""
        return self.measured_images


class PriorDenoiser(NetworkDenoiser[CausalPrior]):
    """The network, and the mean squared error of its estimates in each part of the chain.

    Errors are kept as shares of sigma**2 / (1 + sigma**2), the error for data without structure (independent
    normal values): these shares change little from one noise level to the next.
    """

    errors: Float[Tensor, " k"]
    counts: Float[Tensor, " k"]
    seen: Tensor

    def __init__(self, spec: CausalPriorStageSpec) -> None:
        super().__init__(CausalPrior(spec.net), "x0", tell=Clock(spec.schedule))
        self.length = spec.schedule.num_timesteps
        bins = min(BINS, self.length)
        self.register_buffer("errors", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x: Float[Tensor, " b *s"], sigma: Float[Tensor, " b"], cond: Conditioning) -> Denoised:
        share = between(self.errors / self.counts, (self.tell(sigma) + 0.5) / self.length)
        variance = share * sigma**2 / (1 + sigma**2)
        return super().forward(x, sigma, cond)._replace(x0_variance=spread(variance.to(x), x))

    @property
    def measured(self) -> bool:
        """Whether an error is known in every part of the chain."""
        return bool(self.counts.all())

    @torch.no_grad()
    def measure(
        self,
        t: Int[Tensor, " b"],
        sigma: Float[Tensor, " b"],
        x0_mse: Float[Tensor, " b"],
        told: Bool[Tensor, " b"],
    ) -> None:
        """Add the errors of the rows that were told a caption to the moving averages, which forget old ones.

        Errors that are not finite are not counted: the gradient of their batch will be refused as well.
        """
        share = (x0_mse * (1 + sigma**2) / sigma**2).double()
        told, share = told & share.isfinite(), torch.where(share.isfinite(), share, 0.0)
        t, share, counted = gathered(torch.stack([t.double(), share, told.double()], 1)).unbind(1)
        self.seen += len(t)
        span = max(len(t), min(HORIZON, int(self.seen) // 4))
        place = F.one_hot((t * len(self.errors)).long() // self.length, len(self.errors)).double()
        for total, new in ((self.errors, counted * share), (self.counts, counted)):
            total.mul_(math.exp(-len(t) / span)).add_(new @ place)


def between(values: Float[Tensor, " k"], place: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Linear interpolation of values at the middles of equal parts of [0, 1]; constant at the ends."""
    at = (place.to(values) * len(values) - 0.5).clamp(0, len(values) - 1)
    below = at.long()
    above = (below + 1).clamp(max=len(values) - 1)
    return torch.lerp(values[below], values[above], at - below)


class CausalPriorStage(Stage):
    """Measures the first embeddings, then trains the prior to recover them from noise and the caption.

    Args:
        spec: What to train.
        clip: The parent whose embeddings these are.
        start: A causal prior to take initial weights from; its mean and deviation are kept, its errors are
            measured anew.

    Raises:
        ValueError: The parent CLIP has other widths or another context length; or the start is another
            network, of another chain, or the published one, whose embeddings are not unit vectors.
    """

    model: PriorDenoiser
    table: Float[Tensor, " t"]
    """Noise levels of the timesteps."""
    moments: Float[Tensor, " 2 d"]
    """Sums of the embeddings looked at, and of their squares; a buffer, so that a resumed run goes on."""
    count: Tensor
    """Images looked at."""

    def __init__(self, spec: CausalPriorStageSpec, clip: Trained, start: Trained | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.model = PriorDenoiser(spec)
        self.register_buffer("table", schedules.sigmas(spec.schedule), persistent=False)
        width = spec.net.embedding_width
        self.register_buffer("moments", torch.zeros(2, width, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))
        if start is not None:
            refuse_features(spec.kind, start)
            refuse_other(spec.kind, asking(spec), asking(start.spec))
            now = self.model.state_dict()
            given, first = (
                {k: v for k, v in one.items() if k not in MEASURED} for one in (start.weights, now)
            )
            self.model.load_state_dict(now | widened(start._replace(weights=given), first))
            self.count.fill_(spec.measured_images)
        self.freeze(clip_for(spec.kind, spec.clip_needs, clip))

    def forward(self, batch: PairBatch, phase: str = "model") -> Losses:
        clip, net = self.frozen[0], self.model.network
        assert isinstance(clip, Clip)
        dropped = torch.rand(len(batch.tokens), 1, device=batch.tokens.device) < self.spec.caption_dropout
        tokens = torch.where(dropped, null_like(batch.tokens), batch.tokens)
        with torch.no_grad():
            embedding = embedding_of(clip, batch).float()
            caption = clip.read(tokens)
        if self.count < self.spec.measured_images:
            self.look(gathered(embedding))
            nothing = torch.stack([weight.sum() for weight in self.model.parameters()]).sum() * 0.0
            return Losses(nothing, {})
        t = torch.randint(len(self.table), (len(embedding),), device=embedding.device)
        cond = net.read(caption.states, caption.embedding, upto_end(tokens))
        sigma = self.table.to(embedding)[t]
        x0_mse = losses.x0_mse(self.model, net.whitened(embedding), sigma, cond)
        if self.training:
            self.model.measure(t, sigma, x0_mse, ~dropped[:, 0])
        return Losses(x0_mse.mean(), {"x0_mse": x0_mse.detach().mean()})

    @torch.no_grad()
    def look(self, embedding: Float[Tensor, " b d"]) -> None:
        """Add embeddings to the sums; after `measured_images` of them, fix mean and deviation."""
        if not self.training:
            return
        values, net = embedding.to(self.moments), self.model.network
        self.moments += torch.stack([values.sum(0), values.square().sum(0)])
        self.count += len(embedding)
        if self.count >= self.spec.measured_images:
            mean, square = self.moments / self.count
            net.mean.copy_(mean)
            net.std.copy_((square - mean.square()).clamp(min=0).sqrt().clamp(min=1e-4))


class CausalPriorHop:
    """Caption -> image embedding: several are drawn, the best is kept (`draws`)."""

    def __init__(
        self, trained: Trained, clip: Trained, draft: Trained | None = None, *, device: torch.device | str
    ) -> None:
        assert isinstance(trained.spec, CausalPriorStageSpec)
        self.spec, self.device = trained.spec, torch.device(device)
        self.model = PriorDenoiser(trained.spec)
        self.model.load_state_dict(trained.weights)
        self.measured = self.model.measured  # asked here: later a GPU would have to be waited for
        self.model.eval().requires_grad_(False).to(self.device)
        self.clip = clip_for(self.spec.kind, self.spec.clip_needs, clip).to(self.device)
        self.chooser = Chooser(self.clip, draft and draft_of(draft).to(self.device))

    def refuse(self, state: CascadeState, how: SamplingSpec) -> None:
        self.levels(how)
        refuse_unheard(how, "causal_prior")
        refuse_unlearned(how.guidance_scale, self.spec.guides_itself, "caption_dropout")
        if how.variance == "analytic" and not self.measured:
            raise ValueError(
                "the errors of this prior have not been measured at all noise levels, so the best variance "
                "is not known; train it for longer, or set variance: fixed_small"
            )

    def levels(self, how: SamplingSpec) -> Float[Tensor, " n"]:
        """The noise levels that a sampling visits."""
        table = schedules.sigmas(self.spec.schedule)
        low, high = float(table[0]), float(table[-1])
        return sigmas_of(how, sigma_min=low, sigma_max=high, chain=self.spec.schedule)

    def start(self, state: CascadeState, how: SamplingSpec) -> Draw:
        self.refuse(state, how)
        sigmas = self.levels(how)
        seeds = seeds_of_draws(state.seeds, how.draws)
        noise = SeededNoise(seeds, "prior")
        eps = noise(torch.empty(len(seeds), self.spec.net.embedding_width))
        x = from_vp(eps, float(sigmas[0])).to(self.device)
        return Draw(begin(how, x, sigmas, noise), rows_of_draws(state, how, self.told))

    def told(self, tokens: Int[Tensor, " b l"]) -> Conditioning:
        """Each caption as the network hears it."""
        tokens = tokens.to(self.device)
        caption = self.clip.read(tokens)
        return self.model.network.read(caption.states, caption.embedding, upto_end(tokens))

    def denoiser(self, rows: Rows) -> Denoiser:
        return clip_x0(classifier_free(self.model, rows), bound=BOUND)

    def finish(self, state: CascadeState, x0: Float[Tensor, " kb d"]) -> CascadeState:
        return self.chooser.kept(state, self.model.network.coloured(x0.float()))


def asking(spec: Spec) -> dict[str, Any]:
    """Fields of a causal prior that `refuse_other` compares, of network and chain; empty for other stages."""
    return asked(spec.net, spec.schedule, "x0") if isinstance(spec, CausalPriorStageSpec) else {}
