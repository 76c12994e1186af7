"""What a chain may begin its training from: weights told no more than it is, and asked alike."""

import itertools

import pytest
import torch

from dd_core.cascade import run
from dd_core.denoiser import Conditioning
from dd_core.layouts.published import Process
from dd_core.nets.clip import Clip
from dd_core.stage import Budget, OptimizerSpec, PairBatch, Stage, Trained
from dd_core.stages import build_stage, load_hop
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.clip import clip_of
from dd_core.stages.network import NetworkSpec
from dd_core.text import END
from dd_core.training import TrainState, train
from dd_core.vocabulary import ByteVocabulary
from tests.unit.dd_core.test_chain import (
    BOUND,
    CLIP,
    DDPM,
    EDM,
    ENLARGING,
    FILLING_ENLARGING,
    GLIDE,
    IMPROVED,
    INPAINTING,
    LATENT,
    LATENT_INPAINTING,
    LENGTH,
    PARENTS,
    SMALL,
    TRANSFORMER,
    UNCLIP,
    asked,
    how_of,
    plain,
    told,
    trained,
)


@pytest.mark.parametrize(("before", "after"), [(GLIDE, INPAINTING), (LATENT, LATENT_INPAINTING)])
def test_an_inpainting_model_starts_as_the_model_that_it_is_made_of(
    before: ChainSpec, after: ChainSpec
) -> None:
    base = trained(before)
    stage = build_stage(after, PARENTS | {"start": base})
    started = Trained(after, stage.model.state_dict())
    state, how = asked([1], "a star"), how_of(before)
    known = torch.rand(1, 3, 16, 16) * 2 - 1
    hole = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    hole[..., 8:] = True
    new = load_hop(started, PARENTS, device="cpu")
    old = load_hop(base, PARENTS, device="cpu")
    torch.testing.assert_close(run(new, state, how).image, run(old, state, how).image, atol=1e-2, rtol=0)
    edit = state._replace(known=known, hole=hole)
    training_free = run(old, edit, how.but(inpainting="projection")).image
    torch.testing.assert_close(run(new, edit, how).image, training_free, atol=1e-2, rtol=0)
    assert training_free is not None
    exact = (known[..., :8] * 127.5 + 127.5).round() / 127.5 - 1
    assert torch.equal(training_free[..., :8], exact)
    assert not torch.equal(training_free[..., 8:], known[..., 8:])


def test_an_enlarging_model_that_fills_starts_as_the_one_that_enlarges() -> None:
    before = trained(ENLARGING)
    after = build_stage(FILLING_ENLARGING, {"start": before})
    plainly = build_stage(ENLARGING, {"start": before})
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 3.0])
    enlarged, about = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 16, 16)
    old = plainly.model(x, sigma, Conditioning(image=enlarged)).x0
    new = after.model(x, sigma, Conditioning(image=torch.cat([about, enlarged], dim=1))).x0
    torch.testing.assert_close(new, old)


def test_weights_that_hear_of_holes_otherwise_are_no_start() -> None:
    filling = INPAINTING.but(net=plain(learned=True, image_channels=4))
    with pytest.raises(ValueError, match="fills holes and enlarges nothing"):
        build_stage(FILLING_ENLARGING, {"start": trained(filling)})
    network = NetworkSpec(source="sd1-inpaint", net=LATENT_INPAINTING.net)
    with pytest.raises(ValueError, match="sd1-inpaint hears the mask before the picture"):
        build_stage(LATENT_INPAINTING, PARENTS | {"start": Trained(network, {})})
    other = trained(LATENT_INPAINTING.but(mask_of="hole"))
    with pytest.raises(ValueError, match="mask_of is hole in the parent 'start' and known here"):
        build_stage(LATENT_INPAINTING, PARENTS | {"start": other})


def test_weights_with_a_vocabulary_of_their_own_are_not_trained_on() -> None:
    own = trained(GLIDE)._replace(vocabulary=ByteVocabulary({"a": 0, "<end>": 1}, {}, {}))
    with pytest.raises(ValueError, match="the parent 'start' reads captions by a vocabulary of its own"):
        build_stage(GLIDE, PARENTS | {"start": own})


