"""Render templates, by default those in tasks/reporting/templates; tasks.reporting.number_format provides filters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from tasks.errors import TaskError
from tasks.reporting import number_format

TEMPLATES = Path(__file__).parent / "templates"
FILTERS = ("change", "figure", "interval", "megabytes", "percent", "short_percent", "times", "words")


def render(template: str, *, escape: bool, folder: Path = TEMPLATES, **values: Any) -> str:
    """Render `template` of `folder` with `values`. escape: escape values for HTML.

    Raises TaskError if the template does not exist, and jinja2's UndefinedError if it uses a name missing in `values`.
    """
    if not (folder / template).is_file():
        raise TaskError(f"{template} not found in {folder}; reinstall the project or restore the file")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=escape,  # noqa: S701  most results are not HTML
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {name: getattr(number_format, name) for name in FILTERS}
    return environment.get_template(template).render(values)
