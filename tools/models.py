"""Press a tiny random model of every type that Transformers knows; write docs/models.md and known_types.json.

python -m tools.models [TYPE ...]    # `make models`, without a type

For each type: statistics with importance, W4A16 with proven scaling and GPTQ, W8A8; the written models are read back by
our own reader and, where it can, by Transformers, and generate a token. With types named, only these are tried and
printed; without, both files are written. The last line is `N of M types pass`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tasks.output import write_json
from tasks.sources.known_types import FILE
from tools.tiny_models import TYPES, write_tiny

PAGE = Path("docs/models.md")
VLLM, VLLM_VERSION = Path("tools/vllm_architectures.txt"), "0.32"  # the architectures in its registry
SECONDS = 240  # for one type
SEQUENCES, LENGTH = 6, 48
SAME = 1e-4  # between logits that rounding in float32 alone tells apart
BOUND = {"W4A16": 1.0, "W8A8": 0.1}  # nats a token: the divergence of a random model that is not destroyed
CHECKS = ("streamed", "scaled", "W4A16", "W8A8", "generated")
EXPECTED = {  # by check: what it shows
    "streamed": "layer by layer, with one layer in memory, the logits are the whole model's",
    "scaled": "random factors in all accepted pairs at once leave the logits as they are",
    "W4A16": "scaling, clipping and GPTQ with importance; read back, the logits are those of the dequantized weights",
    "W8A8": "rounded weights and activations; read back, near the model",
    "generated": "the W4A16 model, read back, generates a token",
}
PASSED, SLOW, NOT_BUILT = "+", "took too long", "not built"


@dataclass
class Row:
    """What was seen of one type. checks: by name, `PASSED` or what failed; pairs: sources that can be scaled, and how
    many were rejected; left: matrices in full precision, by reason; native: whether Transformers reads the W4A16 model;
    remarks: what was done otherwise."""

    kind: str
    architecture: str = ""
    checks: dict[str, str] = field(default_factory=dict)
    pairs: str = ""
    left: dict[str, list[str]] = field(default_factory=dict)
    native: str = ""
    remarks: list[str] = field(default_factory=list)

    @property
    def passes(self) -> bool:
        """Whether all checks passed."""
        return all(self.checks.get(name) == PASSED for name in CHECKS)


class Trial:
    """One type, in a folder of its own."""

    def __init__(self, kind: str, folder: Path) -> None:
        import torch
        from safetensors.torch import save_file

        from tasks.output import whole_directory

        self.row, self.folder = Row(kind), folder
        with whole_directory(folder / "source") as work:
            write_tiny(kind, work)
        draw = torch.Generator().manual_seed(2)
        self.tokens = torch.randint(4, 90, (SEQUENCES, LENGTH), generator=draw)
        with whole_directory(folder / "calibration") as work:
            save_file({"input_ids": self.tokens}, work / "tokens.safetensors")
        self.row.architecture = json.loads((folder / "source/config.json").read_text())["architectures"][0]
        self.model = self._whole(folder / "source")
        self.logits = self._logits(self.model)

    def run(self) -> Row:
        """Try everything, as far as it goes."""
        for name, work in {
            "streamed": self.streamed,
            "statistics": self.statistics,
            "scaled": self.scaled,
            "W4A16": self.w4a16,
            "W8A8": self.w8a8,
            "generated": self.generated,
        }.items():
            try:
                self.row.checks[name] = work() or PASSED
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                place = "" if type(error).__name__ == "TaskError" else f" ({Path(last.filename).name}:{last.lineno})"
                self.row.checks[name] = f"{' '.join(str(error).split())[:160] or type(error).__name__}{place}"
                if name == "statistics":
                    break
        return self.row

    def streamed(self) -> str:
        """Layer by layer against the whole model."""
        import torch

        from tasks.model.decoder import Decoder

        decoder = Decoder(self.folder / "source", torch.float32, "cpu")
        hidden = decoder.embed(list(self.tokens[:2].split(1)))
        for index in decoder.order:
            with torch.no_grad(), decoder.layer(index) as layer:
                hidden = [decoder.run(index, layer, rows, number) for number, rows in enumerate(hidden)]
        with torch.no_grad(), decoder.head() as head:
            found = torch.cat([head(rows) for rows in hidden]).log_softmax(-1)
        far = (found - self.logits).abs().max().item()
        return "" if far < SAME else f"differs by {far:.2g}"

    def statistics(self) -> str:
        """The stage, with importance where the layers allow it."""
        from tasks.errors import TaskError
        from tasks.model.structure import read_structure, without_numbers
        from tasks.statistics import collect

        where = self.folder / "source", self.folder / "calibration", self.folder / "statistics"
        try:
            collect(*where, importance=True, least=4)
        except TaskError as error:
            if "importance" not in str(error):
                raise
            self.row.remarks.append("without importance: its layers share keys and values")
            collect(*where, importance=False, least=4)
        layers = read_structure(self.folder / "statistics")
        if not any(layer.linears for layer in layers):
            return "no linear layer was heard"
        used = [pair for layer in layers for pair in layer.usable()]
        rejected = sum(len(layer.pairs) for layer in layers) - len(used)
        self.row.pairs = f"{len(used)}" + (f", {rejected} rejected" if rejected else "")
        for layer in layers:
            for name, why in layer.left.items():
                names = self.row.left.setdefault(why, [])
                names += [own for own in [without_numbers(name)] if own not in names]
        return ""

    def scaled(self) -> str:
        """Random factors in all pairs, on the stored tensors."""
        import torch

        from tasks.activations.inputs import Inputs
        from tasks.model.linears import join, split
        from tasks.model.structure import read_structure
        from tasks.quantizers.layer import Layer
        from tasks.tensor_files import TensorFiles

        files = TensorFiles(self.folder / "source")
        tensors = {name: files.read(name) for name in files}
        draw = torch.Generator().manual_seed(5)
        count = 0
        for index, structure in enumerate(read_structure(self.folder / "statistics")):
            own = {n.removeprefix(structure.prefix): t for n, t in tensors.items() if n.startswith(structure.prefix)}
            blank = {group[0]: _blank(structure.linears[group[0]].width) for group in structure.groups}
            inputs = Inputs.of(blank, structure.groups)
            layer = Layer(index, structure, split(own, structure.linears), inputs)
            for pair in list(layer.scalable()):
                width = structure.linears[pair.readers[0]].width
                layer.scale_input(pair, torch.rand(width, generator=draw) + 0.5, torch.float32)
                count += 1
            tensors |= {structure.prefix + n: t for n, t in join(layer.tensors, structure.linears).items()}
        found = self._logits(self._whole(self._saved("scaled", tensors, self.folder / "source")))
        far = (found - self.logits).abs().max().item()
        if not count:
            self.row.remarks.append("no pair can be scaled")
        return "" if far < 10 * SAME else f"differs by {far:.2g}"

    def w4a16(self) -> str:
        """Press, read back by our reader and by Transformers."""
        from tasks.formats.stored import StoredModel
        from tasks.model.linears import join
        from tasks.model.stored_places import read_places

        pressed = self._press("W4A16", group_size=16, scaling="awq", clip=True, rounding="gptq")
        self.reader = self._read(pressed)
        found = self._logits(self.reader)
        stored = StoredModel(pressed)
        dense = {name: stored.tensor(name) for name in stored.dense}
        dense |= {f"{name}.weight": stored.linear(name).weight.weight() for name in stored.quantized}
        right = self._logits(self._whole(self._saved("dense", join(dense, read_places(pressed)), pressed)))
        far = (found - right).abs().max().item()
        if far > SAME:
            return f"read back, it differs by {far:.2g}"
        try:
            from transformers import CompressedTensorsConfig

            native = self._whole(pressed, quantization_config=CompressedTensorsConfig(dequantize=True))
            far = (self._logits(native) - right).abs().max().item()
            self.row.native = "yes" if far < SAME else "other numbers"
        except Exception as error:
            self.row.native = f"no ({type(error).__name__})"
        return self._near(found, "W4A16")

    def w8a8(self) -> str:
        """Press and read back."""
        return self._near(self._logits(self._read(self._press("W8A8", rounding="nearest"))), "W8A8")

    def generated(self) -> str:
        """One token, greedily."""
        import torch

        with torch.no_grad():
            made = self.reader.generate(self.tokens[:1, :8], max_new_tokens=1, min_new_tokens=1, do_sample=False)
        return "" if made.shape[1] == 9 else f"{made.shape[1] - 8} tokens"

    def _press(self, scheme: str, **values: Any) -> Path:
        from tasks.quantizers import QuantizeJob, press
        from tasks.settings.variant import VariantSettings

        variant = VariantSettings.model_validate({"scheme": scheme, **values})
        destination = self.folder / scheme
        destination.mkdir()
        source, statistics = self.folder / "source", self.folder / "statistics"
        press(QuantizeJob(source, self.tokens, statistics, variant, "cpu", destination))
        return destination

    @staticmethod
    def _read(pressed: Path) -> Any:
        import torch

        from tasks.runtimes.dense import load_dense

        return load_dense(pressed, torch.float32)

    def _near(self, found: Any, scheme: str) -> str:
        far = (self.logits.exp() * (self.logits - found)).sum(-1).mean().item()
        moved = (self.logits - found).abs().max().item()
        if not moved > SAME:
            return "rounding changed nothing"
        return "" if far < BOUND[scheme] else f"diverges by {far:.2g} nats a token"

    @staticmethod
    def _whole(folder: Path, **more: Any) -> Any:
        import torch
        from transformers import AutoConfig

        from tasks.model.skeleton import model_class

        kind = model_class(AutoConfig.from_pretrained(folder))
        return kind.from_pretrained(folder, dtype=torch.float32, **more).eval()

    def _saved(self, name: str, tensors: dict[str, Any], like: Path) -> Path:
        from safetensors.torch import save_file

        folder = self.folder / name
        folder.mkdir()
        config = json.loads((like / "config.json").read_text())
        config.pop("quantization_config", None)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(
            {n: t.clone().contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
        )
        return folder

    def _logits(self, model: Any) -> Any:
        import torch

        with torch.no_grad():
            return model(input_ids=self.tokens[:2], use_cache=False).logits.float().log_softmax(-1)


def _blank(width: int) -> Any:
    import torch

    from tasks.activations.store import Input

    return Input(torch.eye(width), torch.ones(width), torch.ones(width))


def _try(kind: str, folder: str, queue: Any) -> None:
    """Try one type, in a process of its own."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        row = Trial(kind, Path(folder)).run()
    except Exception as error:
        row = Row(kind, TYPES[kind], {"streamed": f"{NOT_BUILT}: {' '.join(str(error).split())[:160]}"})
    queue.put(asdict(row))


