"""The messages between a runtime and the process of its engine: a line of JSON each, and after it the bytes of an array
if there is one. No pickle: whatever comes is data."""

from __future__ import annotations

import json
from typing import IO, Any

import numpy

Array = numpy.ndarray[Any, Any]
DTYPES = ("float32", "int64")


class WireError(Exception):
    """The other side has ended, or sends what is no message."""


class RefusalError(Exception):
    """The engine cannot do what is asked for. The message says why, in the engine's own words."""


def send(stream: IO[bytes], values: dict[str, Any], array: Array | None = None) -> None:
    """Write a message. array: of a dtype in `DTYPES`."""
    if array is not None:
        values = {**values, "array": [str(array.dtype), *array.shape]}
    stream.write(json.dumps(values).encode() + b"\n")
    if array is not None and array.size:
        stream.write(numpy.ascontiguousarray(array).data.cast("B"))
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], Array | None]:
    """Read a message; WireError at the end of the stream and for anything else."""
    text = stream.readline()
    if not text.endswith(b"\n"):
        raise WireError("the stream ended")
    try:
        values: dict[str, Any] = json.loads(text)
        described = values.pop("array", None)
    except (ValueError, AttributeError, TypeError) as error:
        raise WireError(f"{text[:80]!r} is no message") from error
    if described is None:
        return values, None
    dtype, *shape = described
    if dtype not in DTYPES:
        raise WireError(f"an array of {dtype}; expected {' or '.join(DTYPES)}")
    array = numpy.empty(shape, dtype)
    left = array.data.cast("B") if array.size else memoryview(b"")
    while left:
        count = stream.readinto(left)  # type: ignore[attr-defined]  # typeshed's IO lacks it
        if not count:
            raise WireError("the stream ended within an array")
        left = left[count:]
    return values, array
