"""Guides of a hop: each score moves the estimate by Bayes' rule, sums add, rows do not mix."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dd_core import bundle, scores
from dd_core.cascade import CascadeSpec, CascadeState, Hop, HopSpec, run
from dd_core.denoiser import Denoised
from dd_core.guidance import by_gradient, stack
from dd_core.nets.classifier import ClassifierSpec as NetSpec
from dd_core.nets.clip import ClipNetSpec
from dd_core.nets.unet import UNetSpec
from dd_core.noise import SeededNoise
from dd_core.samplers import SamplingSpec, ddim, sample
from dd_core.schedules import ScheduleSpec, walk
from dd_core.stage import Trained
from dd_core.stages import load_hop
from dd_core.stages.chain_hop import ChainHop
from dd_core.stages.classifier import ClassifierSpec
from dd_core.stages.guides import CLEAN
from dd_core.stages.noised_clip import NoisedClipSpec
from dd_core.steering import SCORES, GradientSpec, Guides, Pull, score_of
from tests.unit.dd_core.test_chain import (
    AUTOENCODER,
    CLIP,
    GLIDE,
    LATENT,
    UNCLIP,
    UNET,
    hop,
    made,
    told,
    trained,
)
from tests.unit.dd_core.test_chain import PARENTS as CHAIN_PARENTS
from tests.unit.dd_core.test_stages import BASE
from tests.unit.dd_core.test_stages import CLIP as BASE_CLIP

NOISED = NoisedClipSpec(net=CLIP.net, start="random")
CLASSIFIER = ClassifierSpec(net=NetSpec(unet=UNET.but(level_scale=100.0), image_size=16, classes=3))
PARENTS = CHAIN_PARENTS | {
    "noised_clip": Trained(NOISED, made(NOISED, CHAIN_PARENTS).model.state_dict()),
    "classifier": Trained(CLASSIFIER, made(CLASSIFIER, {}).model.state_dict()),
}
HOP = load_hop(trained(GLIDE), PARENTS, device="cpu")
PICTURE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def asked(*seeds: int) -> CascadeState:
    caption = told("a star").repeat(len(seeds), 1)
    label, reference = torch.tensor([1] * len(seeds)), PICTURE.repeat(len(seeds), 1, 1, 1)
    return CascadeState(seeds=list(seeds), tokens=caption, label=label, reference=reference)


def how_of(**gradient: float | str) -> SamplingSpec:
    led = GradientSpec(**gradient) if gradient else None  # type: ignore[arg-type]
    return SamplingSpec(sampler="ddim", num_steps=3, guidance_scale=1.0, gradient=led)


def expected(name: str, seed: int) -> scores.Score:
    """The score of one name, put together by hand."""
    leaders = HOP.leaders  # type: ignore[attr-defined]
    noise = SeededNoise([seed], "reference")(PICTURE)
    scale = float(leaders.noised_clip.logit_scale())
    caption = leaders.clip.read(told("a star")).embedding
    tower = leaders.noised_clip
    found: dict[str, tuple[float, scores.Score]] = {
        "classes": (1.0, scores.of_class(leaders.classifier, torch.tensor([1]))),
        "caption": (scale, scores.of_caption(tower.embed_image, caption)),
        "image": (scale, scores.of_image(tower.embed_image, PICTURE, lambda like: noise)),
        "style": (1.0, scores.of_style(tower.features, PICTURE, lambda like: noise)),
        "structure": (1.0, scores.of_structure(tower.features, PICTURE, lambda like: noise)),
    }
    return scores.weighted(found[name])


def test_the_noise_of_a_reference_is_not_that_of_the_image_that_it_leads() -> None:
    draw = HOP.start(asked(4, 2**32 - 1), how_of(image=1.0))
    begun = next(draw.sampling)
    own = begun.x / (1 + begun.levels()[0] ** 2) ** 0.5
    noise = draw.rows.pull.noise  # type: ignore[union-attr]
    assert torch.allclose(own[:1], SeededNoise([4])(PICTURE), atol=1e-5)
    for mine in noise:
        assert all(torch.dist(mine, other) > 20 for other in own)  # of 768 numbers; equal ones: 0


@pytest.mark.parametrize("name", SCORES)
def test_each_score_moves_the_estimate_by_its_gradient_times_the_variance(name: str) -> None:
    """Tweedie: E[x0 | x, y] = E[x0 | x] + sigma**2 grad log p(y | x)."""
    x, sigma = 3 * torch.randn(1, 3, 16, 16), torch.tensor([2.0])
    free, led = (HOP.start(asked(4), how) for how in (how_of(), how_of(**{name: 2.5})))
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(expected(name, 4)(leaf, sigma).sum(), leaf)
    assert gradient.abs().max() > 0
    moved = HOP.denoiser(led.rows)(x, sigma)
    still = HOP.denoiser(free.rows)(x, sigma)
    torch.testing.assert_close(moved.x0, still.x0 + 4 * 2.5 * gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moved.gradient, 2.5 * gradient, rtol=1e-4, atol=1e-7)


def test_a_sum_of_scores_moves_by_the_sum() -> None:
    x, sigma = torch.randn(1, 3, 16, 16), torch.tensor([0.7])
    parts = [{"classes": 1.0}, {"caption": 2.0}, {"style": 50.0}, {"structure": 3.0}, {"image": 0.5}]

    def moved(**gradient: float) -> Tensor:
        return HOP.denoiser(HOP.start(asked(4), how_of(**gradient)).rows)(x, sigma).x0

    apart = sum(moved(**part) - moved() for part in parts)
    together = moved(**{name: value for part in parts for name, value in part.items()}) - moved()
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-6)


def test_led_and_unled_requests_share_a_batch_and_do_not_mix() -> None:
    how = [how_of(), how_of(caption=3.0, style=9.0), how_of(classes=4.0)]
    rows = [HOP.start(asked(seed), one).rows for seed, one in enumerate(how)]
    x, sigma = torch.randn(3, 3, 16, 16), torch.tensor([0.5, 2.0, 1.0])
    together = HOP.denoiser(stack(rows))(x, sigma).x0
    for place, one in enumerate(rows):
        alone = HOP.denoiser(one)(x[place : place + 1], sigma[place : place + 1]).x0
        torch.testing.assert_close(together[place : place + 1], alone, rtol=1e-4, atol=1e-5)
    assert stack([rows[0], rows[0]]).pull is None


def test_a_led_image_begins_with_the_noise_of_an_unled_one() -> None:
    starts = [next(HOP.start(asked(4), how).sampling).x for how in (how_of(), how_of(image=1.0))]
    assert torch.equal(*starts)


def mixture(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Two classes of one-pixel images, N(-1, .09) and N(2, .25), one as likely as the other: log p(y, x) up
    to the same constant, and E[x0 | x, y]."""
    mean, variance = torch.tensor([-1.0, 2.0]).to(x), torch.tensor([0.09, 0.25]).to(x)
    noisy = variance + sigma[:, None] ** 2
    log_p = -0.5 * (x[:, :1] - mean) ** 2 / noisy - 0.5 * noisy.log()
    return log_p, (variance * x[:, :1] + sigma[:, None] ** 2 * mean) / noisy