def try_types(kinds: list[str], jobs: int) -> dict[str, Row]:
    """Try every type, `jobs` at a time."""
    context = multiprocessing.get_context("fork")
    found: dict[str, Row] = {}
    running: list[tuple[str, Any, Any, float]] = []
    with tempfile.TemporaryDirectory(prefix="models-") as folder:
        waiting = list(kinds)
        while waiting or running:
            while waiting and len(running) < jobs:
                kind, queue = waiting.pop(0), context.SimpleQueue()
                process = context.Process(target=_try, args=(kind, f"{folder}/{kind}", queue))
                process.start()
                running.append((kind, process, queue, time.monotonic()))
            for one in list(running):
                kind, process, queue, began = one
                if not queue.empty():
                    row = Row(**queue.get())
                elif not process.is_alive() and queue.empty():
                    row = Row(kind, TYPES[kind], {"streamed": f"the process ended with status {process.exitcode}"})
                elif time.monotonic() - began > SECONDS:
                    process.kill()
                    row = Row(kind, TYPES[kind], {"streamed": SLOW})
                else:
                    continue
                process.join()
                running.remove(one)
                shutil.rmtree(f"{folder}/{kind}", ignore_errors=True)
                found[kind] = row
                print(f"{len(found):3} of {len(kinds)}  {_line(row)}", flush=True)
            time.sleep(0.02)
    return {kind: found[kind] for kind in kinds}


