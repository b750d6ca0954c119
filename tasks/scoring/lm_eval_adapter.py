"""Adapter: a `Runtime` as a language model of lm-evaluation-harness."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tasks.runtimes import Question, Runtime, Score
from tasks.settings import CHAT_DATE
from tasks.text.bos import prompt_ids
from tasks.text.chat import render

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

LONGEST_ANSWER = 256  # tokens, where a task sets no limit


class RuntimeLM(TemplateLM):
    """Scores and generates with a `Runtime`. A beginning-of-sequence token is added where the tokenizer adds one."""

    def __init__(self, runtime: Runtime, batch_tokens: int, max_length: int, chat_date: str = CHAT_DATE) -> None:
        super().__init__()
        self.runtime = runtime
        self.tokenizer = runtime.tokenizer
        self.batch_tokens = batch_tokens
        self.max_length = max_length
        self.chat_date = chat_date
        self.progress = "items"  # label of the progress bar; empty: no bar

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The first token of a text without context: BOS if the tokenizer has one, else EOS."""
        bos = self.tokenizer.bos_token_id
        return int(bos if bos is not None else self.eot_token_id)

    @property
    def tokenizer_name(self) -> str:
        """The name under which lm-eval caches chat templates."""
        return str(self.tokenizer.name_or_path)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The applied chat template, for lm-eval's log."""
        return str(self.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render messages with the model's chat template."""
        return render(
            self.tokenizer,
            chat_history,
            self.chat_date,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids. add_special_tokens: None adds special tokens unless the text already begins with BOS."""
        if add_special_tokens is None:
            return prompt_ids(self.tokenizer, string)
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens).input_ids)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations. Those of one context are grouped, so the runtime reads the context once."""
        groups: dict[tuple[int, ...], dict[tuple[int, ...], Score | None]] = {}
        keys = []
        for _, context, continuation in requests:
            answer = tuple(continuation)
            # truncate from the left to the model's window, like lm-eval
            room = self.max_length - len(answer) + 1
            key = tuple(context[-room:] if room > 0 else context[-1:])
            groups.setdefault(key, {})[answer] = None
            keys.append((key, answer))
        questions = [Question(context, tuple(answers)) for context, answers in groups.items()]
        scores = self.runtime.score(questions, self.batch_tokens, self.progress)
        for question, found in zip(questions, scores, strict=True):
            groups[question.context] = dict(zip(question.continuations, found, strict=True))
        results = (groups[context][answer] for context, answer in keys)
        return [(score.logprob, score.greedy) for score in results if score is not None]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows without overlap."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(("", ""), *make_disjoint_window(window)) for window in windows]
            totals.append(sum(logprob for logprob, _ in self._loglikelihood_tokens(parts)))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate greedily up to the first stop string. Sampling options are ignored: they would add random noise."""
        answers = []
        for request in requests:
            prompt, options = request.args[0], request.args[1]
            text = self.runtime.generate(prompt, int(options.get("max_gen_toks", LONGEST_ANSWER)))
            stops = options.get("until") or []
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.split(stop)[0] if stop else text
            answers.append(text)
        return answers
