"""A runtime whose engine runs in a process and an environment of its own (tasks/engines), so that its libraries never
meet ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from tasks.engine_process import EngineProcess
from tasks.hardware import cpu_name, peak_memory, processor_name
from tasks.runtimes import Question, RuntimeInfo, Score
from tasks.text.bos import prompt_ids

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class EngineRuntime:
    """See the protocol `Runtime`. Subclasses start and load the engine, and make the batches."""

    fast = True
    note: str | None = None

    def __init__(
        self,
        engine: EngineProcess,
        directory: Path,
        tokenizer: PreTrainedTokenizerBase,
        libraries: Mapping[str, str],
        ends: Sequence[int] = (),
    ) -> None:
        self.directory, self.tokenizer, self.libraries = directory, tokenizer, libraries
        self._engine, self._ends = engine, list(ends)
        self.info: RuntimeInfo

    def _described(self, name: str, found: Mapping[str, Any], dtype: str) -> RuntimeInfo:
        device = found["device"]
        processor = cpu_name() if device == "cpu" else processor_name()
        return RuntimeInfo(name, found["version"], device, dtype, torch.get_num_threads(), processor)

    @property
    def peak_memory_bytes(self) -> int:
        """Of both processes."""
        return peak_memory("cpu") + int(self._engine.ask("memory")[0]["bytes"])

    def logprobs(self, ids: Tensor) -> Tensor:
        """See `Runtime`."""
        _, logits = self._engine.ask("logits", ids.numpy())
        assert logits is not None
        return torch.from_numpy(logits).log_softmax(-1)

    def generate_ids(self, ids: Tensor, new_tokens: int) -> Tensor:
        """See `Runtime`."""
        found, _ = self._engine.ask("generate", rows=ids.tolist(), new_tokens=new_tokens, exact=True, ends=[])
        return torch.cat([ids, torch.tensor(found["ids"])], 1)

    def generate(self, prompt: str, new_tokens: int) -> str:
        """See `Runtime`."""
        ids = prompt_ids(self.tokenizer, prompt)
        found, _ = self._engine.ask("generate", rows=[ids], new_tokens=new_tokens, exact=False, ends=self._ends)
        return str(self.tokenizer.decode(found["ids"][0], skip_special_tokens=True))

    def score(self, questions: Sequence[Question], batch_tokens: int, progress: str) -> list[list[Score]]:
        """See `Runtime`."""
        results: list[list[Score]] = [[] for _ in questions]
        with tqdm(total=len(questions), desc=progress, unit="item", disable=not progress) as bar:
            for action, batch in self._batches(questions, batch_tokens):
                asked = [[part.context, part.continuations] for _, part in batch]
                found = self._engine.ask(action, questions=asked)[0]["scores"]
                for (index, _), scores in zip(batch, found, strict=True):
                    results[index] += [Score(logprob, greedy) for logprob, greedy in scores]
                bar.update(len(batch))
        return results

    def _batches(
        self, questions: Sequence[Question], batch_tokens: int
    ) -> Iterable[tuple[str, list[tuple[int, Question]]]]:
        """The engine's action and a batch for it: questions, or parts of them in order, each with its index."""
        raise NotImplementedError
