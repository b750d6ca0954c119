"""A served model as a runtime, so that lm-eval's tasks can be scored through its server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from tasks.errors import TaskError
from tasks.hardware import processor_name, stage_threads
from tasks.runtimes import Question, RuntimeInfo, Score
from tasks.serving.api import Api
from tasks.serving.process import Server
from tasks.settings import EvaluationSettings
from tasks.text.bos import prompt_ids

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

ROWS = 16  # texts in one request


class ServedRuntime:
    """See `Runtime` (tasks/runtimes/). The server must offer `echo` and `token ids`; TaskError otherwise.

    device: where the server computes, "cpu" or "cuda"; dtype: in what.
    """

    fast = True
    note: str | None = None

    def __init__(self, server: Server, api: Api, tokenizer: PreTrainedTokenizerBase, device: str, dtype: str) -> None:
        if missing := {"echo", "token ids"} - api.offers:
            raise TaskError(f"{server.engine} cannot score given texts: it has no {', '.join(sorted(missing))}")
        self.libraries: Mapping[str, str] = {}
        self.tokenizer, self._api, self._server = tokenizer, api, server
        self.info = RuntimeInfo(server.engine, server.version, device, dtype, stage_threads(), processor_name())

    @property
    def peak_memory_bytes(self) -> int:
        """Of the server."""
        return self._server.peak_memory_bytes() or 0

    def score(self, questions: Sequence[Question], batch_tokens: int, progress: str) -> list[list[Score]]:
        """See `Runtime`. batch_tokens is the server's own matter."""
        texts = [(q.context, continuation) for q in questions for continuation in q.continuations]
        bar = tqdm(total=len(texts), desc=progress, disable=not progress)
        scores: list[Score] = []
        with bar:
            for start in range(0, len(texts), ROWS):
                some = texts[start : start + ROWS]
                scores += self._scored(some)
                bar.update(len(some))
        found: Iterator[Score] = iter(scores)
        return [[next(found) for _ in question.continuations] for question in questions]

    def _scored(self, texts: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[Score]:
        answers = self._api.given_all([[*context, *continuation] for context, continuation in texts])
        return [
            Score(sum(value for value, _ in found[-len(end) :]), all(greedy for _, greedy in found[-len(end) :]))
            for found, (_, end) in zip(answers, texts, strict=True)
        ]

    def logprobs(self, ids: Tensor) -> Tensor:
        """Servers tell the log-probabilities of a few tokens only: TaskError."""
        raise TaskError(f"{self.info.name} does not tell the log-probabilities of its whole vocabulary")

    def generate_ids(self, ids: Tensor, new_tokens: int) -> Tensor:
        """See `Runtime`."""
        import torch

        rows = ids.tolist()
        answers = self._api.complete_all(rows, new_tokens, ignore_eos=True)
        return torch.tensor([[*row, *(answer.ids or ())] for row, answer in zip(rows, answers, strict=True)])

    def generate(self, prompt: str, new_tokens: int) -> str:
        """See `Runtime`."""
        return self._api.complete(prompt_ids(self.tokenizer, prompt), new_tokens).text


def scores_through_server(
    runtime: ServedRuntime,
    settings: EvaluationSettings,
    evals: Path,
    items: Mapping[str, Sequence[int]],
    longest: int,
) -> dict[str, list[float]]:
    """The scores of some items of each task, in their order, as the evaluation would write them.

    evals: task definitions; their data is read from data/raw of the current directory. longest: tokens that the server
    takes. TaskError as `Questions`.
    """
    from tasks.scoring.lm_eval_adapter import RuntimeLM  # takes seconds to import
    from tasks.scoring.questions import Questions

    lm = RuntimeLM(runtime, settings.batch_tokens, longest, settings.chat_date)
    found = Questions(lm, settings, evals).score(items)
    return {task: [score for _, score in scores] for task, scores in found.items()}
