"""An estimate for a person at a terminal: a table of the stages, then what the run takes and what does not fit."""

from __future__ import annotations

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from flows.planning.simulate import RunEstimate
from tasks.planning.estimate import BYTES, pressed_today
from tasks.planning.machine import Machine
from tasks.planning.shape import Shape
from tasks.settings import Settings

_UNITS = (("days", 86400.0), ("h", 3600.0), ("min", 60.0))


def lines(found: RunEstimate, shape: Shape, settings: Settings, machine: Machine, jobs: int) -> Iterator[str | Table]:
    """What `modelpress plan --model` prints."""
    size = BYTES[settings.model.dtype] * shape.parameters
    tokens = settings.calibration.samples * settings.calibration.sequence_length
    yield (
        f"model    {shape.family}, {count(shape.parameters)} parameters, {gigabytes(size)} in {settings.model.dtype}; "
        f"{tokens:,} tokens of calibration"
    )
    yield (
        f"machine  {escape(machine.name)}; {machine.device}, {gigabytes(machine.memory_gb * 1e9)} memory, "
        f"{gigabytes(machine.disk_gb * 1e9)} disk ({escape(machine.source)})\n"
    )
    yield _table(found, machine)
    yield ""
    yield from _totals(found, machine, jobs)
    if not pressed_today(shape):
        yield (
            f"not yet  modelpress refuses the family {shape.family} today; statistics, quantize and what follows from "
            "them are what they would take with every expert's layers pressed as layers of their own"
        )


def _table(found: RunEstimate, machine: Machine) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage")
    for heading in ("from", "time", "memory", "disk"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for stage, need in found.needs.items():
        room = machine.memory_gb * 1e9
        held = need.memory or 0.0
        short = held > room
        remarks = [f"needs {gigabytes(held)}, this machine has {gigabytes(room)}"] if short else []
        remarks += [need.note] if need.note else []
        table.add_row(
            stage,
            duration(found.begins[stage]),
            "?" if need.seconds is None else duration(need.seconds),
            "?" if need.memory is None else gigabytes(need.memory),
            gigabytes(need.disk) if need.disk else "-",
            "; ".join(remarks),
            style="red" if short else None,
        )
    return table


def _totals(found: RunEstimate, machine: Machine, jobs: int) -> Iterator[str]:
    unknown = [stage for stage, need in found.needs.items() if need.seconds is None]
    without = f", without {', '.join(unknown)}" if unknown else ""
    yield f"time     {duration(found.seconds)} from start to end, {jobs} stage{'s' * (jobs > 1)} at a time{without}"
    largest = max((need.memory or 0.0, stage) for stage, need in found.needs.items())
    together = f"; {gigabytes(found.memory)} while {' and '.join(found.together)} run together"
    memory = f"{gigabytes(largest[0])} for {largest[1]}{together if len(found.together) > 1 else ''}"
    yield f"memory   {memory}: {_fits(found.memory, largest[0], machine.memory_gb * 1e9)}"
    disk = found.disk + found.scratch
    room = machine.disk_gb * 1e9
    verdict = "fits" if disk <= room else f"does not fit, {gigabytes(room)} are free"
    yield (
        f"disk     {gigabytes(found.disk)}, and {gigabytes(found.scratch)} more while it runs: {verdict}; "
        "what is in DVC's cache is linked, and counts once"
    )


def _fits(together: float, largest: float, room: float) -> str:
    if largest > room:
        return f"does not fit, this machine has {gigabytes(room)}"
    return "fits" if together <= room else "fits with --jobs 1 only"


def duration(seconds: float) -> str:
    """As one reads it: 42 s, 12 min, 2.7 h, 3.1 days."""
    for unit, length in _UNITS:
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit}" if unit == "min" else f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def gigabytes(size: float) -> str:
    """Bytes, as one reads them."""
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB" if size < 1e12 else f"{size / 1e12:.2f} TB"


def count(number: int) -> str:
    """Parameters, as one reads them."""
    return f"{number / 1e6:.0f} million" if number < 1e9 else f"{number / 1e9:.2f} billion"