def test_another_network_is_no_start() -> None:
    with pytest.raises(ValueError, match="the parent 'start' has another network"):
        build_stage(GLIDE, PARENTS | {"start": trained(DDPM)})
    narrow = GLIDE.but(net=GLIDE.net.but(unet=GLIDE.net.unet.but(width=8)))  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"another network: net\.unet\.width is 8 there and 16 here"):
        build_stage(GLIDE, PARENTS | {"start": trained(narrow)})
    with pytest.raises(ValueError, match="only input channels may be added"):
        build_stage(GLIDE, PARENTS | {"start": trained(INPAINTING)})


@pytest.mark.parametrize(
    ("now", "before", "said"),
    [
        (DDPM, DDPM.but(net=plain(head_width=16)), r"net\.unet\.head_width is 16 there and 8 here"),
        (DDPM, DDPM.but(net=plain(groups=2)), r"net\.unet\.groups is 2 there and 4 here"),
        (DDPM, DDPM.but(predicts="v"), "was trained otherwise: predicts is 'v' there and 'eps' here"),
        (DDPM, DDPM.but(schedule=SMALL), r"schedule\.betas is 'cosine' there and 'linear' here"),
        (DDPM, EDM.but(net=plain(), predicts="eps"), "told is '250 log sigma' there and 'timesteps' here"),
        (IMPROVED, IMPROVED.but(rescaled_time=False), "rescaled_time is False there and True here"),
    ],
)
def test_weights_that_fit_of_a_network_that_was_asked_otherwise_are_no_start(
    now: ChainSpec, before: ChainSpec, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        build_stage(now, PARENTS | {"start": trained(before)})


def test_what_no_weight_depends_on_may_differ_from_the_start() -> None:
    for now, before in (
        (DDPM.but(told_dropout=0.3), DDPM.but(net=plain(dropout=0.2))),
        (DDPM.but(net=plain(heads=2)), DDPM.but(net=plain(heads=2, head_width=16))),
        (GLIDE, GLIDE.but(told_dropout=0.0, schedule=GLIDE.schedule.but(beta_end=0.5))),
        (BOUND, IMPROVED),
        (TRANSFORMER.but(schedule=SMALL), TRANSFORMER),  # told log sigma, whatever the timesteps
    ):
        start = trained(before)
        begun = build_stage(now, PARENTS | {"start": start}).model.state_dict()
        assert all(torch.equal(value, start.weights[name]) for name, value in begun.items())


def test_a_published_network_is_a_start_if_it_was_asked_alike() -> None:
    weights = {name.removeprefix("network."): value for name, value in trained(LATENT).weights.items()}

    def begun(**process: object) -> Stage:
        published = Process.model_validate(
            {"schedule": "sqrt_linear", "beta_range": (0.00085, 0.012)} | process
        )
        start = Trained(NetworkSpec(source="diffusers", net=LATENT.net, process=published), weights)
        return build_stage(LATENT, PARENTS | {"start": start})

    begun()
    with pytest.raises(ValueError, match=r"schedule\.beta_end is 0\.02 there and 0\.012 here"):
        begun(beta_range=(0.00085, 0.02))
    with pytest.raises(ValueError, match="predicts is 'v' there and 'eps' here"):
        begun(predicts="v")
    with pytest.raises(ValueError, match="is neither a chain nor a published network"):
        build_stage(LATENT, PARENTS | {"start": PARENTS["autoencoder"]})


def test_a_published_decoder_of_embeddings_that_are_no_unit_vectors_is_no_start() -> None:
    """Karlo's is told CLIP's features as its towers project them."""
    weights = {name.removeprefix("network."): value for name, value in trained(UNCLIP).weights.items()}
    start = Trained(NetworkSpec(source="karlo-decoder", net=UNCLIP.net), weights)
    with pytest.raises(
        ValueError, match=r"karlo-decoder, which .* would be told unit vectors; leave start out"
    ):
        build_stage(UNCLIP, PARENTS | {"start": start})
    build_stage(UNCLIP, PARENTS | {"start": trained(UNCLIP)})


def test_a_transformer_that_reads_captions_begins_as_the_text_tower_of_a_clip() -> None:
    """Under that tower's mask it gives the states of the CLIP; the picture's network begins anew."""
    words = CLIP.but(net=CLIP.net.but(text_layers=2))
    torch.manual_seed(1)
    clip = Trained(words, dict(Clip(words.net).state_dict()))
    spec = GLIDE.but(net=GLIDE.net.but(text=GLIDE.net.text.but(layers=2)))  # type: ignore[union-attr]
    network = build_stage(spec, {"start": clip}).model.network
    tokens = torch.randint(1, 400, (2, LENGTH))
    with torch.no_grad():
        x = network.text.tokens(tokens) + network.text.places
        for block in network.text.blocks:
            x = block(x, torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril())
        torch.testing.assert_close(network.text.norm(x), clip_of(clip).read(tokens).states)
    torch.manual_seed(2)
    plainly = build_stage(spec, {}).model.state_dict()
    torch.manual_seed(2)
    begun = build_stage(spec, {"start": clip}).model.state_dict()
    kept = {name for name in begun if torch.equal(begun[name], plainly[name])}
    assert {name for name in begun if not name.startswith("network.text.")} <= kept
    ended = network.text.tokens.weight[END] + network.text.places
    torch.testing.assert_close(network.text.padding, ended)


@pytest.mark.parametrize(
    ("net", "said"),
    [
        ({"text_width": 32}, r"net\.text\.width is 16, the text tower of the parent 'start' has 32"),
        ({"text_layers": 3}, r"net\.text\.layers is 1, .* has 3"),
        ({"text_heads": 4}, r"net\.text\.heads is 2, .* has 4"),
        ({"context_length": LENGTH + 1}, r"net\.text\.context_length is \d+, .* has \d+; make them equal"),
        ({"vocab_size": 50000}, r"net\.text\.vocab_size is 49408, .* has 50000"),
        ({"quick_gelu": True}, "computes quick GELU, net.text computes GELU; leave start out"),
    ],
)
def test_a_clip_whose_text_tower_is_another_transformer_is_no_start(
    net: dict[str, object], said: str
) -> None:
    spec = CLIP.but(net=CLIP.net.but(**net))
    with pytest.raises(ValueError, match=said):
        build_stage(GLIDE, {"start": Trained(spec, {})})


def test_a_clip_is_no_start_of_a_network_that_reads_no_captions_itself() -> None:
    with pytest.raises(ValueError, match="is neither a chain nor a published network"):
        build_stage(DDPM, {"start": PARENTS["clip"]})


def test_a_frozen_transformer_keeps_its_weights_and_its_padding_is_trained() -> None:
    """Also over a restart, whose optimizers know nothing of what is frozen."""
    how = OptimizerSpec(algorithm="muon_unet", learning_rate=1e-2, weight_decay=0.1, warmup_steps=0)
    pairs = [
        PairBatch(torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8), told("a star", "")) for _ in "12"
    ]

    def begun() -> TrainState:
        torch.manual_seed(0)
        return TrainState(build_stage(GLIDE.but(text_frozen=True), {"start": PARENTS["clip"]}), how)

    def train_upto(state: TrainState, steps: int) -> dict[str, torch.Tensor]:
        budget = Budget(steps=2, checkpoint_every=1)
        run_of = train(state, pairs[state.step :], optimizer=how, budget=budget)
        list(itertools.islice(run_of, steps - state.step))
        return {name: weight.clone() for name, weight in state.tensors().items()}

    first, whole, cut, second = begun(), begun(), begun(), begun()
    after = train_upto(whole, 2)
    kept = {name for name, weight in first.tensors().items() if torch.equal(weight, after[name])}
    frozen = {name for name in after if ".network.text." in name and ".padding" not in name}
    assert len(frozen) == 2 * (
        len(whole.stage.model.network.text.state_dict()) - 1
    )  # the weights and their averages, no optimizer's
    assert frozen <= kept
    assert "model.model.network.text.padding" in after.keys() - kept
    halfway = train_upto(cut, 1)
    second.restored(halfway, step=1, images=2)
    assert all(torch.equal(after[name], weight) for name, weight in train_upto(second, 2).items())
