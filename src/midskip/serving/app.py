"""The app of a server: that of transformers, with our handlers and what stands before it."""

from __future__ import annotations

from typing import Any

from midskip.serving.settings import ServeSettings

NEEDED = "serving needs packages that are not installed: pip install 'midskip[serving]'"


def check_installed() -> None:
    """Raises a ValueError that says what to install."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ValueError(NEEDED)


def build_app(served: Any) -> Any:
    """A FastAPI app that serves this model.

    Args:
        served: a `midskip.serving.served.Served`.
    """
    from fastapi.exceptions import RequestValidationError  # pyright: ignore[reportMissingImports]
    from starlette.exceptions import HTTPException  # pyright: ignore[reportMissingImports]
    from starlette.responses import Response  # pyright: ignore[reportMissingImports]
    from transformers.cli.serving.server import build_server

    from midskip.serving.admission import Admission
    from midskip.serving.engine import OneManager, OneModel
    from midskip.serving.errors import ApiError, as_api_error, error_body
    from midskip.serving.handlers import ChatCompletions, Completions

    manager, state = OneModel(served.name, served.model, served.tokenizer), OneManager(served.settings.max_batch)
    parts: dict[str, Any] = {
        "model_manager": manager,
        "chat_handler": ChatCompletions(served, manager, state),
        "completion_handler": Completions(served, manager, state),
        "generation_state": state,
        "response_handler": None,  # nothing reaches these
        "transcription_handler": None,
        "systemone_handler": None,
    }
    app: Any = build_server(**parts)

    async def tell(_: Any, error: Exception) -> Any:
        found = as_api_error(error)
        return Response(error_body(found), found.status, media_type="application/json")

    for kind in (ApiError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, tell)
    max_body = 2**20 + 64 * served.max_tokens  # enough for text of so many tokens, escaped as JSON may be
    app.add_middleware(Admission, max_requests=served.settings.max_requests, max_body=max_body)
    return app


def load_app(settings: ServeSettings) -> Any:
    """The app of a folder.

    Raises:
        ValueError: packages that are missing, a folder that cannot be loaded, or a budget that it cannot run at.
    """
    check_installed()
    from midskip.serving.served import load_served

    return build_app(load_served(settings))
