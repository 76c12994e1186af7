"""The autoregressive prior of unCLIP: caption -> CLIP image embedding, code by code.

It takes the place of the diffusion prior in a cascade.  Its sampling is one query with pure noise, each
number of which draws one code (`chosen_code`), so a seed fixes the embedding.  The answer takes one
call of the network per axis; of `SamplingSpec` only `guidance_scale` and `draws` apply.

Source: Ramesh et al. 2022 (arXiv:2204.06125), section 2.2.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from dd_core import embeddings
from dd_core.cascade import CascadeState, Draw
from dd_core.denoiser import Conditioning, Denoised, Denoiser, cat
from dd_core.guidance import Rows
from dd_core.nets.clip import Clip
from dd_core.nets.code_prior import CodePrior, CodePriorSpec
from dd_core.nets.whitening import nothing_of
from dd_core.noise import SeededNoise
from dd_core.ranks import gathered
from dd_core.samplers import Query, Sampling, SamplingSpec
from dd_core.stage import LearnsEmbeddings, Losses, PairBatch, Stage, Trained
from dd_core.stages.captions import null_like
from dd_core.stages.clip import clip_for, embedding_of
from dd_core.stages.draft import draft_of
from dd_core.stages.draws import Chooser, rows_of_draws, seeds_of_draws
from dd_core.stages.refusals import refuse_unheard, refuse_unlearned


class AutoregressivePriorSpec(LearnsEmbeddings):
    """Autoregressive prior on the embeddings of the parent CLIP."""

    kind: Literal["autoregressive_prior"] = "autoregressive_prior"
    net: CodePriorSpec
    measured_images: int = Field(2048, ge=1)
    """The first so many training images, whose embeddings fix the axes and buckets; until these are seen
    nothing is learned and the loss is 0."""

    @model_validator(mode="after")
    def _fits(self) -> "AutoregressivePriorSpec":
        if self.measured_images < 2 * self.net.axes:
            raise ValueError(
                f"measured_images {self.measured_images} are too few for {self.net.axes} axes; "
                f"take {2 * self.net.axes} or more"
            )
        return self

    @property
    def looks_at(self) -> int:
        """Images whose embeddings fix the axes."""
        return self.measured_images


class AutoregressivePriorStage(Stage):
    """Looks at the first embeddings to find the axes, then learns to continue captions by codes."""

    model: CodePrior
    looked: Float[Tensor, " n d"]
    nearness: Float[Tensor, " n"]
    count: Tensor
    """Images looked at.  A buffer, as the two above, so that a resumed run finds the same axes."""

    def __init__(self, spec: AutoregressivePriorSpec, clip: Trained) -> None:
        super().__init__()
        self.spec = spec
        self.model = CodePrior(spec.net)
        self.register_buffer("looked", torch.zeros(spec.measured_images, spec.net.embedding_width))
        self.register_buffer("nearness", torch.zeros(spec.measured_images))
        self.register_buffer("count", torch.tensor(0))
        self.freeze(clip_for(spec.kind, spec.clip_needs, clip))

    def has_begun(self) -> None:
        self.count.fill_(self.spec.measured_images)

    def forward(self, batch: PairBatch, phase: str = "model") -> Losses:
        clip = self.frozen[0]
        assert isinstance(clip, Clip)
        dropped = torch.rand(len(batch.tokens), 1, device=batch.tokens.device) < self.spec.caption_dropout
        with torch.no_grad():
            embedding = embedding_of(clip, batch)
            nearness = (embedding * clip.read(batch.tokens).embedding).sum(1)
            caption = clip.read(torch.where(dropped, null_like(batch.tokens), batch.tokens))
        if self.count < self.spec.measured_images:
            self.look(gathered(embedding), gathered(nearness))
            return Losses(nothing_of(self.model), {})
        codes, product = self.model.codes(embedding), self.model.product_codes(nearness)
        logits = self.model(self.model.read(caption), product, codes[:, :-1])
        nats = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())
        return Losses(nats, {"nats": nats.detach()})

    @torch.no_grad()
    def look(self, embedding: Float[Tensor, " b d"], nearness: Float[Tensor, " b"]) -> None:
        """Store embeddings and nearnesses; once `measured_images` are stored, find the axes."""
        if not self.training:
            return
        start = int(self.count)
        stop = min(start + len(embedding), self.spec.measured_images)
        self.looked[start:stop] = embedding[: stop - start]
        self.nearness[start:stop] = nearness[: stop - start]
        self.count.fill_(stop)
        if stop == self.spec.measured_images:
            self.model.measure(embeddings.fit_pca(self.looked, self.spec.net.axes), self.nearness)


class AutoregressivePriorHop:
    """Caption -> image embedding: several are drawn, the best is kept (`draws`)."""

    def __init__(
        self, trained: Trained, clip: Trained, draft: Trained | None = None, *, device: torch.device | str
    ) -> None:
        assert isinstance(trained.spec, AutoregressivePriorSpec)
        self.spec, self.device = trained.spec, torch.device(device)
        self.model = CodePrior(trained.spec.net)
        self.model.load_state_dict(trained.weights)
        if not self.model.products.any():
            raise ValueError(
                f"this prior has not seen its first {trained.spec.measured_images} images, "
                "so it has no axes; train it longer"
            )
        self.model.eval().requires_grad_(False).to(self.device)
        self.clip = clip_for(self.spec.kind, self.spec.clip_needs, clip).to(self.device)
        self.chooser = Chooser(self.clip, draft and draft_of(draft).to(self.device))

    def refuse(self, state: CascadeState, how: SamplingSpec) -> None:
        refuse_unheard(how, "autoregressive_prior")
        refuse_unlearned(how.guidance_scale, self.spec.guides_itself, "caption_dropout")

    def start(self, state: CascadeState, how: SamplingSpec) -> Draw:
        self.refuse(state, how)
        seeds = seeds_of_draws(state.seeds, how.draws)
        noise = SeededNoise(seeds, "prior")
        x = noise(torch.empty(len(seeds), 1 + self.spec.net.axes)).to(self.device)
        return Draw(one_answer(x), rows_of_draws(state, how, self.told))

    def told(self, tokens: Int[Tensor, " b l"]) -> Conditioning:
        """Each caption as the network hears it."""
        return Conditioning(text=self.model.read(self.clip.read(tokens.to(self.device))))

    def denoiser(self, rows: Rows) -> Denoiser:
        """Draws all codes of each row, by the guided logits: null + scale * (caption - null)."""
        guided = (rows.scale != 1).nonzero()[:, 0]
        both = cat([rows.cond, rows.null.pick(guided)]).text
        assert both is not None

        def written(x: Float[Tensor, " b k_plus_1"], sigma: Float[Tensor, " b"]) -> Denoised:
            picked, scale = guided.to(x.device), rows.scale[guided].to(x)[:, None]
            product, memories, codes = self.near(x[:, 0]), self.model.memories(), list[Tensor]()
            places = self.model.begin(both, torch.cat([product, product[picked]]))
            for eps in x[:, 1:].unbind(1):
                logits = self.model.logits(places, memories)[:, -1].float()
                with_caption, without = logits[: len(x)], logits[len(x) :]
                pushed = torch.lerp(without, with_caption[picked], scale)
                code = chosen_code(with_caption.index_copy(0, picked, pushed), eps)
                codes.append(code)
                places = self.model.said(torch.cat([code, code[picked]])[:, None])
            return Denoised(self.model.embedding(torch.stack(codes, 1)))

        return written

    def near(self, eps: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Code of the nearness of image and caption, drawn from the nearer half of the data."""
        seen = self.model.products
        nearer = (seen.cumsum(0) - (seen.sum() + 1) // 2).clamp(min=0).diff(prepend=seen.new_zeros(1))
        return chosen_code(nearer.double().log().expand(len(eps), -1), eps)

    def finish(self, state: CascadeState, x0: Float[Tensor, " kb d"]) -> CascadeState:
        return self.chooser.kept(state, x0)


def one_answer(x: Float[Tensor, " b k"]) -> Sampling:
    """A sampling of one query, whose answer is the result."""
    return (yield Query(x, 1.0)).x0


def chosen_code(logits: Float[Tensor, " b k"], eps: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """A draw from softmax(logits) by inverse CDF; eps ~ N(0, 1) decides, so a seed fixes the code."""
    uniform = (1 + (eps / 2**0.5).erf()) / 2
    below = logits.double().softmax(-1).cumsum(-1) < uniform[:, None]
    return below.sum(-1).clamp(max=logits.shape[-1] - 1)
