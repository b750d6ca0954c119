"""A tiny model with its calibration set and statistics, for quantizing variants."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tasks.output import whole_directory
from tasks.quantize import QuantizeReport, quantize
from tasks.runtimes import load_runtime
from tasks.settings import VariantSettings, check_settings
from tasks.statistics import collect
from tests.tiny import Corpus, tiny_corpus

LENGTH, SAMPLES, HELD_OUT = 32, 16, 40  # tokens per sequence, calibration sequences, held-out sequences
PARAMS = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))


def settings(values: dict[str, Any], target: str = "transformers") -> VariantSettings:
    """A variant with these settings."""
    params = {**PARAMS, "targets": [target], "variants": {"base": {"scheme": "none"}, "v": values}}
    return check_settings(params).variant("v")


@dataclass(frozen=True)
class Pressing:
    """The outputs of the stages before quantize, and held-out `text`: int64 [rows, tokens]."""

    model: Path
    calibration: Path
    statistics: Path
    text: torch.Tensor

    @classmethod
    def create(cls, model: Path, corpus: Corpus, folder: Path) -> Pressing:
        """Copy the model to `folder`, and collect its statistics there."""
        with whole_directory(folder / "source") as work:
            for file in model.iterdir():
                (work / file.name).write_bytes(file.read_bytes())
        tokenizer = AutoTokenizer.from_pretrained(model)
        ids = tokenizer(corpus.text.read_text()).input_ids
        tokens = torch.tensor(ids[: SAMPLES * LENGTH]).view(SAMPLES, LENGTH)
        with whole_directory(folder / "calibration") as work:
            save_file({"input_ids": tokens}, work / "tokens.safetensors")
        collect(folder / "source", folder / "calibration", folder / "statistics", importance=True)
        other = tiny_corpus(folder / "held-out", seed=7).text.read_text()
        text = torch.tensor(tokenizer(other).input_ids[: HELD_OUT * LENGTH]).view(HELD_OUT, LENGTH)
        return cls(folder / "source", folder / "calibration", folder / "statistics", text)

    @property
    def tokens(self) -> torch.Tensor:
        """The calibration tokens: int64 [rows, tokens]."""
        return load_file(self.calibration / "tokens.safetensors")["input_ids"]

    def press(self, values: dict[str, Any], destination: Path, target: str = "transformers") -> QuantizeReport:
        """Make the variant with these settings, like its stage."""
        variant = settings(values, target)
        return quantize("v", variant, self.model, self.calibration, self.statistics, destination)

    def perplexity(self, directory: Path, target: str = "transformers") -> float:
        """Perplexity on the held-out text, in the runtime of the target."""
        rows = load_runtime(target, directory, "float32").logprobs(self.text)[:, :-1]
        return float(rows.gather(2, self.text[:, 1:, None]).mean().neg().exp())
