"""`python -m tests.drills`: inject failures into runs of a toy pipeline, and report what recovered.

python -m tests.drills --only flow --only cache --rounds 3 --seed 7
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tests.drills import away, damage, disk, kills, service
from tests.drills import toy as pipeline
from tests.drills.processes import below, strike
from tests.drills.yard import Tally, Yard
from tests.waiting import halted

DRILLS: dict[str, Callable[[Yard], Tally]] = {
    # longest first
    "service": service.kill_service,
    "server": kills.kill_server,
    "flow": kills.kill_flow,
    "dvc": kills.kill_dvc,
    "stage": kills.kill_stage,
    "cache": damage.corrupt_cache,
    "disk": disk.disk_full,
    "rwlock": damage.stale_lock,
    "lock": damage.empty_lock_file,
    "mlflow": away.mlflow_away,
    "hub": away.hub_away,
}

AT_ONCE = 3  # parallel drills; they mostly wait


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"Only this drill: {', '.join(DRILLS)}.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often to run each drill.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Repeat the same moments.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the temporary repositories.")] = False,
) -> None:
    """Run the drills; exit status 1 if anything was lost or did not recover. Ctrl-C and SIGTERM clean up."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    chosen = only or list(DRILLS)
    if unknown := set(chosen) - set(DRILLS):
        raise typer.BadParameter(f"no drill {', '.join(unknown)}; there are {', '.join(DRILLS)}")
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    print(f"seed {seed}", flush=True)
    base = Path(tempfile.mkdtemp(prefix="modelpress-drills-")).resolve()
    os.environ["DVC_SITE_CACHE_DIR"] = str(base / "site")  # DVC's state, deleted with the drills
    try:
        tallies = _hold(base, chosen, rounds, seed)
    finally:
        _end_all(base)
        if not keep:
            shutil.rmtree(base, ignore_errors=True)
    Console().print(_table(tallies))
    for tally in tallies:
        for line in tally.lost:
            print(f"{tally.fault}: {line}")
    sys.exit(0 if all(tally.sound for tally in tallies) else 1)


def _hold(base: Path, chosen: list[str], rounds: int, seed: int) -> list[Tally]:
    from flows.server.ephemeral import quiet, server

    home = base / "server"
    home.mkdir()
    quiet(home)
    os.environ.pop("PREFECT_API_URL", None)
    with server(home) as prefect:
        if prefect:
            prefect.wait()
        url = os.environ.pop("PREFECT_API_URL")
        try:
            finished = pipeline.create(base / "finished")
            finished.dvc("repro", "--quiet")
            # a separate generator, so that a drill does not depend on the other ones
            yards = [Yard(n, base / n, url, finished, _dice(seed, n), rounds) for n in chosen]
            return _all(yards)
        finally:
            os.environ["PREFECT_API_URL"] = url


def _all(yards: list[Yard]) -> list[Tally]:
    """Run them in parallel; on an interrupt, end all waiting and all their processes within seconds."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        drills = [pool.submit(_timed, yard) for yard in yards]
        try:
            return [drill.result() for drill in drills]
        except BaseException:
            halted.set()
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(drill.done() for drill in drills):
                for yard in yards:
                    _end_all(yard.root)
                time.sleep(0.2)
            raise


def _end_all(root: Path) -> None:
    """SIGKILL every process in `root`, and those started meanwhile."""
    while left := below(root):
        strike(left)


def _dice(seed: int, name: str) -> random.Random:
    return random.Random(f"{seed} {name}")


def _timed(yard: Yard) -> Tally:
    start = time.monotonic()
    yard.say(DRILLS[yard.name].__doc__ or "")
    try:
        tally = DRILLS[yard.name](yard)
    except Exception as error:  # a drill that crashes does not stop the others, and counts as a failure
        tally = Tally(yard.name, 1, 0, [f"the drill itself failed: {type(error).__name__}: {error}"])
    tally.remark = "; ".join(filter(None, [tally.remark, f"{time.monotonic() - start:.0f} s"]))
    return tally


def _table(tallies: list[Tally]) -> Table:
    table = Table("fault", "count", "recovered", "lost", "", box=None, pad_edge=False, header_style="bold")
    for tally in tallies:
        style = "" if tally.sound else "red"
        row = (tally.fault, str(tally.count), str(tally.recovered), str(len(tally.lost)), tally.remark)
        table.add_row(*row, style=style)
    return table


if __name__ == "__main__":
    typer.run(main)
