"""A client of the OpenAI chat-completions protocol, with retries and backoff."""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_scalebio.errors import UserError

_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0
_MAX_TOKENS = 1024  # of a verdict


class Reply(NamedTuple):
    """A completion. Tokens are 0 where the server does not tell them."""

    text: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class ChatClient:
    """Where the judge is, and how patiently it is asked.

    Attributes:
        url: base URL up to and with ``/v1``, or the whole URL of ``chat/completions``.
        key_variable: environment variable that holds the API key; empty for none. The key is read
            at each request, and never stored or shown.
        timeout_s: of one request.
        retries: after the first try. The first waits a second, each other twice as long as the one
            before, at most a minute. A server's ``Retry-After`` comes first.
        tell: takes a line about each try that failed.
    """

    url: str
    model: str
    key_variable: str = ""
    timeout_s: float = 120.0
    retries: int = 6
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)
    tell: Callable[[str], None] = field(default=lambda line: None, repr=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UserError(
                f"--judge-url: {self.url!r} is not an http(s) URL (as in https://host/v1)"
            )
        if self.key_variable and not os.environ.get(self.key_variable):
            raise UserError(
                f"--judge-key-env: the environment variable {self.key_variable} is not set (export "
                "it, or name another)"
            )

    def complete(self, messages: list[dict[str, str]]) -> Reply:
        """Asks for a completion at temperature 0.

        Raises:
            UserError: the server refuses, does not answer after all retries, or answers in
                another protocol.
        """
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": _MAX_TOKENS,
        }
        problem = ""
        for attempt in range(self.retries + 1):
            wait_s = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**attempt)
            try:
                with urllib.request.urlopen(self._request(body), timeout=self.timeout_s) as answer:
                    return _parse(answer.read(), self.url)
            except urllib.error.HTTPError as error:
                with error:
                    problem = f"HTTP {error.code}: {self._excerpt(error)}"
                    if error.code not in _RETRIED:
                        raise UserError(
                            f"{self.url}: the judge refuses ({problem}) (check --judge-url, "
                            "--judge-model and --judge-key-env)"
                        ) from None
                    wait_s = _retry_after_s(error, wait_s)
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                problem = self._hide_key(str(getattr(error, "reason", error)) or repr(error))
            if attempt < self.retries:
                self.tell(
                    f"the judge did not answer ({problem}); try {attempt + 2} of "
                    f"{self.retries + 1} in {wait_s:.0f} s"
                )
                self.sleep(wait_s)
        raise UserError(
            f"{self.url}: the judge did not answer in {self.retries + 1} tries ({problem}) (start "
            "again when it is back: what is judged stays judged)"
        )

    def _request(self, body: dict[str, Any]) -> urllib.request.Request:
        url = self.url.rstrip("/")
        url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
        if self.key_variable:  # the key does not follow a redirection to another server
            key = os.environ[self.key_variable]
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        return request

    def _excerpt(self, error: urllib.error.HTTPError) -> str:
        try:
            text = error.read(2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            text = ""
        return self._hide_key(" ".join(text.split())[:200] or error.reason)

    def _hide_key(self, text: str) -> str:
        key = os.environ.get(self.key_variable, "") if self.key_variable else ""
        return text.replace(key, "***") if key else text


def _retry_after_s(error: urllib.error.HTTPError, otherwise_s: float) -> float:
    try:
        told_s = float(error.headers.get("Retry-After", ""))
    except ValueError:
        return otherwise_s
    return min(_LONGEST_WAIT_S, max(0.0, told_s))


def _parse(content: bytes, url: str) -> Reply:
    try:
        reply = json.loads(content)
        text = reply["choices"][0]["message"]["content"]
        usage = reply.get("usage") or {}
        prompt, completion = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
        return Reply(str(text or ""), int(prompt), int(completion))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            f"{url}: the answer is not that of chat completions ({error!r}) (--judge-url needs an "
            "OpenAI-compatible server, as in https://host/v1)"
        ) from None
