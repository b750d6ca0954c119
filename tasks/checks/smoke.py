"""Smoke test: load a bundle in its runtime in a fresh process, and check the text after one prompt.

python -m tasks.checks.smoke dist/name transformers float32
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tasks.errors import TaskError

PROMPT = "The capital of France is"
NEW_TOKENS = 24
REPEATS = 4  # a text that only repeats a short piece this often indicates a broken model
PIECE = 16  # longest such piece, characters
TIMEOUT = 1800.0
ROOT = Path(__file__).resolve().parents[2]  # working directory for `python -m tasks...`
FILE = Path("tasks/checks/smoke.py")


def generates(bundle: Path, target: str, dtype: str) -> str:
    """Return the bundle's greedy continuation of a fixed prompt, loaded offline in its own process.

    TaskError if it does not load, writes nothing, or only repeats itself.
    """
    if not (ROOT / FILE).is_file():
        raise TaskError(f"{ROOT} has no {FILE}, the bundle's smoke test; nothing is packaged. Reinstall modelpress")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    command = [sys.executable, "-m", "tasks.checks.smoke", str(bundle.resolve()), target, dtype]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            timeout=TIMEOUT,
            cwd=ROOT,
        )
    except subprocess.TimeoutExpired as error:
        raise TaskError(f"the bundle wrote nothing within {TIMEOUT:.0f} s in {target}; nothing is packaged") from error
    if done.returncode != 0:
        last = "\n".join(done.stderr.strip().splitlines()[-12:])
        raise TaskError(f"the bundle does not load in {target}; nothing is packaged. Its last output:\n{last}")
    text: str = json.loads(done.stdout.strip().splitlines()[-1])["text"]
    problem = nonsense(text)
    if problem:
        raise TaskError(
            f"the bundle loads in {target}, but after {PROMPT!r} it {problem}: {text!r}. "
            "Nothing is packaged; look at the variant's perplexity and per-layer errors"
        )
    return text


def nonsense(text: str) -> str | None:
    """The problem with a continuation: empty, or one short piece repeated; None if it is fine."""
    plain = text.strip()
    if not plain:
        return "writes nothing"
    for length in range(1, min(PIECE, (len(plain) + 1) // REPEATS) + 1):
        # a repetitive text equals itself shifted by its period
        if plain[length:] == plain[:-length]:
            return "only repeats itself"
    return None


def main() -> None:
    """Load the bundle, generate, and print the text as one line of JSON."""
    if len(sys.argv) != 4:
        sys.exit("usage: python -m tasks.checks.smoke DIRECTORY TARGET DTYPE")
    # slow to import, and needed only in the new process
    from tasks.runtimes import load_runtime

    directory, target, dtype = sys.argv[1:]
    text = load_runtime(target, Path(directory), dtype).generate(PROMPT, NEW_TOKENS)
    print(json.dumps({"text": text.removeprefix(PROMPT)}))


if __name__ == "__main__":
    main()
