"""`modelpress`: the command line.

modelpress run --set variants.awq-int4.clip=false
"""

from __future__ import annotations

import errno
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from flows import delivery, rollout
from flows.errors import FlowError
from flows.execution.runner import CLUSTER_ENV, RUNNER_ENV, Executor, RunnerName
from flows.planning import SECONDS
from flows.server.ephemeral import quiet, server
from flows.workspace.root import find_root
from tasks.reporting.number_format import megabytes

app = typer.Typer(
    name="modelpress",
    help="Quantize a language model for deployment, and prove that the result still works.",
    epilog="Start with `modelpress plan`. It shows what a run would do, and why.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _global(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if show_version:
        print(f"modelpress {version('modelpress')}")
        raise typer.Exit


Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value in params.yaml before the run. Can be repeated."),
]
Jobs = Annotated[
    int, typer.Option(min=1, max=64, help="Maximum number of parallel stages. Each needs memory for a model.")
]
Runner = Annotated[
    RunnerName, typer.Option(envvar=RUNNER_ENV, help="Where stages run: on this machine, or on a Dask or Ray cluster.")
]
Cluster = Annotated[
    str | None,
    typer.Option(
        envvar=CLUSTER_ENV,
        metavar="ADDRESS",
        help="Address of an existing Dask or Ray cluster. Default: start one on this machine.",
    ),
]
Winner = Annotated[
    bool, typer.Option("--winner", help="Keep only the baseline and the winner of the last report, in params.yaml.")
]
Timeout = Annotated[float | None, typer.Option(min=0.01, metavar="MINUTES", help="Time limit for each stage.")]


@app.command()
def run(
    overrides: Set = None,
    jobs: Jobs = 2,
    timeout: Timeout = None,
    runner: Runner = RunnerName.threads,
    cluster: Cluster = None,
    winner: Winner = False,
) -> None:
    """Run the stages that are out of date and show the result.

    `dvc repro` runs the same stages. `--set` and `--winner` write to params.yaml, so both commands agree on what is up
    to date.

    Examples:

        modelpress run

        modelpress run --set evaluation.limit=100

        modelpress run --set variants.gptq-int4.scheme=W4A16 --set gate.four_bit=0.97

        modelpress run --set '+variants.hard={scheme: W8A8, scaling: smoothquant, smoothing: 0.9, rounding: gptq}'

        modelpress run --set '~variants.int8'

        modelpress run --winner --set 'targets=[vllm,onnx]'

        modelpress run --runner dask --cluster tcp://scheduler:8786 --jobs 8
    """
    root = find_root()
    quiet(root)
    if winner:
        overrides = [*(overrides or []), *_only_winner(root)]
    executor = Executor(runner, cluster)
    from flows.graph.dvc_state import check_dvc
    from flows.workspace.run_lock import exclusive

    with exclusive(root):  # an active run must not see the change
        for change in _override(root, overrides or [], elsewhere=cluster is not None):
            print(f"params.yaml: {change}", file=sys.stderr)
    check_dvc(root)
    from flows.execution.nothing_to_do import nothing_to_do

    if known := nothing_to_do(root):
        print("\n".join(known))
        _show_report(root)
        return
    with _interruptible(), server(root) as prefect_server:
        from flows.optimize import PipelineError, optimize
        from flows.server.console_log import readable_logs

        readable_logs()
        if prefect_server:
            import mlflow  # noqa: F401 - the flow needs it; import it while the server starts, because it takes seconds

            prefect_server.wait()
        try:
            optimize(str(root), jobs=jobs, timeout_minutes=timeout, runner=executor.runner, cluster=executor.cluster)
        except PipelineError as error:
            if "report" in error.results:  # perhaps no variant passed: the table shows why
                _show_report(root)
            raise
    _show_report(root)