def test_with_an_exact_classifier_a_request_of_a_class_is_a_draw_from_that_class() -> None:
    def unconditional(x: Tensor, sigma: Tensor) -> Denoised:
        log_p, means = mixture(x, sigma)
        return Denoised((log_p.softmax(1) * means).sum(1, keepdim=True))

    def logits(x: Tensor, sigma: Tensor) -> Tensor:
        return mixture(x, sigma)[0]

    nothing = torch.zeros(6, 0)
    label = torch.tensor([0, 1, 0, 1, 0, 1])
    pull = Pull(torch.tensor([[1.0, 0, 0, 0, 0]] * 6), label, nothing, torch.zeros(6, 0, 1, 1), nothing)
    exact = by_gradient(unconditional, score_of(pull, Guides(logits)), scale=torch.ones(6))
    x, sigma = (
        torch.linspace(-4, 5, 6, dtype=torch.float64)[:, None],
        torch.rand(6, dtype=torch.float64) + 0.2,
    )
    torch.testing.assert_close(exact(x, sigma).x0, mixture(x, sigma)[1].gather(1, label[:, None]))

    levels = walk(ScheduleSpec(), "linspace", 200).sigmas
    count = 4000
    noise = SeededNoise(range(count))
    label = torch.arange(count) % 2
    pull = Pull(
        torch.tensor([[1.0, 0, 0, 0, 0]] * count),
        label,
        torch.zeros(count, 0),
        torch.zeros(count, 0, 1, 1),
        torch.zeros(count, 0, 1, 1),
    )
    guided = by_gradient(unconditional, score_of(pull, Guides(logits)), scale=torch.ones(count))
    start = float(levels[0]) * noise(torch.empty(count, 1, dtype=torch.float64))
    drawn = sample(ddim(start, levels, noise), guided)[:, 0]
    for y, (mean, std) in enumerate(((-1.0, 0.3), (2.0, 0.5))):
        assert drawn[label == y].mean().item() == pytest.approx(mean, abs=0.03)
        assert drawn[label == y].std().item() == pytest.approx(std, abs=0.03)


