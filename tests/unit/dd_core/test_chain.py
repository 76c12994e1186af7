"""A stage on a discrete chain: what it learns, what it is told, and that its hop samples as published."""

import math

import pytest
import torch
from torch import Tensor

from dd_core import likelihood, schedules
from dd_core.cascade import CascadeState, Hop, run
from dd_core.denoiser import Conditioning, Denoised, output_from
from dd_core.losses import output_weight
from dd_core.nets.autoencoder import AutoencoderNetSpec
from dd_core.nets.clip import ClipNetSpec
from dd_core.nets.dit import DiTSpec
from dd_core.nets.network import PlainSpec
from dd_core.nets.packed import upto_end
from dd_core.nets.text import CaptionedSpec, TextSpec, UnclipSpec
from dd_core.nets.unet import UNetSpec
from dd_core.noise import SeededNoise, karras_sigmas
from dd_core.samplers import SamplingSpec, sample
from dd_core.schedules import LogNormalSpec, ScheduleSpec
from dd_core.stage import PairBatch, Stage, Trained
from dd_core.stages import StageSpec, build_stage, load_hop
from dd_core.stages.autoencoder import AutoencoderSpec
from dd_core.stages.chain import ChainStage
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.chain_told import counted, holes, seen
from dd_core.stages.clip import ClipSpec
from dd_core.text import tokens

LENGTH = 12
CLIP = ClipSpec(
    net=ClipNetSpec(
        embedding_width=16,
        image_size=16,
        patch_size=8,
        image_width=16,
        image_layers=1,
        context_length=LENGTH,
        text_width=16,
        text_layers=1,
        head_width=8,
    )
)
AUTOENCODER = AutoencoderSpec(
    net=AutoencoderNetSpec(width=8, channel_mult=(1, 1), blocks=1, groups=4, mid_attention=False),
    image_size=16,
    crop=16,
    perceptual="none",
)
UNET = UNetSpec(
    width=16,
    channel_mult=(1, 2),
    blocks_per_level=1,
    attention_at=(2,),
    head_width=8,
    groups=4,
    level_scale=1,
)
SMALL = ScheduleSpec(betas="cosine", num_timesteps=50)


def plain(learned: bool = False, channels: int = 3, **more: object) -> PlainSpec:
    return PlainSpec(unet=UNET.but(**more), in_channels=channels, out_channels=channels * (1 + learned))


DDPM = ChainSpec(net=plain(), image_size=16, told_dropout=0.0)
BARE = DDPM.but(net=plain(channel_mult=(1,), attention_at=(), attention_in_middle=False), image_size=8)
IMPROVED = DDPM.but(net=plain(learned=True), loss="hybrid", schedule=SMALL, rescaled_time=True)
BOUND = IMPROVED.but(loss="vlb")
GLIDE = ChainSpec(
    net=CaptionedSpec(
        unet=UNET.but(text_width=16),
        text=TextSpec(width=16, layers=1, heads=2, context_length=LENGTH, vocab_size=49408),
    ),
    image_size=16,
    loss="hybrid",
    told_dropout=0.2,
    schedule=ScheduleSpec(betas="cosine", num_timesteps=1000),
)
UNCLIP = ChainSpec(
    net=UnclipSpec(
        unet=UNET.but(text_width=16, text_at_level=False, level_told=True, embedding_width=16),
        states_width=16,
    ),
    image_size=16,
    loss="hybrid",
    told_dropout=0.5,
)
CLASSES = DDPM.but(net=plain(labels=4), told_dropout=0.1)
EDM = DDPM.but(net=plain(labels=3, dropout=0.1), schedule=LogNormalSpec(), predicts="edm")
FROZEN = DDPM.but(
    net=plain(attention="cross", text_width=16, text_at_level=False), predicts="v", told_dropout=0.1
)
TRANSFORMER = ChainSpec(
    net=DiTSpec(
        image_size=16, stem=2, conv_width=8, conv_blocks=1, width=16, layers=1, head_width=8, text_width=16
    ),
    image_size=16,
    predicts="x0",
)
LATENT = DDPM.but(
    net=plain(channels=4, attention="cross", text_width=16, text_at_level=False),
    latent_channels=4,
    schedule=ScheduleSpec(betas="scaled_linear", beta_start=0.00085, beta_end=0.012, last="first"),
    told_dropout=0.1,
)
JOINT = LATENT.but(
    net=CaptionedSpec(
        unet=UNET.but(attention="cross", text_width=16, text_at_level=False),
        text=TextSpec(width=16, layers=1, heads=2, context_length=LENGTH, vocab_size=49408),
        in_channels=4,
        out_channels=4,
    )
)
ENLARGING = DDPM.but(net=plain(learned=True, image_channels=3), loss="hybrid", factor=4)
UNATTENDED = plain(image_channels=3, attention_at=(), attention_in_middle=False)
FILLING_ENLARGING = ENLARGING.but(net=plain(learned=True, image_channels=7), inpaints=True)
BLURRED = DDPM.but(net=UNATTENDED, factor=4, degrades="blur", crop=8)
DEGRADED = BLURRED.but(degrades="bsr")
INPAINTING = GLIDE.but(
    net=GLIDE.net.but(unet=GLIDE.net.unet.but(image_channels=4)),  # type: ignore[union-attr]
    inpaints=True,
)
LATENT_INPAINTING = LATENT.but(
    net=plain(channels=4, attention="cross", text_width=16, text_at_level=False, image_channels=5),
    inpaints=True,
)
SPECS = {
    "ddpm": DDPM,
    "improved": IMPROVED,
    "bound": BOUND,
    "glide": GLIDE,
    "unclip": UNCLIP,
    "classes": CLASSES,
    "edm": EDM,
    "frozen": FROZEN,
    "transformer": TRANSFORMER,
    "latent": LATENT,
    "joint": JOINT,
    "enlarging": ENLARGING,
    "blurred": BLURRED,
    "degraded": DEGRADED,
    "inpainting": INPAINTING,
    "latent_inpainting": LATENT_INPAINTING,
    "latent_inpainting_mask_first": LATENT_INPAINTING.but(mask_of="hole"),
}


