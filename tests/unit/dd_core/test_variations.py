"""Variations: a code paints its picture again, and what lies between two codes paints what lies between."""

import pytest
import torch
from torch import Tensor

from dd_core.cascade import CascadeState, run
from dd_core.samplers import SamplingSpec
from dd_core.stage import Trained
from dd_core.stages import StageSpec, build_stage, load_hop
from dd_core.variations import Code, Encoder, between, encode, turned, walked
from tests.unit.dd_core.test_chain import DDPM, ENLARGING, FROZEN, LATENT, PARENTS, UNCLIP, told
from tests.unit.dd_core.test_chain import hop as chain_hop
from tests.unit.dd_core.test_refusals import silent
from tests.unit.dd_core.test_stages import BASE, UPSAMPLER
from tests.unit.dd_core.test_stages import hop as other_hop
from tests.unit.dd_core.test_stages import parents as parents_of_base

HOW = SamplingSpec(sampler="ddim", num_steps=50, spacing="trailing", guidance_scale=1.0, clip="none")
"""Networks without training paint nothing in the range of pictures, so nothing is clipped."""
PICTURE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8
OTHER = PICTURE.flip(-1)


def encoder(spec: StageSpec, parents: dict[str, Trained] = PARENTS) -> Encoder:
    """A hop whose network, without training, says little of everything it is told: its paths are smooth."""
    torch.manual_seed(0)
    model = build_stage(spec, parents).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.05 if parameter.any() else 0.003) * torch.randn_like(parameter))
    found = load_hop(Trained(spec, model.state_dict()), parents, device="cpu")
    assert isinstance(found, Encoder)
    return found


def asked(picture: Tensor = PICTURE, caption: str = "a star") -> CascadeState:
    return CascadeState(seeds=[3], tokens=told(caption), known=picture)


def painted(hop: Encoder, code: Code, how: SamplingSpec = HOW, seed: int = 3) -> Tensor:
    state = CascadeState(seeds=[seed], tokens=told("a star"))
    image = run(hop, state._replace(image_embedding=code.embedding, noise=code.noise), how).image
    assert image is not None
    return image


def test_a_single_step_finds_no_noise() -> None:
    with pytest.raises(ValueError, match="a picture's noise is found in 2 steps at least"):
        encode(encoder(UNCLIP), asked(), HOW.but(num_steps=1))


def test_a_code_paints_its_picture_the_better_the_more_steps_and_eta_varies_it() -> None:
    hop = encoder(UNCLIP)
    errors = []
    for steps in (5, 100):
        how = HOW.but(num_steps=steps)
        errors.append(float((painted(hop, encode(hop, asked(), how), how) - PICTURE).abs().mean()))
    assert errors[1] < errors[0] / 10  # first order: 20 times as many steps
    code = encode(hop, asked(), HOW)
    assert torch.equal(painted(hop, code, seed=3), painted(hop, code, seed=4))  # no seed has a part in it
    free = [painted(hop, code, walked(HOW, 1.0), seed=seed) for seed in (3, 4)]
    assert float((free[0] - free[1]).abs().mean()) > 0.05


def test_the_base_and_latent_chains_are_encoded_as_well() -> None:
    spec = BASE.but(predicts="eps", from_draft=False)
    base = encoder(spec, parents_of_base(spec))
    how = SamplingSpec(num_steps=150, guidance_scale=1.0, clip="none")
    code = encode(base, asked(), how)
    assert code.embedding is not None
    again = painted(base, code, walked(how, 0.0))
    assert float((again - PICTURE).abs().mean()) < 0.03
    latent = encoder(LATENT)
    how = HOW.but(spacing="ldm_plus_one", num_steps=100)
    code = encode(latent, asked(), how)
    assert code.embedding is None
    assert code.noise.shape == (1, 4, 8, 8)
    autoencoder = latent.autoencoder  # type: ignore[attr-defined]
    with torch.no_grad():
        best = autoencoder.decode(autoencoder.encode(PICTURE, None).float()).clamp(-1, 1)
    assert float((painted(latent, code, walked(how, 0.0)) - best).abs().mean()) < 0.02


