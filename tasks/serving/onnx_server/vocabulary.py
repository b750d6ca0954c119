"""Text to token ids and back."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from .errors import StartError
from .export_folder import TOKENIZER, Export

_INCOMPLETE = "\ufffd"  # a character of which more bytes follow


class Vocabulary:
    """The tokenizer of an export."""

    def __init__(self, export: Export) -> None:
        try:
            self.tokenizer = Tokenizer.from_file(str(export.folder / TOKENIZER))
        except Exception as error:  # the library raises no narrower type
            raise StartError(f"cannot read {export.folder / TOKENIZER}: {error}; export the model again") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self._bos = export.special.get("bos_token", "")
        self._rows = export.vocabulary

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text. special: with the tokens that the tokenizer adds, unless the text already begins with
        BOS: many chat templates write it."""
        begins = bool(self._bos) and text.startswith(self._bos)
        return list(self.tokenizer.encode(text, add_special_tokens=special and not begins).ids)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def token(self, number: int) -> str:
        """Text of one token."""
        return self.decode([number], skip_special=False)

    def contains(self, number: int) -> bool:
        """Whether the model has an embedding for this id."""
        return 0 <= number < self._rows

    def padding(self, export: Export) -> int:
        """An id to pad prompts with: one that no prompt is expected to have, because a batch treats it as no token.

        A row of the embedding without a token, else a special token without a role and without a place in the chat
        template, else the last token.
        """
        size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        if size < export.vocabulary:
            return export.vocabulary - 1
        roles, template = set(export.special.values()), export.template or ""
        added = self.tokenizer.get_added_tokens_decoder()
        free = [
            number
            for number, token in sorted(added.items())
            if token.special
            and token.content not in roles
            and token.content not in template
            and number not in export.ends
            and number < export.vocabulary
        ]
        return free[-1] if free else export.vocabulary - 1


class TextStream:
    """The text of a growing sequence of tokens, piece by piece.

    A piece is complete characters only. A token's text can depend on the tokens before it, so each is decoded after
    the last ones of the prompt or text.
    """

    def __init__(self, vocabulary: Vocabulary, prompt: Sequence[int], skip_special: bool) -> None:
        self._vocabulary = vocabulary
        self._skip = skip_special
        self._ids = list(prompt[-6:])
        self._start = 0
        self._read = len(self._ids)

    def add(self, number: int) -> str:
        """The text that this token completes."""
        self._ids.append(number)
        return self._piece(complete=False)

    def rest(self) -> str:
        """The text of the last tokens, if they end within a character."""
        return self._piece(complete=True)

    def _piece(self, complete: bool) -> str:
        before = self._vocabulary.decode(self._ids[self._start : self._read], self._skip)
        after = self._vocabulary.decode(self._ids[self._start :], self._skip)
        if len(after) <= len(before) or (after.endswith(_INCOMPLETE) and not complete):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return after[len(before) :]
