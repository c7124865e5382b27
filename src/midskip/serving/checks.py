"""Whether the body of a request is one that can be answered, before transformers looks at it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from midskip.serving.errors import ApiError

Check = tuple[Callable[[Any], bool], str]
LONGEST_STOP = 128  # characters; transformers looks through the whole vocabulary for each


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    """Without lone surrogates, which JSON can hold and UTF-8 cannot."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _is_stop(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return 1 <= len(texts) <= 4 and all(_is_text(text) and 0 < len(text) <= LONGEST_STOP for text in texts)


def _is_dicts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, dict) for part in value)


def _is_messages(value: Any) -> bool:
    return _is_dicts(value) and bool(value) and all(map(_is_message, value))


def _is_message(message: dict[str, Any]) -> bool:
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    are_texts = all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    )
    return isinstance(message.get("role"), str) and are_texts and "tool_calls" not in message


COUNT: Check = lambda value: _is_whole(value) and value >= 1, "a whole number of at least 1"
ONE: Check = lambda value: _is_whole(value) and value == 1, "1: one answer is given to a request"
NOT_TAKEN: Check = lambda value: value in (False, 0) and not isinstance(value, str), "it to be left out"

# of fields that both take; None is as if a field were left out
FIELDS: dict[str, Check] = {
    "max_tokens": COUNT,
    "max_completion_tokens": COUNT,
    "temperature": (
        lambda value: _is_number(value) and (value == 0 or 0.001 <= value <= 2),
        "0 for the most likely token, or a number from 0.001 to 2",
    ),
    "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0 and up to 1"),
    "frequency_penalty": (lambda value: _is_number(value) and -1 < value <= 2, "a number above -1 and up to 2"),
    "seed": (lambda value: _is_whole(value) and 0 <= value < 2**63, "a whole number from 0 to below 2**63"),
    "stop": (_is_stop, f"a text of 1 to {LONGEST_STOP} characters, or a list of up to 4 of them"),
    "stream": (lambda value: isinstance(value, bool), "true or false"),
    "suffix": (_is_text, "a text"),
    "n": ONE,
    "best_of": ONE,
    "echo": NOT_TAKEN,
    "logprobs": NOT_TAKEN,
    "top_logprobs": NOT_TAKEN,
    "presence_penalty": NOT_TAKEN,
    "logit_bias": NOT_TAKEN,
    "generation_config": (lambda value: False, "it to be left out: give the fields of OpenAI's API"),
    "tools": (_is_dicts, "a list of objects"),
    "chat_template_kwargs": (lambda value: isinstance(value, dict), "an object"),
}
PROMPT: Check = lambda value: isinstance(value, str) and value != "", "one text, not empty"
MESSAGES: Check = (
    _is_messages,
    "a list, not empty, of objects with role and content, which is a text or a list of {'type': 'text', 'text': ...}",
)


def check_body(body: dict[str, Any], name: str, tokenizer: Any, is_chat: bool) -> None:
    """Refuses what cannot be answered, or not as it is asked for.

    Args:
        name: of the model that is served.
        is_chat: whether it has messages, and not a prompt.

    Raises:
        ApiError: the field, what it was, and what was expected.
    """
    if body.get("model") not in (None, name):
        shown = _shown(body["model"])
        raise ApiError(404, f"there is no model {shown}: this server has {name!r}", "model", "model_not_found")
    if is_chat and not tokenizer.chat_template:
        raise ApiError(
            400,
            f"the tokenizer of {name!r} has no chat template, which says how messages become a prompt: use "
            "/v1/completions, or put a chat_template.jinja into its folder",
            "messages",
            "no_chat_template",
        )
    needed, check = ("messages", MESSAGES) if is_chat else ("prompt", PROMPT)
    _check(body, needed, check)
    for field, check in FIELDS.items():
        if body.get(field) is None:
            body.pop(field, None)
        else:
            _check(body, field, check)
    own = inspect.signature(tokenizer.apply_chat_template).parameters
    if taken := sorted(set(body.get("chat_template_kwargs", ())) & set(own)):
        raise ApiError(
            400, f"chat_template_kwargs has {', '.join(taken)}, which the server gives", "chat_template_kwargs"
        )


def _check(body: dict[str, Any], field: str, check: Check) -> None:
    accepts, expected = check
    if not accepts(body.get(field)):
        shown = _shown(body.get(field))
        raise ApiError(400, f"{field} is {shown}; expected {expected}", field, "invalid_value")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