def test_between_two_codes_the_ends_are_the_codes_and_the_embedding_stays_a_direction() -> None:
    hop = encoder(UNCLIP)
    a, b = (encode(hop, asked(picture), HOW) for picture in (PICTURE, OTHER))
    for share, end in ((0.0, a), (1.0, b)):
        found = between(a, b, share)
        torch.testing.assert_close(found.noise, end.noise, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.embedding, end.embedding, rtol=1e-4, atol=1e-5)
    middle = between(a, b, 0.5)
    assert middle.embedding is not None
    assert float(middle.embedding.norm()) == pytest.approx(1, abs=1e-5)
    mean = (a.noise + b.noise).std() / 2
    assert float(mean) < float(middle.noise.std())  # it is as loud as noise, where the mean would be hushed


def test_a_picture_of_any_size_is_embedded_at_the_size_of_training() -> None:
    hop = encoder(UNCLIP)
    clip = hop.embedder()
    assert clip is not None
    large = torch.nn.functional.interpolate(PICTURE, scale_factor=4)
    code = encode(hop, asked(large), HOW.but(num_steps=2))
    torch.testing.assert_close(code.embedding, clip.embed_image(PICTURE))


def test_a_picture_is_embedded_as_large_as_it_was_in_training_and_never_enlarged_for_it() -> None:
    base = BASE.but(from_draft=False)
    hops = encoder(UNCLIP.but(embedded_at=32)), encoder(base.but(embedded_at=32), parents_of_base(base))
    large = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for hop in hops:
        clip = hop.embedder()
        assert clip is not None
        halved = torch.nn.functional.avg_pool2d(large, 2)
        torch.testing.assert_close(hop.embedded(large), clip.embed_image(halved))
        torch.testing.assert_close(hop.embedded(PICTURE), clip.embed_image(PICTURE))


def test_a_caption_turns_the_embedding_towards_the_difference_and_keeps_the_noise() -> None:
    hop = encoder(UNCLIP)
    clip, code = hop.embedder(), encode(hop, asked(), HOW)
    assert clip is not None
    assert code.embedding is not None
    before, now = told("a star"), told("a blue cross")
    difference = clip.read(now).embedding - clip.read(before).embedding
    difference = difference / difference.norm()
    near = [float((code.embedding * difference).sum())]
    for share in (0.25, 0.5, 1.0):
        after = turned(code, clip, before, now, share)
        assert torch.equal(after.noise, code.noise)
        assert after.embedding is not None
        near.append(float((after.embedding * difference).sum()))
    assert near == sorted(near)
    assert near[-1] == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="both captions say the same"):
        turned(code, clip, before, before, 0.5)


def test_what_cannot_be_encoded_or_begun_is_refused_before_a_network_is_asked() -> None:
    assert not isinstance(other_hop(UPSAMPLER), Encoder)
    enlarging = silent(chain_hop(ENLARGING))
    assert isinstance(enlarging, Encoder)
    with pytest.raises(ValueError, match="encode with a base"):
        enlarging.encode(asked()._replace(image=torch.zeros(1, 3, 4, 4)), HOW)
    plain = silent(chain_hop(DDPM))
    assert isinstance(plain, Encoder)
    with pytest.raises(ValueError, match="not RGB; convert it to RGB"):
        encode(plain, asked(PICTURE[:, :1]), HOW)
    with pytest.raises(ValueError, match="no whole stride takes 300"):
        encode(plain, asked(), HOW.but(spacing="ddim_leading", num_steps=300))
    noise = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="encode the picture with this hop"):
        plain.start(asked()._replace(known=None, noise=noise), HOW)
    with pytest.raises(ValueError, match="exclude each other"):
        plain.start(asked()._replace(noise=noise), HOW)


def test_without_embeddings_the_caption_is_told_on_the_way_back() -> None:
    hop = encoder(FROZEN)
    codes = [encode(hop, asked(caption=caption), HOW) for caption in ("a star", "a blue cross")]
    assert not torch.equal(codes[0].noise, codes[1].noise)
