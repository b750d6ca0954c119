"""Fill a template of tasks/reporting/templates in; numbers are worded by tasks.reporting.number_format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from tasks.reporting import number_format

TEMPLATES = Path(__file__).parent / "templates"
FILTERS = ("change", "figure", "interval", "megabytes", "percent", "short_percent", "times", "words")


def render(template: str, *, escape: bool, **values: Any) -> str:
    """The text of `template` with `values`; `escape` is for HTML. A name that is not there is an error."""
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
