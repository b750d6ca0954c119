"""The arithmetic of a plan: costs from timed miniatures, narrower layers, measurements of other machines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from flows.planning.table import refusal
from tasks.activations.memory import rows_bytes, stored_bytes
from tasks.checks.preflight import check_announced
from tasks.errors import TaskError
from tasks.model.arrival import clean_config, known_config
from tasks.planning.__main__ import find_config, measure
from tasks.planning.miniature import Miniature, narrowed, runs, thin, visited
from tasks.planning.need import Measurement, Need, carried, read_measurement
from tasks.planning.timing import Bench, Cost
from tasks.runtimes import check_room
from tasks.settings import check_settings
from tasks.tensor_files import Entry, write_hollow

ROOT = Path(__file__).resolve().parents[2]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 65536,
}
WEIGHTS = 2048 * (2048 + 512 + 512 + 2048) + 3 * 2048 * 5632
SMOLLM2 = LLAMA | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
HERE = Measurement(
    key="one",
    machine="a processor",
    device="cpu",
    cores=2,
    memory=24e9,
    disk=50e9,
    when="2026-11-28 12:00 UTC",
    model="llama, 135 million",
    parameters=135_000_000,
    took=45.0,
    held=1e9,
    needs={
        "statistics": Need(100.0, 1e9, disk=4e8, scratch=5e8),
        "quantize@int8": Need(30.0, 8e8, disk=2e8, scratch=2e8, rough=True),
        "quantize@library": Need(None, 8e8, note="no such library"),
    },
)


def config(values: dict[str, Any]) -> Any:
    return AutoConfig.for_model(**values)


@pytest.mark.parametrize("factor", [2, 4, 8, 32, 10**6])
@pytest.mark.parametrize("values", [LLAMA, SMOLLM2], ids=["1B", "135M"])
def test_a_narrower_layer_has_the_heads_and_the_groups_of_the_wide_one(values: dict[str, Any], factor: int) -> None:
    whole, small = config(values), narrowed(config(values), factor)
    assert small.hidden_size < whole.hidden_size
    assert small.hidden_size % small.num_attention_heads == 0
    assert small.head_dim == whole.hidden_size // whole.num_attention_heads
    assert small.num_attention_heads % small.num_key_value_heads == 0
    if small.num_key_value_heads > 1:
        ratio = whole.num_attention_heads // whole.num_key_value_heads
        assert small.num_attention_heads // small.num_key_value_heads == ratio
    assert small.intermediate_size % 256 == 0  # as the wide one's
    assert whole.hidden_size == values["hidden_size"]  # unchanged


def test_the_whole_layer_is_the_last_of_the_ladder_unless_it_is_too_large(tmp_path: Path) -> None:
    bench = Bench(tmp_path, config(LLAMA), "bfloat16", (WEIGHTS, WEIGHTS), 0.0)
    assert [mini.config.hidden_size for mini in bench.ladder] == [1024, 2048]
    larger = config(LLAMA | {"hidden_size": 4096, "num_attention_heads": 64})
    wide = Bench(tmp_path, larger, "bfloat16", (4 * WEIGHTS, 4 * WEIGHTS), 0)
    assert wide.ladder[-1].config.hidden_size == 2048
    small = Bench(tmp_path, config(SMOLLM2), "bfloat16", (3_000_000, 3_000_000), 0)
    assert [mini.config.hidden_size for mini in small.ladder] == [576]
    assert (bench.thin.config.hidden_size, bench.thin.config.vocab_size) == (2048, 10_000_000 // 2048)


class FakeMini(Miniature):
    """A miniature without files."""

    def __init__(self, name: str, layers: int, weights: int) -> None:
        self.name, self.layers, self._weights = name, layers, weights

    @property
    def weights(self) -> int:
        return self._weights


class Clocked(Bench):
    """A bench whose work says how long it takes."""

    now = 0.0

    def spend(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def bench(tmp_path: Path) -> Clocked:
    made = Clocked(tmp_path, config(SMOLLM2), "bfloat16", (4_000_000, 4_000_000), time.monotonic() + 60)
    made._clock = lambda: made.now
    made.one, made.two = FakeMini("one", 1, 1000), FakeMini("two", 2, 2000)
    made.thin, made._more = FakeMini("thin", 1, 1000), 2.0
    made.ladder = [FakeMini("a", 1, 250_000), FakeMini("b", 1, 1_000_000)]
    return made


WHOLE = FakeMini("c", 1, 4_000_000)


def costs(bench: Clocked, law: Callable[[float], float], count: float = 1, outer: float | None = None) -> Cost:
    """Of work that takes 2 seconds, then for each time a second and `law` of the weights for each layer, and 5 seconds
    for the words."""

    def work(mini: Any, times: int) -> None:
        if times:
            each = 1 + mini.layers * law(mini.weights / mini.layers) + 5 * (mini.name == "thin")
            bench.spend(2 + times * each)

    return bench.cost(work, count, 1.0, lambda mini: True, outer)


@pytest.mark.parametrize("law", [lambda w: 3e-6 * w, lambda w: 2e-6 * w + 1e-9 * w**1.5], ids=["weights", "products"])
def test_a_layer_that_is_too_wide_follows_from_two_narrower_ones(bench: Clocked, law: Callable[[float], float]) -> None:
    found = costs(bench, law)
    assert found.rough
    assert (found.fixed, found.layer, found.outer) == pytest.approx((3.0, law(4_000_000), 10.0))
    bench.ladder.append(WHOLE)
    found = costs(bench, law, outer=0.0)
    assert (found.fixed, found.layer, found.outer) == pytest.approx((3.0, law(4_000_000), 0.0))
    assert not found.rough


def test_what_is_done_often_is_timed_for_a_few_times(bench: Clocked) -> None:
    bench.ladder.append(WHOLE)
    found = costs(bench, lambda w: 3e-6 * w, count=100)
    assert (found.fixed, found.layer, found.outer) == pytest.approx((102.0, 100 * 12.0, 2 * 100 * 5.0))


def test_no_rung_is_begun_that_would_end_after_the_deadline(bench: Clocked) -> None:
    begun: list[str] = []

    def work(mini: Any, times: int) -> None:
        if times:
            begun.append(mini.name)
            time.sleep(mini.weights / 5e6)

    bench.ladder.append(WHOLE)
    bench.deadline = time.monotonic() + 0.6
    assert bench.cost(work, 1, 1.0, lambda mini: True, 0.0).rough
    assert begun == ["one", "two", "a", "b"]
    time.sleep(max(0.0, bench.deadline - time.monotonic()))
    with pytest.raises(TaskError, match="no time was left"):
        bench.cost(work, 1, 1.0, lambda mini: True, 0.0)


def test_the_statistics_are_a_matrix_and_two_rows_for_each_input() -> None:
    plain = stored_bytes([8, 8, 16] * 2, 8, 0)
    assert plain == 4 * (2 * (8 * 8 + 16 + 8 * 8 + 16 + 16 * 16 + 32) + 8 * 8 + 16)
    assert stored_bytes([8, 8, 16] * 2, 8, 1000 * 3 * 2) == plain + 4 * 1000 * 3 * 2


@pytest.mark.parametrize("importance", [True, False])
def test_without_the_matrices_what_the_layers_read_is_kept(importance: bool) -> None:
    rows = rows_bytes(1000, 2, 8, importance)
    assert rows == 1000 * 8 * 2 * (2 if importance else 4)
    assert stored_bytes([8, 8, 16] * 2, 8, 0, rows) == rows + 8 * (2 * 32 + 8) + 4 * 8 * 8


def test_a_measurement_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "there.json").write_text(json.dumps(asdict(HERE)))
    assert read_measurement(tmp_path / "there.json") == HERE
    for text in ("{", "[]", "{}", json.dumps(asdict(HERE) | {"speed": 3})):
        (tmp_path / "there.json").write_text(text)
        with pytest.raises(TaskError, match="is not a measurement"):
            read_measurement(tmp_path / "there.json")
    with pytest.raises(TaskError, match="is not a measurement"):
        read_measurement(tmp_path / "nowhere.json")


def test_another_machine_is_told_by_its_own_measurement() -> None:
    there = replace(HERE, machine="a server", memory=99e9)
    needs = {stage: replace(need, seconds=None, rough=False, memory=1.0) for stage, need in HERE.needs.items()}
    same = carried(there, replace(HERE, needs=needs))
    assert (same.machine, same.memory) == ("a server", 99e9)
    assert [need.seconds for need in same.needs.values()] == [100.0, 30.0, None]
    assert [need.rough for need in same.needs.values()] == [False, True, False]
    assert same.needs["statistics"].memory == 1.0  # sizes are of the run that is planned


def test_times_of_another_model_are_scaled_and_rough() -> None:
    sizes = replace(HERE, key="two", parameters=2 * HERE.parameters, needs={**HERE.needs, "package": Need(None, 1.0)})
    found = carried(HERE, sizes).needs
    assert (found["statistics"].seconds, found["statistics"].rough) == (200.0, True)
    assert (found["package"].seconds, found["package"].note) == (None, "not measured there")


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "is not a model's config.json"), ("[]", "not a JSON object"), (None, "does not exist; name a config")],
)
def test_what_is_no_model_is_one_clear_error(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(TaskError, match=words):
        find_config(str(tmp_path))


def test_a_model_is_a_config_or_a_folder_with_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    places = (str(tmp_path), str(tmp_path / "config.json"), f"path:{tmp_path}")
    assert {find_config(place) for place in places} == {tmp_path / "config.json"}


MIXTURE = LLAMA | {
    "model_type": "qwen3_moe",
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 6,
    "head_dim": 32,
    "vocab_size": 2048,
}
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "Qwen3-235B-A22B", "gpt-oss-120b", "DeepSeek-V3"])
def test_a_layer_of_a_mixture_has_the_experts_that_a_token_visits(name: str) -> None:
    values, _ = clean_config(json.loads((CONFIGS / f"{name}.json").read_text()), untied=False)
    whole = known_config(values)
    small = visited(whole)
    assert small is not whole
    for factor in (1, 4, 10**6):
        layer = narrowed(small, factor)
        assert layer.num_experts_per_tok == values["num_experts_per_tok"]
        experts = {getattr(layer, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")}
        assert experts - {None} == {layer.num_experts_per_tok}
        assert layer.num_hidden_layers == 1
    assert runs(narrowed(small, 16))
    assert runs(thin(small, 512))


def test_a_model_without_experts_is_visited_whole() -> None:
    whole = config(LLAMA)
    assert visited(whole) is whole


def test_what_does_not_run_is_not_measured() -> None:
    assert not runs(config(MIXTURE | {"num_experts_per_tok": 64}))  # more than there are


def test_what_is_done_once_is_scaled_to_all_experts_and_the_rest_to_those_of_a_token(bench: Clocked) -> None:
    bench.all, bench.visited = 16_000_000, 1_000_000

    def work(mini: Any, times: int) -> None:
        if times:
            bench.spend(3e-6 * mini.weights + times * 1e-6 * mini.weights)

    found = bench.cost(work, 10, 1.0, lambda mini: True, 0.0)
    assert found.layer == pytest.approx(3e-6 * 16_000_000 + 10 * 1e-6 * 1_000_000)
    assert found.rough


def test_a_mixture_is_measured_from_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(MIXTURE | {"architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16"})
    )
    small = {"samples": 2, "sequence_length": 64}
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["calibration"] |= small
    values["variants"] = {
        "base": {"scheme": "none"},
        "int4": {"scheme": "W4A16", "group_size": 32, "format": "compressed-tensors"},
    }
    threads = {"statistics": 1, "quantize@int4": 1}
    day = 86_400.0  # from the start of this process, which runs other tests before
    found = measure(check_settings(values), tmp_path / "config.json", tmp_path, day, threads).needs
    for need in found.values():
        assert need.seconds
        assert need.rough  # measured with 4 of 32 experts
    # of each layer q, k and v's input, o's, and two of each expert; the output layer's
    grams = 6 * (2 * 256**2 + 32 * (256**2 + 128**2)) + 256**2
    assert found["statistics"].disk == pytest.approx(4 * grams, rel=0.05)


def test_stages_that_do_not_fit_are_named_in_one_line_with_the_remedy() -> None:
    assert refusal(HERE) is None
    found = refusal(replace(HERE, memory=9e8)) or ""
    assert found.startswith("statistics cannot run on a machine with 900 MB of memory, they need up to 1.0 GB; run on")
    assert "\n" not in found


def test_a_baseline_that_cannot_fit_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model(parameters: int) -> Path:
        folder = tmp_path / str(parameters)
        folder.mkdir(exist_ok=True)
        write_hollow(folder / "model.safetensors", {"weight": Entry("BF16", (parameters,), 2 * parameters)})
        return folder

    monkeypatch.setattr("tasks.runtimes.device_memory", lambda: 24 * 10**9)
    check_room(model(11_000_000_000), "bfloat16")
    with pytest.raises(TaskError, match=r"needs more than 141\.1 GB .* 70\.6 billion weights in bfloat16, .* 24\.0 GB"):
        check_room(model(70_553_706_496), "bfloat16")
    with pytest.raises(TaskError, match=r"set evaluation\.dtype to bfloat16"):
        check_room(model(11_000_000_000), "float32")


def test_the_preflight_refuses_it_from_config_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = check_settings(yaml.safe_load((ROOT / "params.yaml").read_text()))
    (tmp_path / "config.json").write_text(
        json.dumps(MIXTURE | {"architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16"})
    )
    monkeypatch.setattr("tasks.runtimes.device_memory", lambda: 10**6)
    with pytest.raises(TaskError, match="evaluating the baseline needs more than"):
        check_announced(settings, tmp_path / "config.json", tmp_path / "here", here=True)
    check_announced(settings, tmp_path / "config.json", tmp_path / "there", here=False)
