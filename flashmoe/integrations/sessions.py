"""Which requests belong to one conversation, so that each reaches the process that has its KV prefix.

Knows what an OpenAI request looks like, neither Ray nor models.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SESSION_HEADER = "x-session-id"
# What a client may name its conversation by, the most exact first; `user` keeps a person's chats together.
SESSION_FIELDS = ("session_id", "prompt_cache_key", "user")
PROMPT_CHARACTERS = 512  # of a plain prompt; it may be longer the next time, its beginning stays


def conversation_key(headers: Mapping[str, str], body: bytes) -> str:
    """A name for the conversation that an HTTP request goes on with; "" if it is none.

    `headers` by lower-case names. The client's own name for it, or else its first messages up to the first of
    the user's: they come again with every turn.
    """
    try:
        return _conversation_key(headers, body)
    except (ValueError, RecursionError):
        return ""  # not JSON, or nested without end: the replica says so


def _conversation_key(headers: Mapping[str, str], body: bytes) -> str:
    named = headers.get(SESSION_HEADER, "")
    if named:
        return _digest(["named", named])
    request = json.loads(body) if body else None
    if not isinstance(request, dict):
        return ""
    for field in SESSION_FIELDS:
        value = request.get(field)
        if isinstance(value, str) and value:
            return _digest(["named", value])
    messages, prompt = request.get("messages"), request.get("prompt")
    if isinstance(messages, list) and messages:
        return _digest(["messages", _first_messages(messages)])
    if isinstance(prompt, list) and prompt:
        prompt = prompt[0] if isinstance(prompt[0], str) else prompt[:PROMPT_CHARACTERS]
    return _digest(["prompt", prompt[:PROMPT_CHARACTERS]]) if isinstance(prompt, str | list) else ""


def _first_messages(messages: list[Any]) -> list[Any]:
    first = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        first.append([role, message.get("content") if isinstance(message, dict) else None])
        if role == "user":
            break
    return first


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
