"""JSON that carries a checksum of its own, and what may stand in it."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any


def sealed(body: Mapping[str, Any]) -> bytes:
    """JSON with a checksum of its own: a digit that changed would still be JSON."""
    return json.dumps({"seal": zlib.crc32(json.dumps(body).encode()), **body}).encode()


def unsealed(raw: bytes) -> dict[str, Any] | None:
    """What :func:`sealed` made, without its seal; None if it is damaged."""
    body = json_object(raw)
    if body is None:
        return None
    seal = body.pop("seal", None)
    return body if seal == zlib.crc32(json.dumps(body).encode()) else None


def json_object(raw: bytes) -> dict[str, Any] | None:
    """A JSON object; None if it is anything else."""
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def not_finite(value: Any, place: str) -> Iterator[str]:
    """Where in a JSON value numbers stand that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from not_finite(item, f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from not_finite(item, f"{place}.{index}")
