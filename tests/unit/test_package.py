"""The bundle: bytes, model card, provenance, trial; nothing partial or untested is left."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import yaml
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from tasks.bundle.checksums import check_sums
from tasks.bundle.signing import Signer, check_signature
from tasks.checks import smoke
from tasks.environments import interpreter
from tasks.errors import TaskError
from tasks.export import export
from tasks.output import checksums, sha256, whole_directory, write_json, write_manifest
from tasks.package import Inputs, Package, package
from tasks.report import report
from tasks.reporting.model_card import base_model
from tasks.reporting.provenance import dvc_identity, git_state, machine, versions, without_folders
from tasks.settings import Settings, check_settings
from tests.bundles import key_pair
from tests.tiny import tiny_model
from tests.unit.measured import GATE, made_up

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {"lost": 0, "size": 269_000_000},
    "int8": {"scheme": "W8A8", "bits": 8, "lost": 0.002, "size": 163_000_000, "worse": 0.006, "speed": 1.1},
    "gptq-int4": {"bits": 4, "lost": 0.015, "size": 112_000_000, "worse": 0.2, "speed": None},
}
NORM, INSIDE = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
OUTSIDE = {
    "model.embed_tokens.weight": torch.randn(8, 2),
    "model.visual.merger.weight": torch.tensor([float("nan"), -0.0]),
    "model.visual.patch.bias": torch.ones(3, dtype=torch.bfloat16),
    "model.layers.1.enorm.weight": torch.ones(2),  # a layer that predicts a further token
    NORM: torch.ones(2),
}
SHAPE = {  # of a small model, for the files of serve/
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
}
FAILING = {"base": VARIANTS["base"], "int8": VARIANTS["int8"] | {"lost": 0.3}}


@dataclass
class Workplace:
    """Fake inputs of `package` in one folder."""

    root: Path
    settings: Settings
    inputs: Inputs
    destination: Path

    def package(self, wrote: str = " Paris, of course.") -> Package:
        return package(self.settings, self.settings.targets[0], self.inputs, self.destination, lambda *_: wrote)

    def leftovers(self) -> list[str]:
        return [p.name for p in self.destination.parent.iterdir()] if self.destination.parent.exists() else []


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The made-up exports hold no model that Transformers knows."""
    monkeypatch.setattr("tasks.runtimes.dense.needs_own_reader", lambda *_: False)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Settings]]:
    """The outputs of the stages before `package`, and the settings; cached by arguments. Copy it."""
    made: dict[str, tuple[Path, Settings]] = {}

    def make(
        variants: Mapping[str, Mapping[str, Any]],
        target: str,
        settings_of: Mapping[str, Mapping[str, Any]],
        model: Mapping[str, Any],
    ) -> tuple[Path, Settings]:
        key = repr((variants, target, settings_of, model))
        if key in made:
            return made[key]
        root = made_up(tmp_path_factory.mktemp("reported") / "work", variants, target=target)
        source = root / "models/source"
        source.mkdir(parents=True)
        write_json(source / "source.json", json.loads((root / "source.json").read_text()) | dict(model))
        (source / "LICENSE").write_text("Apache License")
        (source / "generation_config.json").write_text('{"of": "the source"}')
        (source / "config.json").write_text('{"of": "the source"}')
        (source / "processor_config.json").write_text('{"of": "the processor"}')
        save_file(OUTSIDE | {INSIDE: torch.ones(4, 2)}, source / "model.safetensors")
        layer = {"prefix": "model.layers.0.", "linears": {}, "unusual": []}
        write_json(source / "linears.json", {"layers": [layer], "modules": {}, "output": None, "embedding": None})
        for variant in variants:
            with whole_directory(root / "exports" / target / variant) as folder:
                quantization = {"quantization_config": {"quant_method": "compressed-tensors"}}
                write_json(folder / "config.json", quantization | SHAPE)
                packed = {f"{INSIDE}_packed": torch.full((4,), len(variant))}
                save_file(OUTSIDE | {NORM: OUTSIDE[NORM].half()} | packed, folder / "model.safetensors")
                (folder / "tokenizer.json").write_text("{}")
                (folder / "chat_template.jinja").write_text("{{ messages }}")
                (folder / "README.md").write_text("of the exporter")
        write_json(root / "sources.json", {"piqa": {"source": "path:/home/someone/data.jsonl", "sha256": "0" * 64}})
        params = yaml.safe_load(Path("params.yaml").read_text())
        params["variants"] = {v: params["variants"][v] | dict(settings_of.get(v, {})) for v in variants}
        params["targets"] = [target]
        settings = check_settings(params).model_copy(update={"gate": GATE})
        report(settings, root / "metrics", root / "results", source / "source.json", root / "report")
        made[key] = root, settings
        return made[key]

    return make


