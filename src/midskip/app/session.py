"""What the page asks of the models: one thing at a time, since limits are set on a model itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

from transformers import PreTrainedTokenizerBase

from midskip.budget.calibration import Calibration
from midskip.budget.measured_on import calibration_of
from midskip.budget.monitor import temporary_limits
from midskip.look import Look, Outcome, look, stream, what_if
from midskip.model.modeling import MidskipForCausalLM

MOST_TOKENS = 20_000  # of a text that is shown


@dataclass(frozen=True)
class Limits:
    """What a run may do, as the page has it: `budget` None is as trained, `max_layers` None is all of them."""

    run: str
    budget: float | None = None
    max_layers: int | None = None


@dataclass(frozen=True)
class Seen:
    """A text as a run saw it. `left_out`: tokens at its end that are too many."""

    limits: Limits
    look: Look
    vocab_size: int
    left_out: int = 0


@dataclass(frozen=True)
class Choices:
    """What can be set of a run.

    Attributes:
        num_layers: L.
        adjustable: whether `max_layers` can be set.
        lowest: the smallest budget that was calibrated, or None where there is none.
        why: if not all can be set, why, and what to do.
    """

    num_layers: int
    adjustable: bool
    lowest: float | None
    why: str = ""


class Session:
    """Runs that are shown.

    Args:
        runs: model and tokenizer by the name that the page shows, which is the run's folder.
    """

    def __init__(self, runs: Mapping[str, tuple[MidskipForCausalLM, PreTrainedTokenizerBase]]):
        self.runs, self._lock = dict(runs), Lock()
        self.choices: dict[str, Choices] = {}
        self._calibrations: dict[str, Calibration] = {}
        for name, (model, _) in self.runs.items():
            why = ""
            try:
                self._calibrations[name] = calibration_of(model)
            except ValueError as error:
                why = f"No budget for this run: {error}"
            lowest = self._calibrations[name].share[-1] if name in self._calibrations else None
            self.choices[name] = Choices(model.config.num_skip_units, model.model.policy.adjustable, lowest, why)

    def see(self, text: str, limits: Limits) -> Seen | None:
        """Run a model over the text; None for an empty one."""
        model, tokenizer = self.runs[limits.run]
        ids = ids_of(tokenizer, text)
        if not ids:
            return None
        with self._limited(limits):
            seen = look(model, tokenizer, ids[:MOST_TOKENS])
        return Seen(limits, seen, model.config.vocab_size, max(0, len(ids) - MOST_TOKENS))

    def is_seen(self, seen: Seen | None, text: str, limits: Limits) -> bool:
        """Whether `see` would give the same again."""
        ids = ids_of(self.runs[limits.run][1], text)
        return seen is not None and seen.limits == limits and list(seen.look.ids) == list(ids[:MOST_TOKENS])

    def what_if(self, seen: Seen, token: int) -> dict[str, Outcome]:
        """`look.what_if` of one of the tokens seen, in its window."""
        ids, window = seen.look.ids, seen.look.window
        if not 0 <= token < len(ids):
            raise ValueError(f"the token is {token} of {len(ids)}; expected one of them, counted from 0")
        start = token // window * window
        end = min(start + window, len(ids))
        with self._limited(seen.limits):
            model = self.runs[seen.limits.run][0]
            return what_if(model, ids[start:end], token - start, ids[end] if end < len(ids) else None)

    def prompt(self, text: str, run: str, max_new_tokens: int) -> tuple[list[int], int]:
        """The end of the text that there is room for, half of the context at least, and how many tokens stand before
        it."""
        model, tokenizer = self.runs[run]
        ids, most = ids_of(tokenizer, text), model.config.max_position_embeddings
        room = max(1, most - max_new_tokens, most // 2)
        return ids[-room:], max(0, len(ids) - room)

    def go_on(
        self, ids: list[int], limits: Limits, max_new_tokens: int, temperature: float, seed: int
    ) -> Iterator[tuple[list[int], list[int]]]:
        """`look.stream` of the prompt."""
        model = self.runs[limits.run][0]
        return stream(model, ids, max_new_tokens, temperature, seed=seed, step=lambda: self._limited(limits))

    @contextmanager
    def _limited(self, limits: Limits) -> Iterator[None]:
        model = self.runs[limits.run][0]
        with self._lock:
            scale = 1.0 if limits.budget is None else self._calibrations[limits.run].scale_for(limits.budget)
            with temporary_limits(model, scale, limits.max_layers):
                yield


def clean(text: str) -> str:
    """What is no Unicode in a text becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(clean(text), verbose=False)["input_ids"] if text else []
