"""Help a process that quantizes a variant, perhaps on another machine that sees the same folder.

python -m tasks.quantizers.assist awq-int4 [FILE]

The process of the stage shares its work with all that help: each takes what nobody has begun. The bytes of the result
do not depend on who did what. FILE: help no longer than it exists.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tasks.device import compute_device
from tasks.errors import TaskError
from tasks.output import resumable_work
from tasks.program import run_stage
from tasks.quantizers import QuantizeJob
from tasks.quantizers.identity import identity_of, read_tokens
from tasks.settings import Settings
from tasks.settings.variant import VariantSettings


def assist(
    name: str,
    variant: VariantSettings,
    model: Path,
    calibration: Path,
    statistics: Path,
    destination: Path,
    until: Path | None = None,
) -> int:
    """Help until the process that makes the variant at `destination` needs no more help; returns the number of shares
    that were quantized here. until: a file; help no longer than it exists. TaskError if there is nothing to share."""
    if not variant.has_shares:
        raise TaskError(f"{name} is not quantized in shares; only our own quantizer without propagate does that")
    from tasks.quantizers.builtin import help_press  # takes seconds to import

    work = resumable_work(destination, identity_of(variant, model, calibration, statistics))
    job = QuantizeJob(model, read_tokens(variant, calibration), statistics, variant, compute_device(), work)
    return help_press(job, lambda: until is None or until.exists())


def main() -> None:
    """Help with the variant that the command line names, in the current directory."""
    if len(sys.argv) not in (2, 3) or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m tasks.quantizers.assist VARIANT [FILE]")
    name, until = sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None

    def work(settings: Settings) -> None:
        folders = Path("models/source"), Path("data/calibration"), Path("data/statistics"), Path("models") / name
        done = assist(name, settings.variant(name), *folders, until)
        print(f"{name}: quantized {done} layer{'s' * (done != 1)} or shares of them here")

    run_stage(work)


if __name__ == "__main__":
    main()
