"""Chats, in the forms in which people store them, as the text that a tokenizer's chat template makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from eckart.errors import DataError

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "observation": "tool"}
"""Roles of ShareGPT -> those that chat templates know."""

Chat = list[dict[str, Any]]


def read_chat(value: Any) -> Chat | None:
    """Return the messages of a cell, or None if it holds no chat.

    Known are lists of `{role, content}`, with tool calls in place of the content too, those of ShareGPT
    (`{from, value}`), and either as a string of JSON.
    """
    if isinstance(value, str):
        return read_chat(_read_json(value)) if value.lstrip()[:1] == "[" else None
    if not isinstance(value, list | tuple) or not value or not all(isinstance(message, Mapping) for message in value):
        return None
    messages = [_message(message) for message in value]
    return None if None in messages else [message for message in messages if message is not None]


def write_chat(chat: Chat, tools: Any, tokenizer: Any, where: str) -> str:
    """Turn messages into text by the tokenizer's chat template.

    Args:
        chat: as :func:`read_chat` returned it.
        tools: descriptions of functions, or JSON of them; None for none.
        tokenizer: its chat template is used.
        where: file, line and column, for messages.

    Raises:
        DataError: if there is no chat template, or it cannot write these messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where} holds chat messages, but the tokenizer has no chat template: "
            "set tokenizer.chat_template, or name a column of plain text"
        )
    tools = _tools(tools, where)
    first: Exception | None = None
    for form in FORMS:
        try:
            return str(tokenizer.apply_chat_template([form(message) for message in chat], tools=tools, tokenize=False))
        except Exception as error:  # templates raise whatever their author wrote
            first = first or error
    raise DataError(f"{where}: the chat template cannot write it ({first}): correct or remove the row") from first


def _message(message: Mapping[str, Any]) -> dict[str, Any] | None:
    """A message as templates take it; what a table has filled up with None is left out."""
    found = {str(key): value for key, value in message.items() if value is not None}
    if "role" not in found and isinstance(found.get("from"), str):
        role = found.pop("from")
        found = {"role": ROLES.get(role, role), "content": found.pop("value", None), **found}
    if not isinstance(found.get("role"), str) or not message.keys() & {"content", "value", "tool_calls"}:
        return None
    if isinstance(found.get("tool_calls"), list):
        found["tool_calls"] = [_without_none(call) for call in found["tool_calls"]]
    if not found.get("tool_calls"):
        found.pop("tool_calls", None)
    return found | {"content": found.get("content") or ""}


def _objects(message: dict[str, Any]) -> dict[str, Any]:
    """Arguments of tool calls as objects, which is how transformers documents them."""
    return _with_arguments(message, lambda value: _read_json(value) if isinstance(value, str) else value)


def _strings(message: dict[str, Any]) -> dict[str, Any]:
    """Arguments of tool calls as strings, which is how OpenAI's interface gives them."""
    return _with_arguments(message, lambda value: value if isinstance(value, str) else json.dumps(value))


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    """The parts of a content in parts as one string; parts that are no text are left to the template."""
    parts = message.get("content")
    if not isinstance(parts, list) or not all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in parts):
        return message
    return message | {"content": "".join(part["text"] for part in parts)}


FORMS: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = (
    lambda message: _objects(_joined(message)),
    _objects,
    lambda message: _strings(_joined(message)),
)
"""What messages may look like, tried in turn: templates differ in what they take."""


def _with_arguments(message: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    calls = []
    for call in message.get("tool_calls", ()):
        own = call.get("function", call)
        if "arguments" in own:
            arguments = change(own["arguments"])
            own = own | {"arguments": own["arguments"] if arguments is None else arguments}
        calls.append({**call, "function": own} if "function" in call else own)
    return message | {"tool_calls": calls} if calls else message


def _tools(tools: Any, where: str) -> Any:
    if isinstance(tools, str):
        found = _read_json(tools) if tools.strip() else []
        if not isinstance(found, list):
            raise DataError(f"{where}: the tools beside it are no list in JSON: correct or remove the row")
        tools = found
    return _without_none(list(tools)) if tools is not None and len(tools) else None


def _without_none(value: Any) -> Any:
    """A table fills every object up to the keys of all of them."""
    if isinstance(value, Mapping):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list | tuple) else value


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
