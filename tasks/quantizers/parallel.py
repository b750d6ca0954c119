"""Layers are independent: where a model is large, several processes press them side by side.

A solver's steps are too small for many threads to share, so each process has a thread or a few of its own.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from tasks.hardware import current_memory, peak_memory

PressLayer = Callable[[int], None]  # presses the decoder layer of a number and writes it; it is pickled
WORTH = 100_000_000  # weights for a process: it starts in the time in which a sixth of them is pressed
PROCESS = 600_000_000  # bytes that it holds by itself
FOR_A_WEIGHT = 40  # bytes, of a layer in work: 0.9 GB were measured for 3.5 million weights, 2.4 for 50 million
_PR_SET_PDEATHSIG = 1

_held = 0
_press_layer: PressLayer  # in a worker, set by `_prepare`: it is sent once, not for every layer


def processes(threads: int, layers: int, weights: int, memory: float) -> int:
    """How many to press `layers` layers with, of so many weights each: one for each thread, as far as there is work for
    them, and room in `memory` bytes."""
    room = int(memory / (PROCESS + FOR_A_WEIGHT * weights))
    return max(1, min(threads, layers, layers * weights // WORTH, room))


def press_side_by_side(press_layer: PressLayer, layers: Iterable[int], count: int) -> None:
    """Call `press_layer` for each of `layers` in `count` processes.

    Raises what one of them raised, and MemoryError where one was killed; the others are ended.
    """
    global _held
    import torch

    threads = max(1, torch.get_num_threads() // count)
    context = multiprocessing.get_context("spawn")  # a fork of a process in which threads computed may hang
    memory: dict[int, int] = {}
    with ProcessPoolExecutor(count, context, initializer=_prepare, initargs=(press_layer, threads)) as pool:
        futures = [pool.submit(_press, layer) for layer in layers]
        try:
            for future in tqdm(as_completed(futures), f"pressing, {count} at a time", len(futures), unit="layer"):
                process, peak = future.result()
                memory[process] = peak
        except BaseException as error:
            for child in multiprocessing.active_children():
                child.kill()
            if isinstance(error, BrokenProcessPool):
                raise MemoryError(
                    "a process that pressed layers was killed, most likely by the system for want of memory"
                ) from error
            raise
    _held = current_memory() + sum(memory.values())


def held_beside() -> int:
    """The memory that the processes of the last `press_side_by_side` and this one held at most, together, bytes; 0 if
    there was none."""
    return _held


def _prepare(press_layer: PressLayer, threads: int) -> None:
    """At the start of a worker."""
    global _press_layer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits ends this one
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing is left of a stage that was killed
    import torch

    torch.set_num_threads(threads)
    _press_layer = press_layer


def _press(layer: int) -> tuple[int, int]:
    """The worker's process id, and the memory that it has held at most, bytes."""
    _press_layer(layer)
    return os.getpid(), peak_memory()
