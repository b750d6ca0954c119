"""`python -m bench.plan`: is the estimate of `modelpress plan --model` true? A model, pressed and estimated.

python -m bench.plan --model models/source --calibration data/calibration    # about 4 minutes for 135M parameters
python -m bench.plan --only statistics --only int8 --only gptq-int4          # a random model of 1 billion: 10 minutes

Statistics and variants run as the stages that they are, with one thread, on a machine measured with one: their time is
the processor's, which says something also where others are at work. What was found joins bench/results/plan.json.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from tasks.output import write_json, write_manifest
from tasks.planning.estimate import PlanJob, estimate
from tasks.planning.machine import check_machine
from tasks.planning.shape import read_shape
from tasks.program import PARAMS
from tasks.reporting.provenance import versions
from tasks.settings import BASE, check_settings, load_settings

RESULTS = Path("bench/results/plan.json")
_MAKE = """
import json, sys, torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
width, layers, vocabulary = map(int, sys.argv[1:])
config = LlamaConfig(hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
                     num_attention_heads=width // 64, num_key_value_heads=width // 256, vocab_size=vocabulary)
AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained("models/source")
words = {f"w{number}": number for number in range(vocabulary)}
PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0"))).save_pretrained("models/source")
"""


@dataclass(frozen=True)
class Ratio:
    """A stage as estimated and as measured: seconds of one core, peak memory and disk in bytes."""

    stage: str
    estimated: dict[str, float]
    measured: dict[str, float]

    @property
    def line(self) -> str:
        """Both, and the estimate over what was measured."""
        cells = []
        for what, unit in (("seconds", 1.0), ("memory", 1e9), ("disk", 1e9)):
            ours, found = self.estimated[what], self.measured[what]
            cells.append(f"{what} {ours / unit:.2f} / {found / unit:.2f} = {ours / found:.2f}")
        return f"{self.stage:<20}{'   '.join(cells)}"


def main(
    model: Annotated[Path | None, typer.Option(help="A model's folder; a random one is made if not given.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Its calibration tokens; random ones if not given.")] = None,
    width: Annotated[int, typer.Option(help="Channels of the random model; a multiple of 256.")] = 2048,
    layers: Annotated[int, typer.Option(help="Decoder layers of the random model.")] = 16,
    vocabulary: Annotated[int, typer.Option(help="Words of the random model.")] = 65536,
    samples: Annotated[int, typer.Option(min=1, help="Random sequences of calibration, of 512 tokens.")] = 4,
    only: Annotated[list[str] | None, typer.Option(help="statistics, which all need, or a variant.")] = None,
) -> None:
    """Estimate and run statistics and every variant of params.yaml that presses, and compare."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="modelpress-plan-") as name:
        found = compare(Path(name), model, calibration, (width, layers, vocabulary), samples, only)
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    write_json(RESULTS, kept | found)


def compare(
    folder: Path,
    model: Path | None,
    calibration: Path | None,
    size: tuple[int, int, int],
    samples: int,
    only: list[str] | None,
) -> dict[str, Any]:
    """Run the stages in `folder`; their own files say what they took. By the model, what was found of it."""
    values = load_settings(PARAMS).model_dump(exclude_unset=True, mode="json")
    _lay_out(folder, model, calibration, size, samples)
    count, length = _tokens(folder)
    values["calibration"] |= {"samples": count, "sequence_length": length}
    settings = check_settings(values)
    (folder / PARAMS).write_text(yaml.safe_dump(values), encoding="utf-8")
    shape = read_shape(json.loads((folder / "models/source/config.json").read_text(encoding="utf-8")), "the model")
    machine = check_machine(yaml.safe_load(_python("-m", "tasks.planning.measure_machine", "1")), "this machine")
    found = []
    stages = ["statistics", *(f"quantize@{name}" for name in settings.variants if name != BASE)]
    for stage in stages:
        module, _, name = stage.partition("@")
        if only and (name or module) not in only:
            continue
        used = _processor_seconds()
        _python("-m", f"tasks.{module}", *([name] if name else []), cwd=folder)
        seconds = _processor_seconds() - used
        need = estimate(stage, PlanJob(shape, settings, machine))
        report = json.loads((folder / f"metrics/{stage.replace('@', '/')}.json").read_text(encoding="utf-8"))
        written = folder / (f"models/{name}" if name else "data/statistics")
        size_bytes = sum(path.stat().st_size for path in written.glob("*.safetensors"))
        measured = {"seconds": seconds, "memory": report["peak_memory_bytes"], "disk": size_bytes}
        estimated = {"seconds": need.seconds or 0.0, "memory": need.memory or 0.0, "disk": need.disk}
        found.append(Ratio(stage, estimated, measured))
        print(found[-1].line, flush=True)
    about = {
        "machine": machine.model_dump(mode="json"),
        "versions": versions(),
        "tokens": count * length,
        "stages": [asdict(one) for one in found],
    }
    return {f"{shape.family}, {shape.parameters / 1e6:.0f} million": about}


def _lay_out(
    folder: Path, model: Path | None, calibration: Path | None, size: tuple[int, int, int], samples: int
) -> None:
    """models/source and data/calibration, as the stages before would have left them."""
    (folder / "models").mkdir()
    (folder / "data").mkdir()
    if model is not None:
        (folder / "models/source").symlink_to(model.resolve())
    else:
        _python("-c", _MAKE, *map(str, size), cwd=folder)
        write_manifest(folder / "models/source")
    if calibration is not None:
        (folder / "data/calibration").symlink_to(calibration.resolve())
        return
    # torch in a process of its own: a child's peak of memory begins where its parent's is
    (folder / "data/calibration").mkdir()
    config = json.loads((folder / "models/source/config.json").read_text(encoding="utf-8"))
    program = (
        "import torch; from safetensors.torch import save_file; "
        f"save_file({{'input_ids': torch.randint({config['vocab_size']}, ({samples}, 512))}}, 'tokens.safetensors')"
    )
    _python("-c", program, cwd=folder / "data/calibration")
    write_manifest(folder / "data/calibration")


def _tokens(folder: Path) -> tuple[int, int]:
    """Sequences of calibration, and tokens in each."""
    from tasks.tensor_files import read_header

    shape = read_header(folder / "data/calibration/tokens.safetensors")["input_ids"].shape
    return shape[0], shape[1]


def _processor_seconds() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _python(*arguments: str, cwd: Path | None = None) -> str:
    """What a Python process prints; it ends the whole if it fails."""
    done: Any = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        sys.exit(f"{' '.join(arguments[:3])} failed: {said[-1] if said else 'no word'}")
    return str(done.stdout)


if __name__ == "__main__":
    typer.run(main)
