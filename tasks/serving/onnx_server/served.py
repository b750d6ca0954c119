"""The model that is served."""

from __future__ import annotations

from dataclasses import dataclass

from .chat_template import ChatTemplate
from .errors import StartError
from .export_folder import Export, read_export
from .options import GIB, Options
from .vocabulary import Vocabulary


@dataclass(frozen=True)
class Served:
    """A model under the name that clients use. context: tokens of prompt and text together."""

    name: str
    export: Export
    vocabulary: Vocabulary
    template: ChatTemplate | None
    context: int


def read_served(options: Options) -> Served:
    """Read the model's folder; StartError if files are missing or the options do not fit the model."""
    export = read_export(options.model)
    context = options.max_model_len or export.context
    if context > export.context:
        raise StartError(f"--max-model-len is {context}, but the model's context is {export.context} tokens; lower it")
    needed, allowed = context * export.cache_bytes / GIB, options.kv_cache / GIB
    if needed > allowed:
        raise StartError(
            f"the KV cache of {context} tokens needs {needed:.1f} GiB, but --kv-cache-gib allows {allowed:.1f}; "
            "raise it, or lower --max-model-len"
        )
    template = ChatTemplate(export.template, export.special) if export.template else None
    return Served(options.name, export, Vocabulary(export), template, context)
