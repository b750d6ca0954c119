"""The items of all tasks: loaded once by lm-eval, then scored in units of any size."""

from __future__ import annotations

import hashlib
import json
import math
import random
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.errors import TaskError, TransientError, first_line
from tasks.scoring.eval_tasks import task_manager
from tasks.scoring.order import BLOCK, Order
from tasks.settings import EvaluationSettings

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task

    from tasks.scoring.lm_eval_adapter import RuntimeLM

# The metrics to use, in order of preference; a task without them uses its first metric where higher is better.
METRICS = ("acc_norm", "acc", "exact_match", "f1")


class Questions:
    """All planned items, and the items after them that complete the last block.

    Raises TaskError if a task is unknown, runs code or has no items, or if its data cannot be read; TransientError if
    a hub cannot be reached.
    """

    def __init__(self, lm: RuntimeLM, settings: EvaluationSettings, evals: Path) -> None:
        self._lm = lm
        self._tasks = _load(lm, settings, evals)
        self._requests = {task: _by_item(loaded) for task, loaded in self._tasks.items()}
        most = math.inf if settings.limit is None else settings.limit
        planned = {task: int(min(most, len(found))) for task, found in self._requests.items()}
        self.order = Order(settings.seed, planned)

    def definition(self) -> dict[str, Any]:
        """Version and hash of each task. The hash is a sha256 over the document, prompt and target of every planned
        item."""
        return {
            task: {"version": loaded.VERSION, "hash": self._asked(task, self.order.items[task])}
            for task, loaded in self._tasks.items()
        }

    def document_hash(self, task: str, item: int) -> str:
        """sha256 of the item's document, as lm-eval computes it."""
        from lm_eval.utils import handle_non_serializable

        document = self._requests[task][item][0].doc
        return _sha256(json.dumps(document, indent=2, default=handle_non_serializable, ensure_ascii=False))

    def chance(self, task: str) -> float | None:
        """The score of guessing on the planned items; None if an item has no options."""
        options = [len(self._requests[task][item]) for item in range(self.order.items[task])]
        return sum(1 / n for n in options) / len(options) if min(options) > 1 else None

    def blocks(self) -> list[dict[str, list[int]]]:
        """The items of all tasks, block by block. The last block is complete, even beyond the planned items, so that
        it stays the same when more are planned."""
        count = math.ceil(max(self.order.items.values()) / BLOCK)
        blocks = []
        for start in range(0, count * BLOCK, BLOCK):
            found = {
                task: [item for item in range(start, start + BLOCK) if item in self._requests[task]]
                for task, planned in self.order.items.items()
                if start < planned
            }
            blocks.append({task: items for task, items in found.items() if items})
        return blocks

    def identity(self, unit: Mapping[str, Sequence[int]]) -> list[Any]:
        """All requests of a unit's items, as JSON values."""
        return [
            [task, item, self.document_hash(task, item), self._target(task, item), requests]
            for task, items in unit.items()
            for item in items
            for requests in [[(one.request_type, one.args) for one in self._requests[task][item]]]
        ]

    def score(self, unit: Mapping[str, Sequence[int]]) -> dict[str, list[tuple[str, float]]]:
        """Score the items of a unit together: by task, the metric and score of each item, in order.

        Raises TaskError if a task has no metric where higher is better.
        """
        kinds: dict[str, list[Instance]] = defaultdict(list)
        for task, items in unit.items():
            self._tasks[task]._instances = [request for item in items for request in self._requests[task][item]]
            for request in self._tasks[task].instances:
                request.resps = []
                kinds[request.request_type] += [request] * request.repeats
        for kind, requests in kinds.items():
            for request, answer in zip(requests, getattr(self._lm, kind)(requests, disable_tqdm=True), strict=True):
                request.resps.append(answer)
        return {task: list(self._scored(task, items)) for task, items in unit.items()}

    def _scored(self, task: str, items: Sequence[int]) -> Iterator[tuple[str, float]]:
        loaded = self._tasks[task]
        loaded.apply_filters()
        chosen: tuple[str, str] | None = None
        for item in items:
            requests = self._requests[task][item]
            # if a task has several filters for an answer, use the first
            first = next(iter(requests[0].filtered_resps))
            found = loaded.process_results(requests[0].doc, [request.filtered_resps[first] for request in requests])
            if chosen is None:
                metric = _metric(task, found, loaded.higher_is_better())
                chosen = metric, metric if first == "none" else f"{metric},{first}"
            yield chosen[1], float(found[chosen[0]])

    def _asked(self, task: str, planned: int) -> str:
        parts = (
            self.document_hash(task, item)
            + _sha256(self._requests[task][item][0].arguments[0])
            + _sha256(self._target(task, item))
            for item in range(planned)
        )
        return _sha256("".join(parts))

    def _target(self, task: str, item: int) -> str:
        return str(self._tasks[task].doc_to_target(self._requests[task][item][0].doc))


