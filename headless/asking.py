"""What ComfyUI's HTTP API answers, or a sentence about it that does not.

server = Server("127.0.0.1:8188")
names = server.told(lambda answer: [str(name) for name in answer], "GET", "models/vae")
content = server.ask("GET", "view", params={"filename": "a.png"})
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import requests

from ..answers import content_of
from ..errors import UserError, WrongArguments

Told = TypeVar("Told")

#: Seconds without an answer after which there is none, and most that one may take in all.
TIMEOUT, PATIENCE = 30.0, 600.0
#: Most bytes of an answer, and of a file: those of a run are of tens of MB.
MOST_ANSWER, MOST_FILE = 256_000_000, 4_000_000_000
#: What comes of walking through JSON that is not as expected.
_ODD = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


class Unreachable(UserError):
    """No server answers."""

    status = 3


class Missing(UserError):
    """The server has no such file."""


class Refused(UserError):
    """The server does not take the graph; it took nothing of it."""


class Server:
    """A server at `address` ("host:port", or a URL); `url` is where it is asked."""

    def __init__(self, address: str):
        self.address = address
        scheme, _, place = address.rstrip("/").rpartition("://")
        self.url = f"{scheme or 'http'}://{place}"
        self._session = requests.Session()

    def close(self) -> None:
        self._session.close()

    def told(self, read: Callable[[Any], Told], method: str, path: str, **options: Any) -> Told:
        """What `read` makes of the JSON that the server answers; `UserError` where it cannot."""
        content = self.ask(method, path, **options)
        try:
            return read(json.loads(content))
        except _ODD as error:
            raise self._odd(path, error) from error

    def _odd(self, path: str, error: Exception) -> UserError:
        return UserError(f"{self.address} answered /{path} as no ComfyUI does ({error!r:.150}): is it one, of version 0.8 on?")

    def ask(
        self,
        method: str,
        path: str,
        refused: Callable[[Any], str] | None = None,
        most: int = MOST_ANSWER,
        **options: Any,
    ) -> bytes:
        """The server's answer; `Unreachable` where there is none, `UserError` where it is an error (`Refused`, with what
        `refused` makes of it, for status 400) or has no end."""
        try:
            answer = self._session.request(method, f"{self.url}/{path}", timeout=TIMEOUT, stream=True, **options)
            content = content_of(answer, most, PATIENCE)
            if answer.status_code == 400 and refused is not None:
                try:
                    said = refused(json.loads(content))
                except _ODD as error:
                    raise self._odd(path, error) from error
                raise Refused(said)
            if answer.status_code in (502, 503, 504):  # of a proxy, which has no server behind it
                raise Unreachable(f"No ComfyUI answers at {self.address} (status {answer.status_code}): start it again.")
            if answer.status_code == 404:
                raise Missing(f"ComfyUI at {self.address} has no {path} of this name ({dict(options.get('params', {}))}).")
            answer.raise_for_status()
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            raise Unreachable(f"No ComfyUI answers at {self.address} ({error}): start it, or give its host:port.") from error
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
            raise WrongArguments(f"{self.address} is not a server's address ({error}): expected host:port or a URL.") from error
        except requests.RequestException as error:
            raise UserError(f"ComfyUI at {self.address} did not do what was asked ({error}): look at its log.") from error
        return content