def test_in_an_ancestral_step_the_mean_moves_by_the_variance_or_by_bayes_as_asked() -> None:
    images = []
    for moves in ("mean", "estimate"):
        led = GradientSpec(classes=50.0, moves=moves)
        how = SamplingSpec(sampler="ddpm", num_steps=4, guidance_scale=1.0, spacing="linspace", gradient=led)
        images.append(run(HOP, asked(4), how).image)
    assert not torch.equal(*images)


def test_climbing_a_score_raises_it() -> None:
    def scored(**gradient: float) -> float:
        how = SamplingSpec(
            sampler="ddim",
            num_steps=12,
            guidance_scale=1.0,
            gradient=GradientSpec(**gradient) if gradient else None,  # type: ignore[arg-type]
        )
        image = run(HOP, asked(1, 2, 3, 4), how).image
        assert image is not None
        logits = HOP.leaders.classifier(image, torch.full((4,), 0.1))  # type: ignore[attr-defined]
        return float(logits.log_softmax(1)[:, 1].mean())

    assert scored(classes=30.0) > scored() + 0.01


def test_the_base_is_led_as_well() -> None:
    net: ClipNetSpec = BASE_CLIP.net
    noised = NoisedClipSpec(net=net, start="random")
    clip = Trained(BASE_CLIP, made(BASE_CLIP, {}).model.state_dict())
    parents = {"clip": clip, "noised_clip": Trained(noised, made(noised, {"clip": clip}).model.state_dict())}
    alone = BASE.but(from_draft=False)
    base: Hop = load_hop(
        Trained(alone, made(alone, {"clip": clip}).model.state_dict()), parents, device="cpu"
    )
    plain, led = (run(base, asked(1), how).image for how in (how_of(), how_of(caption=20.0)))
    assert plain is not None
    assert not torch.equal(plain, led)


@pytest.mark.parametrize(
    ("change", "how", "remedy"),
    [
        ({"label": None}, how_of(classes=1.0), "paints by class, and the request names none; give a label"),
        ({"label": torch.tensor([3])}, how_of(classes=1.0), "no class of the classifier; there are 0 to 2"),
        ({"reference": None}, how_of(image=1.0), "look at a reference picture; give one"),
        ({"reference": PICTURE[:, :1]}, how_of(style=1.0), "not RGB; convert it to RGB"),
    ],
)
def test_a_request_that_cannot_be_led_is_refused(
    change: dict[str, Tensor | None], how: SamplingSpec, remedy: str
) -> None:
    with pytest.raises(ValueError, match=remedy):
        HOP.start(asked(1)._replace(**change), how)


