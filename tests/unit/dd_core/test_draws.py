"""Several embeddings are drawn for a caption; the one whose picture suits it is kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dd_core.cascade import CascadeState, run
from dd_core.denoiser import Conditioning, Denoised
from dd_core.nets.draft import Draft
from dd_core.noise import SeededNoise
from dd_core.samplers import SamplingSpec
from dd_core.stage import Trained
from dd_core.stages import build_stage, load_hop
from dd_core.stages.clip import clip_of
from dd_core.stages.draft import DraftSpec, drawn
from dd_core.stages.draws import Chooser, seeds_of_draws
from dd_core.stages.prior import PriorHop
from tests.unit.serve import tiny

DRAFT = DraftSpec(embedding_width=16, width=8, layers=2, image_size=16, measured_images=32)


def shaken(spec: object, parents: dict[str, Trained]) -> Trained:
    """With weights that say something: new networks answer alike."""
    model = build_stage(spec, parents).model  # type: ignore[arg-type]
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return Trained(spec, model.state_dict())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained() -> dict[str, Trained]:
    torch.manual_seed(0)
    parents = {"clip": shaken(tiny.STAGES["clip"], {})}
    return {**parents, "prior": shaken(tiny.STAGES["prior"], parents), "draft": shaken(DRAFT, parents)}


@pytest.fixture
def state() -> CascadeState:
    tokens = torch.zeros(3, 12, dtype=torch.long)
    tokens[:, :3] = torch.tensor([[49406, 320, 49407], [49406, 700, 49407], [49406, 1100, 49407]])
    return CascadeState(seeds=[5, 6, 7], tokens=tokens)


def test_the_draws_of_a_seed_differ_from_each_other_and_the_first_is_its_own() -> None:
    """A generator on a CPU hears 32 bits of its seed: a second draw beyond them was the first again."""
    seeds = seeds_of_draws([0, 1, 2, 2**32 - 1], 8)
    assert seeds[::8] == [0, 1, 2, 2**32 - 1]
    noise = SeededNoise(seeds)(torch.empty(len(seeds), 4))
    assert len({tuple(row) for row in noise.tolist()}) == 32


def test_one_draw_more_changes_none_of_the_others() -> None:
    assert seeds_of_draws([9], 8)[:3] == seeds_of_draws([9], 3)


def test_no_hop_of_a_cascade_begins_with_the_noise_of_another(state: CascadeState) -> None:
    torch.manual_seed(0)
    trained, begun = {"clip": shaken(tiny.STAGES["clip"], {})}, []
    for link in tiny.CASCADE.hops:
        parents = {role: trained[role] for role in tiny.PARENTS.get(link.stage, ())}
        hop = load_hop(shaken(tiny.STAGES[link.stage], parents), parents, device="cpu")
        draw = hop.start(state, link.how)
        begun.append(next(draw.sampling).x[0].flatten()[:16])
        state = run(hop, state, link.how)
    together = torch.corrcoef(torch.stack(begun)) - torch.eye(len(begun))
    assert together.abs().max() < 0.9  # of three times 16 numbers; where one stream feeds all of them: 1


def by_hand(clip: Trained, draft: Trained | None, state: CascadeState, x0: Tensor) -> Tensor:
    """Draw after draw: seen by CLIP, compared with its caption and itself, the best remembered."""
    tower = clip_of(clip)
    painter = None if draft is None else shown(draft)
    kept = []
    for row, tokens in enumerate(state.tokens):
        caption = tower.read(tokens[None]).embedding[0]
        draws = F.normalize(x0.unflatten(0, (len(state.tokens), -1))[row], dim=-1)
        nearness = []
        for draw in draws:
            seen = draw if painter is None else tower.embed_image(drawn(painter, draw[None]))[0]
            nearness.append(float(seen @ caption + seen @ draw))
        kept.append(draws[max(range(len(draws)), key=nearness.__getitem__)])
    return torch.stack(kept)


def shown(draft: Trained) -> Draft:
    net = Draft(16, 16, 8, 2, 32)
    net.load_state_dict(draft.weights)
    return net.eval()


@pytest.mark.parametrize("painted", [False, True])
def test_the_draw_that_suits_its_caption_is_kept(
    trained: dict[str, Trained], state: CascadeState, painted: bool
) -> None:
    x0 = torch.randn(12, 16, generator=torch.Generator().manual_seed(1))
    clip, draft = trained["clip"], trained["draft"] if painted else None
    kept = Chooser(clip_of(clip), draft and shown(draft)).kept(state, x0).image_embedding
    assert kept is not None
    torch.testing.assert_close(kept, by_hand(clip, draft, state, x0))


def test_a_single_draw_is_kept_and_nothing_is_painted_to_compare_it(
    trained: dict[str, Trained], state: CascadeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    chooser = Chooser(clip_of(trained["clip"]), shown(trained["draft"]))

    def seen(picture: Tensor) -> Tensor:
        raise RuntimeError("painted and looked at")

    monkeypatch.setattr(chooser.clip, "embed_image", seen)
    x0 = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    kept = chooser.kept(state, x0).image_embedding
    assert kept is not None
    torch.testing.assert_close(kept, F.normalize(x0, dim=-1))
    with pytest.raises(RuntimeError, match="looked at"):
        chooser.kept(state, torch.cat([x0, x0]))


def test_pictures_may_choose_another_draw_than_embeddings(
    trained: dict[str, Trained], state: CascadeState
) -> None:
    x0 = torch.randn(12, 16, generator=torch.Generator().manual_seed(1))
    clip = trained["clip"]
    assert not torch.equal(by_hand(clip, None, state, x0), by_hand(clip, trained["draft"], state, x0))


MEANT = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def gaussian(trained: dict[str, Trained], monkeypatch: pytest.MonkeyPatch) -> PriorHop:
    """A prior in closed form: for caption i the embeddings are N(MEANT[i], .1 I), and nothing is whitened."""
    hop = load_hop(trained["prior"], {"clip": trained["clip"]}, device="cpu")
    assert isinstance(hop, PriorHop)

    def exact(x: Tensor, sigma: Tensor, cond: Conditioning) -> Denoised:
        assert cond.text is not None
        level = sigma[:, None] ** 2
        return Denoised((0.1 * x + level * cond.text[:, 0]) / (0.1 + level))

    monkeypatch.setattr(hop, "told", lambda tokens: Conditioning(text=MEANT[:, None]))
    monkeypatch.setattr(hop.model, "forward", exact)
    monkeypatch.setattr(hop.model.network.whitening, "forward", lambda embedding: embedding)
    return hop


def test_the_likeliest_embedding_is_the_one_nearest_to_what_the_caption_means(
    gaussian: PriorHop, state: CascadeState
) -> None:
    generator = torch.Generator().manual_seed(4)
    away = torch.randn(3, 6, 16, generator=generator) * torch.linspace(0.2, 3, 6)[:, None]
    embeddings = (MEANT[:, None] + away)[:, torch.randperm(6, generator=generator)]
    order = gaussian.fit(state.tokens, embeddings).argsort(1, descending=True)
    assert torch.equal(order, (embeddings - MEANT[:, None]).norm(dim=-1).argsort(1))


def test_a_prior_that_draws_more_keeps_a_likelier_embedding(gaussian: PriorHop, state: CascadeState) -> None:
    fits = []
    for draws in (1, 2, 8):
        made = run(gaussian, state, SamplingSpec(num_steps=3, guidance_scale=1.0, draws=draws))
        assert made.image_embedding is not None
        assert made.image_embedding.shape == (3, 16)
        fits.append(gaussian.fit(state.tokens, made.image_embedding[:, None])[:, 0])
    assert (fits[1] >= fits[0]).all()
    assert (fits[2] >= fits[1]).all()
    assert fits[2].sum() > fits[0].sum()


def test_the_fit_of_an_embedding_depends_on_no_other(
    trained: dict[str, Trained], state: CascadeState
) -> None:
    hop = load_hop(trained["prior"], {"clip": trained["clip"]}, device="cpu")
    assert isinstance(hop, PriorHop)
    found = F.normalize(torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(3)), dim=-1)
    with torch.no_grad():
        together = hop.fit(state.tokens, found)
        alone = hop.fit(state.tokens[1:2], found[1:2, 3:4])
    torch.testing.assert_close(together[1:2, 3:4], alone)


def test_a_draft_of_another_clip_is_refused(trained: dict[str, Trained]) -> None:
    with pytest.raises(ValueError, match="embeddings of 24 numbers, the prior's have 16"):
        Chooser(clip_of(trained["clip"]), Draft(24, 16, 8, 2, 32))


def test_a_hop_that_chooses_nothing_refuses_draws(state: CascadeState) -> None:
    torch.manual_seed(0)
    clip = shaken(tiny.STAGES["clip"], {})
    base = load_hop(shaken(tiny.STAGES["base"], {"clip": clip}), {"clip": clip}, device="cpu")
    with pytest.raises(ValueError, match="a base keeps no best of 4 draws; leave draws out"):
        base.refuse(state, SamplingSpec(draws=4))