@app.command()
def plan(
    model: Annotated[
        str | None,
        typer.Option(
            help="Estimate a run with this model: a config.json, a folder with one, or hf:organisation/name@revision."
        ),
    ] = None,
    machine: Annotated[
        Path | None, typer.Option(help="Take the times from a measurement that this command wrote on another machine.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(min=0.1, metavar="GB", help="Memory to compare with, instead of the machine's.")
    ] = None,
    disk: Annotated[float | None, typer.Option(min=0.1, metavar="GB", help="Free disk space to compare with.")] = None,
    seconds: Annotated[
        float, typer.Option(min=20, help="Time to measure. With more, fewer stages of a large model are left out.")
    ] = SECONDS,
    jobs: Jobs = 2,
) -> None:
    """Show what a run would do with each stage, why, and how large its outputs are. Nothing is changed.

    With `--model`, estimate instead what a run with any model would take under the settings in params.yaml: time,
    memory and disk for every stage. Only the model's config.json is read, never its weights. For up to `--seconds` this
    measures the stages' own code on one random layer of the model's size; measure on a quiet machine. The exit status
    is 1 if a stage needs more memory than there is.

    Examples:

        modelpress plan

        modelpress plan --model ~/models/Llama-2-7b-hf

        modelpress plan --model hf:Qwen/Qwen2.5-0.5B-Instruct@main --jobs 1

        modelpress plan --model config.json --memory 256 --disk 1000

        modelpress plan --model config.json --machine server.json
    """
    root = find_root()
    quiet(root)
    from flows.graph.dvc_state import check_dvc
    from flows.graph.params_file import read_settings
    from flows.graph.plan import ACTIONS, read_plan, summary

    if model is None and (machine or memory or disk):
        raise FlowError("--machine, --memory and --disk are for an estimate; add --model")
    check_dvc(root)
    read_settings(root / "params.yaml")
    if model is not None:
        from flows.planning.simulate import measure, simulate
        from flows.planning.table import lines, refusal

        graph = {name: stage.upstreams for name, stage in read_plan(root).items()}
        with Console(stderr=True).status(f"measuring, for up to {seconds:.0f} seconds"):  # shown only on a terminal
            found, kept = measure(root, model, graph, jobs, machine, seconds)
        found = replace(found, memory=1e9 * memory if memory else found.memory)
        found = replace(found, disk=1e9 * disk if disk else found.disk)
        for part in lines(simulate(graph, found.needs, jobs), found, jobs):
            Console(soft_wrap=not isinstance(part, Table), highlight=False).print(part)
        if machine is None:
            print(f"saved    to {kept}; --machine reads it on another machine", flush=True)
        if reason := refusal(found):
            raise FlowError(reason)
        return
    stages = read_plan(root)
    table = Table("stage", "action", "reason", "size", box=None, pad_edge=False, header_style="bold")
    for stage in stages.values():
        sizes = [out.size for out in stage.outs]
        size = "?" if None in sizes else megabytes(sum(s for s in sizes if s is not None))
        table.add_row(stage.name, ACTIONS[stage.state], "; ".join(stage.reasons), size)
    Console(soft_wrap=False).print(table)
    print(f"\n{summary(stages)}")


@app.command()
def report() -> None:
    """Show the result table of the last run again."""
    _show_report(find_root())


@app.command()
def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen on. Any address other than 127.0.0.1 is open to others.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of Prefect's UI and API.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of MLflow's UI.")] = 5000,
) -> None:
    """Start the web UIs of Prefect and MLflow, to start or schedule runs and to browse their results.

    Ctrl-C stops everything.
    """
    root = find_root()
    quiet(root)
    from flows.server.serve import serve as start

    with _interruptible("stopped"):
        start(root, host, port, mlflow_port, say=lambda line: print(line, flush=True))


