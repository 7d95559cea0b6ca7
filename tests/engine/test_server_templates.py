"""Variables of the chat template that the operator sets, and requests override."""

from __future__ import annotations

from typing import Any

import pytest
from served import Setup, served

from quire.config import ServeOptions
from quire.errors import ConfigError
from quire.serve.listen import checked_keys

TALK: dict[str, Any] = {"messages": [{"role": "user", "content": "say:x;"}], "return_prompt_text": True}


def test_the_operator_sets_what_requests_leave_out() -> None:
    options = ServeOptions(default_chat_template_kwargs={"mood": "gay"})
    with served(Setup(options=options)) as server:
        told = []
        for path in ("/v1/chat/completions", "/tokenize"):
            for given in ({}, {"chat_template_kwargs": {"mood": "grave"}}):
                told.append(server.http.post(path, json=TALK | given).json())
        assert "[gay]" in told[0]["prompt_text"] and "[grave]" in told[1]["prompt_text"]
        assert told[2]["count"] + len("grave") - len("gay") == told[3]["count"], "a token for each byte"


@pytest.mark.parametrize("given", [{"messages": []}, {"a": "x" * 20_000}])
def test_what_no_template_may_get_is_said_at_the_start(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--default-chat-template-kwargs"):
        checked_keys(ServeOptions(default_chat_template_kwargs=given))
