"""The solvers: what they promise of the error of a layer's output, and GPTQ against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tasks.solvers import Grid, Rounded, fit_grid, gptq, output_error, round_to_grid, rtn
from tasks.solvers.awq import search_clip, search_scale
from tasks.solvers.smoothquant import smooth

ROWS, WIDTH, GROUP, TOKENS = 48, 128, 32, 512


def grid(*, symmetric: bool = False, bits: int = 4, group: int | None = GROUP) -> Grid:
    return Grid(bits, group, symmetric, torch.float32)


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    """Correlated, and of uneven size, as a model's are: [tokens, width]."""
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


def cost(solved: Rounded, weight: Tensor, gram: Tensor) -> float:
    return float(output_error(solved.weight() - weight, gram).sum())


def test_the_gram_matrix_tells_the_error_of_the_output(inputs: Tensor, gram: Tensor, weight: Tensor) -> None:
    change = rtn.solve(weight, grid()).weight() - weight
    assert torch.allclose(output_error(change, gram), (inputs @ change.T).pow(2).sum(0), rtol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [GROUP, None])
def test_a_weight_on_the_grid_stays(symmetric: bool, group: int | None) -> None:
    way = grid(symmetric=symmetric, group=group)
    integers = torch.arange(WIDTH * 2, dtype=torch.uint8).view(2, WIDTH) % 16
    scales = torch.full((2, way.groups(WIDTH)), 0.5)
    zeros = torch.full_like(scales, 8 if symmetric else 3, dtype=torch.uint8)
    weight = Rounded(integers, scales, zeros).weight()
    if symmetric:
        assert torch.equal(round_to_grid(weight, scales, zeros, way).weight(), weight)
    else:
        solved = rtn.solve(weight, way)
        assert torch.equal(solved.weight(), weight)
        assert torch.equal(solved.zeros, zeros)


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_weight_moves_by_more_than_half_a_step(weight: Tensor, symmetric: bool) -> None:
    solved = rtn.solve(weight, grid(symmetric=symmetric))
    step = solved.scales.repeat_interleave(GROUP, 1)
    # symmetric: the largest on one side may lie half a step beyond the last number
    assert ((solved.weight() - weight).abs() <= step * 0.501).all()


def test_groups_of_one_sign_and_of_zeros_have_a_zero_and_a_scale() -> None:
    weight = torch.stack([torch.linspace(1, 2, GROUP), torch.zeros(GROUP), -torch.linspace(1, 2, GROUP)])
    scales, zeros = fit_grid(weight, grid())
    assert zeros.flatten().tolist() == [0, 0, 15]
    assert (scales > 0).all()
    assert torch.equal(rtn.solve(weight, grid()).weight()[1], torch.zeros(GROUP))


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_is_what_its_definition_says(act_order: bool, symmetric: bool, weight: Tensor, gram: Tensor) -> None:
    """One column after another, each time with the inverse of what is left of the Gram matrix."""
    way, damping = grid(symmetric=symmetric), 0.01
    matrix = gram.double() + damping * gram.diagonal().mean().double() * torch.eye(WIDTH).double()
    order = gram.diagonal().argsort(descending=True) if act_order else torch.arange(WIDTH)
    scales, zeros = fit_grid(weight, way)
    rest, expected = weight.double().clone(), torch.zeros(ROWS, WIDTH).double()
    for place, column in enumerate(order.tolist()):
        left = order[place:]
        inverse = torch.linalg.inv(matrix[left][:, left])
        scale, zero = scales[:, column // GROUP].double(), zeros[:, column // GROUP].double()
        expected[:, column] = ((rest[:, column] / scale).round().add(zero).clamp(0, 15) - zero) * scale
        error = (rest[:, column] - expected[:, column]) / inverse[0, 0]
        rest[:, left] -= error[:, None] * inverse[0]
    found = gptq.solve(weight, gram, way, act_order=act_order, damping=damping)
    # a sum that lies between two numbers may fall to either side in another precision
    assert (found.weight().double() - expected).abs().gt(1e-4).double().mean() < 0.01


def test_gptq_beats_rounding_and_stacking_changes_nothing(weight: Tensor, gram: Tensor) -> None:
    together = gptq.solve(weight, gram, grid(), act_order=True, damping=0.01)
    assert cost(together, weight, gram) < 0.6 * cost(rtn.solve(weight, grid()), weight, gram)
    parts = [gptq.solve(part, gram, grid(), act_order=True, damping=0.01) for part in weight.split(16)]
    assert torch.equal(together.integers, torch.cat([part.integers for part in parts]))


def test_gptq_takes_inputs_that_never_occur(weight: Tensor, inputs: Tensor) -> None:
    quiet = inputs.clone()
    quiet[:, [0, 7, WIDTH - 1]] = 0
    solved = gptq.solve(weight, quiet.T @ quiet, grid(), act_order=True, damping=0.01)
    assert solved.weight().isfinite().all()
    assert torch.equal(solved.weight()[:, 7], torch.zeros(ROWS))


def test_awq_scales_and_clips_cost_less_than_none(weight: Tensor, inputs: Tensor, gram: Tensor) -> None:
    plain = cost(rtn.solve(weight, grid()), weight, gram)
    scale = search_scale(weight, gram, inputs.abs().mean(0), grid())
    scaled_gram = gram / scale[:, None] / scale
    scaled = cost(rtn.solve(weight * scale, grid()), weight * scale, scaled_gram)
    assert scaled < 0.95 * plain
    limit = search_clip(weight * scale, scaled_gram, grid())
    assert (limit <= (weight * scale).abs().view(ROWS, -1, GROUP).amax(-1)).all()
    both = gptq.solve(weight * scale, scaled_gram, grid(), act_order=True, damping=0.01, limit=limit)
    alone = gptq.solve(weight, gram, grid(), act_order=True, damping=0.01)
    assert cost(both, weight * scale, scaled_gram) < cost(alone, weight, gram)


def test_clips_lessen_the_error_of_each_group(weight: Tensor, gram: Tensor) -> None:
    limit = search_clip(weight, gram, grid())
    for number in range(WIDTH // GROUP):
        part = slice(number * GROUP, (number + 1) * GROUP)
        own = gram[part, part]
        clipped = rtn.solve(weight[:, part], grid(), limit[:, number : number + 1])
        plain = output_error(rtn.solve(weight[:, part], grid()).weight() - weight[:, part], own)
        assert (output_error(clipped.weight() - weight[:, part], own) <= plain * 1.0001).all()


def test_smoothing_moves_outliers_by_its_strength(weight: Tensor, inputs: Tensor) -> None:
    largest = inputs.abs().amax(0)
    even = largest / smooth(weight, largest, 1.0)
    assert even.max() / even.min() < 1.01
    assert torch.allclose(smooth(weight, largest, 0.0) * weight.abs().amax(0), torch.ones(WIDTH))
    half = smooth(weight, largest, 0.5)
    assert torch.allclose(largest / half, (weight * half).abs().amax(0), rtol=1e-4)
