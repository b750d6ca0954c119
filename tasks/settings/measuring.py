"""Settings for measuring and judging variants: the sections statistics, evaluation, benchmark, load, gate and
package."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from tasks.settings.data import DataSource, TextSource
from tasks.settings.section import CHAT_DATE, Date, Name, Section

LABEL = r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$"  # a label's value in Kubernetes


class StatisticsSettings(Section):
    """Statistics of the activations. importance: weight each token by its influence on the output (Fisher information).
    expert_tokens: tokens that an expert must see for statistics of its own (tasks/activations/gram.py).
    gram_gigabytes: of Gram matrices that are kept on disk; with more, each variant sums its own again."""

    importance: bool
    expert_tokens: Annotated[int, Field(ge=1)] = 128
    gram_gigabytes: Annotated[float, Field(ge=0)] = 64


class EvaluationSettings(Section):
    """The evaluation, which is the same for the baseline and all variants.

    chat_date: what the chat template takes for today, if it asks.
    """

    tasks: Annotated[list[str], Field(min_length=1)]
    limit: Annotated[int, Field(ge=1)] | None
    shots: Annotated[int, Field(ge=0, le=64)] | None
    chat_template: bool
    chat_date: Date = CHAT_DATE
    dtype: Literal["float32", "bfloat16", "float16"]
    batch_tokens: Annotated[int, Field(ge=16)]
    seed: Annotated[int, Field(ge=0)]
    sources: dict[Name, DataSource]
    texts: Annotated[dict[Name, TextSource], Field(min_length=1)]
    text_tokens: Annotated[int, Field(ge=64)]
    window: Annotated[int, Field(ge=16)]

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        twice = sorted({t for t in value if value.count(t) > 1})
        if twice:
            raise ValueError(f"names {', '.join(twice)} more than once; name each task once")
        return value


class BenchmarkSettings(Section):
    """The workload for measuring speed."""

    dtype: Literal["float32", "bfloat16", "float16"]
    prompt_tokens: Annotated[int, Field(ge=1)]
    new_tokens: Annotated[int, Field(ge=2)]
    batch_size: Annotated[int, Field(ge=1)]
    repeats: Annotated[int, Field(ge=1)]


class ServeSettings(Section):
    """The check of a served model.

    items: of each task, scored by lm-eval through the server; None: all that the evaluation scored.
    """

    items: Annotated[int, Field(ge=1)] | None


class ObjectiveSettings(Section):
    """What a request must meet to count for the goodput, seconds. ttft: time to its first token. tpot: mean time for
    each further token."""

    ttft: Annotated[float, Field(gt=0, strict=False)]
    tpot: Annotated[float, Field(gt=0, strict=False)]


class LoadSettings(Section):
    """The load test of a served model, beside the baseline's server.

    price: of the machine, for an hour, in any currency; None: no cost is reported.
    """

    prompt_tokens: Annotated[int, Field(ge=1)]
    new_tokens: Annotated[int, Field(ge=2)]
    pairs: Annotated[int, Field(ge=5, le=100)]
    requests: Annotated[int, Field(ge=1)]
    concurrency: Annotated[int, Field(ge=1, le=4096)]
    limit: Annotated[int, Field(ge=1, le=4096)]
    objective: ObjectiveSettings
    price: Annotated[float, Field(gt=0, strict=False)] | None = None


class GateSettings(Section):
    """When a variant passes: the required retention, by the bits of its weights, and the confidence.

    sequential: score items until the verdict is certain; false: all of them, with bootstrap intervals of `resamples`.
    """

    sequential: bool
    four_bit: Annotated[float, Field(gt=0, le=1.5, strict=False)]
    eight_bit: Annotated[float, Field(gt=0, le=1.5, strict=False)]
    confidence: Annotated[float, Field(ge=0.5, lt=1)]
    resamples: Annotated[int, Field(ge=100, le=1_000_000)]

    def share(self, bits: int | None) -> float:
        """The required retention for weights with `bits` bits; None (unknown) gets the gate for 8 bits."""
        return self.four_bit if bits is not None and bits <= 4 else self.eight_bit


class HardwareSettings(Section):
    """The machines that will serve the model.

    gpu: as in the node label nvidia.com/gpu.product; None: none. memory: GB of each card, or of each machine without
    GPUs. cards: of each machine.
    """

    gpu: Annotated[str, Field(pattern=LABEL, max_length=63)] | None = None
    memory: Annotated[float, Field(gt=0, strict=False)]
    cards: Annotated[int, Field(ge=1, le=64)] = 1
    machines: Annotated[int, Field(ge=1, le=1024)] = 1

    @model_validator(mode="after")
    def _check_cards(self) -> HardwareSettings:
        if self.gpu is None and self.cards > 1:
            raise ValueError(f"cards is {self.cards}, but gpu is null, so there are none; name the gpu or remove cards")
        return self


class PackageSettings(Section):
    """The bundle to ship. `signing`: with the private key that MODELPRESS_SIGNING_KEY names, or by Sigstore.
    hardware: for the files in its folder serve/; None: one machine without a GPU."""

    name: Name
    signing: Literal["none", "key", "keyless"] = "none"
    hardware: HardwareSettings | None = None