def test_guides_that_are_not_there_or_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="gradient asks a classifier, and this hop has none; name it in"):
        hop(GLIDE).start(asked(1), how_of(classes=1.0))
    three = "a classifier, a clip and a noised_clip, and this hop has none; name them in its guides"
    with pytest.raises(ValueError, match=three):
        hop(GLIDE).start(asked(1), how_of(classes=1.0, caption=1.0))
    with pytest.raises(ValueError, match=three):
        HOP.leaders._replace(classifier=None, noised_clip=None, clip=None).refuse(  # type: ignore[attr-defined]
            GradientSpec(classes=1.0, caption=1.0), asked(1), 16
        )
    with pytest.raises(
        ValueError, match=r"asks a clip and a noised_clip, .*\{clip: its stage, noised_clip: its"
    ):
        HopSpec(stage="base", how=how_of(caption=1.0))
    small = ClassifierSpec(net=NetSpec(unet=UNetSpec(width=16, channel_mult=(1,), head_width=8, groups=4,
                           attention_at=()), image_size=8, classes=3))  # fmt: skip
    other = PARENTS | {"classifier": Trained(small, made(small, {}).model.state_dict())}
    with pytest.raises(ValueError, match="'classifier' reads 8 px, its hop paints 16"):
        load_hop(trained(GLIDE), other, device="cpu").start(asked(1), how_of(classes=1.0))
    with pytest.raises(ValueError, match="pulls nowhere"):
        GradientSpec()


def quantising(codes: int) -> Trained:
    """The autoencoder with a codebook."""
    torch.manual_seed(3)
    spec = AUTOENCODER.but(net=AUTOENCODER.net.but(codes=codes))
    return Trained(spec, made(spec, {}).model.state_dict())


@pytest.mark.parametrize("codes", [0, 32])
@pytest.mark.parametrize("name", SCORES)
def test_latents_are_led_through_what_they_decode_to(name: str, codes: int) -> None:
    """The move is sigma**2 times the gradient of the score of the decoded estimate, past any codebook."""
    parents = PARENTS if not codes else PARENTS | {"autoencoder": quantising(codes)}
    latent = load_hop(trained(LATENT), parents, device="cpu")
    x, sigma = 3 * torch.randn(1, 4, 8, 8), torch.tensor([2.0])
    free, led = (
        latent.start(asked(4), how) for how in (how_of(), how_of(**{name: 0.5}))
    )  # whose moves float32 adds to 1e-5
    plain, decode = latent.denoiser(free.rows), latent.autoencoder.decode  # type: ignore[attr-defined]
    leaf = x.clone().requires_grad_()
    score = expected(name, 4)(decode(plain(leaf, sigma).x0), torch.tensor([CLEAN])).sum()
    (gradient,) = torch.autograd.grad(score, leaf)
    assert gradient.abs().max() > 0
    with torch.no_grad():  # as samplers ask
        moved, still = latent.denoiser(led.rows)(x, sigma), plain(x, sigma)
    torch.testing.assert_close(moved.x0, still.x0 + 4 * 0.5 * gradient, rtol=1e-4, atol=1e-5)
    assert not moved.x0.requires_grad


def test_a_latent_chain_is_led_from_noise_to_picture_and_by_smaller_guides() -> None:
    small = ClassifierSpec(net=NetSpec(unet=UNET.but(level_scale=100.0), image_size=8, classes=3))
    smaller = PARENTS | {"classifier": Trained(small, made(small, {}).model.state_dict())}
    for parents in (PARENTS, {role: one for role, one in smaller.items() if role != "noised_clip"}):
        latent = load_hop(trained(LATENT), parents, device="cpu")
        found: list[float] = []
        for how in (how_of(), how_of(classes=30.0)):
            end = run(latent, asked(1), how.but(num_steps=8))
            assert end.image is not None
            classifier = latent.leaders.classifier  # type: ignore[attr-defined]
            side = classifier.network.spec.image_size
            seen = torch.nn.functional.adaptive_avg_pool2d(end.image, side)
            found.append(float(classifier(seen, torch.tensor([CLEAN])).log_softmax(-1)[0, 1]))
        assert found[1] > found[0]
    with pytest.raises(ValueError, match="read pictures of two sizes"):
        load_hop(trained(LATENT), smaller, device="cpu").start(asked(1), how_of(classes=1.0))