@pytest.fixture
def workplace(reported: Callable[..., tuple[Path, Settings]], tmp_path: Path) -> Callable[..., Workplace]:
    def make(
        variants: Mapping[str, Mapping[str, Any]] = VARIANTS,
        name: str = "work",
        target: str = "transformers",
        settings_of: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
        **model: Any,
    ) -> Workplace:
        one, settings = reported(variants, target, settings_of, model)
        root = shutil.copytree(one, tmp_path / name)
        source = root / "models/source"
        inputs = Inputs(
            root / "report" / target, root / "exports" / target, source, root / "sources.json", root / "dvc.lock"
        )
        return Workplace(root, settings, inputs, root / "dist" / "bundle")

    return make


class TestBundle:
    def test_bundle_contains_the_evaluated_bytes_and_companion_files(self, workplace: Callable[..., Workplace]) -> None:
        work = workplace()
        done = work.package()
        assert done.variant == "gptq-int4"
        assert {p.name for p in work.destination.iterdir()} == {
            *(
                "config.json",
                "model.safetensors",
                "tokenizer.json",
                "chat_template.jinja",
                "generation_config.json",
                "processor_config.json",
            ),
            *("LICENSE", "README.md", "provenance.json", "bom.cdx.json", "SHA256SUMS", "serve"),
        }
        exported = work.root / "exports/transformers/gptq-int4/model.safetensors"
        assert sha256(work.destination / "model.safetensors") == sha256(exported)
        assert "quantization_config" in (work.destination / "config.json").read_text()
        assert (work.destination / "README.md").read_text() != "of the exporter"
        # a separate file, not written through a hard link to the export's
        assert (work.root / "exports/transformers/gptq-int4/README.md").read_text() == "of the exporter"

    def test_sums_cover_every_other_file(self, workplace: Callable[..., Workplace]) -> None:
        work = workplace()
        work.package()
        lines = (work.destination / "SHA256SUMS").read_text().splitlines()
        files = {p.relative_to(work.destination).as_posix() for p in work.destination.rglob("*") if p.is_file()}
        assert {line.split("  ")[1] for line in lines} == files - {"SHA256SUMS"}
        assert "serve/vllm.yaml" in files
        command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
        assert subprocess.run(command, cwd=work.destination, capture_output=True).returncode == 0
        (work.destination / "tokenizer.json").write_text("[]")
        assert subprocess.run(command, cwd=work.destination, capture_output=True).returncode == 1

    def test_bundle_is_reproducible_on_any_machine(self, workplace: Callable[..., Workplace]) -> None:
        one, two = workplace(name="one"), workplace(name="two")
        # a repeated run takes a different time
        for path in two.root.glob("metrics/**/*.json"):
            value = json.loads(path.read_text())
            slower = {k: 1.7 * v for k, v in value.items() if v and k.split("_")[-1] in ("seconds", "second", "bytes")}
            write_json(path, value | {k: v for k, v in slower.items() if k != "size_bytes"})
        report(
            two.settings,
            two.root / "metrics",
            two.root / "results",
            two.inputs.source / "source.json",
            two.root / "report",
        )
        assert (one.inputs.report / "summary.json").read_bytes() != (two.inputs.report / "summary.json").read_bytes()
        one.package()
        two.package()
        assert checksums(one.destination) == checksums(two.destination)

    def test_bundle_contains_no_local_paths(self, workplace: Callable[..., Workplace]) -> None:
        work = workplace(source="path:/home/someone/models/tiny")
        work.package()
        for name in ("README.md", "provenance.json"):
            text = (work.destination / name).read_text()
            assert "someone" not in text
            assert str(work.root) not in text
            assert "path:tiny" in text

    def test_bill_of_materials_is_valid_and_complete(self, workplace: Callable[..., Workplace]) -> None:
        work = workplace()
        work.package()
        text = (work.destination / "bom.cdx.json").read_text()
        assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
        bill = json.loads(text)
        model, parts = bill["metadata"]["component"], {one["bom-ref"]: one for one in bill["components"]}
        assert bill["dependencies"] == [{"ref": "model", "dependsOn": list(parts)}]
        assert model["licenses"] == [{"license": {"id": "Apache-2.0"}}]
        (weights,) = model["components"]
        assert weights["hashes"][0]["content"] == sha256(work.destination / "model.safetensors")
        data = {ref for ref, one in parts.items() if one["type"] == "data"}
        assert data == {one["ref"] for one in model["modelCard"]["modelParameters"]["datasets"]} == {"data/piqa"}
        row = json.loads((work.inputs.report / "summary.json").read_text())["variants"]["gptq-int4"]
        (mean,) = (
            one
            for one in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
            if one["slice"] == "mean of the tasks"
        )
        assert mean["value"] == f"{row['retention']['mean']:.4f}"
        library = parts[f"pkg:pypi/safetensors@{version('safetensors')}"]
        assert library["licenses"]
        assert "timestamp" not in text

    def test_licence_of_a_data_set_is_the_one_in_the_settings(self, workplace: Callable[..., Workplace]) -> None:
        work = workplace()
        work.settings.evaluation.sources["piqa"] = work.settings.evaluation.sources["piqa"].model_copy(
            update={"licence": "afl-3.0"}
        )
        work.package()
        bill = json.loads((work.destination / "bom.cdx.json").read_text())
        (piqa,) = (one for one in bill["components"] if one["type"] == "data")
        assert piqa["licenses"] == [{"license": {"id": "AFL-3.0"}}]

    def test_a_bundle_is_signed_with_the_key_of_the_environment(
        self, workplace: Callable[..., Workplace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        work, unsigned = workplace(name="signed"), workplace(name="unsigned")
        work.settings = work.settings.model_copy(
            update={"package": work.settings.package.model_copy(update={"signing": "key"})}
        )
        monkeypatch.delenv("MODELPRESS_SIGNING_KEY", raising=False)
        with pytest.raises(TaskError, match="MODELPRESS_SIGNING_KEY is not set"):
            work.package()
        assert work.leftovers() == []
        private, public = key_pair(tmp_path, "signing")
        monkeypatch.setenv("MODELPRESS_SIGNING_KEY", str(private))
        work.package()
        check_signature(work.destination, check_sums(work.destination), Signer(public))
        secret = private.read_text().splitlines()[1]
        assert not any(
            secret in text or str(tmp_path) in text
            for text in (p.read_text(errors="replace") for p in work.destination.rglob("*") if p.is_file())
        )
        first = checksums(work.destination)
        work.package()
        again = checksums(work.destination)
        assert {k for k in first if first[k] != again[k]} == {"model.sig"}
        unsigned.package()
        assert not (unsigned.destination / "model.sig").exists()

    def test_without_a_winner_nothing_is_written(self, workplace: Callable[..., Workplace]) -> None:
        work = workplace(FAILING)
        with pytest.raises(TaskError, match=r"no variant passes its gate.*int8: fail, it keeps at most .* gate is 98%"):
            work.package()
        assert work.leftovers() == []

    def test_changed_weights_are_not_shipped(self, workplace: Callable[..., Workplace]) -> None:
        work = workplace()
        (work.root / "exports/transformers/gptq-int4/model.safetensors").write_bytes(b"other")
        with pytest.raises(
            TaskError, match=r"model\.safetensors of .*exports/transformers/gptq-int4 changed since the export"
        ):
            work.package()
        assert work.leftovers() == []

    def test_a_missing_file_is_named(self, workplace: Callable[..., Workplace]) -> None:
        work = workplace()
        (work.root / "exports/transformers/gptq-int4/tokenizer.json").unlink()
        with pytest.raises(TaskError, match=r"tokenizer\.json is missing; .* export@transformers-gptq-int4"):
            work.package()

    def test_a_bundle_that_fails_its_trial_does_not_replace_the_last_one(
        self, workplace: Callable[..., Workplace]
    ) -> None:
        work = workplace()
        work.package()
        before = sha256(work.destination / "SHA256SUMS")
        tried: list[bool] = []

        def fails(bundle: Path, target: str, dtype: str) -> str:
            tried.append((bundle / "README.md").exists() and (target, dtype) == ("transformers", "float32"))
            raise TaskError("does not load")

        with pytest.raises(TaskError, match="does not load"):
            package(work.settings, "transformers", work.inputs, work.destination, fails)
        assert tried == [True]
        assert sha256(work.destination / "SHA256SUMS") == before
        assert work.leftovers() == ["bundle"]


class TestCard:
    @pytest.fixture
    def work(self, workplace: Callable[..., Workplace]) -> Workplace:
        work = workplace()
        work.package()
        return work

    def test_the_hub_can_read_its_metadata(self, work: Workplace) -> None:
        card = ModelCard.load(work.destination / "README.md")
        assert card.data.license == "apache-2.0"
        assert card.data.base_model == "SmolLM2-135M-Instruct.Q4_1"
        assert card.data.tags == ["quantized", "W4A16_ASYM", "4-bit", "compressed-tensors", "modelpress"]
        quantization = card.data.to_dict()["quantization"]
        assert quantization == {
            "scheme": "W4A16_ASYM",
            "group_size": 64,
            "clip": True,
            "rounding": "gptq",
            "refine": 1,
            "backend": "modelpress",
            "format": "compressed-tensors",
            "bits": 4,
            "bits_per_weight": 4.31,
        }

    def test_it_says_how_the_model_was_made(self, work: Workplace) -> None:
        text = (work.destination / "README.md").read_text()
        assert "`SmolLM2-135M-Instruct.Q4_1`, quantized to W4A16_ASYM (GPTQ):" in text
        assert "- Scheme and method: scheme W4A16_ASYM, group_size 64, clip yes, rounding gptq, refine 1" in text
        assert "; the output layer and the embedding are not quantized." in text

    def test_card_names_the_output_layers_precision(self, workplace: Callable[..., Workplace]) -> None:
        work = workplace(settings_of={"gptq-int4": {"output_layer": "W8A16@64", "embedding": "W4A16_ASYM@32"}})
        work.package()
        text = (work.destination / "README.md").read_text()
        assert "; the output layer is rounded to W8A16@64 and the embedding is rounded to W4A16_ASYM@32." in text

    def test_its_numbers_are_those_of_the_summary(self, work: Workplace) -> None:
        text = (work.destination / "README.md").read_text()
        row = json.loads((work.inputs.report / "summary.json").read_text())["variants"]["gptq-int4"]
        kept = row["retention"]
        for value in (kept["mean"], kept["low"], kept["high"], *(t["score"] for t in kept["tasks"].values())):
            assert f"{100 * value:.1f}" in text
        assert f"{row['texts']['news']['perplexity']:.2f} | +20.0%" in text
        assert "112 MB instead of 269 MB (2.40x smaller)" in text
        assert "limit: 400" in text
        assert "dequantized" in text
        assert "Apache-2.0 (see LICENSE)" in text

    def test_its_code_is_python(self, work: Workplace) -> None:
        code = (work.destination / "README.md").read_text().split("```python\n")[1].split("```")[0]
        compile(code, "README.md", "exec")
        assert "apply_chat_template" in code

    def test_it_offers_vllm_only_what_vllm_loads(self, workplace: Callable[..., Workplace]) -> None:
        auto = {"base": VARIANTS["base"], "auto": VARIANTS["gptq-int4"] | {"scheme": "mixed"}}
        gptq = {name: {"gptq-int4": {"format": "gptq", "scheme": name}} for name in ("W4A16_ASYM", "W4A16")}
        asymmetric, symmetric = (
            VARIANTS | {"gptq-int4": VARIANTS["gptq-int4"] | made["gptq-int4"]} for made in gptq.values()
        )
        remedies = {
            "uniform": (VARIANTS, {}, None),
            "mixed": (auto, {"auto": {"fused": False}}, "`variants.auto.fused: true`"),
            "asymmetric": (asymmetric, gptq["W4A16_ASYM"], "`variants.gptq-int4.format: compressed-tensors`"),
            "symmetric": (symmetric, gptq["W4A16"], None),
        }
        for name, (variants, changes, remedy) in remedies.items():
            work = workplace(variants, name, settings_of=changes)
            work.package()
            text = (work.destination / "README.md").read_text()
            assert ("vllm serve" in text) == (remedy is None)
            assert [one for _, _, one in remedies.values() if one and one in text] == [remedy][: remedy is not None]

    def test_for_onnx_its_code_runs(
        self, workplace: Callable[..., Workplace], llama: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        work = workplace(target="onnx")
        work.package()
        text = (work.destination / "README.md").read_text()
        assert "; the output layer and the embedding are not quantized." in text
        assert "transformers" not in text.split("## How to load it")[1].split("## How it was made")[0]
        assert ModelCard.load(work.destination / "README.md").data.tags[3] == "onnx"
        write_manifest(shutil.copytree(llama, work.root / "tiny"))
        export(work.root / "tiny", "onnx", work.root / "onnx")
        code = text.split("```python\n")[1].split("```")[0]
        exec(code.replace(f"{work.settings.package.name}-onnx", str(work.root / "onnx")), {})
        assert "What is the capital of France?" in capsys.readouterr().out

    @pytest.mark.gguf
    def test_for_gguf_its_code_runs(self, workplace: Callable[..., Workplace], llama: Path) -> None:
        work = workplace(target="gguf")
        work.package()
        text = (work.destination / "README.md").read_text()
        assert "; the output layer and the embedding are not quantized." in text
        assert ModelCard.load(work.destination / "README.md").data.tags[3] == "gguf"
        write_manifest(shutil.copytree(llama, work.root / "tiny"))
        export(work.root / "tiny", "gguf", work.root / "gguf")
        code = text.split("```python\n")[1].split("```")[0]
        code = code.replace(f"{work.settings.package.name}-gguf", str(work.root / "gguf"))
        code += '\nassert model.metadata["tokenizer.chat_template"]\n'
        command = [str(interpreter("llama-cpp")), "-I", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()

    @pytest.mark.parametrize(
        ("source", "name"),
        [
            ("hf:org/model@main", "org/model"),
            ("wheel:p==1/f/Some-Model.Q4_1.gguf", "Some-Model.Q4_1"),
            ("path:/a/tiny-llama/", "tiny-llama"),
        ],
    )
    def test_the_base_models_name(self, source: str, name: str) -> None:
        assert base_model(source) == name

    def test_a_licence_that_the_hub_does_not_know_is_other(self, workplace: Callable[..., Workplace]) -> None:
        work = workplace(name="other", licence="Our-Own-1.0")
        work.package()
        card = ModelCard.load(work.destination / "README.md")
        assert (card.data.license, card.data.license_name) == ("other", "Our-Own-1.0")


class TestProvenance:
    def test_it_holds_all_parameters_sources_and_seeds(self, workplace: Callable[..., Workplace]) -> None:
        work = workplace()
        work.package()
        found = json.loads((work.destination / "provenance.json").read_text())
        assert found["parameters"] == without_folders(work.settings.model_dump(mode="json"))
        made = {"scheme": "W4A16_ASYM", "recipe": "GPTQ", "format": "compressed-tensors", "backend": "modelpress"}
        assert {key: found["variant"][key] for key in (*made, "output_layer")} == made | {"output_layer": None}
        assert found["variant"]["identity"] == "ab" * 32
        assert found["data"]["piqa"]["source"] == "path:data.jsonl"
        assert set(found["seeds"]) == {"calibration", "evaluation", "bootstrap"}
        assert found["machine"]["python"] == machine()["python"]
        assert found["libraries"]["torch"] == versions()["torch"]

    def test_it_lists_what_is_kept_of_the_source(self, workplace: Callable[..., Workplace]) -> None:
        work = workplace()
        work.package()
        assert json.loads((work.destination / "provenance.json").read_text())["kept"] == {
            "unchanged": {
                "model.embed_tokens": {"tensors": 1, "bytes": 64},
                "model.layers.1": {"tensors": 1, "bytes": 8},
                "model.visual": {"tensors": 2, "bytes": 14},
            },
            "changed": {"model.norm": {"tensors": 1, "bytes": 8}},  # in another dtype
            "quantized": {},
            "files": ["processor_config.json"],
        }
        text = (work.destination / "README.md").read_text()
        assert "byte for byte (compared when the bundle was made):\n\n- `model.embed_tokens`: 1 tensor, 64 b" in text
        assert "\n- `model.visual`: 2 tensors, 14 bytes\n- `processor_config.json`\n\nConverted to the dtype" in text
        assert ": `model.norm`.\n" in text

    def test_dvc_identity_leaves_out_what_differs_between_runs(self, tmp_path: Path) -> None:
        def out(path: str, md5: str) -> dict[str, Any]:
            return {"outs": [{"path": path, "hash": "md5", "md5": md5}]}

        lock = tmp_path / "dvc.lock"
        stages = {
            "quantize@int8": out("models/int8", "2.dir"),
            "quantize@gone": out("models/gone", "3.dir"),
            "download": out("models/source", "1.dir"),
            "load@onnx-int8": out("metrics/load/onnx/int8.json", "4"),
            "export@onnx-int8": out("exports/onnx/int8", "7.dir"),
            "export@gguf-int8": out("exports/gguf/int8", "8.dir"),
            "reference@onnx": out("data/reference/onnx", "9.dir"),
            "report": out("report", "5.dir"),
            "package@onnx": out("dist/x", "6.dir"),
        }
        lock.write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
        assert dvc_identity(lock, "onnx", ["base", "int8"]) == {
            "data/reference/onnx": "9.dir",
            "exports/onnx/int8": "7.dir",
            "models/int8": "2.dir",
            "models/source": "1.dir",
        }
        assert dvc_identity(tmp_path / "none", "onnx", ["int8"]) == {}
        lock.write_text("")
        assert dvc_identity(lock, "onnx", ["int8"]) == {}

    @pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
    def test_git_state_counts_code_and_not_the_pipelines_own_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        # outside the repository that pytest may run in
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        assert git_state() == {"commit": None, "dirty": None}
        author = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
        (tmp_path / "params.yaml").write_text("a: 1\n")
        for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "first"]):
            subprocess.run(["git", *command], check=True)
        (tmp_path / "dvc.lock").write_text("stages: {}\n")
        state = git_state()
        assert len(state["commit"]) == 40
        assert state["dirty"] is False
        (tmp_path / "params.yaml").write_text("a: 2\n")
        assert git_state()["dirty"] is True


class TestTrial:
    @pytest.mark.parametrize("text", [" Paris. It is the largest city.", "no", "a b c a b c d a b c a b c d", "1"])
    def test_a_sound_text(self, text: str) -> None:
        assert smoke.nonsense(text) is None

    @pytest.mark.parametrize("text", ["", "  \n", "the the the the", "aaaaaaa", "!!!!", "ab\nab\nab\nab\nab\na"])
    def test_nonsense(self, text: str) -> None:
        assert smoke.nonsense(text) is not None

    @pytest.mark.slow
    def test_a_model_that_loads_and_writes_nonsense_is_refused(self, tmp_path: Path) -> None:
        model = tiny_model(tmp_path / "model") / "model.safetensors"
        weights = load_file(model)
        save_file({name: 0 * tensor for name, tensor in weights.items()}, model, {"format": "pt"})
        with pytest.raises(TaskError, match=r"loads in transformers, but after .* it (writes nothing|only repeats)"):
            smoke.generates(model.parent, "transformers", "float32")

    def test_bundle_that_does_not_load_is_refused_with_its_last_output(self, tmp_path: Path) -> None:
        with pytest.raises(TaskError, match=r"does not load in transformers; nothing is packaged\. (.|\n)*Error"):
            smoke.generates(tmp_path, "transformers", "float32")