def _line(row: Row) -> str:
    marks = "".join("+" if row.checks.get(name) == PASSED else "-" for name in CHECKS)
    bad = [f"{name}: {what}" for name, what in row.checks.items() if what != PASSED]
    return f"{row.kind:26} {marks}  {'; '.join([*bad, *row.remarks])}"[:300].rstrip()


def main() -> None:
    """Try the types that the command line names, or all of them."""
    kinds = sys.argv[1:]
    if unknown := [kind for kind in kinds if kind not in TYPES]:
        sys.exit(f"error: Transformers has no type {unknown[0]!r} of decoder; leave it out")
    rows = try_types(kinds or list(TYPES), os.cpu_count() or 1)
    if not kinds:
        PAGE.write_text(page(rows), encoding="utf-8")
        write_json(FILE, verdicts(rows))
    print(total(rows))


def total(rows: dict[str, Row]) -> str:
    """The last line."""
    return f"{sum(row.passes for row in rows.values())} of {len(rows)} types pass"


def in_vllm(row: Row) -> bool:
    """Whether vLLM lists the architecture."""
    return row.architecture in VLLM.read_text(encoding="utf-8").split()


def verdicts(rows: dict[str, Row]) -> dict[str, Any]:
    """The content of known_types.json. What took too long is not judged. needs: the library without which the type was
    not built."""
    found: dict[str, dict[str, Any]] = {}
    for kind, row in rows.items():
        if SLOW in row.checks.values():
            continue
        engines = [name for name, reads in {"Transformers": row.native == "yes", "vLLM": in_vllm(row)}.items() if reads]
        found[kind] = {"refused": refused(row), "engines": engines}
        if missing := re.search(r"requires the (\w+) library", str(refused(row))):
            found[kind]["needs"] = missing[1]
    return {"transformers": version("transformers"), "vllm": VLLM_VERSION, "types": found}