def told(*captions: str) -> Tensor:
    return torch.tensor(tokens(captions, LENGTH))


def made(spec: StageSpec, parents: dict[str, Trained]) -> Stage:
    """A stage with no weight left at zero, so that everything it is told may matter."""
    torch.manual_seed(0)
    stage = build_stage(spec, parents)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return stage


PARENTS = {
    "clip": Trained(CLIP, made(CLIP, {}).model.state_dict()),
    "autoencoder": Trained(AUTOENCODER, made(AUTOENCODER, {}).model.state_dict()),
}


def trained(spec: ChainSpec) -> Trained:
    return Trained(spec, made(spec, PARENTS).model.state_dict())


def hop(spec: ChainSpec) -> Hop:
    return load_hop(trained(spec), PARENTS, device="cpu")


def asked(seeds: list[int], *captions: str, **more: Tensor) -> CascadeState:
    small = torch.linspace(-1, 1, 4).expand(len(seeds), 3, 4, 4)
    label = torch.arange(len(seeds)) % 3
    return CascadeState(seeds=seeds, tokens=told(*captions), image=small, label=label)._replace(**more)


def drawn(spec: ChainSpec, state: CascadeState, how: SamplingSpec) -> Tensor:
    image = run(hop(spec), state, how).image
    assert image is not None
    return image


def how_of(spec: ChainSpec, **more: object) -> SamplingSpec:
    scale = 2.0 if spec.guides_itself else 1.0
    return SamplingSpec(**{"sampler": "ddim", "num_steps": 3, "guidance_scale": scale, "eta": 0.5} | more)


def batch(count: int = 4) -> PairBatch:
    image = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8)
    captions = ["a red circle", "a blue star", "two", "a cross"][:count]
    return PairBatch(image, told(*captions), torch.arange(count) % 3)


@pytest.mark.parametrize("name", SPECS)
def test_every_trained_weight_can_learn(name: str) -> None:
    stage = made(SPECS[name], PARENTS)
    torch.manual_seed(3)
    stage(batch()).total.backward()
    still = [key for key, p in stage.named_parameters() if p.grad is None]
    assert still == []  # as data parallelism asks
    zero = [key for key, p in stage.named_parameters() if not p.grad.any()]
    assert zero in ([], ["model.network.no_embedding"])  # none was dropped in this batch
    assert all(not p.requires_grad for parent in stage.frozen for p in parent.parameters())
    assert len(stage.frozen) == len(SPECS[name].needs)


