"""Quantize the independent layers of a large model in several processes.

A solver's steps are too small for many threads, so each process gets one thread or a few.
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

PressLayer = Callable[[int], None]  # quantizes and writes a decoder layer, by index; pickled
WORTH = 100_000_000  # weights that justify a process: its start takes a sixth of the time to quantize them
PROCESS = 600_000_000  # memory of a process itself, bytes
FOR_A_WEIGHT = 40  # bytes, in the current layer: measured 0.9 GB for 3.5 million weights, 2.4 for 50 million
_PR_SET_PDEATHSIG = 1

_held = 0
_press_layer: PressLayer  # in a worker, set by `_prepare`, so that it is sent only once


def processes(threads: int, layers: int, weights: int, memory: float) -> int:
    """The number of processes for `layers` layers of `weights` each: at most one per thread, limited by the work and by
    `memory` bytes."""
    room = int(memory / held_bytes(weights))
    return max(1, min(threads, layers, layers * weights // WORTH, room))


def held_bytes(weights: int) -> int:
    """The memory, bytes, that a process holds which presses layers of so many weights."""
    return PROCESS + FOR_A_WEIGHT * weights


def press_side_by_side(press_layer: PressLayer, layers: Iterable[int], count: int) -> None:
    """Call `press_layer` for each of `layers` in `count` processes.

    Re-raises the exception of a process, MemoryError if one was killed, after ending the others.
    """
    global _held
    import torch

    threads = max(1, torch.get_num_threads() // count)
    context = multiprocessing.get_context("spawn")  # a fork after threads have computed may hang
    memory: dict[int, int] = {}
    with ProcessPoolExecutor(count, context, initializer=_prepare, initargs=(press_layer, threads)) as pool:
        futures = [pool.submit(_press, layer) for layer in layers]
        try:
            for future in tqdm(as_completed(futures), f"quantizing, {count} at a time", len(futures), unit="layer"):
                process, peak = future.result()
                memory[process] = peak
        except BaseException as error:
            for child in multiprocessing.active_children():
                child.kill()
            if isinstance(error, BrokenProcessPool):
                raise MemoryError(
                    "a process that quantized layers was killed, most likely by the system because memory ran out"
                ) from error
            raise
    _held = current_memory() + sum(memory.values())


def held_beside() -> int:
    """The total peak memory of this process and those of the last `press_side_by_side`, in bytes; 0 if there were
    none."""
    return _held


def _prepare(press_layer: PressLayer, threads: int) -> None:
    """Initialize a worker."""
    global _press_layer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # end with a killed stage
    import torch

    torch.set_num_threads(threads)
    _press_layer = press_layer


def _press(layer: int) -> tuple[int, int]:
    """Quantize a layer; return the worker's process id and its peak memory in bytes."""
    _press_layer(layer)
    return os.getpid(), peak_memory()
