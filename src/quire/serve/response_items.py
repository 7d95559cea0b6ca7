"""The output of /v1/responses as items, and the events that tell how they grow. Knows no engine and no HTTP."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from quire.serve.blocks import Block, Blocks, Growth

Event = tuple[str, dict[str, Any]]  # its type without "response.", and its content
Logprobs = list[dict[str, Any]]
_PREFIXES = {"text": "msg_", "thinking": "rs_", "call": "fc_"}


@dataclass(slots=True)
class Items:
    """One item for each block of the answer. `logprobs` are those of the last text."""

    blocks: Blocks = field(default_factory=Blocks)
    logprobs: Logprobs = field(default_factory=list)
    _ids: list[str] = field(default_factory=list)

    def output(self, status: str) -> list[dict[str, Any]]:
        """All items of the answer that has ended; one that was cut short is so in its last item."""
        return [
            self.item(index, "completed" if index + 1 < len(self.blocks.found) else status)
            for index in range(len(self.blocks.found))
        ]

    def item(self, index: int, status: str) -> dict[str, Any]:
        """One item as it is now."""
        block = self.blocks.found[index]
        return self._empty(index, status) | (
            {"arguments": block.text} if block.kind == "call" else {"content": [self._part(index, block.text)]}
        )

    def message(self) -> dict[str, Any]:
        """The answer as a chat message, for conversations that go on from it."""
        texts = [block.text for block in self.blocks.found if block.kind == "text"]
        message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
        calls = [block for block in self.blocks.found if block.kind == "call"]
        if calls:
            message["tool_calls"] = [chat_call(_call_id(call), call.name, call.text) for call in calls]
        return message

    def grown(self, growth: Growth, logprobs: Logprobs) -> list[Event]:
        """The events for a block's new text."""
        index, block = growth.index, growth.block
        events = self._opened(index) if growth.begins else []
        place = self._place(index)
        if block.kind == "call":
            events.append(("function_call_arguments.delta", self._bare(index) | {"delta": growth.text}))
        elif block.kind == "thinking":
            events.append(("reasoning_text.delta", place | {"delta": growth.text}))
        elif growth.text:
            events.append(("output_text.delta", place | {"delta": growth.text, "logprobs": logprobs}))
        return events

    def closed(self, index: int, status: str) -> list[Event]:
        """The events for the end of a block."""
        block = self.blocks.found[index]
        done: Event = ("output_item.done", {"output_index": index, "item": self.item(index, status)})
        if block.kind == "call":
            told = {"arguments": block.text, "name": block.name}
            return [("function_call_arguments.done", self._bare(index) | told), done]
        part = self._part(index, block.text)
        told = {"text": block.text} | ({"logprobs": part["logprobs"]} if block.kind == "text" else {})
        kind = "output_text.done" if block.kind == "text" else "reasoning_text.done"
        return [(kind, self._place(index) | told), ("content_part.done", self._place(index) | {"part": part}), done]

    def _opened(self, index: int) -> list[Event]:
        events = self.closed(index - 1, "completed") if index else []
        events.append(("output_item.added", {"output_index": index, "item": self._empty(index, "in_progress")}))
        if self.blocks.found[index].kind != "call":
            events.append(("content_part.added", self._place(index) | {"part": self._part(index, "")}))
        return events

    def _empty(self, index: int, status: str) -> dict[str, Any]:
        """An item without its text."""
        block = self.blocks.found[index]
        frame: dict[str, Any] = {"id": self._id(index), "status": status}
        if block.kind == "call":
            return frame | {"type": "function_call", "call_id": _call_id(block), "name": block.name, "arguments": ""}
        if block.kind == "thinking":
            return frame | {"type": "reasoning", "summary": [], "content": [], "encrypted_content": None}
        return frame | {"type": "message", "role": "assistant", "content": []}

    def _part(self, index: int, text: str) -> dict[str, Any]:
        if self.blocks.found[index].kind == "thinking":
            return {"type": "reasoning_text", "text": text}
        is_last = all(block.kind != "text" for block in self.blocks.found[index + 1 :])
        logprobs = self.logprobs if text and is_last else []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _place(self, index: int) -> dict[str, Any]:
        return self._bare(index) | {"content_index": 0}

    def _bare(self, index: int) -> dict[str, Any]:
        return {"item_id": self._id(index), "output_index": index}

    def _id(self, index: int) -> str:
        while len(self._ids) <= index:
            self._ids.append(_PREFIXES[self.blocks.found[len(self._ids)].kind] + uuid.uuid4().hex)
        return self._ids[index]


def _call_id(block: Block) -> str:
    return f"call_{block.id}"


def chat_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call as chat completions write it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
