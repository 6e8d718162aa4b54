"""Answers over HTTP, with an end: so many bytes and so many seconds, whatever the other side sends.

with session.get(url, stream=True, timeout=30) as answer:
    content = content_of(answer, most=10**8, seconds=60)
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import requests
from urllib3.exceptions import HTTPError, ProtocolError, ReadTimeoutError

#: Bytes that are read at a time, after unpacking.
_PART = 1 << 16


class NoEnd(requests.RequestException):
    """An answer that is longer, or takes longer, than it may."""


def content_of(answer: requests.Response, most: int, seconds: float) -> bytes:
    """The content of an answer asked for with `stream=True`, unpacked.

    Raises `requests.RequestException` where it breaks off, or has more than `most` bytes or lasts for more than `seconds`
    (and one wait for the next byte, which the request's timeout ends).
    """
    end, found = time.monotonic() + seconds, bytearray()
    for part in _parts(answer):
        found += part
        if len(found) > most:
            raise NoEnd(f"its answer is larger than {most / 1e6:,.0f} MB")
        if time.monotonic() > end:
            raise NoEnd(f"its answer has not ended after {seconds:.0f} s")
    return bytes(found)


def _parts(answer: requests.Response) -> Iterator[bytes]:
    """What has come so far, again and again: an answer that drips would fill a part of some size in days."""
    if not hasattr(answer.raw, "read1"):  # before urllib3 2.2
        yield from answer.iter_content(_PART)
        return
    try:
        while part := answer.raw.read1(_PART, decode_content=True):
            yield part
    except ReadTimeoutError as error:
        raise requests.ConnectionError(error) from error
    except ProtocolError as error:
        raise requests.exceptions.ChunkedEncodingError(error) from error
    except HTTPError as error:
        raise requests.exceptions.ContentDecodingError(error) from error
