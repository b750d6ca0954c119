"""How a model is spread over GPUs: memory, divisibility, context; what does not fit is refused with the numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.deployment.shape import Shape, read_shape
from tasks.deployment.sizing import ACTIVATIONS, GB, GIB, SHARE, gigabytes, obstacles, plan
from tasks.errors import TaskError
from tasks.settings import HardwareSettings
from tests.tiny import CONTEXT, tiny_model

# Llama-3.1-70B with 4-bit weights
LARGE = Shape(
    layer_bytes=38 * GB,
    outer_bytes=2 * GB,
    layers=80,
    heads=64,
    kv_heads=8,
    vocabulary=128_256,
    widths={"intermediate size": 28_672, "attention width": 8192},
    group=128,
    experts=0,
    context=131_072,
    kv_token=2 * 80 * 8 * 128 * 2,
    kv_sequence=0,
)


def gpus(memory: float, cards: int = 1, machines: int = 1) -> HardwareSettings:
    return HardwareSettings(gpu="NVIDIA-H100", memory=memory, cards=cards, machines=machines)


class TestShape:
    def test_a_small_model(self, tmp_path: Path) -> None:
        model = tiny_model(tmp_path / "model")
        shape = read_shape(model)
        assert (shape.layers, shape.heads, shape.kv_heads) == (2, 4, 2)
        assert shape.context == CONTEXT
        assert shape.kv_token == 2 * 2 * 2 * 16 * 2  # keys and values, layers, heads, width of a head, bytes
        assert shape.outer_bytes == 2 * (shape.vocabulary * 64 + 64)  # tied embedding, last norm
        stored = (model / "model.safetensors").stat().st_size
        assert 0 <= stored - shape.weights < 10_000  # the file's header

    @pytest.mark.parametrize(
        ("changes", "token", "sequence"),
        [
            ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 64}, 128, 64 * 128),
            ({"layer_types": ["full_attention", "linear_attention"]}, 128, 0),
            ({"layer_types": ["full_attention", "deepseek_sparse_attention"]}, 256, 0),
            ({"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}, 128, 0),
            ({"kv_lora_rank": 24, "qk_rope_head_dim": 8}, 2 * 32 * 2, 0),
        ],
    )
    def test_the_cache_of_special_layers(
        self, tmp_path: Path, changes: dict[str, Any], token: int, sequence: int
    ) -> None:
        model = tiny_model(tmp_path / "model")
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        shape = read_shape(model)
        assert (shape.kv_token, shape.kv_sequence) == (token, sequence)

    def test_the_group_size_of_each_format(self, tmp_path: Path) -> None:
        path = tiny_model(tmp_path / "model") / "config.json"
        config = json.loads(path.read_text())
        for stored in (
            {"quant_method": "awq", "group_size": 32},
            {
                "config_groups": {
                    "group_0": {"weights": {"group_size": 32}},
                    "group_1": {"weights": {"group_size": None}},
                }
            },
        ):
            path.write_text(json.dumps(config | {"quantization_config": stored}))
            assert read_shape(path.parent).group == 32


class TestDivisibility:
    @pytest.mark.parametrize(
        ("changes", "cards", "what"),
        [
            ({}, 3, ["64 attention heads", "8 key-value heads", "intermediate size 28,672", "attention width 8,192"]),
            ({"kv_heads": 6}, 4, ["6 key-value heads"]),
            ({"kv_heads": 2}, 4, []),  # every card keeps one
            ({"kv_heads": 0}, 4, []),  # a compressed cache
            ({"vocabulary": 32_000, "heads": 66, "kv_heads": 3, "widths": {}}, 3, ["a vocabulary of 32,000"]),
            ({"widths": {"moe intermediate size": 768}}, 4, ["moe intermediate size 768 in groups of 128"]),
            ({"widths": {"moe intermediate size": 768}, "group": 64}, 4, []),
            ({"heads": 0}, 2, ["0 attention heads"]),
        ],
    )
    def test_what_cannot_be_split_is_named(self, changes: dict[str, Any], cards: int, what: list[str]) -> None:
        found = obstacles(replace(LARGE, **changes), cards)
        assert [one for one in found if one in what] == what
        assert bool(found) == bool(what)

    def test_one_card_splits_nothing(self) -> None:
        assert obstacles(replace(LARGE, heads=0), 1) == []


class TestGpus:
    def test_the_fewest_cards_that_hold_a_text_of_full_length(self) -> None:
        one = plan(LARGE, gpus(80, cards=8))
        assert (one.tensor, one.pipeline, one.copies, one.unused) == (2, 1, 4, 0)
        assert one.context == LARGE.context
        assert one.card_weights == 20 * GB
        assert one.room == SHARE * 80 * GB - ACTIVATIONS - 20 * GB
        assert one.kv_tokens == one.room // (LARGE.kv_token // 2)

    def test_memory_is_never_exceeded(self) -> None:
        for memory in (16, 24, 40, 80, 141):
            for cards in (1, 2, 3, 4, 8):
                for machines in (1, 2, 4):
                    try:
                        one = plan(LARGE, gpus(memory, cards, machines))
                    except TaskError:
                        continue
                    used = one.card_weights + one.card_token * (one.context or 0) + ACTIVATIONS
                    assert used <= SHARE * memory * GB
                    assert not obstacles(LARGE, one.tensor)
                    assert one.cards + one.unused == cards
                    assert one.pipeline <= machines

    def test_a_context_that_does_not_fit_is_shortened(self) -> None:
        one = plan(LARGE, gpus(24, cards=4))
        assert one.tensor == 4
        assert one.shortened
        assert one.context == one.kv_tokens // 256 * 256

    def test_a_model_too_large_for_one_machine_takes_several(self) -> None:
        one = plan(LARGE, gpus(24, machines=4))
        assert (one.tensor, one.pipeline, one.copies, one.grouped) == (1, 4, 1, True)
        # a stage has a quarter of the layers, and the first or last one the embedding or output layer
        assert one.card_weights == 38 * GB // 4 + 2 * GB

    def test_experts_are_spread_over_copies_that_divide_them(self) -> None:
        mixture = replace(LARGE, experts=12)
        one = plan(mixture, gpus(141, cards=8))
        assert (one.tensor, one.copies, one.unused, one.experts) == (1, 6, 2, 12)

    @pytest.mark.parametrize(("experts", "joined"), [(0, True), (12, True), (24, True), (6, False), (18, False)])
    def test_machines_answer_as_one_if_they_divide_the_experts(self, experts: int, joined: bool) -> None:
        one = plan(replace(LARGE, experts=experts), gpus(141, cards=6, machines=2))
        assert (one.copies, one.experts, one.joined) == (6, experts, joined)
        assert not plan(replace(LARGE, experts=experts), gpus(141, cards=6)).joined

    def test_every_card_keeps_a_head_or_the_whole_compressed_cache(self) -> None:
        for kv_heads, share in ((8, 1 / 8), (2, 1 / 2), (0, 1)):
            one = plan(replace(LARGE, kv_heads=kv_heads, context=4096), gpus(9, cards=8))
            assert one.tensor == 8
            assert one.card_token == LARGE.kv_token * share

    def test_a_model_that_does_not_fit_is_refused_with_the_numbers(self) -> None:
        expected = (
            r"package\.hardware has 3 x 16 GB \(NVIDIA-H100\), too little for this model: of its 40\.0 GB of weights, "
            r"split over 2, 20\.0 GB are on each card, which leaves -7\.60 GB for a KV cache that needs 163,840 bytes "
            r"per token and at least 2,048 tokens; describe more .* \(3 cards cannot share 64 attention heads, "
        )
        with pytest.raises(TaskError, match=expected):
            plan(LARGE, gpus(16, cards=3))


class TestProcessors:
    def test_without_a_description_the_cache_stays_small(self) -> None:
        one = plan(LARGE, None)
        assert (one.tensor, one.pipeline, one.copies, one.machines) == (1, 1, 1, 1)
        assert one.room == 4 * GIB
        assert one.context == 4 * GIB // LARGE.kv_token // 256 * 256

    def test_each_machine_has_a_copy(self) -> None:
        one = plan(LARGE, HardwareSettings(memory=256, machines=3))
        assert (one.machines, one.copies, one.grouped) == (3, 1, False)
        assert one.context == LARGE.context

    def test_a_small_model_takes_no_more_than_it_needs(self) -> None:
        one = plan(replace(LARGE, context=512), HardwareSettings(memory=512))
        assert one.room == GIB  # whole GiB

    def test_a_model_that_does_not_fit_is_refused_with_the_numbers(self) -> None:
        expected = (
            r"package\.hardware has 32 GB of memory and no GPU, too little for this model: 40\.0 GB of weights and "
            r"4\.00 GB for the server's process leave 0 GB for a KV cache that needs 327,680 bytes per token"
        )
        with pytest.raises(TaskError, match=expected):
            plan(LARGE, HardwareSettings(memory=32))


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 GB"), (-7.6 * GB, "-7.60 GB"), (114e6, "0.114 GB"), (40e9, "40.0 GB"), (1234e9, "1234 GB")],
)
def test_gigabytes_have_three_digits(number: float, text: str) -> None:
    assert gigabytes(number) == text
