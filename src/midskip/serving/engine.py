"""transformers' serving, with a model of ours in it: how it is loaded, and how a request runs.

transformers generates on one thread of its own for a model. Limits are set on that thread right before, so that
requests with other budgets cannot mix.
"""

from __future__ import annotations

import asyncio
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState, _StreamError

from midskip.serving.batches import Request, Waiting
from midskip.serving.stream import Joined
from midskip.serving.work import REQUEST


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


class BatchManager(GenerateManager):
    """`GenerateManager`, in which requests run under their own limits, and together where they can.

    Args:
        max_batch: requests in a batch.
    """

    def __init__(self, max_batch: int):
        super().__init__()
        self.waiting = Waiting(max_batch)

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *others: Any, **named: Any
    ) -> Any:
        request: Any = Request(self.waiting, model, REQUEST.get(), inputs, gen_config)
        queue, streamer = super().generate_streaming(request, processor, inputs, gen_config, *others, **named)
        loop = asyncio.get_running_loop()

        def tell() -> None:  # now, and not when its turn comes
            if (failure := request.work.failure) is not None:
                loop.call_soon_threadsafe(queue.put_nowait, _StreamError(str(failure)))

        request.on_end = tell
        self.waiting.add(request, streamer)
        return Joined(queue), streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *others: Any, **named: Any
    ) -> Any:
        """As transformers' own, but it ends with the request, and not when its turn comes."""
        request = Request(self.waiting, model, REQUEST.get(), inputs, gen_config)
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        request.on_end = lambda: loop.call_soon_threadsafe(ended.set)
        self.waiting.add(request)
        self.submit(request.generate, tokenizer=processor)
        await ended.wait()
        if request.work.failure is not None:
            raise request.work.failure
        new = torch.tensor(request.new)
        return processor.decode(new, skip_special_tokens=True), request.num_columns, new


class OneManager(GenerationState):
    """The one manager of the one model."""

    def __init__(self, max_batch: int) -> None:
        super().__init__()
        self._manager = BatchManager(max_batch)

    def get_manager(self, model_id: str, use_cb: bool = False) -> BatchManager:
        return self._manager
