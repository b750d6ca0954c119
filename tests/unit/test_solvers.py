"""The solvers: output errors, and GPTQ against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tasks.grid import Grid, QuantizedWeight
from tasks.solvers import awq, gptq, output_error
from tasks.solvers.awq import search_clip, search_scale
from tasks.solvers.refine import _fit_scales, refine
from tasks.solvers.smoothquant import smooth

ROWS, WIDTH, GROUP, TOKENS = 48, 128, 32, 512
INT8 = Grid(8, None, True, torch.float32)


def grid(*, symmetric: bool = False, bits: int = 4, group: int | None = GROUP) -> Grid:
    return Grid(bits, group, symmetric, torch.float32)


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    """Correlated inputs of uneven size, like a model's: [tokens, width]."""
    random = torch.Generator().manual_seed(0)
    mix = torch.eye(WIDTH) + 0.2 * torch.randn(WIDTH, WIDTH, generator=random)
    return torch.randn(TOKENS, WIDTH, generator=random) @ mix * (3 * torch.rand(WIDTH, generator=random) ** 2 + 0.01)


@pytest.fixture(scope="module")
def gram(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs


@pytest.fixture(scope="module")
def weight() -> Tensor:
    random = torch.Generator().manual_seed(1)
    found = torch.randn(ROWS, WIDTH, generator=random)
    found[:, 5] *= 6  # an outlier in each first group
    return found


def cost(solved: QuantizedWeight, weight: Tensor, gram: Tensor) -> float:
    return float(output_error(solved.weight() - weight, gram).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [GROUP, None])
def test_refining_reduces_every_rows_error(weight: Tensor, gram: Tensor, symmetric: bool, group: int | None) -> None:
    way = grid(symmetric=symmetric, group=group)
    for solved in (way.round(weight), gptq.solve(weight, gram, way, act_order=True, damping=0.01)):
        before = output_error(solved.weight() - weight, gram)
        once, thrice = (refine(weight, gram, way, solved, rounds) for rounds in (1, 3))
        errors = [output_error(one.weight() - weight, gram) for one in (once, thrice)]
        assert (errors[0] <= before).all()
        assert (errors[1] <= errors[0]).all()
        assert errors[0].sum() < 0.98 * before.sum()
        assert int(thrice.integers.max()) <= way.top
        assert (thrice.scales > 0).all()
        assert torch.equal(thrice.zeros, solved.zeros)


def test_refining_finds_the_scales_of_least_squares(weight: Tensor, inputs: Tensor, gram: Tensor) -> None:
    solved = grid(group=None).round(weight)
    levels = solved.integers.float() - solved.zeros
    fitted = _fit_scales(weight, gram, solved)
    outputs, wanted = inputs @ levels.T, inputs @ weight.T
    best = (outputs * wanted).sum(0) / outputs.pow(2).sum(0)
    assert torch.allclose(fitted[:, 0], best, rtol=2e-3)


def test_row_parts_do_not_change_the_result(weight: Tensor, gram: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def solved() -> QuantizedWeight:
        return refine(weight, gram, grid(), grid().round(weight, search_clip(weight, gram, grid())), 1)

    whole = solved()
    monkeypatch.setattr("tasks.solvers.PART", 5 * weight.shape[1])
    few = solved()
    assert torch.equal(few.integers, whole.integers)
    torch.testing.assert_close(few.scales, whole.scales)


def test_refining_keeps_weights_on_the_grid_and_dead_channels(gram: Tensor) -> None:
    way = grid()
    integers = torch.arange(WIDTH * 2, dtype=torch.uint8).view(2, WIDTH) % 16
    scales = torch.full((2, way.groups(WIDTH)), 0.5)
    exact = QuantizedWeight(integers, scales, torch.full_like(scales, 3, dtype=torch.uint8))
    silent = gram.clone()
    silent[7], silent[:, 7] = 0, 0
    found = refine(exact.weight(), silent, way, exact, 2)
    assert torch.equal(found.integers, exact.integers)
    assert torch.equal(found.scales, exact.scales)


def test_grid_halves_its_groups_until_they_divide_and_counts_its_bits() -> None:
    assert grid(group=128).fitted(576).group_size == 64
    assert grid(group=64).fitted(576).group_size == 64
    assert grid(group=None).fitted(576).group_size is None
    half = Grid(4, 64, False, torch.float16)
    assert half.bits_per_weight(576) == 4 + (16 + 4) / 64
    assert Grid(8, None, True, torch.float32).bits_per_weight(64) == 8.5


def test_zero_points_respect_the_formats_minimum() -> None:
    weight = torch.linspace(1, 2, GROUP)[None]
    way = Grid(4, GROUP, False, torch.float32, least_zero=1)
    solved = way.round(weight)
    assert solved.zeros.tolist() == [[1]]
    assert (solved.weight() - weight).abs().max() < 0.2


def test_output_error_from_the_gram_matrix(inputs: Tensor, gram: Tensor, weight: Tensor) -> None:
    change = grid().round(weight).weight() - weight
    assert torch.allclose(output_error(change, gram), (inputs @ change.T).pow(2).sum(0), rtol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [GROUP, None])
def test_weight_on_the_grid_is_unchanged(symmetric: bool, group: int | None) -> None:
    way = grid(symmetric=symmetric, group=group)
    integers = torch.arange(WIDTH * 2, dtype=torch.uint8).view(2, WIDTH) % 16
    scales = torch.full((2, way.groups(WIDTH)), 0.5)
    zeros = torch.full_like(scales, 8 if symmetric else 3, dtype=torch.uint8)
    weight = QuantizedWeight(integers, scales, zeros).weight()
    if symmetric:
        assert torch.equal(way.round_with(weight, scales, zeros).weight(), weight)
    else:
        solved = way.round(weight)
        assert torch.equal(solved.weight(), weight)
        assert torch.equal(solved.zeros, zeros)


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_weight_moves_by_more_than_half_a_step(weight: Tensor, symmetric: bool) -> None:
    solved = grid(symmetric=symmetric).round(weight)
    step = solved.scales.repeat_interleave(GROUP, 1)
    # symmetric: the largest on one side may be half a step beyond the last value
    assert ((solved.weight() - weight).abs() <= step * 0.501).all()


def test_groups_of_one_sign_and_of_zeros_have_a_valid_grid() -> None:
    weight = torch.stack([torch.linspace(1, 2, GROUP), torch.zeros(GROUP), -torch.linspace(1, 2, GROUP)])
    scales, zeros = grid().fit(weight)
    assert zeros.flatten().tolist() == [0, 0, 15]
    assert (scales > 0).all()
    assert torch.equal(grid().round(weight).weight()[1], torch.zeros(GROUP))


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_follows_its_definition(act_order: bool, symmetric: bool, weight: Tensor, gram: Tensor) -> None:
    """Column by column, each time with the inverse of the remaining Gram matrix."""
    way, damping = grid(symmetric=symmetric), 0.01
    matrix = gram.double() + damping * gram.diagonal().mean().double() * torch.eye(WIDTH).double()
    order = gram.diagonal().argsort(descending=True) if act_order else torch.arange(WIDTH)
    scales, zeros = way.fit(weight)
    rest, expected = weight.double().clone(), torch.zeros(ROWS, WIDTH).double()
    for place, column in enumerate(order.tolist()):
        left = order[place:]
        inverse = torch.linalg.inv(matrix[left][:, left])
        scale, zero = scales[:, column // GROUP].double(), zeros[:, column // GROUP].double()
        expected[:, column] = ((rest[:, column] / scale).round().add(zero).clamp(0, 15) - zero) * scale
        error = (rest[:, column] - expected[:, column]) / inverse[0, 0]
        rest[:, left] -= error[:, None] * inverse[0]
    found = gptq.solve(weight, gram, way, act_order=act_order, damping=damping)
    # a value half-way between two integers may round either way in another precision
    assert (found.weight().double() - expected).abs().gt(1e-4).double().mean() < 0.01


def test_gptq_beats_rounding_and_stacking_changes_nothing(weight: Tensor, gram: Tensor) -> None:
    together = gptq.solve(weight, gram, grid(), act_order=True, damping=0.01)
    assert cost(together, weight, gram) < 0.6 * cost(grid().round(weight), weight, gram)
    parts = [gptq.solve(part, gram, grid(), act_order=True, damping=0.01) for part in weight.split(16)]
    assert torch.equal(together.integers, torch.cat([part.integers for part in parts]))


def test_gptq_handles_dead_inputs(weight: Tensor, inputs: Tensor) -> None:
    quiet = inputs.clone()
    quiet[:, [0, 7, WIDTH - 1]] = 0
    solved = gptq.solve(weight, quiet.T @ quiet, grid(), act_order=True, damping=0.01)
    assert solved.weight().isfinite().all()
    assert torch.equal(solved.weight()[:, 7], torch.zeros(ROWS))


def test_awq_scales_and_clips_cost_less_than_none(weight: Tensor, inputs: Tensor, gram: Tensor) -> None:
    plain = cost(grid().round(weight), weight, gram)
    scale = search_scale(weight, gram, inputs.abs().mean(0), grid())
    scaled_gram = gram / scale[:, None] / scale
    scaled = cost(grid().round(weight * scale), weight * scale, scaled_gram)
    assert scaled < 0.95 * plain
    clip_range = search_clip(weight * scale, scaled_gram, grid())
    grouped = (weight * scale).view(ROWS, -1, GROUP)
    assert (clip_range[0] >= grouped.amin(-1)).all()
    assert (clip_range[1] <= grouped.amax(-1)).all()
    both = gptq.solve(weight * scale, scaled_gram, grid(), act_order=True, damping=0.01, clip_range=clip_range)
    alone = gptq.solve(weight, gram, grid(), act_order=True, damping=0.01)
    assert cost(both, weight * scale, scaled_gram) < cost(alone, weight, gram)


def test_awq_ranks_trials_on_a_sample_of_rows(inputs: Tensor, gram: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    many = torch.randn(2 * awq.ROWS + 100, WIDTH, generator=torch.Generator().manual_seed(2))
    many[:, 5] *= 6

    def found() -> float:
        scale = search_scale(many, gram, inputs.abs().mean(0), grid())
        return cost(grid().round(many * scale), many * scale, gram / scale[:, None] / scale)

    some = found()
    monkeypatch.setattr(awq, "ROWS", len(many))
    assert some == pytest.approx(found(), rel=0.02)


def test_clipping_reduces_the_error_of_each_group(weight: Tensor, gram: Tensor) -> None:
    low, high = search_clip(weight, gram, grid())
    assert ((low <= 0) & (high >= 0)).all()
    for number in range(WIDTH // GROUP):
        part = slice(number * GROUP, (number + 1) * GROUP)
        own = gram[part, part]
        clipped = grid().round(weight[:, part], (low[:, number, None], high[:, number, None]))
        plain = output_error(grid().round(weight[:, part]).weight() - weight[:, part], own)
        assert (output_error(clipped.weight() - weight[:, part], own) <= plain * 1.0001).all()


def test_clip_limits_of_a_group_move_separately(weight: Tensor, gram: Tensor) -> None:
    lopsided = weight.abs() ** 2 - 0.2 * weight.abs().amax()
    own = gram * torch.block_diag(*[torch.ones(GROUP, GROUP)] * (WIDTH // GROUP))

    def error(low: Tensor, high: Tensor) -> Tensor:
        return output_error(grid().round(lopsided, (low, high)).weight() - lopsided, own)

    largest = lopsided.abs().view(ROWS, -1, GROUP).amax(-1)
    even = torch.stack([error(-share * largest, share * largest) for share in awq.CLIP_SHARES]).amin(0)
    assert error(*search_clip(lopsided, gram, grid())).sum() < 0.97 * even.sum()


def test_smoothing_moves_outliers_by_its_strength(weight: Tensor, inputs: Tensor, gram: Tensor) -> None:
    largest = inputs.abs().amax(0)
    size = (gram.diagonal().sqrt() * largest).sqrt()

    def uneven(strength: float, *, of_inputs: bool) -> float:
        factor = smooth(weight, gram, largest, strength)
        found = size / factor if of_inputs else (weight * factor).norm(dim=0)
        return float(found.max() / found.min())

    assert uneven(1.0, of_inputs=True) == pytest.approx(1, abs=1e-3)
    assert uneven(0.0, of_inputs=False) == pytest.approx(1, abs=1e-3)
    half = smooth(weight, gram, largest, 0.5)
    balance = size / half / (weight * half).norm(dim=0)
    assert balance.max() / balance.min() == pytest.approx(1, abs=1e-4)
    assert half.log().mean().abs() < 1e-5


def test_smoothing_of_one_half_is_best_for_w8a8(weight: Tensor, inputs: Tensor, gram: Tensor) -> None:
    """Against more, less, none, and the paper's formula, which uses only the largest magnitudes."""
    largest = inputs.abs().amax(0)

    def error(factor: Tensor) -> float:
        moved, known = weight * factor, inputs / factor
        step = known.abs().amax(1, keepdim=True) / 127
        rounded = (known / step).round() * step
        return float((rounded @ INT8.round(moved).weight().T - inputs @ weight.T).square().sum())

    best = error(smooth(weight, gram, largest, 0.5))
    for strength in (0.0, 0.2, 0.8, 1.0):
        assert best < error(smooth(weight, gram, largest, strength))
    assert best < error(torch.ones(WIDTH))
    assert best < error((largest / weight.abs().amax(0)).sqrt())


def test_smoothing_factors_of_dead_channels_are_bounded(weight: Tensor) -> None:
    for strength in (0.0, 0.5, 1.0):
        factor = smooth(weight * (torch.arange(WIDTH) > 3), torch.zeros(WIDTH, WIDTH), torch.zeros(WIDTH), strength)
        assert factor.isfinite().all()
        assert (factor > 0).all()