@app.command()
def runs(
    sweep: Annotated[bool, typer.Option("--sweep", help="Delete the workspaces of runs that are not active.")] = False,
    names: Annotated[list[str] | None, typer.Argument(help="Only these runs.", metavar="[NAME]...")] = None,
) -> None:
    """List the runs started from a browser or a schedule: those with a workspace, and the finished ones.

    A finished run is a git tag. `git checkout run/NAME` restores its parameters and `modelpress get run/NAME` fetches
    its package.
    """
    root = find_root()
    quiet(root)
    from flows.workspace.worktree import remove, tags, workspaces

    spaces = [space for space in workspaces(root) if not names or space.name in names]
    if unknown := set(names or ()) - {space.name for space in spaces}:
        raise FlowError(f"no workspace for the run {', '.join(sorted(unknown))}; `modelpress runs` lists them")
    if sweep:
        for space in spaces:
            if not space.running:
                remove(space)
                print(f"deleted {space.root}")
        return
    table = Table("run", "state", "started", "changes", "error", box=None, pad_edge=False, header_style="bold")
    for space in spaces:
        state = "running" if space.running else "failed" if space.error else "interrupted"
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(space.started))
        table.add_row(space.name, state, started, " ".join(space.changes), space.error or "")
    for tag in [] if names else tags(root):
        table.add_row(tag, "finished", "", "", "")
    Console(soft_wrap=False).print(table)


@app.command()
def history() -> None:
    """Compare the finished runs in MLflow, for each target: winner, size, retention, perplexity, and the champion."""
    root = find_root()
    quiet(root)
    from flows.tracking.history import finished_runs

    found = finished_runs(root)
    if not found:
        print("no finished runs yet; start one with `modelpress run`")
        return
    headings = ("date", "run", "tag", "target", "winner", "scheme", "size", "retention (interval)", "perplexity", "")
    table = Table(*headings, box=None, pad_edge=False, header_style="bold")
    for one in found:
        mean, low, high = (f"{100 * value:.1f}" for value in one.retention) if one.retention else ("", "", "")
        table.add_row(
            time.strftime("%Y-%m-%d %H:%M", time.localtime(one.ended)),
            one.name,
            one.tag,
            one.target,
            one.winner,
            one.scheme,
            megabytes(one.size_bytes) if one.size_bytes else "",
            f"{mean} ({low} to {high})" if mean else "",
            ", ".join(f"{text} {value:.2f}" for text, value in one.perplexities.items()),
            f"champion of {one.champion_of}" if one.champion_of else "",
        )
    Console(soft_wrap=False).print(table)


@app.command()
def get(
    what: Annotated[
        str,
        typer.Argument(help="run/NAME, the tag of a finished run; or champion, the best package in MLflow's registry."),
    ],
    to: Annotated[Path | None, typer.Option(help="Folder to create. Default: the package's name.")] = None,
    target: Annotated[str | None, typer.Option(help="The target of the package, if the run has several.")] = None,
) -> None:
    """Fetch the package of a finished run, or the champion of the package in params.yaml, and verify its checksums."""
    root = find_root()
    quiet(root)
    from flows.tracking.fetch import fetch_package

    print(fetch_package(root, what, to, target))


@app.command()
def doctor(
    repair: Annotated[
        bool, typer.Option("--repair", help="Fix damage from a crash, a kill or a bad disk: locks, dvc.lock, cache.")
    ] = False,
) -> None:
    """Check versions, device, memory, disk, network, settings and DVC, and show a remedy for each problem."""
    root = find_root()
    quiet(root)
    if repair:
        _repair(root)
        return
    from flows.doctor.examine import examine

    styles = {"ok": "green", "note": "yellow", "bad": "red"}
    console, bad = Console(highlight=False, soft_wrap=True), 0
    for finding in examine(root):
        bad += finding.level == "bad"
        remedy = f" -> {finding.remedy}" if finding.remedy else ""
        console.print(f"{finding.level:<5}", style=styles[finding.level], end="")
        console.print(f"{finding.subject:<14} {finding.found}{remedy}", markup=False)
    if bad:
        raise FlowError(f"{bad} problem{'s' if bad > 1 else ''} to fix before a run can work")


for command in (delivery.verify, delivery.sign, delivery.oci, delivery.push, delivery.pull, rollout.deploy):
    app.command()(command)


def main() -> None:
    """The entry point. An error that the user can fix is one line on stderr, with exit status 1."""
    with _one_line_errors():
        app()