def _load(lm: RuntimeLM, settings: EvaluationSettings, evals: Path) -> dict[str, Task]:
    """Load the tasks and build their requests, like lm-eval's `simple_evaluate`."""
    import datasets
    import httpx
    import numpy as np
    import torch

    datasets.disable_progress_bars()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(settings.seed)
    most = None if settings.limit is None else math.ceil(settings.limit / BLOCK) * BLOCK
    with _own_cache():
        try:
            tasks: dict[str, Task] = task_manager(settings.tasks, evals).load(list(settings.tasks))["tasks"]
            for name, task in tasks.items():
                _check(name, task)
                own = task.get_config("num_fewshot")
                if own is None or (settings.shots is not None and own != 0):
                    task.set_config(key="num_fewshot", value=settings.shots or 0)
                task.set_fewshot_seed(seed=settings.seed)
                task.build_all_requests(
                    limit=most,
                    rank=lm.rank,
                    world_size=lm.world_size,
                    apply_chat_template=settings.chat_template,
                    chat_template=lm.apply_chat_template if settings.chat_template else None,
                    tokenizer_name=lm.tokenizer_name if settings.chat_template else "",
                )
        except (FileNotFoundError, ConnectionError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
            reason = first_line(error)
            away = isinstance(error, ConnectionError | httpx.HTTPError)
            raise (TransientError if away else TaskError)(
                f"the data of {', '.join(settings.tasks)} cannot be read: {reason}; "
                "run the datasets stage, or check that the hub is reachable: modelpress doctor"
            ) from error
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            raise TaskError(
                f"the data of {', '.join(settings.tasks)} comes with a script ({error}), and code from a hub is never "
                "run; choose a task whose data are files"
            ) from error
    return tasks


def _check(name: str, task: Task) -> None:
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        kind = "runs code that the model writes" if getattr(task, "UNSAFE_CODE", False) else "asks about pictures"
        raise TaskError(f"task {name} {kind}, which is not supported; choose another task")
    if not len(task.eval_docs):
        raise TaskError(f"task {name} has no items; check its data")


@contextmanager
def _own_cache() -> Iterator[None]:
    """Let `datasets` use a temporary cache: its cache goes by path and time, so a shared one could be stale.

    Its environment variables would have no effect here, because it reads them at import.
    """
    from datasets import config

    names = ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH")
    before = {name: getattr(config, name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        downloads = Path(folder) / "downloads"
        for name, path in zip(names, (Path(folder), downloads, downloads / "extracted"), strict=True):
            setattr(config, name, path)
        try:
            yield
        finally:
            for name, path in before.items():
                setattr(config, name, path)


def _by_item(task: Task) -> dict[int, list[Instance]]:
    found: dict[int, list[Instance]] = defaultdict(list)
    for request in task.instances:
        found[request.doc_id].append(request)
    return {item: sorted(requests, key=lambda request: request.idx) for item, requests in found.items()}


def _metric(task: str, found: Mapping[str, Any], higher_is_better: Mapping[str, bool]) -> str:
    numbers = [name for name, value in found.items() if isinstance(value, int | float)]
    metric = next((m for m in (*METRICS, *numbers) if m in numbers and higher_is_better.get(m)), None)
    if metric is None:
        raise TaskError(
            f"task {task} has no metric where higher is better (it has: {', '.join(found)}); choose another task"
        )
    return metric


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
