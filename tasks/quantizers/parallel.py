"""Quantize independent layers, or shares of them, in several processes: on a CPU for a large model, with several GPUs
one process each.

A solver's steps are too small for many threads, so each process gets one thread or a few.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm

from tasks.hardware import current_memory, peak_memory
from tasks.quantizers.shares import Share

Press = Callable[[Any], object]  # quantizes and writes a share of a decoder layer; both pickled
WORTH = 100_000_000  # weights that justify a process: its start takes a sixth of the time to quantize them
PROCESS = 600_000_000  # memory of a process itself, bytes
FOR_A_WEIGHT = 40  # bytes, in the current layer: measured 0.9 GB for 3.5 million weights, 2.4 for 50 million
_PR_SET_PDEATHSIG = 1

_held = 0
_press_share: Press  # in a worker, set by `_prepare`, so that it is sent only once


def job_devices(device: str, shares: Sequence[Share], memory: float) -> list[str]:
    """The devices of the processes that quantize these shares, one for each process. memory: bytes that are free."""
    import torch

    if device == "cuda":
        return [f"cuda:{number}" for number in range(max(1, min(torch.cuda.device_count(), len(shares))))]
    weights = sum(share.weights for share in shares) // len(shares)
    return [device] * processes(torch.get_num_threads(), len(shares), weights, memory)


def processes(threads: int, shares: int, weights: int, memory: float) -> int:
    """The number of processes for `shares` of layers, of `weights` each: at most one per thread, limited by the work
    and by `memory` bytes."""
    room = int(memory / held_bytes(weights))
    return max(1, min(threads, shares, shares * weights // WORTH, room))


def held_bytes(weights: int) -> int:
    """The memory, bytes, that a process holds which presses layers of so many weights."""
    return PROCESS + FOR_A_WEIGHT * weights


def press_side_by_side(press: Press, shares: Sequence[Any], devices: Sequence[str], unit: str = "layer") -> None:
    """Call `press` for each of `shares`, in one process for each of `devices`.

    Re-raises the exception of a process, MemoryError if one was killed, after ending the others.
    """
    global _held
    import torch

    count = len(devices)
    threads = max(1, torch.get_num_threads() // count)
    context = multiprocessing.get_context("spawn")  # a fork after threads have computed may hang
    memory: dict[int, int] = {}
    free = context.SimpleQueue()
    for device in devices:
        free.put(device)
    with ProcessPoolExecutor(count, context, initializer=_prepare, initargs=(press, threads, free)) as pool:
        futures = [pool.submit(_press, share) for share in shares]
        try:
            for future in tqdm(as_completed(futures), f"quantizing, {count} at a time", len(futures), unit=unit):
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


def _prepare(press: Press, threads: int, free: Any) -> None:
    """Initialize a worker. free: a queue of devices, of which it takes one."""
    global _press_share
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # end with a killed stage
    import torch

    torch.set_num_threads(threads)
    device = free.get()
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # what `cuda` means from now on
    _press_share = press


def _press(share: Any) -> tuple[int, int]:
    """Quantize a share; return the worker's process id and its peak memory in bytes."""
    _press_share(share)
    return os.getpid(), peak_memory()
