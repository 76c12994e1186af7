"""Consistency losses: the printed schedules, paths that meet, and what is trained."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dd_core import consistency, losses
from dd_core.consistency import Cut, ended, following, heun_down
from dd_core.denoiser import (
    Conditioning,
    Denoised,
    NetworkDenoiser,
    Parameterization,
    Tell,
    consistency_time,
    input_scale,
    output_from,
)
from dd_core.noise import SeededNoise, karras_sigmas, spread
from dd_core.samplers import ddim, heun, sample
from dd_core.schedules import Clock, ScheduleSpec
from dd_core.stages.consistency import bound

STD = 0.5


def flow_end(x: Tensor, sigma: Tensor) -> Denoised:
    """Where the exact path of N(0, STD**2) arrives: a perfect consistency model."""
    return Denoised(x * STD / (STD**2 + spread(sigma, x) ** 2).sqrt())


def posterior(x: Tensor, sigma: Tensor) -> Denoised:
    """The exact teacher of the same images."""
    return Denoised(x * STD**2 / (STD**2 + spread(sigma, x) ** 2))


class Scaled(nn.Module):
    """A student with one weight."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, x: Tensor, sigma: Tensor) -> Denoised:
        return Denoised(self.weight * flow_end(x, sigma).x0)


def test_the_pace_at_the_first_step_is_the_printed_one() -> None:
    paper = consistency.pace(0, 800_000, s0=2, s1=200, mu0=0.95)
    code = consistency.pace(0, 800_000, s0=2, s1=200, mu0=0.95, form="openai_code")
    assert (paper.num_levels, code.num_levels) == (2, 2)
    assert paper.mu == pytest.approx(0.95, abs=1e-12)
    assert code.mu == pytest.approx(0.9025, abs=1e-12)


