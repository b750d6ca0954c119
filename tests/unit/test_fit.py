"""Settings that do not fit a model are refused before work starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.checks.preflight import check
from tasks.errors import TaskError
from tasks.model.compatibility import check_context, check_fit
from tasks.model.layout import linear_shapes
from tasks.settings import Settings, VariantSettings, check_settings
from tests.mixed import untied
from tests.tiny import CONTEXT

PARAMS = yaml.safe_load(Path("params.yaml").read_text())
# within the tiny model's context
PARAMS["calibration"]["sequence_length"] = PARAMS["evaluation"]["window"] = CONTEXT
VARIANTS = PARAMS["variants"]
# of a weight-only mixture
PLAIN = {"smoothing": None, "symmetric_activations": None}
# in a format with only one group size
GPTQ = {**VARIANTS["gptq-int4"], "group_size": 32, "format": "gptq"}


def gptq(**changes: Any) -> VariantSettings:
    return VariantSettings.model_validate({**GPTQ, **changes})


def test_a_group_size_that_fits_passes(llama: Path) -> None:
    check_fit("v", gptq(), llama)
    check_fit("v", VariantSettings.model_validate({**VARIANTS["awq-int4"], "group_size": 64}), llama)
    check_fit("v", VariantSettings.model_validate(VARIANTS["int8"]), llama)


def test_group_size_that_does_not_divide_names_the_layer_and_valid_sizes(llama: Path) -> None:
    with pytest.raises(TaskError) as caught:
        check_fit("v", gptq(group_size=128), llama)
    message = str(caught.value)
    assert "variants.v: group_size is 128, which does not divide the width 64 of model.layers.0." in message
    assert "sizes that divide every layer: 16, 32, 64;" in message
    assert message.endswith("or set format to compressed-tensors, in which layers may differ")
    check_fit("v", gptq(group_size=128, format="compressed-tensors"), llama)
    with pytest.raises(TaskError, match="group_size is 72, which does not divide the width 128"):
        check_fit("v", gptq(group_size=72, format="compressed-tensors"), llama)


def test_format_without_unquantized_layers_refuses_skip_layers(llama: Path) -> None:
    with pytest.raises(TaskError, match="skip_layers is set, but the format gptq does not support"):
        check_fit("v", gptq(skip_layers=[1]), llama)
    check_fit("v", gptq(skip_layers=[1], format="awq"), llama)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scheme": "W8A16", "format": "awq"},
            "the format awq does not support 8 bits; set format to compressed-tensors",
        ),
        ({"scheme": "W8A8", "group_size": None, "format": "awq"}, "does not support rounded activations; set format"),
        ({"scheme": "W8A8", "group_size": None}, "the format gptq does not support rounded activations; set format"),
        ({"format": "awq", "output_layer": "W8A16@64"}, "of lm_head is set, but the format awq holds"),
        ({"output_layer": "W8A16@64"}, "of lm_head is set, but the format gptq holds"),
        ({"scale_dtype": "bfloat16"}, "scale_dtype is bfloat16, but the format gptq stores float16"),
        (
            {"format": "compressed-tensors", "output_layer": "W8A16@72"},
            "72, which does not divide the width 64 of lm_h",
        ),
    ],
)
def test_unsupported_settings_of_a_format_are_refused_before_work_starts(
    changes: dict[str, Any], message: str, llama: Path
) -> None:
    with pytest.raises(TaskError, match=rf"^variants\.v: .*{message}"):
        check_fit("v", gptq(**changes), llama)


def test_a_tied_embedding_cannot_be_set_apart(llama: Path, tmp_path: Path) -> None:
    for variant in (gptq(format="compressed-tensors", embedding="W8A16@64"), auto(embedding="W8A16@64")):
        with pytest.raises(
            TaskError, match=r"variants\.v: embedding is W8A16@64, but the model ties .* only output_layer"
        ):
            check_fit("v", variant, llama)
        check_fit("v", variant, untied(llama, tmp_path / variant.scheme))


def test_a_mixtures_output_layer_must_fit_as_well(llama: Path) -> None:
    check_fit("v", auto(output_layer="W8A16@128"), llama)  # with smaller groups
    with pytest.raises(
        TaskError, match=r"variants\.v: group_size is 72, which does not divide the width 64 of lm_head"
    ):
        check_fit("v", auto(output_layer="W8A16@72"), llama)


@pytest.mark.parametrize("key", ["output_layer", "embedding"])
def test_target_that_cannot_load_a_variant_is_refused_before_work_starts(key: str, llama: Path, tmp_path: Path) -> None:
    def settings(target: str) -> Settings:
        variants = {"base": {"scheme": "none"}, "v": {**VARIANTS["gptq-int4"], key: "W8A16@64"}}
        return check_settings(PARAMS | {"targets": [target], "variants": variants})

    evals, apart = Path("evals"), untied(llama, tmp_path / "untied")
    what = "ties the output layer to the embedding" if key == "output_layer" else "look up embeddings in full precision"
    with pytest.raises(
        TaskError, match=rf"variants\.v\.{key} is W8A16@64, but .*{what}.*set targets to \[onnx\] or \[gguf\]"
    ):
        check(settings("transformers"), llama, evals)
    if key == "output_layer":
        check(settings("transformers"), apart, evals)
        check(settings("onnx"), llama, evals)
    else:
        with pytest.raises(TaskError, match="look up embeddings in full precision"):
            check(settings("transformers"), apart, evals)
        with pytest.raises(TaskError, match="embedding is W8A16@64, but the model ties"):
            check(settings("onnx"), llama, evals)
    check(settings("onnx"), apart, evals)


def auto(**changes: Any) -> VariantSettings:
    own = {"candidates": ["W4A16_ASYM@32", "W8A8"], "bits_per_weight": 5.0}
    return VariantSettings.model_validate({**VARIANTS["auto"], **own, **changes})


def test_candidates_must_fit_the_layers_and_the_budget(llama: Path) -> None:
    check_fit("v", auto(bits_per_weight=4.625), llama)
    with pytest.raises(
        TaskError, match=r"candidates are W4A16_ASYM@128, W8A16@96, none of which divides the width 64 .*: 16, 32, 64$"
    ):
        check_fit("v", auto(candidates=["W4A16_ASYM@128", "W8A16@96"], **PLAIN), llama)
    with pytest.raises(TaskError, match=r"bits_per_weight is 4\.62, but the smallest candidates take 4\.625"):
        check_fit("v", auto(bits_per_weight=4.62), llama)


def test_skipped_layers_need_not_fit_but_must_exist(llama: Path) -> None:
    with pytest.raises(TaskError, match=r"skip_layers names layer 2, but the model has 2: 0 to 1"):
        check_fit("v", gptq(skip_layers=[2], format="awq"), llama)
    with pytest.raises(TaskError, match="names all 2 layers"):
        check_fit("v", gptq(skip_layers=[0, 1], format="awq"), llama)


@pytest.mark.parametrize(
    ("grid_symmetric", "group", "symmetric", "refused"),
    [
        (False, 32, False, True),
        (False, 16, False, True),  # smaller groups contain the grid of larger ones
        (False, 64, False, False),
        (False, 32, True, False),  # a symmetric grid does not contain an asymmetric one
        (True, 32, True, True),
    ],
)
def test_grid_of_the_dequantized_weights_is_refused(
    llama: Path, tmp_path: Path, grid_symmetric: bool, group: int, symmetric: bool, refused: bool
) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    grid = {"bits": 4, "group_size": 32, "symmetric": grid_symmetric}
    (model / "source.json").write_text(json.dumps({"grid": grid}))
    variant = gptq(group_size=group, scheme="W4A16" if symmetric else "W4A16_ASYM")
    if refused:
        with pytest.raises(TaskError, match="would equal the baseline"):
            check_fit("v", variant, model)
    else:
        check_fit("v", variant, model)


def test_shapes_are_of_the_linear_layers_inside_the_decoder(llama: Path) -> None:
    shapes = linear_shapes(llama)
    assert shapes["model.layers.1.mlp.down_proj"] == (64, 128)
    assert len(shapes) == 14


@pytest.mark.parametrize(
    ("section", "key", "name"),
    [
        ("calibration", "sequence_length", "calibration.sequence_length is"),
        ("evaluation", "window", "evaluation.window is"),
        ("benchmark", "prompt_tokens", "benchmark.prompt_tokens and new_tokens are together"),
    ],
)
def test_more_tokens_than_the_models_context_are_refused(section: str, key: str, name: str) -> None:
    less = PARAMS["benchmark"]["new_tokens"] if section == "benchmark" else 0
    for tokens, fits in ((CONTEXT, True), (CONTEXT + 1, False)):
        settings = check_settings(PARAMS | {section: PARAMS[section] | {key: tokens - less}})
        check_context(settings, {})
        for long in (
            {"max_position_embeddings": 2 * CONTEXT},
            {"max_position_embeddings": CONTEXT, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"text_config": {"max_position_embeddings": 2 * CONTEXT}, "max_position_embeddings": 1},
        ):
            check_context(settings, long)
        config = {"max_position_embeddings": CONTEXT, "rope_scaling": {"rope_type": "llama3", "factor": 2.0}}
        if fits:
            check_context(settings, config)
        else:
            with pytest.raises(TaskError, match=rf"^{name} {CONTEXT + 1}, but the model's context is {CONTEXT} tokens"):
                check_context(settings, config)


class TestBeforeTheDownload:
    """The model's weights are not there yet, and its config.json says enough."""

    @staticmethod
    def announced(folder: Path, llama: Path, **changes: Any) -> Settings:
        """Settings with a model of which only a changed config.json exists."""
        config = json.loads((llama / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        variants = {"base": {"scheme": "none"}, "int8": VARIANTS["int8"], "v": {**VARIANTS["gptq-int4"]}}
        model = PARAMS["model"] | {"source": f"path:{folder}", "sha256": None}
        return check_settings(PARAMS | {"variants": variants, "model": model})

    def test_settings_that_fit_pass(self, llama: Path, tmp_path: Path) -> None:
        check(self.announced(tmp_path, llama), None, Path("evals"))

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"max_position_embeddings": 128}, r"calibration\.sequence_length is 256, but the model's context is 128"),
            ({"hidden_size": 60}, r"does not divide the width 60"),
            ({"quantization_config": {"quant_method": "fp8"}}, r"already quantized \(fp8\)"),
            ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, r"no decoder language model"),
        ],
    )
    def test_what_does_not_fit_is_refused(
        self, changes: dict[str, Any], words: str, llama: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(TaskError, match=words):
            check(self.announced(tmp_path, llama, **changes), None, Path("evals"))

    def test_a_damaged_configuration_is_one_line(self, llama: Path, tmp_path: Path) -> None:
        settings = self.announced(tmp_path, llama)
        (tmp_path / "config.json").write_text('{"model_type": ')
        with pytest.raises(TaskError, match=r"config\.json is not JSON"):
            check(settings, None, Path("evals"))

    def test_a_path_without_a_model_is_refused(self, llama: Path, tmp_path: Path) -> None:
        settings = self.announced(tmp_path, llama)
        gone = settings.model.model_copy(update={"source": f"path:{tmp_path / 'gone'}"})
        with pytest.raises(TaskError, match=r"gone not found \(looked at"):
            check(settings.model_copy(update={"model": gone}), None, Path("evals"))

    def test_a_hub_that_is_away_is_left_to_the_download(
        self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        evals = Path("evals").resolve()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        settings = self.announced(tmp_path, llama)
        away = settings.model.model_copy(update={"source": "hf:acme/tiny@main"})
        check(settings.model_copy(update={"model": away}), None, evals)

    @pytest.mark.parametrize(
        ("hardware", "words"),
        [
            (
                {"gpu": "NVIDIA-L4", "memory": 24},
                r"^the smallest variant, awq-int4, will have about 4\.\d bits per weight, together 3\d\.\d GB, and "
                r"could not be packaged: package\.hardware has 1 x 24 GB \(NVIDIA-L4\), too little",
            ),
            ({"memory": 32}, r"package\.hardware has 32 GB of memory and no GPU, too little"),
            ({"gpu": "NVIDIA-L4", "memory": 24, "cards": 4}, None),
            ({"memory": 64}, None),
            (None, None),
        ],
    )
    def test_a_model_too_large_for_the_machines_that_will_serve_it(
        self, hardware: dict[str, Any] | None, words: str | None, tmp_path: Path
    ) -> None:
        (tmp_path / "config.json").write_text(Path("tests/configs/Llama-3.1-70B.json").read_text())
        package = PARAMS["package"] | {"hardware": hardware}
        four_bit = {**VARIANTS["awq-int4"], "group_size": 128}
        params = PARAMS | {"package": package, "variants": VARIANTS | {"awq-int4": four_bit}}
        params["model"] = PARAMS["model"] | {"source": f"path:{tmp_path}", "sha256": None}
        settings = check_settings(params)
        if words is None:
            check(settings, None, Path("evals"), here=False)
        else:
            with pytest.raises(TaskError, match=words):
                check(settings, None, Path("evals"), here=False)
