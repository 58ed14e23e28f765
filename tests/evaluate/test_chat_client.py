from __future__ import annotations

from typing import Any

import pytest

from megatron_scalebio.errors import UserError
from megatron_scalebio.evaluate.chat_client import ChatClient, Reply

MESSAGES = [{"role": "user", "content": "Grade this."}]


def client(judge: Any, waits: list[float] | None = None, **options: Any) -> ChatClient:
    sleep = (waits if waits is not None else []).append
    return ChatClient(judge.url, "grader", sleep=sleep, timeout_s=5, **options)


def test_a_completion(judge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret-key")
    reply = client(judge, key_variable="JUDGE_KEY").complete(MESSAGES)
    assert reply == Reply("Good. Rating: [[7]]", 100, 10)
    assert judge.paths == ["/v1/chat/completions"]
    assert judge.requests == [
        {"model": "grader", "messages": MESSAGES, "temperature": 0, "max_tokens": 1024}
    ]
    assert judge.headers[0]["Authorization"] == "Bearer secret-key"
    whole = ChatClient(judge.url + "/chat/completions", "grader")
    assert whole.complete(MESSAGES) == reply
    assert "Authorization" not in judge.headers[1]


def test_retries_wait_longer_and_longer(judge: Any) -> None:
    waits: list[float] = []
    told: list[str] = []
    judge.script = [(500, {}, "oops"), "drop", (429, {"Retry-After": "0.5"}, "slow"), (503, {}, "")]
    assert client(judge, waits, tell=told.append).complete(MESSAGES).text.endswith("[[7]]")
    assert waits == [1, 2, 0.5, 8] and len(judge.paths) == 5
    assert told[0] == "the judge did not answer (HTTP 500: oops); try 2 of 7 in 1 s"
    assert len(told) == 4 and "try 5 of 7 in 8 s" in told[-1]
    judge.script = [(500, {}, "broken inside")] * 3
    with pytest.raises(UserError, match=r"did not answer in 3 tries \(HTTP 500: broken inside\)"):
        client(judge, retries=2).complete(MESSAGES)


def test_a_refusal_is_final_and_does_not_show_the_key(
    judge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret-key")
    judge.script = [(401, {}, '{"error": "no such key: secret-key"}')]
    asking = client(judge, key_variable="JUDGE_KEY")
    with pytest.raises(UserError, match=r"refuses \(HTTP 401: .*no such key: \*\*\*") as caught:
        asking.complete(MESSAGES)
    assert "secret-key" not in str(caught.value) and "secret-key" not in repr(asking)
    assert len(judge.paths) == 1
    judge.script = [(302, {"Location": f"{judge.url}/elsewhere"}, "")]
    asking.complete(MESSAGES)
    assert "Authorization" not in judge.headers[-1]


def test_other_protocols_and_bad_settings(judge: Any) -> None:
    for body in ("<html>", "[]", '{"choices": []}', '{"choices": [{"message": null}]}'):
        judge.script = [(201, {}, body)]
        with pytest.raises(UserError, match="not that of chat completions"):
            client(judge).complete(MESSAGES)
    with pytest.raises(UserError, match=r"--judge-url: 'localhost:1' is not an http"):
        ChatClient("localhost:1", "grader")
    with pytest.raises(UserError, match=r"--judge-key-env: .*NOT_SET_KEY is not set"):
        client(judge, key_variable="NOT_SET_KEY")
    judge.server.shutdown()
    judge.server.server_close()
    with pytest.raises(UserError, match=r"did not answer in 2 tries"):
        client(judge, retries=1).complete(MESSAGES)
