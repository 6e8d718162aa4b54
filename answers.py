"""Answers over HTTP, with an end: so many bytes and so many seconds, whatever the other side sends.

with session.get(url, stream=True, timeout=30) as answer:
    content = content_of(answer, most=10**8, seconds=60)
"""

from __future__ import annotations

import time

import requests

#: Bytes that are read at a time, after unpacking.
_PART = 1 << 16


class NoEnd(requests.RequestException):
    """An answer that is longer, or takes longer, than it may."""


def content_of(answer: requests.Response, most: int, seconds: float) -> bytes:
    """The content of an answer asked for with `stream=True`, unpacked.

    Raises `requests.RequestException` where it breaks off, or has more than `most` bytes or lasts for more than `seconds`.
    """
    end, found = time.monotonic() + seconds, bytearray()
    for part in answer.iter_content(_PART):
        found += part
        if len(found) > most:
            raise NoEnd(f"its answer is larger than {most / 1e6:,.0f} MB")
        if time.monotonic() > end:
            raise NoEnd(f"its answer has not ended after {seconds:.0f} s")
    return bytes(found)
