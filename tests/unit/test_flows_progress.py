from __future__ import annotations

import io

from tqdm import tqdm

from flows.execution.log_lines import Lines


class Clock:
    """A manual clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _lines(*chunks: bytes) -> list[str]:
    lines = Lines()
    return [line for chunk in chunks for line in lines.feed(chunk)] + list(lines.close())


def test_finished_lines_pass_at_once_and_whole() -> None:
    lines = Lines()
    assert list(lines.feed(b"one\ntw")) == ["one"]
    assert list(lines.feed(b"o\n\n")) == ["two"]
    assert list(lines.feed(b"rest")) == []
    assert list(lines.close()) == ["rest"]


def test_split_character_is_decoded() -> None:
    text = "größer\n".encode()
    assert _lines(text[:3], text[3:]) == ["größer"]


def test_colours_are_dropped() -> None:
    assert _lines(b"\x1b[31mred\x1b[0m\n") == ["red"]


def test_a_bar_becomes_a_line_every_three_seconds_with_item_total_and_time_left() -> None:
    clock = Clock()
    lines, seen = Lines(clock=clock), []
    for n in range(1, 21):
        clock.now = float(n)
        bar = f"\revaluate:  {5 * n}%|###   | {n}/20 [00:{n:02}<00:{20 - n:02},  1.00it/s]"
        seen += [(clock.now, line) for line in lines.feed(bar.encode())]
    assert seen[0] == (2.0, "evaluate: 2 of 20, 00:02 spent, 00:18 left")
    assert [when for when, _ in seen] == [2.0, 5.0, 8.0, 11.0, 14.0, 17.0, 20.0]
    assert seen[-1][1] == "evaluate: 20 of 20, 00:20 spent"


def test_end_of_a_shown_bar_is_logged_once() -> None:
    clock = Clock()
    lines = Lines(clock=clock)
    half, end = (f"\rx: {p}%|#| {n}/2 [00:01<00:01, 1it/s]".encode() for p, n in ((50, 1), (100, 2)))
    assert list(lines.feed(half)) == []
    clock.now = 1.5
    assert list(lines.feed(half)) == ["x: 1 of 2, 00:01 spent, 00:01 left"]
    assert list(lines.feed(end)) == ["x: 2 of 2, 00:01 spent"]
    assert list(lines.feed(end + b"\n")) == []


def test_bars_that_differ_only_in_digits_are_one_bar() -> None:
    clock = Clock()
    lines, seen = Lines(clock=clock), []
    for layer in range(100):
        clock.now += 0.1
        seen += list(lines.feed(f"\r({layer}/100) calibrating: 100%|#| 8/8 [00:00<00:00, 80it/s]\n".encode()))
    assert 2 <= len(seen) <= 5


def test_a_real_tqdm_is_understood() -> None:
    clock, out = Clock(), io.StringIO()
    lines = Lines(clock=clock)
    bar = tqdm(total=4, desc="items", file=out, mininterval=0, ncols=80)
    seen = []
    for _ in range(4):
        clock.now += 3
        bar.update()
        seen += list(lines.feed(out.getvalue().encode()))
        out.seek(0)
        out.truncate()
    bar.close()
    assert [line.split(",")[0] for line in seen] == ["items: 2 of 4", "items: 3 of 4", "items: 4 of 4"]


def test_silent_bar_is_shown_before_its_next_update() -> None:
    clock = Clock()
    lines = Lines(clock=clock)
    assert list(lines.feed(b"\rslow: 10%|#| 1/10 [00:30<04:30, 30s/it]")) == []
    clock.now = 2
    assert list(lines.feed(b"")) == ["slow: 1 of 10, 00:30 spent, 04:30 left"]


def test_bar_without_a_total_has_the_same_interval() -> None:
    clock = Clock()
    lines, seen = Lines(clock=clock), []
    for n in range(1, 9):
        clock.now += 0.5
        seen += list(lines.feed(f"\rwheel==1.2: {n}.0MB [00:0{n // 2}, 2.0MB/s]\n".encode()))
    assert seen == ["wheel==1.2: 3.0MB, 00:01 spent"]


def test_finished_share_covers_all_of_several_bars() -> None:
    clock = Clock()
    lines = Lines(clock=clock)
    shares = []
    for state in (
        "x: 50%|#| 1/2 [00:01<00:01, 1it/s]",
        "(2/4): Calibrating: 50%|#| 4/8 [00:01<00:01, 1it/s]",
        "a word",
    ):
        clock.now += 4
        list(lines.feed(f"\r{state}".encode()))
        clock.now += 4
        list(lines.feed(b"" if "%" in state else b"\n"))
        shares.append(lines.share)
    assert shares == [0.5, 0.375, None]