@pytest.mark.parametrize("name", SPECS)
def test_a_seed_gives_the_same_draw_alone_and_in_company(name: str) -> None:
    spec = SPECS[name]
    how = how_of(spec)
    together = drawn(spec, asked([5, 6, 7], "a red circle", "a blue star", "a cross"), how)
    one = asked([6], "a blue star", label=torch.tensor([1]))
    alone = drawn(spec, one, how)
    torch.testing.assert_close(together[1:2], alone, atol=1e-2, rtol=0)  # one of 256 levels
    assert torch.equal(alone, drawn(spec, one, how))
    assert not torch.equal(alone, drawn(spec, one._replace(seeds=[7]), how))


def published_ddpm(spec: ChainSpec, seed: int, t_of: list[int], variance: str) -> Tensor:
    """Ancestral sampling in DDPM's own frame, with its own coefficients, asking the network itself."""
    hopped = hop(spec)
    network, noise = hopped.model.network, SeededNoise([seed])  # type: ignore[attr-defined]
    bars = schedules.alpha_bars(spec.schedule)
    x = noise(torch.empty(1, 3, spec.image_size, spec.image_size))
    for i in reversed(range(len(t_of))):
        bar, before = bars[t_of[i]], bars[t_of[i - 1]] if i else torch.tensor(1.0, dtype=torch.float64)
        beta = 1 - bar / before
        told_t = torch.tensor([float(t_of[i])]) * (1000 / len(bars) if spec.rescaled_time else 1)
        with torch.no_grad():
            out = network(x, told_t, Conditioning())
        eps, v = out[:, :3], out[:, 3:]
        x0 = ((x.double() - (1 - bar).sqrt() * eps) / bar.sqrt()).clamp(-1, 1)
        mean = before.sqrt() * beta / (1 - bar) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - bar) * x
        tilde = beta * (1 - before) / (1 - bar)
        if not i:
            return mean.float()
        match variance:
            case "learned":
                share = (v.double() + 1) / 2
                log_var = share * beta.log() + (1 - share) * tilde.log()
            case "fixed_small":
                log_var = tilde.log()
            case _:
                log_var = beta.log()
        x = (mean + (log_var / 2).exp() * noise(x)).float()
    return x


@pytest.mark.parametrize(
    ("spec", "steps", "variance"),
    [
        (BARE.but(schedule=ScheduleSpec(num_timesteps=250)), 250, "fixed_large"),
        (DDPM, 25, "fixed_small"),
        (IMPROVED, 50, "learned"),
        (IMPROVED, 10, "learned"),
        (IMPROVED, 10, "fixed_small"),
    ],
    ids=["ddpm-250-large", "ddpm-25-small", "improved-all", "improved-10", "improved-10-small"],
)
def test_the_hop_is_ddpm_as_published_on_the_same_network(spec: ChainSpec, steps: int, variance: str) -> None:
    how = SamplingSpec(
        sampler="ddpm", num_steps=steps, variance=variance, spacing="linspace", guidance_scale=1.0
    )
    chosen = schedules.timesteps("linspace", spec.schedule.num_timesteps, steps).tolist()
    hopped = hop(spec)
    draw = hopped.start(asked([3], "a star"), how)
    found = sample(draw.sampling, hopped.denoiser(draw.rows))
    torch.testing.assert_close(found, published_ddpm(spec, 3, chosen, variance), atol=2e-4, rtol=0)


