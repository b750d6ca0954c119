"""What each stage of a run does, how often, and how many bytes it takes; the work is the stages' own code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tasks.activations.inputs import AT_ONCE
from tasks.activations.memory import again_bytes, gram_bytes, grams_kept, kept_bytes, rows_bytes, stored_bytes
from tasks.benchmark import alternate
from tasks.device import compute_device, fast_dtype
from tasks.errors import TaskError
from tasks.export import export
from tasks.exporters import load_exporter
from tasks.formats import load_format
from tasks.hardware import available_memory, current_memory, device_memory
from tasks.model.compatibility import check_fit
from tasks.model.decoder import Decoder
from tasks.model.hollow import hollow_model, variant_bytes
from tasks.model.input_widths import input_widths
from tasks.model.layout import layer_weights, linear_shapes
from tasks.model.mapped import file_bytes, in_memory
from tasks.model.structure import FILE
from tasks.planning.miniature import Miniature, narrowed, visited
from tasks.planning.need import Need
from tasks.planning.timing import LARGEST as WIDEST
from tasks.planning.timing import Bench, Cost
from tasks.quantize import quantize
from tasks.quantizers import sensitivity
from tasks.quantizers.parallel import held_bytes, processes
from tasks.quantizers.shares import LARGEST
from tasks.runtimes import Question, Runtime, RuntimeWithStates, load_runtime, loaded_bytes
from tasks.schemes import LLAMA_CPP, MIXED
from tasks.scoring.completions import NEW_TOKENS, PASS_TOKENS, prompts
from tasks.scoring.divergence import Window, measure_text
from tasks.scoring.reference_states import output_layer
from tasks.settings import BASE, BUILTIN, TARGETS, Settings
from tasks.settings.variant import VariantSettings
from tasks.statistics import collect, estimate_bytes, find_structure
from tasks.targets import files_of, has_server
from tasks.tensor_files import read_header

ITEM = 50  # tokens of an evaluation item: a question with its answers, as in evals/
BATCH = 8  # items that are scored at once
READ = 256  # tokens of text that are read at once
PROMPT = 12  # tokens of a prompt to continue, as in tasks/scoring/prompts.json
LEAST = 0.001  # seconds to quantize a layer that is too large to be measured whole: less is the clock's noise
ITEMS = 1000  # of a task, where `evaluation.limit` does not say
# in this order: without time for a variant's evaluation or load, it is assumed to be as fast as the baseline
ORDER = (BASE, "reference", "statistics", "quantize", "export", "evaluate", "load")  # BASE: its load
SHARES = {"statistics": 6.0, "quantize": 4.0}  # of the time to measure; other stages: 1

Part = tuple[str, str, str, float]  # a method of `Run`, a target or none, a variant, and how often the stage does it


def _of(stage: str) -> tuple[str, str, str]:
    """The kind of a stage, its target and its variant, each empty if it has none."""
    kind, _, of = stage.partition("@")
    if kind == "quantize":
        return kind, "", of
    target = next((one for one in TARGETS if of == one or of.startswith(f"{one}-")), "")
    return kind, target, of.removeprefix(target).removeprefix("-")


class Run:
    """The stages of a run. threads: by stage, named as in dvc.yaml; until: when to stop measuring, by time.monotonic().

    TaskError if the settings do not fit the model.
    """

    def __init__(self, settings: Settings, config: Any, root: Path, threads: Mapping[str, int], until: float) -> None:
        self.settings, self.threads, self.device = settings, threads, compute_device()
        self.base = current_memory()  # of a process with its libraries
        model = hollow_model(config, settings.model.dtype, root / "hollow")
        for name, variant in settings.variants.items():
            check_fit(name, variant, model)
        for target in settings.targets:
            load_exporter(target).check(settings, None)
        self.decoder, self.linears = Decoder(model, torch.float32, self.device), len(linear_shapes(model))
        self.hidden, _, self.words = self.decoder.widths
        self.layers, self.widths = len(self.decoder), input_widths(model)
        self.grams = gram_bytes(width for widths in self.widths for width in widths)
        self.again = not grams_kept(self.grams, settings.statistics.gram_gigabytes)  # each variant sums its own
        self.by_layer = layer_weights(model)
        self.weights = sum(self.by_layer) // self.layers
        few = visited(config)
        seen, self.reads = self.weights, sum(map(len, self.widths))  # reads: distinct inputs that a token is a part of
        if few is not config:
            active = hollow_model(narrowed(few, 1), settings.model.dtype, root / "visited")
            seen, self.reads = layer_weights(active)[0], len(input_widths(active)[0]) * self.layers
        self.parameters = sum(entry.count for entry in read_header(model / "model.safetensors").values())
        self.bytes = {name: variant_bytes(variant, model) for name, variant in settings.variants.items()}
        self.largest = max((name for name in self.bytes if name != BASE), key=self.bytes.__getitem__)
        self.items = len(settings.evaluation.tasks) * (settings.evaluation.limit or ITEMS)
        self.bench = Bench(root, few, settings.model.dtype, (self.weights, seen), until)
        self.costs: dict[Part, Cost] = {}
        self.outer: dict[tuple[str, str, bool], float] = {}
        self.loaded: dict[tuple[Path, str, str], Runtime] = {}
        self.fast: dict[tuple[str, str], bool] = {}  # by target and variant: whether there is a kernel for the format

    def needs(self, measured: bool) -> dict[str, Need]:
        """The need of every stage; without times if not `measured`."""
        bytes_ = {stage: self._bytes(*_of(stage)) for stage in self.threads}
        room = device_memory()

        def turn(stage: str) -> tuple[bool, int]:  # what does not fit here comes last
            kind, _, name = _of(stage)
            what = stage if (kind, name) == ("load", BASE) else kind
            return bytes_[stage][0] > room, next((i for i, one in enumerate(ORDER) if one in what), 0)

        order = sorted(self.threads, key=turn)
        found, shares = {}, [SHARES.get(stage.partition("@")[0], 1.0) for stage in order]
        for number, stage in enumerate(order):
            kind, target, name = _of(stage)
            parts, seconds, rough, note = self._parts(kind, target, name), 0.0 if measured else None, False, ""
            share = min(1.0, 1.5 * shares[number] / sum(shares[number:]))  # time that it leaves is for the others
            try:
                for part in parts if measured else ():
                    cost = self._cost(part, self.threads[stage], share)
                    if part[0] == "press" and self.weights > WIDEST and cost.layer < LEAST:
                        raise TaskError("the layers that fit into the minute are too small to tell; run it here alone")
                    layers = self._layers(name) if part[0] == "press" else float(self.layers)
                    if part[0] == "discover":  # nearly all of it is done once, for layers that are alike
                        layers = 1.0
                    mixed = part[0] == "press" and self.settings.variants[name].scheme == MIXED
                    outer = cost.outer * (self.layers if mixed else 1)  # each layer's divergence takes the output layer
                    seconds = (seconds or 0.0) + cost.fixed + layers * cost.layer + outer
                    rough |= cost.rough
                    if part[0] == "rounds" and not self.fast.get((target, name), True):
                        break  # without a kernel the stage only loads the model
            except TaskError as error:
                seconds, note = None, str(error)
            if kind in ("serve", "load") and has_server(target):
                seconds, note = None, "starts the target's server: not estimated"
            elif not parts:
                note = "takes seconds"
            elif kind == "statistics" and not note:
                where = "summed again by each variant" if self.again else "kept on disk"
                note = f"Gram matrices, {self.grams / 1e9:.3g} GB: {where}"
            elif kind in ("reference", "evaluate") and not note:
                note = f"{self.items} items" + ", the gate may need fewer" * (kind == "evaluate")
            found[stage] = Need(seconds, *bytes_[stage], note or None, rough)
        return {stage: found[stage] for stage in self.threads}

    # -- what the stages do

    def _parts(self, kind: str, target: str, name: str) -> list[Part]:
        """Empty for a stage that does little besides starting."""
        evaluation, samples = self.settings.evaluation, self.settings.calibration.samples
        text = len(evaluation.texts) * evaluation.text_tokens / READ
        match kind:
            case "statistics":
                return [("discover", "", "", 1), ("collect", "", "", samples)]
            case "quantize" if name != BASE:
                variant = self.settings.variants[name]
                parts: list[Part] = [
                    ("press", "", name, (variant.samples or samples) if self._reads_tokens(name) else 1)
                ]
                passes = sensitivity.stream_passes(self.layers, self.linears // self.layers) / self.layers
                return [*parts, ("streams", "", name, passes)] if variant.scheme == MIXED else parts
            case "export":
                return [("export", target, name, 1)]
            case "reference" | "evaluate" if (kind, name) != ("evaluate", BASE):
                name = name or BASE
                parts = [("texts", target, name, text), ("score", target, name, self.items / BATCH)]
                return [*parts, ("write", target, name, NEW_TOKENS)]
            case "load" if not has_server(target):
                rounds = 1 + self.settings.benchmark.repeats
                return [("rounds", target, one, rounds) for one in dict.fromkeys((name, BASE))]
        return []

    def discover(self, target: str, name: str, mini: Miniature, times: int) -> None:
        """Find out what the layers consist of, `times` times."""
        tokens = torch.randint(mini.config.vocab_size, (1, self.settings.calibration.sequence_length))
        for _ in range(times):
            find_structure(Decoder(mini.model, torch.float32, self.device), mini.model, tokens, mini.folder)

    def collect(self, target: str, name: str, mini: Miniature, times: int) -> None:
        """The pass over `times` sequences."""
        tokens = mini.calibration(max(1, times), self.settings.calibration.sequence_length)
        structure = mini.folder / FILE
        if not structure.exists():
            self.discover("", "", mini, 1)
        if times:
            asked, most = self.settings.statistics, 0.0 if self.again else math.inf
            folders = mini.model, tokens, mini.folder / f"statistics-{times}"
            collect(*folders, asked.importance, gram_gigabytes=most, structure=structure)

    def press(self, target: str, name: str, mini: Miniature, times: int) -> None:
        """The stage quantize with `times` sequences."""
        variant = self.settings.variants[name]
        if not variant.is_baseline:
            budget = {"retention": None, "bits_per_weight": 16.0} if variant.retention else {}
            variant = variant.model_copy(update={"skip_layers": [], "samples": None, **budget})
        tokens = mini.calibration(max(1, times), self.settings.calibration.sequence_length)
        statistics = self._statistics(mini, max(1, times) if self.again else 3 if self._reads_tokens(name) else 1)
        if times:
            quantize(name, variant, mini.model, tokens, statistics, mini.folder / "models" / name)

    def streams(self, target: str, name: str, mini: Miniature, times: int) -> None:
        """Run `times` streams of the scheme mixed through every layer."""
        decoder = Decoder(mini.model, torch.float32, self.device)
        hidden = decoder.embed([torch.zeros(sensitivity.SEQUENCES, sensitivity.LENGTH, dtype=torch.int64)])[0]
        for index in range(len(decoder)):
            with decoder.layer(index) as layer:
                for _ in range(times):
                    decoder.run(index, layer, hidden)

    def export(self, target: str, name: str, mini: Miniature, times: int) -> None:
        """The stage export."""
        if not (mini.folder / "models" / name).exists():
            self.press("", name, mini, 1)
        if times:
            export(mini.folder / "models" / name, target, mini.folder / "exports" / target / name)

    def texts(self, target: str, name: str, mini: Miniature, times: int) -> None:
        """Load a model, read `times` pieces of text and compare its predictions with the baseline's."""
        evaluation = self.settings.evaluation
        runtime = self.loaded[mini.folder, target, name] = self._load(target, name, mini, evaluation.dtype)
        layer, states = None, torch.zeros(READ - 1, mini.config.hidden_size, device=self.device)
        if isinstance(runtime, RuntimeWithStates):
            layer = output_layer(mini.model, evaluation.dtype, self.device)

        def baseline(_: int, ids: torch.Tensor) -> torch.Tensor:
            return layer.logprobs(states) if layer else runtime.logprobs(ids)[0, :-1]

        if times:
            pieces = [Window([2] * READ, 1)] * times
            measure_text(runtime.logprobs, None if name == BASE else baseline, pieces, "")

    def score(self, target: str, name: str, mini: Miniature, times: int) -> None:
        """Score `times` batches of evaluation items."""
        option = (2,) * (ITEM // 6)
        question = Question((2,) * (ITEM - 3 * (len(option) - 1)), (option,) * 3)
        for _ in range(times):
            self.loaded[mini.folder, target, name].score([question] * BATCH, 1 << 20, "")

    def write(self, target: str, name: str, mini: Miniature, times: int) -> None:
        """Continue the prompts by `times` tokens, and read the result."""
        if times:
            runtime = self.loaded[mini.folder, target, name]
            ids = runtime.generate_ids(torch.full((len(prompts()), PROMPT), 2), times)
            for some in ids.split(PASS_TOKENS // ids.shape[1]):
                runtime.logprobs(some[:, :-1])

    def rounds(self, target: str, name: str, mini: Miniature, times: int) -> None:
        """Load a model and run `times` rounds of the benchmark, none if the runtime has no kernel for the format."""
        runtime = self._load(target, name, mini, self.settings.benchmark.dtype)
        self.fast[target, name] = runtime.fast
        alternate([runtime] if runtime.fast else [], self.settings.benchmark.model_copy(update={"repeats": times}))

    # -- what that takes

    def _cost(self, part: Part, threads: int, share: float) -> Cost:
        """Seconds of a part, timed once. Outside the decoder layers, all variants take equally long to serve."""
        if part not in self.costs:
            what, target, name, count = part
            served = what in ("export", "texts", "score", "write", "rounds")
            alike = (what, target, name == BASE and what == "texts")  # which compares a variant with the baseline
            torch.set_num_threads(max(1, threads // (self._processes(name) if what == "press" else 1)))

            def known(mini: Miniature) -> bool:  # pressed before
                return not served or name == BASE or (mini.folder / "models" / name).exists()

            variant = self.settings.variants.get(name)
            inside = what == "press" and variant and variant.scheme != MIXED and not variant.output_layer
            outer = 0.0 if inside or what == "streams" else self.outer.get(alike)
            try:
                self.costs[part] = self.bench.cost(
                    partial(getattr(self, what), target, name), count, share, known, outer
                )
            except TaskError:
                if (what, target, BASE, count) not in self.costs:
                    raise
                self.costs[part] = replace(self.costs[what, target, BASE, count], rough=True)
            if what == "rounds" and not self.fast.get((target, name), True):
                self.costs[part] = replace(self.costs[part], outer=0.0)
            elif served:
                self.outer[alike] = self.costs[part].outer
        return self.costs[part]

    def _layers(self, name: str) -> float:
        """Decoder layers that one process presses, the output layer among them by its weights."""
        variant = self.settings.variants[name]
        outer = self.words * self.hidden / self.weights if variant.output_layer else 0.0
        pressed = [weights for layer, weights in enumerate(self.by_layer) if layer not in variant.skip_layers]
        return math.ceil(len(pressed) / self._processes(name)) * sum(pressed) / len(pressed) / self.weights + outer

    def _processes(self, name: str) -> int:
        """The number of processes that press layers side by side (quantizers/parallel.py)."""
        variant = self.settings.variants[name]
        if self.device != "cpu" or not variant.has_shares or variant.scheme == MIXED:
            return 1
        weights = self._share(variant)
        return processes(self.threads.get(f"quantize@{name}", 1), self.layers, weights, available_memory())

    def _share(self, variant: VariantSettings) -> int:
        """The weights that are quantized together: of the largest layer, or about those of a share of it."""
        most = max(range(self.layers), key=self.by_layer.__getitem__)
        weights = self.by_layer[most]
        if not variant.has_shares:
            return weights
        return int(weights * min(1.0, LARGEST / (4 * weights + gram_bytes(self.widths[most]))))

    def _reads_tokens(self, name: str) -> bool:
        """Whether quantizing runs the model over the calibration tokens again."""
        variant = self.settings.variants[name]
        return variant.propagate or variant.backend != BUILTIN or self.again

    def _bytes(self, kind: str, target: str, name: str) -> tuple[float, float, float]:
        """Memory, disk and scratch space of a stage."""
        calibration, importance = self.settings.calibration, self.settings.statistics.importance
        tokens = calibration.samples * calibration.sequence_length
        match kind:
            case "download":
                return self.base, self.bytes[BASE], 0
            case "statistics":
                inputs = [width for widths in self.widths for width in widths]
                rows = rows_bytes(tokens, self.layers, self.hidden, importance) if self.again else 0
                disk = stored_bytes(inputs, self.hidden, importance * tokens * self.reads, rows)
                scratch = kept_bytes(tokens, self.layers, self.hidden, importance)
                length, text = calibration.sequence_length, calibration.samples
                held = estimate_bytes(self.decoder, text, length, self.widths, importance, not self.again)
                files = file_bytes(self.decoder.layer_parameters, self.device)
                return self.base + held, disk, max(scratch - rows, 0) + files
            case "quantize" if name != BASE:
                count = self._processes(name)
                each = held_bytes(self._share(self.settings.variants[name]))
                if self.again:
                    grams = min(AT_ONCE, max(map(gram_bytes, self.widths)))
                    size = in_memory(self.decoder.layer_parameters, self.device)
                    product = fast_dtype(self.device).itemsize
                    each += again_bytes(tokens, self.hidden, size, product, grams)
                held = count * each + self.base * (count > 1)
                if self.settings.variants[name].scheme == MIXED:
                    streams = sensitivity.held_bytes(self.linears, self.hidden, self.words)
                    held = max(held, self.base + streams)
                return held, self.bytes[name], self.bytes[name]
            case "reference":
                states = len(self.settings.evaluation.texts) * self.settings.evaluation.text_tokens * self.hidden
                return self.base + self._loaded(BASE, kind), 4 * states * (files_of(target) == "transformers"), 0
            case "evaluate" | "serve" | "load" | "package" if (kind, name) != ("evaluate", BASE):
                beside = self._loaded(BASE, kind) if kind == "load" and name != BASE else 0
                if kind == "evaluate":  # the baseline's output layer and its predictions
                    beside = 4 * self.words * self.hidden + 8 * self.settings.evaluation.window * self.words
                return self.base + self._loaded(name or self.largest, kind) + beside, 0, 0
        return self.base, 0, 0

    def _loaded(self, name: str, kind: str) -> int:
        variant, evaluation = self.settings.variants[name], self.settings.evaluation
        native = variant.is_baseline or variant.scheme in LLAMA_CPP or load_format(variant.format).native
        predictions = evaluation.window * self.words * (kind in ("reference", "evaluate"))
        return loaded_bytes(self.parameters, self.bytes[name], evaluation.dtype, native, predictions)

    def _statistics(self, mini: Miniature, sequences: int) -> Path:
        if not (mini.folder / f"statistics-{sequences}").exists():
            self.collect("", "", mini, sequences)
        return mini.folder / f"statistics-{sequences}"

    def _load(self, target: str, name: str, mini: Miniature, dtype: str) -> Runtime:
        folder = mini.folder / "exports" / target / name
        if not folder.exists():
            self.export(target, name, mini, 1)
        return load_runtime(target, folder, dtype)
