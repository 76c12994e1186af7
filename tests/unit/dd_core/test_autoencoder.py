"""The autoencoder: sizes as published, two players that keep to their parts, latents of unit scale."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dd_core import bundle, checkpoint, images, losses
from dd_core.nets.autoencoder import Autoencoder, AutoencoderNetSpec, Posterior
from dd_core.nets.perceptual import PatchGanSpec
from dd_core.nets.quantiser import Quantiser, straight_through
from dd_core.stage import Budget, OptimizerSpec, PairBatch
from dd_core.stages import build_stage
from dd_core.stages.autoencoder import AutoencoderSpec, AutoencoderStage, autoencoder_of
from dd_core.training import TrainState, train, wrapping

NET = AutoencoderNetSpec(width=16, channel_mult=(1, 2), blocks=1, groups=8, stem=2, latent_channels=4)
SPEC = AutoencoderSpec(
    net=NET,
    image_size=32,
    crop=16,
    perceptual="none",
    kl_weight=1e-3,
    discriminator=PatchGanSpec(width=8, layers=1),
    disc_start=0,
)
OPTIMIZER = OptimizerSpec(
    learning_rate=3e-3, warmup_steps=1, schedule="constant", precision="fp32", ema_images=8
)


def batches() -> Iterator[PairBatch]:
    gen = torch.Generator().manual_seed(1)
    small = torch.randint(0, 256, (4, 3, 4, 4), generator=gen, dtype=torch.uint8)
    while True:
        yield PairBatch(
            image=small.repeat_interleave(8, 2).repeat_interleave(8, 3), tokens=torch.ones(4, 6).long()
        )


def fresh(spec: AutoencoderSpec = SPEC) -> TrainState:
    torch.manual_seed(0)
    return TrainState(AutoencoderStage(spec), OPTIMIZER)


def run(state: TrainState, steps: int) -> list[dict[str, float]]:
    budget = Budget(steps=steps, checkpoint_every=100)
    return [report.read() for report in train(state, batches(), optimizer=OPTIMIZER, budget=budget)]


@pytest.mark.parametrize(
    ("spec", "millions"),
    [
        (AutoencoderNetSpec(channel_mult=(1, 2, 4), latent_channels=3), 55.31),
        (AutoencoderNetSpec(), 83.65),
        (AutoencoderNetSpec(channel_mult=(1, 1, 2, 2, 4), latent_channels=16, attention_levels=(4,)), 69.61),
        (
            AutoencoderNetSpec(channel_mult=(1, 1, 2, 2, 4, 4), latent_channels=64, attention_levels=(4, 5)),
            103.88,
        ),
    ],
)
def test_the_published_autoencoders_have_as_many_parameters(
    spec: AutoencoderNetSpec, millions: float
) -> None:
    with torch.device("meta"):
        net = Autoencoder(spec)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("spec", [NET, NET.but(stem=1, channel_mult=(1, 2, 2)), NET.but(channel_mult=(1,))])
def test_a_latent_has_one_value_per_channel_and_square_of_factor_pixels(spec: AutoencoderNetSpec) -> None:
    net, image = Autoencoder(spec), torch.rand(2, 3, 16, 24) * 2 - 1
    latent = net.encode(image)
    assert latent.shape == (2, 4, 16 // spec.factor, 24 // spec.factor)
    assert net.decode(latent).shape == image.shape


def test_without_norms_and_attention_a_crop_becomes_what_it_becomes_in_the_whole_picture() -> None:
    torch.manual_seed(0)
    net = Autoencoder(NET.but(norm="none", mid_attention=False))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    image, latent = torch.rand(1, 3, 128, 128), torch.randn(1, 4, 32, 32)
    whole, crop = net.posterior(image).mean, net.posterior(image[:, :, :96, :96]).mean
    torch.testing.assert_close(
        crop[:, :, :15, :15], whole[:, :, :15, :15]
    )  # 36 px: half the field of the encoder
    whole, crop = net.generate(latent), net.generate(latent[:, :, :24, :24])
    torch.testing.assert_close(crop[:, :, :48, :48], whole[:, :, :48, :48])  # 48 px: that of the decoder


def test_latents_have_unit_deviation_on_what_was_observed() -> None:
    net, image = Autoencoder(NET), torch.rand(8, 3, 16, 16) * 2 - 1
    for part in image.chunk(4):
        net.observe(net.posterior(part).mean)
    assert net.encode(image).std(correction=0).item() == pytest.approx(1, rel=1e-4)


def test_a_batch_that_is_not_finite_is_not_observed() -> None:
    net = Autoencoder(NET)
    net.observe(torch.randn(2, 4, 3, 3))
    before = net.moments.clone()
    net.observe(torch.full((2, 4, 3, 3), torch.nan))
    assert torch.equal(net.moments, before)


def test_kl_is_that_of_two_gaussians() -> None:
    mean, logvar = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    normal = torch.distributions.Normal(0.0, 1.0)
    exact = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (logvar / 2).exp()), normal)
    torch.testing.assert_close(losses.kl_to_normal(mean, logvar), exact.sum((1, 2, 3)))


def test_a_discriminator_beyond_its_margins_loses_nothing() -> None:
    assert losses.hinge(torch.tensor([1.0, 5.0]), torch.tensor([-1.0, -2.0])) == 0
    assert losses.hinge(torch.tensor([0.0]), torch.tensor([0.5])) == pytest.approx(0.5 * (1 + 1.5))


def published_loss(stage: AutoencoderStage, batch: PairBatch) -> Tensor:
    """The generator's loss as published, the weight by two walks to the last layer.

    Of a Gaussian it is a sum over the values of an image, here divided by them; of a codebook a mean.
    """
    image = images.crops(images.to_unit(batch.image), SPEC.crop, count=SPEC.crops_per_image)
    model = stage.model
    if model.quantiser is None:
        posterior, values = model.posterior(image), image[0].numel()
        latent = posterior.draw(torch.randn(posterior.mean.shape))
        cost = SPEC.kl_weight * losses.kl_to_normal(posterior.mean, posterior.logvar).mean()
    else:
        z, values = model.unquantised(image), 1
        vectors = model.quantiser(z).vectors
        latent, cost = straight_through(z, vectors), losses.vq_commitment(z, vectors).mean()
    x0_hat = model.generate(latent, quantise=False)
    reconstruction = (x0_hat - image).abs().mean() * values
    adversarial = -stage.discriminator(x0_hat).mean()
    last = model.decoder.conv_out.weight
    pull, push = (
        torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)
    )
    weight = (pull / (push + 1e-4)).clamp(0, 1e4).detach() * SPEC.disc_weight
    return (reconstruction + cost + weight * adversarial) / values


def gradients(net: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in net.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("faint", [1.0, 1e-5], ids=["balanced", "clamped"])
@pytest.mark.parametrize("codes", [0, 32], ids=["gaussian", "codebook"])
def test_one_walk_backwards_gives_the_published_loss_and_gradients(codes: int, faint: float) -> None:
    """Also where the discriminator hardly moves the image and its weight meets the published limit."""
    torch.manual_seed(0)
    stage, batch = AutoencoderStage(SPEC.but(net=NET.but(codes=codes))), next(batches())
    stage.has_begun()  # the codebook, too
    with torch.no_grad():
        stage.discriminator.layers[-1].weight.mul_(faint)
    torch.manual_seed(7)
    published = published_loss(stage, batch)
    published.backward()
    expected = [grad.clone() for grad in gradients(stage.model)]
    stage.zero_grad()
    torch.manual_seed(7)
    ours = stage(batch).total
    ours.backward()
    torch.testing.assert_close(ours, published)
    rounding = 1e-6 * max(grad.abs().max().item() for grad in expected)
    torch.testing.assert_close(gradients(stage.model), expected, rtol=1e-4, atol=rounding)


def test_each_phase_moves_its_own_player_alone() -> None:
    stage, batch = AutoencoderStage(SPEC), next(batches())
    stage(batch).total.backward()
    assert gradients(stage.model)
    assert not gradients(stage.discriminator)
    stage.zero_grad()
    stage(batch, "discriminator").total.backward()
    assert gradients(stage.discriminator)
    assert not gradients(stage.model)


def test_the_discriminator_waits_for_its_batch() -> None:
    state = fresh(SPEC.but(disc_start=2))
    stage = state.stage
    assert isinstance(stage, AutoencoderStage)
    first = [weight.clone() for weight in stage.discriminator.parameters()]
    log = run(state, 2)
    assert all("adversarial" not in metrics for metrics in log)
    assert all(torch.equal(a, b) for a, b in zip(first, stage.discriminator.parameters(), strict=True))
    assert "adversarial" in run(state, 3)[0]
    assert not all(torch.equal(a, b) for a, b in zip(first, stage.discriminator.parameters(), strict=True))


@pytest.mark.parametrize("forwards", [1, 3])
def test_the_discriminator_waits_for_the_same_step_however_many_forwards_a_step_has(forwards: int) -> None:
    budget, state = Budget(steps=4, checkpoint_every=4), fresh(VQ.but(disc_start=2))
    steps = train(state, batches(), optimizer=OPTIMIZER, budget=budget, accumulate=forwards)
    plays = [{"adversarial", "real"} <= report.read().keys() for report in steps]
    assert plays == [False, False, True, True]


def test_a_run_resumed_as_the_discriminator_enters_repeats_the_unbroken_one_bit_for_bit(
    tmp_path: Path,
) -> None:
    spec = SPEC.but(disc_start=3)
    whole = run(fresh(spec), 5)
    first = fresh(spec)
    head = run(first, 3)
    checkpoint.write(tmp_path / "c", first.tensors(), {"step": first.step, "images": first.images})
    torch.manual_seed(999)  # a new process knows nothing
    second = TrainState(AutoencoderStage(spec), OPTIMIZER)
    tensors = second.tensors()
    facts = checkpoint.read(tmp_path / "c", tensors)
    second.restored(tensors, step=facts["step"], images=facts["images"])
    assert head + run(second, 5) == whole


def test_it_learns_to_reconstruct() -> None:
    log = run(fresh(SPEC.but(disc_start=1000)), 60)
    assert log[-1]["psnr"] > log[0]["psnr"] + 3


VQ = SPEC.but(net=NET.but(codes=32), disc_start=1000)


def test_a_codebook_learns_to_reconstruct_and_its_vectors_are_used() -> None:
    log = run(fresh(VQ), 60)
    assert log[-1]["psnr"] > log[0]["psnr"] + 3
    assert log[-1]["used"] > 1 / 32
    assert log[-1]["commitment"] >= 0


def test_a_codebook_begins_with_latents_of_the_first_batch_and_is_left_to_training_then() -> None:
    """Wherever they are: from around zero the vectors follow too slowly, and few of them are ever used."""
    torch.manual_seed(0)
    stage, batch = AutoencoderStage(VQ), next(batches())
    quantiser = stage.model.quantiser
    with torch.no_grad():
        stage.model.encoder.conv_out.weight.mul_(100)
    seen = []
    quantiser.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    torch.manual_seed(1)
    parts = stage(batch).parts
    rows = seen[0].movedim(1, -1).flatten(0, -2)
    vectors = quantiser.vectors.weight.detach().clone()
    assert all((rows == vector).all(1).any() for vector in vectors)
    assert parts["used"] > 0.5
    stage(batch)
    assert torch.equal(quantiser.vectors.weight, vectors)


def test_the_gradient_of_a_codebook_passes_to_the_encoder_and_the_vectors_are_pulled() -> None:
    stage = AutoencoderStage(VQ)
    stage(next(batches())).total.backward()
    assert all(p.grad is not None for p in stage.model.parameters())
    assert stage.model.encoder.conv_in.weight.grad.any()
    assert stage.model.quantiser.vectors.weight.grad.any()


@pytest.mark.parametrize("form", ["fixed", "legacy"])
def test_the_commitment_pulls_codebook_and_encoder_four_to_one_as_its_form_says(form: str) -> None:
    stage = AutoencoderStage(VQ.but(commitment=form))
    stage.has_begun()  # the codebook, too
    image = images.to_unit(next(batches()).image)
    z = stage.model.unquantised(image).detach().requires_grad_()
    vectors = stage.model.quantiser(z).vectors
    cost = losses.vq_commitment(z, vectors, form=stage.spec.commitment).mean()
    torch.manual_seed(0)
    assert stage.bottleneck(image).cost.item() == pytest.approx(cost.item(), rel=1e-5)
    pull_z, pull_code = torch.autograd.grad(cost, [z, vectors])
    ratio = (pull_code.norm() / pull_z.norm()).item()
    assert ratio == pytest.approx(4.0 if form == "fixed" else 0.25, rel=1e-4)


def test_codes_are_chosen_in_full_precision_under_autocast() -> None:
    quantiser = Quantiser(512, 4)
    latent = torch.randn(2, 4, 8, 8) / 512
    with torch.autocast("cpu", torch.bfloat16):
        codes = quantiser(latent).codes
    assert torch.equal(codes, quantiser(latent).codes)


def test_the_discriminator_of_a_codebook_takes_part_and_observes_nothing() -> None:
    state = fresh(VQ.but(disc_start=0))
    log = run(state, 3)
    assert "adversarial" in log[-1]
    stage = state.stage
    assert isinstance(stage, AutoencoderStage)
    assert stage.model.observed == stage.batches == 3


@pytest.mark.filterwarnings("ignore:Grad strides do not match")  # a matter of speed
def test_under_ddp_the_gradients_are_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stage, batch = AutoencoderStage(SPEC), next(batches())
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(stage, **wrapping(stage))
        for phase in stage.phases:
            found = []
            for module in (stage, wrapped):
                stage.zero_grad()
                torch.manual_seed(7)
                module(batch, phase).total.backward()
                found.append(
                    [grad.clone() for player in stage.players(phase) if (grad := player.grad) is not None]
                )
            torch.testing.assert_close(*found)
    finally:
        dist.destroy_process_group()


def test_a_bundle_reconstructs_as_the_average_did(tmp_path: Path) -> None:
    state = fresh()
    run(state, 3)
    bundle.save(tmp_path / "b", SPEC, state.average, parents={}, facts={})
    loaded = autoencoder_of(bundle.load(tmp_path / "b").trained)
    average = Autoencoder(NET)
    average.load_state_dict(state.average)
    image = images.to_unit(next(batches()).image)
    assert torch.equal(loaded.reconstruct(image), average.eval().reconstruct(image))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"crop": 64}, "crop 64 is larger than image_size 32"),
        ({"crop": 18}, "crop 18 must be a multiple of the net's factor 4"),
        ({"perceptual": "lpips"}, "needs lpips_weights"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SPEC.but(**changes)


def test_the_clip_distance_needs_its_parent() -> None:
    with pytest.raises(ValueError, match="needs the parent 'clip'"):
        build_stage(SPEC.but(perceptual="clip"), {})


def test_the_noise_of_a_latent_does_not_depend_on_how_features_lie_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some convolutions give channels last, some do not: that depends on the machine."""
    stage = AutoencoderStage(SPEC)
    image, found, posterior = torch.rand(2, 3, 16, 16) * 2 - 1, [], stage.model.posterior
    for lie in (torch.contiguous_format, torch.channels_last):

        def lying(image: Tensor, lie: torch.memory_format = lie) -> Posterior:
            mean, logvar = posterior(image)
            return Posterior(mean.contiguous(memory_format=lie), logvar.contiguous(memory_format=lie))

        monkeypatch.setattr(stage.model, "posterior", lying)
        torch.manual_seed(0)
        found.append(stage.bottleneck(image).latent)
    torch.testing.assert_close(*found)
