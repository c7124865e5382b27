"""Requests that wait at the same time run as one batch, if they ask for the same but for their prompts and lengths.

transformers takes requests in their order, and calls `generate` for each, on one thread. A `Request` stands for the
model there. When the turn of one comes, those like it that wait run with it, each to its own end and, if it streams, to
its own stream. Their turns come later, and find them done.

B requests, T columns, L layers.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from traceback import format_exc
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, StoppingCriteria, StopStringCriteria
from transformers.cli.serving.utils import _GenerationCancelled

from midskip.model.modeling import MidskipForCausalLM
from midskip.serving.stream import Grouped
from midskip.serving.work import Work

LOG = logging.getLogger(__name__)
BATCHED = {"input_ids", "attention_mask"}  # of a prompt; one with more runs alone


class Request:
    """One request, from when it waits to its end.

    Args:
        waiting: those that have not begun, itself not yet among them.
        work: its limits, and where it is told what ran.
        inputs: int64 `input_ids` [1, T], and perhaps `attention_mask`, without pads.
        config: what it asks of `generate`; `max_new_tokens` is set.
    """

    def __init__(self, waiting: Waiting, model: Any, work: Work, inputs: Any, config: GenerationConfig):
        self.waiting, self.model, self.work, self.config = waiting, model, work, config
        self.ids_1T, self.inputs = inputs["input_ids"], inputs
        self.streamer: Any = None
        self.new: list[int] = []
        self.has_begun = self.has_ended = False
        self.on_end: Callable[[], Any] = lambda: None  # called on the thread that generates
        is_drawn = config.do_sample and work.seed is not None
        is_alone = is_drawn or config.stop_strings or config.repetition_penalty not in (None, 1.0)
        alike = {name: value for name, value in config.to_dict().items() if name != "max_new_tokens"}
        self.kind = id(self) if is_alone or inputs.keys() - BATCHED else (work.score_scale, work.max_layers, alike)

    def generate(self, streamer: Any = None, tokenizer: Any = None, **_: Any) -> None:
        """Its turn has come. What it gave is in `new`."""
        if not self.has_begun:
            self.streamer = streamer
            if self.work.gone.is_set():
                self.waiting.take(self, 1)
                self.fail(_GenerationCancelled())
            else:
                run(self.waiting.take(self), tokenizer)
        if self.work.failure is not None:
            raise self.work.failure

    def take(self, token: int, ends: Sequence[int]) -> None:
        """A new token."""
        if self.work.gone.is_set():
            return self.end()
        self.new.append(token)
        if self.streamer is not None:
            try:
                self.streamer.put(token)
            except Exception as error:  # its client has gone, or its tokens are no text: the others of the batch go on
                return self.fail(error)
        if token in ends or len(self.new) >= self.config.max_new_tokens:
            self.end()

    def fail(self, error: Exception) -> None:
        """It ends with that."""
        self.work.failure = error.with_traceback(None)  # whose frames hold the cache
        self.end()

    def end(self) -> None:
        """No token comes any more."""
        if self.has_ended:
            return
        self.has_ended = True
        if self.streamer is not None and self.work.failure is None:
            try:
                self.streamer.end()
            except Exception as error:
                self.work.failure = error.with_traceback(None)
        self.on_end()

    @property
    def num_columns(self) -> int:
        """Of its prompt."""
        return self.ids_1T.shape[1]


class Waiting:
    """Requests that have not begun.

    Args:
        most: in a batch.
    """

    def __init__(self, most: int):
        self.most, self.requests, self.lock = most, [], threading.Lock()

    def add(self, request: Request, streamer: Any = None) -> None:
        """Unless its turn has come already."""
        with self.lock:
            if not request.has_begun:
                request.streamer = streamer
                self.requests.append(request)

    def take(self, first: Request, most: int | None = None) -> list[Request]:
        """That one, and those like it that have waited longest. All of them have begun."""
        with self.lock:
            batch, most = [first], self.most if most is None else most
            for other in self.requests:
                is_like = other is not first and other.kind == first.kind and not other.work.gone.is_set()
                if is_like and len(batch) < most and _have_room([*batch, other]):
                    batch.append(other)
            self.requests = [other for other in self.requests if other not in batch]
            for request in batch:
                request.has_begun = True
            return batch


def _have_room(batch: list[Request]) -> bool:
    """Whether the longest prompt and the longest answer fit into the model together: pads count too."""
    columns = max(request.num_columns for request in batch) + max(request.config.max_new_tokens for request in batch)
    return columns <= batch[0].model.config.max_position_embeddings


class _Rows(StoppingCriteria):
    """Hands the tokens of a batch to its requests, and says which rows have ended.

    Args:
        stop: says which rows end with a text to stop at, if there is one. It sees the answer alone, while `generate`
            would show it the prompt too, where such a text may begin.
    """

    def __init__(self, batch: list[Request], stop: StopStringCriteria | None = None):
        end = batch[0].config.eos_token_id
        self.stop, self.num_columns = stop, max(request.num_columns for request in batch)
        self.batch, self.ends = batch, [] if end is None else [end] if isinstance(end, int) else list(end)

    def __call__(self, input_ids: Tensor, scores: Any, **others: Any) -> Any:
        for request, token in zip(self.batch, input_ids[:, -1].tolist(), strict=True):
            if not request.has_ended:
                request.take(token, self.ends)
        if self.stop is not None:
            is_over_B = self.stop(input_ids[:, self.num_columns :], scores)  # pyright: ignore[reportArgumentType]
            for request, is_over in zip(self.batch, is_over_B.tolist(), strict=True):
                if is_over:
                    request.end()
        return torch.tensor([request.has_ended for request in self.batch], device=input_ids.device)


def run(batch: list[Request], tokenizer: Any) -> None:
    """Generate for all of them; what breaks one breaks all."""
    model, work, config = batch[0].model, batch[0].work, copy.copy(batch[0].config)
    config.max_new_tokens = max(request.config.max_new_tokens for request in batch)
    texts, config.stop_strings = config.stop_strings, None
    try:
        rows = _Rows(batch, StopStringCriteria(tokenizer, texts) if texts else None)
        if isinstance(model, MidskipForCausalLM):
            model.model.policy.set_limits(work.score_scale, work.max_layers)
        for request in batch:
            if request.streamer is not None:
                request.streamer.put(request.ids_1T)  # which it leaves out
                request.streamer = Grouped(request.streamer)
        with counted(model, batch), _drawn_by(work.seed, batch[0].ids_1T.device):
            model.generate(**_together(batch), generation_config=config, tokenizer=tokenizer, stopping_criteria=[rows])
    except Exception as error:
        LOG.error("a batch of %s could not go on:\n%s", len(batch), format_exc())
        for request in batch:
            if not request.has_ended:
                request.fail(error)
    for request in batch:
        request.end()


@contextmanager
def _drawn_by(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seeds the sampling of one request; afterwards the generator is as it was, so that later requests draw anew."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def _together(batch: list[Request]) -> Any:
    """Their prompts as one input, with pads on the left."""
    if len(batch) == 1:
        return batch[0].inputs
    rows = [request.ids_1T[0] for request in batch]
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_side="left"),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left"),
    }


@contextmanager
def counted(model: Any, batch: list[Request]) -> Iterator[None]:
    """Tells each request what ran of its tokens, after every pass; nothing for models that do not say."""

    def ask(_: Any, arguments: Any, named: dict[str, Any]) -> Any:
        return arguments, named | {"output_gates": len(batch) > 1}

    def add(_: Any, arguments: Any, named: dict[str, Any], output: Any) -> None:
        if len(batch) == 1:
            shares_B = [output.executed_share * named["input_ids"].numel()]
        else:
            shares_B = (output.executed.sum((0, 2)) / len(output.executed)).tolist()
        for request, share in zip(batch, shares_B, strict=True):
            if not request.has_ended:
                request.work.num_tokens = request.num_columns + len(request.new)
                before = 0.0 if model.model.policy.looks_back else request.work.share_of_tokens  # it reads all anew
                request.work.share_of_tokens = before + share

    if not isinstance(model, MidskipForCausalLM):
        yield
        return
    with (
        model.register_forward_pre_hook(ask, with_kwargs=True),
        model.register_forward_hook(add, with_kwargs=True),
    ):
        yield
