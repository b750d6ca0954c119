"""Fill a template of tasks/reporting/templates in; numbers are worded by tasks.reporting.number_format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from tasks.errors import TaskError
from tasks.reporting import number_format

TEMPLATES = Path(__file__).parent / "templates"
FILTERS = ("change", "figure", "interval", "megabytes", "percent", "short_percent", "times", "words")


def render(template: str, *, escape: bool, **values: Any) -> str:
    """The text of `template` with `values`; `escape` is for HTML.

    TaskError if there is no such template; jinja2's UndefinedError if it uses a name that is not among the values.
    """
    if not (TEMPLATES / template).is_file():
        raise TaskError(f"{TEMPLATES} holds no {template}; install the project with its templates, or restore the file")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=escape,  # noqa: S701  the model card is Markdown
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {name: getattr(number_format, name) for name in FILTERS}
    return environment.get_template(template).render(values)
