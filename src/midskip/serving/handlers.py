"""transformers' handlers of completions and chat, with budgets, checks and errors around them."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import BaseHandler, _GenerationCancelled

from midskip.serving.checks import check_body
from midskip.serving.engine import OneManager, OneModel
from midskip.serving.errors import ApiError, as_api_error, error_part
from midskip.serving.served import Served
from midskip.serving.work import REQUEST

MOST_NEW_TOKENS = 1024  # of a request that does not say, as transformers has it
ERROR_MARK = 'data: {"error": "'  # of transformers' streams; quotes within text are escaped there

_Base = BaseHandler if TYPE_CHECKING else object


class _Limited(_Base):
    """What both have in common; stands before one of transformers' handlers."""

    is_chat: bool

    def __init__(self, served: Served, manager: OneModel, state: OneManager):
        super().__init__(manager, state)
        self.served = served

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        work = REQUEST.get()
        check_body(body, self.served.name, self.served.tokenizer, self.is_chat)
        self.served.limit(work, body)
        work.seed = body.pop("seed", None)  # set where it generates; another request may be drawing now
        try:
            return await super().handle_request(body, request_id)  # pyright: ignore[reportAttributeAccessIssue]
        except _GenerationCancelled:
            raise ApiError(499, "the client has gone") from None
        except (ValueError, TypeError, KeyError, TemplateError) as error:
            if work.failure is not None:
                raise
            raise ApiError(400, f"the request cannot be turned into a prompt: {error}") from error

    def _build_generation_config(self, body: dict[str, Any], *others: Any, **named: Any) -> Any:
        config = super()._build_generation_config(body, *others, **named)
        if body.get("temperature", body.get("top_p")):
            config.do_sample = True  # transformers takes these for settings of a model that samples anyway
        if "max_tokens" not in body and "max_completion_tokens" not in body:
            config.max_new_tokens = None
        return config

    def _streaming(self, request_id: str, model: Any, processor: Any, model_id: str, inputs: Any, gen_config: Any,
                   *others: Any, **named: Any) -> Any:  # fmt: skip
        self._fit(inputs, gen_config)
        response = super()._streaming(request_id, model, processor, model_id, inputs, gen_config, *others, **named)  # pyright: ignore[reportAttributeAccessIssue]
        response.body_iterator = _shaped(response.body_iterator)
        return response

    async def _non_streaming(self, request_id: str, model: Any, processor: Any, model_id: str, inputs: Any,
                             gen_config: Any, *others: Any, **named: Any) -> Any:  # fmt: skip
        self._fit(inputs, gen_config)
        given = request_id, model, processor, model_id, inputs, gen_config
        response = await super()._non_streaming(*given, *others, **named)  # pyright: ignore[reportAttributeAccessIssue]
        answer = json.loads(response.body)
        if (share := REQUEST.get().executed_share) is not None:
            answer["usage"]["executed_share"] = share
        return type(response)(answer)

    def _build_chunk_sse(self, *arguments: Any, usage: Any = None, **named: Any) -> str:
        if usage is not None and (share := REQUEST.get().executed_share) is not None:
            usage = usage.model_copy(update={"executed_share": share})
        return super()._build_chunk_sse(*arguments, usage=usage, **named)  # pyright: ignore[reportAttributeAccessIssue]

    def _fit(self, inputs: Any, config: Any) -> None:
        """Refuse more tokens than the model takes; where none were asked for, as many as there is room for."""
        count, most = inputs["input_ids"].shape[-1], self.served.max_tokens
        param, code = "messages" if self.is_chat else "prompt", "context_length_exceeded"
        if count == 0:
            raise ApiError(400, "the prompt has no tokens: give at least one character", param, "invalid_value")
        if count >= most:
            told = f"the prompt has {count} tokens; this model takes at most {most - 1}: shorten it"
            raise ApiError(400, told, param, code)
        if config.max_new_tokens is None:
            config.max_new_tokens = min(MOST_NEW_TOKENS, most - count)
        elif count + config.max_new_tokens > most:
            asked = f"the prompt has {count} tokens and {config.max_new_tokens} more were asked for"
            told = f"{asked}, but this model takes at most {most} together: ask for at most {most - count}"
            raise ApiError(400, told, "max_tokens", code)


class Completions(_Limited, CompletionHandler):
    """`/v1/completions`."""

    is_chat = False


class ChatCompletions(_Limited, ChatCompletionHandler):
    """`/v1/chat/completions`."""

    is_chat = True


async def _shaped(parts: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    """A stream of transformers' with errors of OpenAI's shape and OpenAI's last line."""
    work = REQUEST.get()
    try:
        async for part in parts:
            before, mark, _ = part.rpartition(ERROR_MARK) if work.failure is not None else (part, "", "")
            if mark:
                yield before + error_part(as_api_error(work.failure or RuntimeError()))
                return
            yield part
        yield "data: [DONE]\n\n"
    finally:
        await parts.aclose()