def test_a_noised_clip_is_told_captions_by_the_clip_that_it_was_trained_with(tmp_path: Path) -> None:
    """The decoder of unCLIP hears embeddings of a CLIP of its own."""
    other = Trained(CLIP, {name: 1.01 * weight for name, weight in PARENTS["clip"].weights.items()})
    stages = {
        "own": other,
        "clip": PARENTS["clip"],
        "noised": PARENTS["noised_clip"],
        "base": trained(UNCLIP),
    }
    digests: dict[str, str] = {}
    for name, one in stages.items():
        roles = {"noised": {"clip": "clip"}, "base": {"clip": "own"}}.get(name, {})
        named = {role: digests[parent] for role, parent in roles.items()}
        digests[name] = bundle.save(tmp_path / name, one.spec, one.weights, parents=named, facts={})
    directories = {name: tmp_path / name for name in stages}
    hops = [
        HopSpec(stage="base", how=how_of(caption=5.0), guides={"noised_clip": "noised", "clip": clip})
        for clip in ("own", "clip")
    ]
    wrong, right = (CascadeSpec(name="led", hops=(one,), context_length=12, image_size=16) for one in hops)
    with pytest.raises(ValueError, match=r"guides\.clip is 'own', but 'noised' was trained with 'clip'"):
        bundle.save_cascade(tmp_path / "wrong", wrong, directories, card="")
    bundle.save_cascade(tmp_path / "cascade", right, directories, card="")
    (opened,) = bundle.load_cascade(tmp_path / "cascade").hops
    assert isinstance(opened, ChainHop)
    for clip, mine in ((opened.clip, other), (opened.leaders.clip, PARENTS["clip"])):
        assert clip is not None
        assert all(torch.equal(clip.state_dict()[name], weight) for name, weight in mine.weights.items())


def test_a_cascade_on_disk_opens_a_hop_with_the_guides_that_it_names(tmp_path: Path) -> None:
    led = how_of(classes=20.0, caption=5.0)
    guides = {"noised_clip": "noised", "clip": "clip", "classifier": "judge"}
    cascade = CascadeSpec(
        name="led",
        hops=(HopSpec(stage="base", how=led, guides=guides),),
        context_length=12,
        image_size=16,
    )
    stages = {"clip": PARENTS["clip"], "noised": PARENTS["noised_clip"], "judge": PARENTS["classifier"]}
    stages |= {"first": trained(GLIDE), "base": trained(GLIDE)}
    digests: dict[str, str] = {}
    for name, one in stages.items():
        parents = {"noised": {"clip": "clip"}, "base": {"start": "first"}}.get(name, {})
        named = {role: digests[parent] for role, parent in parents.items()}
        digests[name] = bundle.save(tmp_path / name, one.spec, one.weights, parents=named, facts={})
    directories = {name: tmp_path / name for name in stages}
    bundle.save_cascade(tmp_path / "cascade", cascade, directories, card="led")
    opened = bundle.load_cascade(tmp_path / "cascade")
    assert torch.equal(run(opened.hops[0], asked(1), led).image, run(HOP, asked(1), led).image)
    ranks = bundle.parent_of_hops(tmp_path / "cascade", cascade, "clip")  # nothing but guides stands on it
    assert ranks is not None
    assert all(torch.equal(ranks.weights[name], weight) for name, weight in PARENTS["clip"].weights.items())
    assert bundle.parent_of_hops(tmp_path / "cascade", cascade, "draft") is None
    with pytest.raises(ValueError, match="hop 'judge' has no bundle"):
        bundle.save_cascade(
            tmp_path / "other", cascade, {k: v for k, v in directories.items() if k != "judge"}, card=""
        )
