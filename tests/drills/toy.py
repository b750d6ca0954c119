"""The toy pipeline of the functional tests, slow and large enough to be killed during a stage.

Every stage has a knob in knobs.yaml: turning it makes the stage and its downstreams out of date. Outputs depend only on
the knob and the inputs, so two runs with the same knobs have the same bytes.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import yaml

from tests.functional.toy import PROJECT, STAGES, Toy

OUTPUTS = ("models", "metrics", "report")

DVC_YAML = """
stages:
  download:
    cmd: python stage.py download models/source
    deps: [stage.py]
    params: [model, {knobs.yaml: [download]}]
    outs: [models/source]
  quantize:
    foreach: ${variants}
    do:
      cmd: python stage.py quantize@${key} models/${key} metrics/quantize/${key}.json models/source
      deps: [stage.py, models/source]
      params: ["variants.${key}", {knobs.yaml: ["quantize@${key}"]}]
      outs: ["models/${key}"]
      metrics: ["metrics/quantize/${key}.json": {cache: false}]
  load:
    foreach: ${variants}
    do:
      cmd: python stage.py load@${key} - metrics/load/${key}.json models/${key}
      deps: [stage.py, "models/${key}"]
      params: [{knobs.yaml: ["load@${key}"]}]
      metrics: ["metrics/load/${key}.json": {cache: false}]
  report:
    cmd: python stage.py report report - metrics
    deps: [stage.py, metrics/quantize, metrics/load]
    params: [variants, gate, {knobs.yaml: [report]}]
    outs: [report]
"""

# writes in place and in many pieces, unlike the real stages
STAGE = """
import hashlib, json, os, sys, time
from pathlib import Path
import yaml

PIECES = 20
# one line, as a real stage's run_stage says it
sys.excepthook = lambda kind, error, _: print(f"error: {error}", file=sys.stderr)
name, out, metric, *inputs = (sys.argv[1:] + ["-", "-"])[:4]
with open("times.jsonl", "a") as file:
    file.write(json.dumps([name, "start", time.time()]) + "\\n")
digest = hashlib.sha256(repr([name, yaml.safe_load(Path("knobs.yaml").read_text())[name]]).encode())
for path in sorted(p for i in inputs if i != "-" for p in Path(i).rglob("*") if p.is_file()):
    digest.update(path.read_bytes())
text = digest.hexdigest()
pause = float(os.environ.get("DRILL_SECONDS", "0")) / PIECES
if out != "-":
    Path(out).mkdir(parents=True)
    Path(out, "config.json").write_text(json.dumps({"digest": text}))
for piece in range(PIECES):
    time.sleep(pause)
    if out != "-":
        with open(Path(out, "weights"), "a") as file:
            file.write(text * 256)
            file.flush()
if metric != "-":
    Path(metric).parent.mkdir(parents=True, exist_ok=True)
    Path(metric).write_text(json.dumps({"variant": name.partition("@")[2], "digest": text}))
if name == "report":
    variants = yaml.safe_load(Path("params.yaml").read_text())["variants"]
    names = [v for v in variants if v != "base"]
    verdicts = {v: {"verdict": "pass", "identity": "0" * 64, "retention": {"mean": 0.97, "low": 0.95}} for v in names}
    Path(out, "table.txt").write_text("the table of the field\\n")
    Path(out, "transformers").mkdir()
    Path(out, "transformers/summary.json").write_text(json.dumps({"variants": verdicts, "winner": names[0]}))
with open("times.jsonl", "a") as file:
    file.write(json.dumps([name, "end", time.time()]) + "\\n")
"""


def create(root: Path) -> Toy:
    """Create a repository in which nothing has run, and from which `press` can be deployed."""
    toy = Toy.create(root)
    toy.write("dvc.yaml", DVC_YAML)
    toy.write("stage.py", STAGE)
    toy.write("knobs.yaml", yaml.safe_dump(dict.fromkeys(STAGES, 0)))
    shutil.copy(PROJECT / "prefect.yaml", root)
    commit(toy)
    (root / "flows").symlink_to(PROJECT / "flows")  # where Prefect looks for the flow of prefect.yaml
    return toy


def commit(toy: Toy) -> None:
    """Commit tracked files and new files of the definition."""
    toy.command("git", "add", "--update")
    toy.command("git", "add", "dvc.yaml", "stage.py", "knobs.yaml", "params.yaml", "prefect.yaml")
    toy.command("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "--allow-empty", "-m", "drill")


def copy(toy: Toy, root: Path) -> Toy:
    """Copy the state to another folder, with outputs linked to the cache as in the original."""
    subprocess.run(["cp", "--archive", str(toy.root), str(root)], check=True)
    return Toy(root)


def turn(toy: Toy, stage: str, to: int) -> None:
    """Turn the knob of a stage, which makes it out of date."""
    knobs = yaml.safe_load(toy.read("knobs.yaml"))
    toy.write("knobs.yaml", yaml.safe_dump({**knobs, stage: to}))


def outputs(root: Path) -> dict[str, str]:
    """The digest of every output file."""
    files = (path for place in OUTPUTS for path in sorted((root / place).rglob("*")))
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file() and path.name != ".gitignore"
    }


def outs_of(stage: str) -> tuple[str, ...]:
    """The outputs of a stage."""
    kind, _, variant = stage.partition("@")
    return {
        "download": ("models/source",),
        "quantize": (f"models/{variant}", f"metrics/quantize/{variant}.json"),
        "load": (f"metrics/load/{variant}.json",),
        "report": ("report",),
    }[kind]
