"""Parse multiple-choice data sets."""

from __future__ import annotations

import pytest
from datasets import Dataset

from evals.choices import answer_index, multiple_choice, split_options, yes_no


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("A. one\nB. two", ["one", "two"]),
        ("\nA. bank\nB. new york\nC. mall", ["bank", "new york", "mall"]),
        ("A. finish with  bobby pin \nB. end ", ["finish with  bobby pin", "end"]),
        ("A. vitamin\nC. is good\nB. no", ["vitamin\nC. is good", "no"]),  # only consecutive letters are markers
        ("no marker", []),
    ],
)
def test_options_are_split_at_their_letters(options: str, expected: list[str]) -> None:
    assert split_options(options) == expected


def test_the_answer_is_found_with_and_without_its_letter() -> None:
    assert answer_index("A. one\nB. two", "B. two") == 1
    assert answer_index("A. one\nB. two", "two") == 1
    assert answer_index("A. one\nB. two", "three") is None


def test_items_whose_answer_is_no_option_are_dropped() -> None:
    data = Dataset.from_list(
        [
            {"question": " q1 ", "options": "A. one\nB. two", "answer": "B. two"},
            {"question": "q2", "options": "A. one\nB. two", "answer": "C. three"},
        ]
    )
    assert [(i["question"], i["choices"], i["gold"]) for i in multiple_choice(data)] == [("q1", ["one", "two"], 1)]


def test_yes_and_no() -> None:
    data = Dataset.from_list([{"answer": "True"}, {"answer": "False"}])
    assert yes_no(data)["gold"] == [1, 0]
