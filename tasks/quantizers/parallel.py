"""Layers are independent: where a model is large, several processes press them side by side.

A solver's steps are too small for many threads to share. So each process has a thread or a few of its own, and each
takes every n-th layer; what it makes lies in files, as for a process that goes on where another was interrupted.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import wait
from multiprocessing.queues import SimpleQueue
from typing import Any

from tqdm import tqdm

from tasks.hardware import current_memory, peak_memory
from tasks.quantizers import QuantizeJob

Again = Callable[[QuantizeJob], None]  # presses the layers of the job's share; it is pickled
WORTH = 100_000_000  # weights for a process: it starts in the time in which a sixth of them is pressed
PROCESS = 600_000_000  # bytes that it holds by itself
FOR_A_WEIGHT = 40  # bytes, of a layer in work: 0.9 GB were measured for 3.5 million weights, 2.4 for 50 million
LOOK = 0.5  # seconds between two looks at what is done
_PR_SET_PDEATHSIG = 1

_held = 0


def processes(threads: int, layers: int, weights: int, memory: float) -> int:
    """How many to press `layers` layers with, of so many weights each: one for each thread, as far as there is work for
    them, and room in `memory` bytes."""
    room = int(memory / (PROCESS + FOR_A_WEIGHT * weights))
    return max(1, min(threads, layers, layers * weights // WORTH, room))


def press_side_by_side(job: QuantizeJob, again: Again, count: int, left: Callable[[], int]) -> None:
    """Let `count` processes call `again`, each with a share of the layers. left: how many are not there yet.

    Raises what one of them raised, and MemoryError where one was killed; the others are ended.
    """
    global _held
    import torch

    context = multiprocessing.get_context("spawn")  # a fork of a process in which threads computed may hang
    said: SimpleQueue[Any] = context.SimpleQueue()
    threads = max(1, torch.get_num_threads() // count)
    shares = [replace(job, share=(number, count)) for number in range(count)]
    team = [context.Process(target=_press, args=(again, share, threads, said), daemon=True) for share in shares]
    try:
        for one in team:
            one.start()
        with tqdm(desc=f"pressing, {count} at a time", unit="layer", total=left()) as bar:
            while (alive := [one.sentinel for one in team if one.is_alive()]) and not any(one.exitcode for one in team):
                wait(alive, LOOK)
                bar.update(bar.total - bar.n - left())
        status = next((one.exitcode for one in team if one.exitcode), 0)
    finally:
        for one in team:
            one.kill()
            one.join()
    answers = []
    while not said.empty():
        answers.append(said.get())
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    if status < 0:
        raise MemoryError("a process that pressed layers was killed, most likely by the system for want of memory")
    if status > 0:
        raise RuntimeError(f"a process that pressed layers ended with status {status}; its own words stand above")
    _held = current_memory() + sum(answers)


def held_beside() -> int:
    """The memory that the processes of the last `press_side_by_side` and this one held at most, together, bytes; 0 if
    there was none."""
    return _held


def _press(again: Again, job: QuantizeJob, threads: int, said: SimpleQueue[Any]) -> None:
    """In a process of its own: press the share; say how much memory it took, or what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that waits ends this one
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing is left of a stage that was killed
    import torch

    torch.set_num_threads(threads)
    try:
        again(job)
        said.put(peak_memory())
    except Exception as error:
        said.put(error)
        sys.exit(1)
