"""Replies of an OpenAI-compatible chat endpoint. Failures that may pass are waited out."""

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hyperlora.errors import InputError

KEY_VARIABLES = ("HYPERLORA_JUDGE_KEY", "OPENAI_API_KEY")
_LONGEST_WAIT = 60.0  # seconds
_JITTER = random.Random()  # waiting must not disturb the caller's random numbers


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """urllib would send the key to wherever the redirect points."""


_OPENER = urllib.request.build_opener(_NoRedirects)


@dataclass
class Endpoint:
    """A model behind `<base_url>/chat/completions`; its key comes from the environment and goes nowhere else.

    Attributes:
        base_url: as in `http://localhost:8000/v1`.
        options: further fields of every request. Some models refuse these; give others, or none.
        timeout: seconds without a byte after which an attempt has failed.
        attempts: how often one request is sent before the endpoint counts as down.
        failed_attempts: how many have failed so far.
    """

    base_url: str
    model: str
    options: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0, "max_tokens": 512})
    timeout: float = 60.0
    attempts: int = 6
    failed_attempts: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        try:
            parts = urllib.parse.urlsplit(self.base_url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        if not usable:  # not quoted: what was given may hold a password
            raise InputError("the endpoint's address cannot be used; give one like http://localhost:8000/v1")
        if "@" in parts.netloc or parts.query:
            raise InputError(f"the endpoint's address must not carry a key or password; put it in {KEY_VARIABLES[0]}")

    def body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """The request that is sent: everything that determines the reply."""
        return {"model": self.model, "messages": messages, **self.options}

    def reply(self, body: dict[str, Any]) -> str:
        """The text of the model's reply; empty when it gave none.

        Raises:
            InputError: the endpoint refuses the request, or every attempt met a time-out, a lost connection, 408, 429,
                5xx or something that is no reply.
        """
        key = _key()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        address = self.base_url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        wait = 0.0
        for attempt in range(self.attempts):
            if attempt:  # exponential backoff with full jitter
                time.sleep(max(wait, _JITTER.uniform(0, min(_LONGEST_WAIT, 2**attempt))))
            try:
                with _OPENER.open(request, timeout=self.timeout) as response:
                    return _content(json.load(response))
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}"
                if error.code not in (408, 429) and error.code < 500:
                    advice = f"; check the key in {KEY_VARIABLES[0]}" if error.code in (401, 403) else _said(error, key)
                    raise InputError(f"{address} refuses the request: {reason}{advice}") from None
                asked = error.headers.get("Retry-After", "")
                wait = min(_LONGEST_WAIT, float(asked)) if asked.isdecimal() else 0.0
                error.close()
            except (OSError, http.client.HTTPException) as error:
                reason, wait = str(getattr(error, "reason", error)) or type(error).__name__, 0.0
            except (ValueError, LookupError, TypeError, RecursionError):  # a proxy's page, a part of a reply, babble
                reason, wait = "the reply is not that of a chat endpoint", 0.0
            self.failed_attempts += 1
        raise InputError(f"{address} failed {self.attempts} times, at last with: {reason}")


def _key() -> str | None:
    key = next((os.environ[name].strip() for name in KEY_VARIABLES if os.environ.get(name)), None)
    if key and not (key.isascii() and key.isprintable()):
        raise InputError(f"the key in {' or '.join(KEY_VARIABLES)} holds characters that no key has; set it again")
    return key


def _content(response: Any) -> str:
    content = response["choices"][0]["message"]["content"]
    if content is not None and not isinstance(content, str):
        raise TypeError
    return content or ""


def _said(error: urllib.error.HTTPError, key: str | None) -> str:
    """The endpoint's own words, in one line and without the key, which some endpoints quote."""
    try:
        text = " ".join(error.read(2000).decode(errors="replace").split())
    except (OSError, http.client.HTTPException):
        return ""
    return f" ({(text.replace(key, '[key]') if key else text)[:200]})" if text else ""
