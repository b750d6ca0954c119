"""An estimate for the terminal: a table of the stages, then the totals and what does not fit."""

from __future__ import annotations

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from flows.planning.simulate import RunEstimate
from tasks.planning.need import Measurement

_UNITS = (("days", 86400.0), ("h", 3600.0), ("min", 60.0))


def lines(found: RunEstimate, measured: Measurement, jobs: int) -> Iterator[str | Table]:
    """The output of `modelpress plan --model`, compared with the memory and disk of `measured`."""
    needs, memory, disk = measured.needs, measured.memory, measured.disk
    machine = f"{escape(measured.machine)}, {measured.cores} cores, {measured.device}"
    yield f"model    {measured.model} parameters"
    yield f"machine  {machine}; {size(memory)} memory, {size(disk)} disk free"
    yield f"measured {measured.when} in {duration(measured.took)}, using {size(measured.held)} of memory\n"
    table = Table("stage", *(("start", "time", "memory", "disk")), "", box=None, pad_edge=False, header_style="bold")
    for column in table.columns[1:5]:
        column.justify = "right"
    for stage, begin in found.begins.items():
        need = needs[stage]
        short = need.memory > memory
        time = "?" if need.seconds is None else duration(need.seconds)
        remarks = [f"needs {size(need.memory)}, this machine has {size(memory)}"] * short
        remarks += ["rough"] * (need.rough and need.seconds is not None) + [need.note or ""]
        cells = (stage, duration(begin), time, size(need.memory), size(need.disk) if need.disk else "-")
        table.add_row(*cells, escape("; ".join(filter(None, remarks))), style="red" if short else None)
    yield table
    unknown = [stage for stage, need in needs.items() if need.seconds is None]
    without = f", without {', '.join(unknown)}" if unknown else ""
    rough = "; rough: extrapolated" if any(need.rough for need in needs.values()) else ""
    yield f"\ntime     {duration(found.seconds)}, {jobs} stage{'s' * (jobs > 1)} at a time{without}{rough}"
    largest, stage = max((need.memory, stage) for stage, need in needs.items())
    together = f"; {size(found.memory)} while {' and '.join(found.together)} run together"
    fits = "fits" if found.memory <= memory else "fits with --jobs 1 only"
    verdict = fits if largest <= memory else f"does not fit: this machine has {size(memory)}"
    yield f"memory   {size(largest)} for {stage}{together if len(found.together) > 1 else ''}: {verdict}"
    verdict = "fits" if found.disk + found.scratch <= disk else f"does not fit: {size(disk)} are free"
    yield f"disk     {size(found.disk)}, and {size(found.scratch)} more during the run: {verdict}"


def refusal(measured: Measurement) -> str | None:
    """The stages that need more memory than the machine has, and what to do, in one line; None if all fit."""
    short = {stage: need.memory for stage, need in measured.needs.items() if need.memory > measured.memory}
    if not short:
        return None
    kind = "GPU memory" if measured.device == "cuda" else "memory"
    return (
        f"{', '.join(short)} cannot run on a machine with {size(measured.memory)} of {kind}, they need up to "
        f"{size(max(short.values()))}; run on a machine with more memory, or with a GPU that has as much (plan there, "
        "or try --memory), or choose a smaller model"
    )


def duration(seconds: float) -> str:
    """A duration for people: 42 s, 12 min, 2.7 h, 3.1 days."""
    for unit, length in _UNITS:
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit}" if unit == "min" else f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def size(count: float) -> str:
    """Bytes for people: 512 MB, 1.2 GB, 1.20 TB."""
    number, unit = (count / 1e6, "MB") if count < 1e9 else (count / 1e9, "GB") if count < 1e12 else (count / 1e12, "TB")
    return f"{number:.0f} {unit}" if unit == "MB" else f"{number:.{'1' if unit == 'GB' else '2'}f} {unit}"
