"""What a chat template can do with tools, and which of vLLM's parsers reads the calls that it teaches."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

PARSERS = Path(__file__).parent / "tables" / "tool_parsers.json"


@dataclass(frozen=True)
class Template:
    """chat: whether there is a chat template. tools: whether it shows tools to the model. parser: vLLM's name; None if
    there are no tools, or their form is not in tool_parsers.json."""

    chat: bool
    tools: bool
    parser: str | None


def read_template(directory: Path) -> Template:
    """Find out what the chat template of the model in `directory` can do."""
    text = _text(directory)
    tools = re.search(r"\btools\b", text) is not None
    # the first row whose markers are all in the template: special forms stand before general ones
    rows = json.loads(PARSERS.read_text(encoding="utf-8")) if tools else []
    fits = (row["parser"] for row in rows if all(marker in text for marker in row["markers"]))
    return Template(chat=bool(text), tools=tools, parser=next(fits, None))


def _text(directory: Path) -> str:
    template, tokenizer = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    if template.is_file():
        return template.read_text(encoding="utf-8")
    found = json.loads(tokenizer.read_text(encoding="utf-8")).get("chat_template") if tokenizer.is_file() else None
    if isinstance(found, list):  # several, by name
        found = next((one["template"] for one in found if one["name"] == "default"), None)
    return found or ""
