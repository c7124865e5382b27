"""transformers' serving, with a model of ours in it: how it is loaded, and how a request runs.

transformers generates for one request at a time, on one thread of its own for a model. Limits are set on that thread
right before, so that requests with other budgets cannot mix.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState, _GenerationCancelled

from midskip.model.modeling import MidskipForCausalLM
from midskip.serving.stream import Grouped, Joined
from midskip.serving.work import REQUEST, NobodyWaits, Work, counted


class OneModel(ModelManager):
    """The only model of a server, loaded before it; nothing else is ever loaded."""

    def __init__(self, name: str, model: Any, tokenizer: PreTrainedTokenizerBase):
        self._model, self._tokenizer = model, tokenizer
        super().__init__(force_model=name)

    def _load_processor(self, *others: Any, **named: Any) -> Any:
        return self._tokenizer

    def _load_model(self, *others: Any, **named: Any) -> Any:
        return self._model

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """As it is: transformers would have answers name a revision, which a folder does not have."""
        return model_id

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As `/v1/models` tells; transformers' own looks through the cache of the hub."""
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "midskip"}]


class Limited:
    """Stands for the model where transformers calls `generate`: under the limits of one request."""

    def __init__(self, model: Any, work: Work):
        self.model, self.work = model, work

    def generate(self, **arguments: Any) -> Any:
        work = self.work
        if work.gone.is_set():
            raise _GenerationCancelled()
        if isinstance(self.model, MidskipForCausalLM):
            self.model.model.policy.set_limits(work.score_scale, work.max_layers)
        if work.seed is not None:
            torch.manual_seed(work.seed)
        if "streamer" in arguments:
            arguments["streamer"] = Grouped(arguments["streamer"])
        try:
            with counted(self.model, work):
                return self.model.generate(**arguments, stopping_criteria=[NobodyWaits(work)])
        except _GenerationCancelled:
            raise
        except Exception as error:
            work.failure = error
            raise


class LimitedManager(GenerateManager):
    """`GenerateManager`, each request under its own limits."""

    def generate_streaming(self, model: Any, *arguments: Any, **named: Any) -> Any:
        limited: Any = Limited(model, REQUEST.get())
        queue, streamer = super().generate_streaming(limited, *arguments, **named)
        return Joined(queue), streamer

    async def generate_non_streaming(self, model: Any, *arguments: Any, **named: Any) -> Any:
        return await super().generate_non_streaming(Limited(model, REQUEST.get()), *arguments, **named)  # pyright: ignore[reportArgumentType]


class OneAtATime(GenerationState):
    """The one manager of the one model."""

    def __init__(self) -> None:
        super().__init__()
        self._manager = LimitedManager()

    def get_manager(self, model_id: str, use_cb: bool = False) -> LimitedManager:
        return self._manager
