"""`modelpress`: the command line.

modelpress run --set variants.awq-int4.group_size=32
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from flows.errors import FlowError
from flows.local import quiet, server

app = typer.Typer(
    name="modelpress",
    help="Press a language model down to the size it is deployed at, and prove that it still works.",
    epilog="Start with `modelpress plan`: it says what a run would do, and why.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _global(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)
    ] = False,
) -> None:
    if show_version:
        print(f"modelpress {version('modelpress')}")
        raise typer.Exit


Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value of params.yaml first; may be repeated."),
]
Jobs = Annotated[int, typer.Option(min=1, max=64, help="Stages at a time; each needs memory for a model.")]
Timeout = Annotated[
    float | None, typer.Option(min=0.01, metavar="MINUTES", help="The longest a stage may take.")
]


@app.command()
def run(overrides: Set = None, jobs: Jobs = 2, timeout: Timeout = None) -> None:
    """Bring everything up to date and show the result: only what changed is done.

    The same stages as `dvc repro` runs. A `--set` stays in params.yaml, so both agree on what is up to date.

    Examples:

        modelpress run

        modelpress run --set evaluation.limit=100

        modelpress run --set variants.awq-int4.group_size=32 --set gate.four_bit=0.97

        modelpress run --set '+variants.small={method: gptq, bits: 4, group_size: 32, symmetric: true, ...}'

        modelpress run --set '~variants.int8'
    """
    root = find_root()
    quiet(root)
    from flows.overrides import override

    for change in override(root / "params.yaml", overrides or []):
        print(f"params.yaml: {change}", file=sys.stderr)
    with server(root) as prefect_server:
        from flows.optimize import optimize
        from flows.terminal import readable_logs

        readable_logs()
        if prefect_server:
            import mlflow  # noqa: F401 - takes seconds, and the flow needs it: better while the server starts

            prefect_server.wait()
        optimize(str(root), jobs=jobs, timeout_minutes=timeout)
    _show_report(root)


@app.command()
def plan() -> None:
    """Say what a run would do with each stage, why, and how large its outputs are; nothing is changed."""
    root = find_root()
    quiet(root)
    from flows.overrides import read_settings
    from flows.plan import read_plan, summary

    read_settings(root / "params.yaml")
    stages = read_plan(root)
    table = Table("stage", "what", "why", "size", box=None, pad_edge=False, header_style="bold")
    words = {"changed": "run", "cached": "restore", "unchanged": "-"}
    for stage in stages.values():
        sizes = [out.size for out in stage.outs]
        size = "?" if None in sizes else _bytes(sum(s for s in sizes if s is not None))
        table.add_row(stage.name, words[stage.state], "; ".join(stage.reasons), size)
    Console(soft_wrap=False).print(table)
    print(f"\n{summary(stages)}")


@app.command()
def report() -> None:
    """Show the table of the last run again."""
    _show_report(find_root())


def main() -> None:
    """The entry point: what a person can put right is one line on stderr and exit status 1."""
    with _one_line_errors():
        app()


def find_root() -> Path:
    """The closest folder from here upwards that holds dvc.yaml; FlowError if there is none."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").is_file():
            return folder
    raise FlowError(f"no dvc.yaml in {here} or above it; run in the project's folder")


def _show_report(root: Path) -> None:
    table = root / "report/table.txt"
    if not table.is_file():
        raise FlowError("there is no report yet; `modelpress run` makes one")
    print(table.read_text(encoding="utf-8").rstrip())


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except FlowError as error:
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(
            f"error: {error}", style="red"
        )
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit("interrupted; what was finished stays, and the next run goes on from there")