def test_the_last_step_of_latent_diffusion_stops_at_the_first_timestep() -> None:
    """DDIM as published there: x_prev = sqrt(bar_0) x0 + sqrt(1 - bar_0) eps at the end, never x0 itself."""
    spec, how = LATENT, SamplingSpec(sampler="ddim", num_steps=2, spacing="ldm_plus_one", guidance_scale=1.0)
    hopped, state = hop(spec), asked([3], "a star")
    draw = hopped.start(state, how)
    found = sample(draw.sampling, hopped.denoiser(draw.rows))
    bars = schedules.alpha_bars(spec.schedule)
    x = SeededNoise([3])(torch.empty(1, 4, 8, 8))
    for t, before in ((501, bars[1]), (1, bars[0])):
        with torch.no_grad():
            eps = hopped.model.network(x, torch.tensor([float(t)]), draw.rows.cond)  # type: ignore[attr-defined]
        x0 = (x.double() - (1 - bars[t]).sqrt() * eps) / bars[t].sqrt()
        x = (before.sqrt() * x0 + (1 - before).sqrt() * eps).float()
    torch.testing.assert_close(found, x, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("spacing", ["karras", "trailing", "linspace"])
def test_every_sampler_walks_a_chain(sampler: str, spacing: str) -> None:
    how = SamplingSpec(sampler=sampler, num_steps=4, spacing=spacing, guidance_scale=2.0)
    hopped = hop(GLIDE)
    draw = hopped.start(asked([1], "a star"), how)
    found = sample(draw.sampling, hopped.denoiser(draw.rows))
    assert found.shape == (1, 3, 16, 16)
    assert float(found.abs().max()) <= 1 + 1e-5  # it ends in an estimate, in range before it is quantised
    assert float(found.std()) > 0.01


def test_an_empty_caption_is_all_padding_and_a_long_one_counts_to_its_end() -> None:
    both = told("", "a red circle")
    assert counted(both)[0].sum() == 0
    assert counted(both)[1].sum() == upto_end(both)[1].sum() == 5
    assert upto_end(both)[0].sum() == 2


@pytest.mark.parametrize("spec", [GLIDE, JOINT], ids=["glide", "joint"])
def test_what_stands_behind_the_end_of_a_caption_is_not_heard(spec: ChainSpec) -> None:
    state = asked([1], "a star")
    changed = state.tokens.clone()
    changed[:, -1] = 7
    how = how_of(spec)
    assert torch.equal(drawn(spec, state, how), drawn(spec, state._replace(tokens=changed), how))
    assert not torch.equal(drawn(spec, state, how), drawn(spec, asked([1], "a cross"), how))


def test_a_latent_model_that_reads_captions_itself_stands_on_no_clip() -> None:
    assert JOINT.needs == ("autoencoder",)
    assert LATENT.needs == ("clip", "autoencoder")
    build_stage(JOINT, {"autoencoder": PARENTS["autoencoder"]})


@pytest.mark.parametrize("name", ["glide", "frozen", "joint", "transformer", "classes", "unclip"])
def test_at_scale_zero_nothing_told_is_heard_and_at_one_no_negative(name: str) -> None:
    spec = SPECS[name]
    deaf, plain_how = how_of(spec, guidance_scale=0.0), how_of(spec, guidance_scale=1.0)
    first = asked([1], "a star", label=torch.tensor([0]), image_embedding=torch.ones(1, 16) / 4)
    other = asked([1], "a red box", label=torch.tensor([2]), image_embedding=-torch.ones(1, 16) / 4)
    assert torch.equal(drawn(spec, first, deaf), drawn(spec, other, deaf))
    assert not torch.equal(drawn(spec, first, plain_how), drawn(spec, other, plain_how))
    negative = first._replace(negative=told("a red box"))
    assert torch.equal(drawn(spec, first, plain_how), drawn(spec, negative, plain_how))


def test_a_learned_variance_is_that_of_the_conditional_row_whatever_the_scale() -> None:
    hopped, state = hop(GLIDE), asked([1], "a star")
    x, sigma = torch.randn(1, 3, 16, 16), torch.tensor([2.0])
    fractions = []
    for scale in (0.0, 1.0, 3.0):
        draw = hopped.start(state, how_of(GLIDE, guidance_scale=scale))
        fractions.append(hopped.denoiser(draw.rows)(x, sigma).variance_fraction)
    torch.testing.assert_close(fractions[0], fractions[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(fractions[2], fractions[1], atol=1e-6, rtol=1e-5)


def pictures(count: int) -> PairBatch:
    """Dark for "night", bright for "day", each pixel a little different."""
    bright = torch.randint(0, 2, (count,))
    image = (40 + 160 * bright[:, None, None, None] + torch.randint(0, 20, (count, 3, 8, 8))).to(torch.uint8)
    words = told("night", "day")
    return PairBatch(image, words[bright], bright)


def beaten(spec: ChainSpec, steps: int) -> tuple[ChainStage, float, float]:
    """A stage trained for some steps; its loss, and that of the best denoiser which knows no more than the
    mean and the variance of the pixels: the baseline, linear in x and exact for Gaussians."""
    torch.manual_seed(0)
    stage = build_stage(spec, PARENTS)
    assert isinstance(stage, ChainStage)
    optimizer = torch.optim.Adam(stage.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        found = stage(pictures(16))
        found.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(found.parts["mse"]))
    values = pictures(512).image / 127.5 - 1
    variance = float(values.var())
    sigma = schedules.sigmas(spec.schedule)
    baseline = float((variance * sigma**2 / (variance + sigma**2)).mean())  # E|x0 - E[x0|x]|^2
    return stage, sum(losses[-20:]) / 20, baseline


@pytest.fixture(scope="module")
def night_and_day() -> tuple[Trained, float, float]:
    unet = UNET.but(channel_mult=(1,), attention_at=(), text_width=16)
    spec = GLIDE.but(net=GLIDE.net.but(unet=unet), image_size=8, predicts="x0")  # type: ignore[union-attr]
    stage, loss, baseline = beaten(spec, 150)
    return Trained(spec, stage.model.state_dict()), loss, baseline


def test_a_short_training_beats_the_best_linear_denoiser(night_and_day: tuple[Trained, float, float]) -> None:
    _, loss, baseline = night_and_day
    assert loss < 0.8 * baseline, (loss, baseline)


@pytest.mark.parametrize(
    "how",
    [
        SamplingSpec(sampler="ddpm", num_steps=20, spacing="linspace", guidance_scale=3.0),
        SamplingSpec(sampler="ddim", num_steps=15, spacing="linspace", guidance_scale=3.0),
        SamplingSpec(num_steps=10, guidance_scale=3.0, dynamic_threshold=0.98),
    ],
    ids=["ddpm", "ddim", "dpmpp"],
)
def test_what_it_learned_is_painted_as_told(
    night_and_day: tuple[Trained, float, float], how: SamplingSpec
) -> None:
    hopped = load_hop(night_and_day[0], {}, device="cpu")
    state = CascadeState(seeds=[1, 2, 3, 4], tokens=told("night", "day", "night", "day"))
    image = run(hopped, state, how).image
    assert image is not None
    mean = image.mean((1, 2, 3))
    assert (mean[1::2] > mean[::2].max() + 0.4).all(), mean


def test_a_variation_stays_the_nearer_the_fewer_steps_it_takes(
    night_and_day: tuple[Trained, float, float],
) -> None:
    hopped = load_hop(night_and_day[0], {}, device="cpu")
    known = pictures(1).image / 127.5 - 1
    state = CascadeState(seeds=[1], tokens=told("day" if known.mean() < 0 else "night"), known=known)
    far = []
    for strength in (0.1, 0.5, 1.0):
        how = SamplingSpec(sampler="ddim", num_steps=10, guidance_scale=3.0, strength=strength)
        image = run(hopped, state, how).image
        assert image is not None
        far.append(float((image - known).square().mean()))
    assert far[0] < 0.05
    assert far[0] < far[2]
    assert far[1] < far[2] + 0.05


@pytest.mark.parametrize("spec", [BLURRED, DEGRADED], ids=lambda spec: spec.degrades)
def test_an_enlarging_model_trains_on_crops_and_paints_whole_pictures(spec: ChainSpec) -> None:
    stage = made(spec, {})
    shown: list[torch.Size] = []
    stage.model.register_forward_pre_hook(lambda _, told: shown.append(told[0].shape))
    assert stage(batch()).total.isfinite()
    assert shown == [(4, 3, 8, 8)]
    assert drawn(spec, asked([1], "a"), how_of(spec)).shape == (1, 3, 16, 16)


def test_importance_sampling_survives_in_the_state_and_reweighs() -> None:
    stage = made(BOUND.but(schedule=ScheduleSpec(betas="cosine", num_timesteps=4)), PARENTS)
    assert isinstance(stage, ChainStage)
    assert stage.timesteps is not None
    for _ in range(30):
        stage(batch())
    assert (stage.timesteps.seen >= 10).all()
    chances = stage.timesteps.probabilities()
    assert chances.max() > 1.2 * chances.min()
    again = made(stage.spec, PARENTS)
    again.load_state_dict(stage.state_dict())
    assert torch.equal(again.timesteps.probabilities(), chances)  # type: ignore[union-attr]
    stage.eval()
    before = stage.timesteps.seen.clone()
    stage(batch())
    assert torch.equal(stage.timesteps.seen, before)


def test_the_weights_of_the_loss_are_those_of_what_is_predicted() -> None:
    """With the estimate x0 + d the loss is d**2 / sigma**2, d**2, d**2 (1 + 1 / sigma**2) for eps, x0, v, and
    for edm d**2 (4 + 1 / sigma**2)."""
    x0, x, sigma = (
        torch.randn(3, 5, 3, dtype=torch.float64).unbind(0)[0],
        torch.randn(5, 3),
        torch.rand(5) + 0.3,
    )
    level = sigma[:, None].double()
    for predicts in ("eps", "x0", "v", "edm"):
        d = 0.1
        apart = output_from(predicts, x0 + d, x.double(), level) - output_from(
            predicts, x0, x.double(), level
        )
        expected = apart.square().mean(1)
        torch.testing.assert_close(output_weight(predicts, sigma.double()) * d**2, expected)


@pytest.mark.parametrize("predicts", ["eps", "v", "x0"])
def test_the_bound_counts_as_the_error_of_what_is_predicted_does(
    predicts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = build_stage(IMPROVED.but(predicts=predicts), {}).eval()
    assert isinstance(stage, ChainStage)
    assert stage.table is not None
    lowest = torch.zeros(4, dtype=torch.long)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: lowest)
    x0, cond = torch.rand(4, 3, 16, 16), Conditioning()
    torch.manual_seed(0)
    found = stage.loss(x0, cond).parts["bits"]
    torch.manual_seed(0)
    _, published = likelihood.hybrid(stage.model, x0, lowest, stage.table, cond, rescaled=True)
    share = float(stage.table[0]) ** 2 if predicts == "x0" else 1.0
    assert found.item() == pytest.approx(share * published.mean().item(), rel=1e-5)


def test_edm_counts_every_level_alike_before_it_has_learned() -> None:
    """On data of deviation .5 its target has variance 1 at all levels; they are told as 250 log sigma."""
    torch.manual_seed(0)
    stage = build_stage(EDM.but(net=plain(labels=3)), {})
    assert isinstance(stage, ChainStage)
    image = 64 + 127 * torch.randint(0, 2, (64, 3, 16, 16), dtype=torch.uint8)
    example = stage.example(PairBatch(image, told("a").expand(64, -1), torch.zeros(64, dtype=torch.long)))
    heard = []

    def looking(_: object, seen: tuple[Tensor, ...]) -> None:
        heard.append(seen[1])

    stage.model.network.register_forward_pre_hook(looking)
    for sigma in (0.01, 0.5, 20.0):
        level = torch.full((64,), sigma)
        loss = stage.simple(example.x0, level, example.told(stage.model.network)).total
        assert loss.item() == pytest.approx(1.0, abs=0.03)
        torch.testing.assert_close(heard.pop(), 250 * level.log())
    assert isinstance(EDM.schedule, LogNormalSpec)
    drawn_levels = EDM.schedule.draw(torch.empty(20_000)).log()
    assert float(drawn_levels.mean()) == pytest.approx(-1.2, abs=0.05)
    assert float(drawn_levels.std()) == pytest.approx(1.2, abs=0.05)


def test_edm_is_sampled_from_pure_noise_at_karras_levels() -> None:
    state, levels = asked([3], "a"), []
    made_hop = hop(EDM)
    draw = made_hop.start(state, SamplingSpec(sampler="heun", num_steps=4, guidance_scale=1.0))
    first = next(draw.sampling)
    torch.testing.assert_close(first.x, 80.0 * SeededNoise([3])(first.x))
    draw = made_hop.start(state, SamplingSpec(sampler="ddim", num_steps=4, guidance_scale=1.0))

    def looking(x: Tensor, sigma: Tensor) -> Denoised:
        levels.append(float(sigma))
        return made_hop.denoiser(draw.rows)(x, sigma)

    sample(draw.sampling, looking)
    assert levels == pytest.approx(karras_sigmas(4, sigma_min=0.002, sigma_max=80.0)[:4].tolist())


def test_holes_are_rectangles_and_some_hide_everything() -> None:
    torch.manual_seed(0)
    hole = holes(torch.zeros(400, 3, 16, 12))[:, 0]
    rows, columns = hole.any(2), hole.any(1)
    assert torch.equal(hole, rows[:, :, None] & columns[:, None])
    assert (rows.sum(1) >= 4).all()
    assert (columns.sum(1) >= 3).all()
    assert 0.08 < hole.all(2).all(1).float().mean() < 0.25


@pytest.mark.parametrize("spec", [INPAINTING, LATENT, LATENT_INPAINTING], ids=["pixels", "latents", "told"])
def test_what_a_hole_hides_has_no_part_in_the_picture(spec: ChainSpec) -> None:
    """Nor in the latents around it, which an autoencoder would see through their edge."""
    hole = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    hole[..., 8:] = True
    how = how_of(spec, inpainting="model" if spec.inpaints else "projection")
    hidden = [
        drawn(
            spec, asked([1], "a star", known=torch.zeros(1, 3, 16, 16).masked_fill(hole, v), hole=hole), how
        )
        for v in (-1, 1)
    ]
    assert torch.equal(*hidden)


def test_an_enlarging_model_that_fills_hears_what_glides_weights_hear_in_their_order() -> None:
    known, small = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 4, 4), -0.25)
    hole = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    hole[..., 8:] = True
    found = seen(FILLING_ENLARGING, None, small=small, known=known, hole=hole)
    assert found is not None
    left, right = found[0, :, 0, 0].tolist(), found[0, :, 0, 15].tolist()
    assert left == [0.5, 0.5, 0.5, 1, -0.25, -0.25, -0.25]  # picture, mask, enlarged: model_fns of GLIDE
    assert right == [0, 0, 0, 0, -0.25, -0.25, -0.25]


def test_the_first_noise_is_multiplied_by_the_temperature() -> None:
    made, state = hop(DDPM), asked([1], "a")
    how = SamplingSpec(sampler="ddim", num_steps=4, guidance_scale=1.0)
    first, cooler = (next(made.start(state, how.but(temperature=t)).sampling).x for t in (1.0, 0.5))
    torch.testing.assert_close(cooler, first / 2)


def test_a_chain_told_to_sample_with_measured_errors_says_that_it_has_none() -> None:
    how = SamplingSpec(sampler="ddpm", variance="analytic", guidance_scale=1.0)
    with pytest.raises(ValueError, match="a chain's errors are not measured; set variance: learned"):
        hop(IMPROVED).start(asked([1], "a star"), how)


def test_a_chain_that_predicts_images_and_learns_its_variance_knows_its_errors() -> None:
    made = hop(IMPROVED.but(predicts="x0"))
    how = SamplingSpec(
        sampler="ddpm", variance="analytic", num_steps=3, spacing="linspace", guidance_scale=1.0
    )
    draw = made.start(asked([1, 2], "a star"), how)
    assert made.denoiser(draw.rows)(next(draw.sampling).x, torch.full((2,), 2.0)).x0_variance is not None
    pictures = run(made, asked([1, 2], "a star"), how).image
    assert pictures is not None
    other = run(made, asked([1, 2], "a star"), how.but(variance="fixed_small")).image
    assert other is not None
    assert not torch.equal(pictures, other)


def test_a_network_that_would_wait_for_what_nobody_tells_it_is_refused() -> None:
    assert isinstance(GLIDE.net, CaptionedSpec)
    unet = GLIDE.net.unet.but(embedding_width=16)
    with pytest.raises(ValueError, match=r"kind captioned is told no image embedding; leave net\.unet\."):
        GLIDE.but(net=GLIDE.net.but(unet=unet))
    with pytest.raises(ValueError, match=r"is told classes alone with its level; set net\.unet\.labels"):
        DDPM.but(net=plain(level_told=True))


def test_latents_have_the_deviation_of_their_scale_and_come_back() -> None:
    hopped = hop(LATENT)
    state = asked([1], "a star")
    draw = hopped.start(state, how_of(LATENT))
    assert draw.rows.limits is not None
    assert draw.rows.limits[0, 1] == math.inf  # latents are not clipped
    latent = torch.randn(1, 4, 8, 8)
    image = hopped.finish(state, latent).image
    expected = hopped.autoencoder.decode(latent)  # type: ignore[attr-defined]
    torch.testing.assert_close(image, (expected * 127.5 + 127.5).round() / 127.5 - 1, atol=1e-6, rtol=0)