def refused(row: Row) -> str | None:
    """Why the type cannot be pressed, None if it can."""
    if row.passes:
        return None
    said = next(row.checks[name] for name in row.checks if row.checks[name] != PASSED)
    what = re.split(r"; |\. | \(lists|: TypeError", said.replace(NOT_BUILT, "a tiny one was not built"))[0]
    return what.replace("differs", "run layer by layer, its log-probabilities differ")


def page(rows: dict[str, Row]) -> str:
    """The text of docs/models.md."""
    lines = [
        "# Models",
        "",
        "Which decoders can be pressed is found out on the model itself; no list of families decides. This page shows",
        f"it: a tiny random model of every causal type that Transformers {version('transformers')} has, and of some",
        "vision-language types, went through the pipeline's own code. `make models` repeats it (about 15 minutes on 2",
        "cores) and writes this page.",
        "",
        *(f"- **{name}**: {EXPECTED[name]}." for name in CHECKS),
        "- **pairs**: sources whose factors can move into the layers that read them, over four layers, and how many",
        "  were proposed and rejected, because factors would change the model, reach a router, or several channels",
        "  follow one row (grouped queries).",
        "- **Transformers**: whether it reads the W4A16 model itself, to the same logits. Where it does not, our",
        "  reader evaluates the model.",
        f"- **vLLM**: whether version {VLLM_VERSION} lists the architecture. The models were not run in it here.",
        "",
        "A type that does not pass is refused by its config.json, before weights are fetched; so is one that neither",
        "engine reads, for the target transformers (`tasks/sources/known_types.json`, of the same trial).",
        "",
        "| type | streamed | scaled | W4A16 | W8A8 | generated | pairs | Transformers | vLLM | remarks |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        marks = ["+" if row.checks.get(name) == PASSED else "-" for name in CHECKS]
        bad = dict.fromkeys(what for what in row.checks.values() if what != PASSED)
        left = [
            f"{', '.join(f'`{name}`' for name in names)} in full precision: {why}" for why, names in row.left.items()
        ]
        remarks = "; ".join([*bad, *row.remarks, *left]).replace("|", "/")
        vllm = "yes" if in_vllm(row) else "no"
        lines.append(f"| {row.kind} | {' | '.join(marks)} | {row.pairs} | {row.native} | {vllm} | {remarks} |")
    return "\n".join([*lines, "", f"{total(rows)}.", ""])


if __name__ == "__main__":
    main()