def _override(root: Path, overrides: list[str], elsewhere: bool) -> list[str]:
    """Apply the --set changes; on an invalid change, restore params.yaml and raise FlowError."""
    from flows.graph.params_file import override
    from flows.graph.preflight import MODEL, check_settings_work

    params = root / "params.yaml"
    before = params.read_text(encoding="utf-8") if params.exists() else ""
    changes = override(params, overrides)
    if overrides:
        try:
            check_settings_work(
                root,
                downloaded=(root / MODEL / "config.json").exists() and not _names_model(overrides),
                elsewhere=elsewhere,
            )
        except FlowError as error:
            params.write_text(before, encoding="utf-8")
            raise FlowError(f"{error}; params.yaml is unchanged") from error
    return list(changes)


def _only_winner(root: Path) -> list[str]:
    """The changes that leave the baseline and the winners of the last report."""
    from flows.graph.params_file import read_settings
    from flows.tracking.run_facts import summaries
    from tasks.settings import BASE

    winners = {one["winner"] for one in summaries(root).values() if one.get("winner")}
    if not winners:
        raise FlowError("--winner: there is no report with a winner yet; make one with `modelpress run`")
    settings = read_settings(root / "params.yaml")
    return [f"~variants.{name}" for name in settings.variants if name not in (BASE, *winners)]


def _names_model(overrides: list[str]) -> bool:
    """Whether an override changes the model, so that the variants cannot be checked against the downloaded one."""
    return any(item.lstrip("+~").startswith("model") for item in overrides)


def _show_report(root: Path) -> None:
    table = root / "report/table.txt"
    if not table.is_file():
        raise FlowError("there is no report yet; create one with `modelpress run`")
    print(table.read_text(encoding="utf-8").rstrip() + "\n")
    from flows.graph.params_file import package_names
    from flows.tracking.mlflow_run import tracking_uri

    params = root / "params.yaml"
    names = package_names(params.read_text(encoding="utf-8"), str(params)).values()
    for what, place in (("report", root / "report/index.html"), *(("package", root / "dist" / name) for name in names)):
        print(f"{what:<8} {place if place.exists() else '(none)'}")
    print(f"{'MLflow':<8} {tracking_uri(root)}")
    print(f"{'next':<8} {_next_command(root)}")


def _next_command(root: Path) -> str:
    """The command to suggest next: a longer evaluation if more items could make a variant pass, else `serve`."""
    from flows.tracking.run_facts import summaries

    for summary in summaries(root).values():
        needed = [row.get("items_needed") for row in (summary.get("variants") or {}).values()]
        if not summary.get("winner") and any(needed):
            return f"modelpress run --set evaluation.limit={min(filter(None, needed))}"
    return "modelpress serve    # browse all runs, start new ones from a form or on a schedule"


def _repair(root: Path) -> None:
    """Repair the checkout, with a progress bar, because reading a large cache takes minutes."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from flows.doctor.repair import repair

    columns = (TextColumn("reading DVC's cache"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("")
        repaired = list(repair(root, lambda read, total: bar.update(task, completed=read, total=total)))
    print("\n".join(repaired) or "nothing to repair")


class _Terminated(KeyboardInterrupt):
    """Raised on SIGTERM and handled like Ctrl-C."""


@contextmanager
def _interruptible(
    word: str = "interrupted; finished stages are kept, and the next run continues from there",
) -> Iterator[None]:
    """On Ctrl-C or SIGTERM, end the body cleanly, print `word` and exit with the usual status."""

    def terminate(*_: object) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        print(word, file=sys.stderr)
        raise typer.Exit(143 if isinstance(interrupt, _Terminated) else 130) from interrupt


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except FlowError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        _fail(f"{error.filename or 'the disk'}: {error.strerror}; free some space or fix the permissions")


def _fail(message: str) -> NoReturn:
    text = "\n  ".join(" ".join(line.split()) for line in message.splitlines() if line.strip())
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"error: {text}", style="red")
    sys.exit(1)