@given(step=st.integers(0, 1000), s0=st.integers(2, 10), s1=st.integers(20, 200))
@settings(max_examples=60, deadline=None)
def test_the_pace_follows_its_formulas(step: int, s0: int, s1: int) -> None:
    paper = consistency.pace(step, 1000, s0=s0, s1=s1, mu0=0.9)
    code = consistency.pace(step, 1000, s0=s0, s1=s1, mu0=0.9, form="openai_code")
    levels = math.ceil(math.sqrt(step / 1000 * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1) + 1
    assert paper.num_levels == code.num_levels == levels
    assert paper.mu == pytest.approx(math.exp(s0 * math.log(0.9) / levels))
    assert code.mu == pytest.approx(math.exp(s0 * math.log(0.9) / (levels - 1)))


def test_the_pace_ends_at_its_last_number_of_levels() -> None:
    assert consistency.pace(1000, 1000, s0=2, s1=150).num_levels == 151


def test_pairs_are_neighbours_on_the_grid() -> None:
    torch.manual_seed(0)
    pair = consistency.draw_pair(torch.zeros(500, 1, dtype=torch.float64), Cut(5))
    grid = karras_sigmas(5, sigma_min=0.002, sigma_max=80.0)[:-1].tolist()
    found = set(zip(pair.high.tolist(), pair.low.tolist(), strict=True))
    assert found == set(pairwise(grid))


def test_a_perfect_model_loses_nothing_but_the_error_of_the_teachers_step() -> None:
    torch.manual_seed(0)
    x0 = STD * torch.randn(256, 4, dtype=torch.float64)

    def loss(num_levels: int) -> float:
        pair = consistency.draw_pair(x0, Cut(num_levels))
        gap = consistency.distillation(flow_end, flow_end, following(posterior), x0, pair, consistency.l1)
        return gap.max().item()

    assert loss(400) < 1e-3
    assert loss(100) > 4 * loss(400)


def test_the_ends_of_segments_cut_the_path_in_equal_parts() -> None:
    torch.manual_seed(0)
    like = torch.zeros(500, 1, dtype=torch.float64)
    pair = consistency.draw_pair(like, Cut(9, sigma_min=0.1, sigma_max=10.0, to_zero=True, segments=4))
    grid = karras_sigmas(8, sigma_min=0.1, sigma_max=10.0).tolist()
    found = set(zip(pair.high.tolist(), pair.low.tolist(), pair.end.tolist(), strict=True))
    assert found == {(grid[i], grid[i + 1], grid[2 * (i // 2) + 2]) for i in range(8)}
    coarse = Cut(5, sigma_min=0.1, sigma_max=10.0, to_zero=True, segments=2, steps=2)
    pair = consistency.draw_pair(like, coarse)
    found = set(zip(*(level.tolist() for level in pair[:3]), map(tuple, pair.path.tolist()), strict=True))
    assert found == {
        (grid[2 * i], grid[2 * i + 2], grid[4 * (i // 2) + 4], tuple(grid[2 * i : 2 * i + 3]))
        for i in range(4)
    }


@pytest.mark.parametrize("to_zero", [False, True])
def test_a_perfect_model_of_segments_loses_nothing_but_the_error_of_the_teachers_step(to_zero: bool) -> None:
    """Which ends, from anywhere in a segment, where the exact path passes the segment's end."""
    torch.manual_seed(0)
    x0 = STD * torch.randn(256, 4, dtype=torch.float64)

    def loss(num_levels: int) -> float:
        pair = consistency.draw_pair(x0, Cut(num_levels, to_zero=to_zero, segments=3))

        def perfect(x: Tensor, sigma: Tensor) -> Denoised:
            end, sigma = spread(pair.end, x), spread(sigma, x)
            passing = x * ((STD**2 + end**2) / (STD**2 + sigma**2)).sqrt()
            return Denoised(torch.where(sigma == end, x, (passing - x * end / sigma) / (1 - end / sigma)))

        gap = consistency.distillation(perfect, perfect, following(posterior), x0, pair, consistency.l1)
        return gap.max().item()

    assert loss(1201) < 1e-3
    assert loss(301) > 4 * loss(1201)


def test_jumps_from_end_to_end_of_segments_follow_the_exact_path() -> None:
    ends = karras_sigmas(4, sigma_min=0.1, sigma_max=10.0)

    def perfect(x: Tensor, sigma: Tensor) -> Denoised:
        end = ends[1 + int((ends == sigma[0]).nonzero())]
        passing = x * ((STD**2 + end**2) / (STD**2 + spread(sigma, x) ** 2)).sqrt()
        return Denoised((passing - x * end / spread(sigma, x)) / (1 - end / spread(sigma, x)))

    x = 10 * torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = sample(ddim(x, ends, SeededNoise([0] * 5)), perfect)
    torch.testing.assert_close(found, flow_end(x, ends[:1].expand(5)).x0)


@pytest.mark.parametrize(("segments", "jumps"), [(4, 4), (4, 8), (4, 16), (2, 8)])
def test_several_jumps_in_a_segment_draw_from_the_data_too(segments: int, jumps: int) -> None:
    """A perfect model gives a Gaussian its own width, in however many jumps."""
    cut = Cut(17, sigma_min=0.02, sigma_max=80.0, to_zero=True, segments=segments)
    ends, levels = cut.ends(), cut.grid()[:: 16 // jumps]

    def perfect(x: Tensor, sigma: Tensor) -> Denoised:
        end, sigma = ends[ends < sigma[0]].max(), spread(sigma, x)
        passing = x * ((STD**2 + end**2) / (STD**2 + sigma**2)).sqrt()
        return Denoised((passing - x * end / sigma) / (1 - end / sigma))

    noise = SeededNoise(range(2))
    x = math.sqrt(STD**2 + 80.0**2) * noise(torch.empty(2, 50_000, dtype=torch.float64))
    found = sample(consistency.segmented(x, levels, ends, noise), perfect)
    assert found.std().item() == pytest.approx(STD, rel=0.01)


class Gains(nn.Module):
    """A network that can do nothing but multiply what has unit variance, by another number at every level."""

    def __init__(self, grid: Tensor) -> None:
        super().__init__()
        self.grid, self.gain = grid, nn.Parameter(torch.ones_like(grid))

    def forward(self, x: Tensor, sigma: Tensor) -> Denoised:
        place = (self.grid - sigma[:, None]).abs().argmin(1)
        return Denoised(spread(self.gain[place] / (STD**2 + sigma**2).sqrt(), x) * x)


class Exact(nn.Module):
    """The network of N(0, STD**2) that answers what `predicts` says, told `tell` of sigma."""

    def __init__(self, predicts: Parameterization, tell: Tell) -> None:
        super().__init__()
        self.predicts, self.sigmas = predicts, torch.logspace(-2.3, 2.3, 4000, dtype=torch.float64)
        self.told = tell(self.sigmas).double()

    def forward(self, scaled: Tensor, told: Tensor, cond: Conditioning) -> Tensor:
        place = torch.searchsorted(self.told, told.double()).clamp(1, len(self.told) - 1)
        low, high = self.told[place - 1], self.told[place]
        sigma = torch.lerp(self.sigmas[place - 1], self.sigmas[place], (told - low) / (high - low))
        x = scaled / spread(input_scale(self.predicts, sigma), scaled)
        return output_from(self.predicts, posterior(x, sigma).x0, x, spread(sigma, x))


TEACHERS: dict[str, tuple[Parameterization, Tell]] = {
    "edm": ("edm", consistency_time),
    "eps on timesteps": ("eps", Clock(ScheduleSpec())),
    "v on timesteps": ("v", Clock(ScheduleSpec(betas="cosine"))),
}


@pytest.mark.parametrize(("name", "segments"), [*((name, 1) for name in TEACHERS), ("edm", 3)])
def test_distilling_the_exact_teacher_of_a_gaussian_gives_its_exact_consistency_function(
    name: str, segments: int
) -> None:
    """Where the path through x ends: at level 0 x STD / sqrt(STD**2 + sigma**2), or at its segment's end."""
    torch.manual_seed(0)
    predicts, tell = TEACHERS[name]
    teacher = bound(NetworkDenoiser(Exact(predicts, tell), predicts, tell=tell), Conditioning())
    count, low, high = 25, 0.05, 10.0
    grid = karras_sigmas(count - 1, sigma_min=low, sigma_max=high)[:-1]
    student, target = Gains(grid), Gains(grid)
    optimizer = torch.optim.SGD(student.parameters(), lr=8.0)
    cut, path = Cut(count, low, high, to_zero=True, segments=segments), following(teacher)
    for _ in range(250):
        x0 = STD * torch.randn(256, 4, dtype=torch.float64)
        pair = consistency.draw_pair(x0, cut)
        gap = consistency.distillation(student, ended(target), path, x0, pair, consistency.l2)
        optimizer.zero_grad()
        gap.mean().backward()
        optimizer.step()
        with torch.no_grad():
            target.gain.lerp_(student.gain, 0.5)
    each = len(grid) // segments
    ends = torch.cat([grid, torch.zeros(1)])[::each][1:].repeat_interleave(each)
    unit, left = (STD**2 + grid**2).sqrt(), ends / grid
    exact = unit * ((STD**2 + ends**2).sqrt() / unit - left) / (1 - left)
    torch.testing.assert_close(student.gain.detach(), exact, rtol=0.03, atol=0)


@pytest.mark.parametrize("predicts", ["x0", "eps", "v", "edm"])
def test_at_level_zero_the_answer_is_what_was_shown(predicts: Parameterization) -> None:
    class Waves(nn.Module):
        def forward(self, x: Tensor, told: Tensor, cond: Conditioning) -> Tensor:
            return torch.sin(3 * x) + told[:, None] / 10

    denoise = NetworkDenoiser(Waves(), predicts)
    x = torch.randn(3, 5)

    def answer(x: Tensor, sigma: Tensor) -> Denoised:
        return denoise(x, sigma, Conditioning())

    assert torch.equal(ended(answer)(x, torch.zeros(3)).x0, x)
    some = torch.tensor([0.0, 0.3, 2.0])
    assert torch.equal(ended(answer)(x, some).x0[1:], answer(x[1:], some[1:]).x0)
    near = (answer(x, torch.full((3,), 1e-5)).x0 - x).abs().max()
    assert (near < 1e-3) == (predicts != "x0")  # the other parameterisations tend to it by themselves


def test_the_teachers_steps_are_those_of_the_heun_sampler_down_to_zero() -> None:
    grid = karras_sigmas(6, sigma_min=0.1, sigma_max=10.0)
    x = walked = 10 * torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for high, low in pairwise(grid):
        walked = sample(heun_down(walked, high.expand(2, 1), low.expand(2, 1)), posterior)
    torch.testing.assert_close(walked, sample(heun(x, grid), posterior))


@pytest.mark.parametrize("solver", ["heun", "ddim"])
def test_a_teacher_of_several_steps_walks_them_as_its_sampler(solver: consistency.Solver) -> None:
    grid = karras_sigmas(6, sigma_min=0.1, sigma_max=10.0)
    x = 10 * torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampler = heun(x, grid) if solver == "heun" else ddim(x, grid, SeededNoise([0, 1]))
    walked = following(posterior, solver)(x, grid.expand(2, -1))
    torch.testing.assert_close(walked, sample(sampler, posterior))


@pytest.mark.parametrize(("intervals", "segments"), [(6, 1), (6, 2), (4, 4)])
def test_paths_from_noise_are_those_on_which_the_teacher_paints(intervals: int, segments: int) -> None:
    cut = Cut(intervals + 1, sigma_min=0.1, sigma_max=10.0, to_zero=True, segments=segments, steps=2)
    noise = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = cut.grid()
    (high, low), pair = consistency.rollout(following(posterior, "ddim"), noise, cut)
    painted = sample(ddim(grid[0] * noise, grid, SeededNoise([0, 1, 2])), posterior)
    paths = low.unflatten(0, (3, intervals))
    torch.testing.assert_close(paths[:, -1], painted)
    starts = high.unflatten(0, (3, intervals))
    assert torch.equal(starts[:, 1:], paths[:, :-1])
    torch.testing.assert_close(starts[:, 0], grid[0] * noise)
    assert pair.path[:intervals].tolist() == [grid[2 * i : 2 * i + 3].tolist() for i in range(intervals)]
    assert torch.equal(pair.path[:intervals], pair.path[-intervals:])
    each = intervals // segments
    ends = [float(cut.ends()[i // each]) for i in range(intervals)]
    assert pair.end.tolist() == pytest.approx(3 * ends)


def test_what_a_student_learns_of_paths_from_noise_is_where_its_own_jumps_lead() -> None:
    """The teacher draws to one of two points; in two segments it is followed from noise to the nearest."""

    def choice(x: Tensor, sigma: Tensor) -> Denoised:
        return Denoised(torch.tanh(8 * x / (1 + spread(sigma, x) ** 2)))

    cut = Cut(3, sigma_min=0.3, sigma_max=10.0, to_zero=True, segments=2, steps=6)
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (high, low), pair = consistency.rollout(following(choice, "ddim"), noise, cut)
    reached = consistency.landing_alike(low, (high, low), pair)

    def student(x: Tensor, sigma: Tensor) -> Denoised:
        """By heart: the answer at the nearest start that it was shown."""
        known = pair.high == sigma[0]
        nearest = (x - high[known].T).abs().argmin(1)
        return Denoised(reached[known][nearest])

    grid = torch.stack([pair.high[0], pair.high[1], torch.zeros((), dtype=torch.float64)])
    landed = sample(consistency.segmented(cut.grid()[0] * noise, grid, cut.ends(), SeededNoise([])), student)
    torch.testing.assert_close(landed, low[1::2], atol=1e-9, rtol=0)


def test_levels_to_zero_are_as_many_and_their_last_is_zero() -> None:
    x = torch.zeros(500, 1, dtype=torch.float64)
    pair = consistency.draw_pair(x, Cut(5, sigma_min=0.1, sigma_max=10.0, to_zero=True))
    grid = karras_sigmas(4, sigma_min=0.1, sigma_max=10.0).tolist()
    assert set(zip(pair.high.tolist(), pair.low.tolist(), strict=True)) == set(pairwise(grid))


def test_without_a_teacher_the_noise_is_the_same_at_both_levels() -> None:
    """So a model that knows the image is consistent, whatever the levels."""
    x0 = torch.randn(16, 4, dtype=torch.float64)
    pair = consistency.draw_pair(x0, Cut(18))
    seen = []

    def looking(x: Tensor, sigma: Tensor) -> Denoised:
        seen.append((x - x0) / spread(sigma, x))
        return Denoised(x0)

    assert consistency.training(looking, looking, x0, pair, consistency.l2).max() == 0
    torch.testing.assert_close(seen[0], seen[1])


def test_only_the_student_is_trained() -> None:
    x0 = torch.randn(8, 4, dtype=torch.float64)
    pair = consistency.draw_pair(x0, Cut(18))
    student, target, teacher = Scaled(0.9), Scaled(1.1), Scaled(1.0)
    gap = consistency.distillation(student, target, following(teacher), x0, pair, consistency.pseudo_huber)
    gap.mean().backward()
    assert student.weight.grad is not None
    assert target.weight.grad is None
    assert teacher.weight.grad is None


def test_student_and_target_drop_out_alike() -> None:
    torch.manual_seed(0)
    drop, masks = nn.Dropout(0.5), []

    def dropping(x: Tensor, sigma: Tensor) -> Denoised:
        masks.append(drop(torch.ones_like(x)))
        return Denoised(masks[-1])

    x0 = torch.randn(8, 50)
    pair = consistency.draw_pair(x0, Cut(9))
    assert consistency.training(dropping, dropping, x0, pair, consistency.l2).max() == 0
    assert masks[0].unique().tolist() == [0.0, 2.0]


def test_pseudo_huber_is_square_when_near_and_absolute_when_far() -> None:
    c = 0.00054 * math.sqrt(48)
    a = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    for size in (1e-6, 100.0):
        b = a.clone()
        b[0, 0, 0, 0] = size
        near, far = size**2 / (2 * c), size - c
        assert consistency.pseudo_huber(a, b).item() == pytest.approx(near if size < c else far, rel=1e-3)


def test_perceptual_distances_see_small_images_enlarged() -> None:
    sizes = []

    def distance(a: Tensor, b: Tensor) -> Tensor:
        sizes.append(tuple(a.shape[2:]))
        return consistency.l2(a, b)

    for side in (64, 256):
        consistency.enlarged(distance)(torch.zeros(1, 3, side, side), torch.ones(1, 3, side, side))
    assert sizes == [(224, 224), (256, 256)]


def test_karras_weights_make_all_levels_alike_for_an_idle_network() -> None:
    """With output 0 the answer is c_skip x, and the weighted error is the variance of the target, 1."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 100_000, generator=generator, dtype=torch.float64)
    sigma = torch.tensor([0.01, 0.5, 20.0], dtype=torch.float64)
    x = STD * x0 + spread(sigma, x0) * eps
    error = (posterior(x, sigma).x0 - STD * x0).square().mean(1)
    torch.testing.assert_close(losses.karras_weight(sigma) * error, torch.ones(3).double(), atol=0.02, rtol=0)
