"""The model of a server, and what a request may ask of it."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedTokenizerBase

from midskip.budget.calibration import Calibration
from midskip.budget.measured_on import calibration_of
from midskip.model.modeling import MidskipForCausalLM
from midskip.runs import load_run
from midskip.serving.errors import ApiError
from midskip.serving.settings import ServeSettings
from midskip.serving.work import Work


class Served:
    """A model and its tokenizer, under the limits of the server.

    Args:
        model: of this package, or, to compare with, any causal language model of transformers.

    Raises:
        ValueError: a budget or max_layers of the settings that the model cannot run at.
    """

    def __init__(self, settings: ServeSettings, model: Any, tokenizer: PreTrainedTokenizerBase):
        self.settings, self.model, self.tokenizer = settings, model, tokenizer
        self.name = settings.model_name
        self.is_ours = isinstance(model, MidskipForCausalLM)
        self._calibration: Calibration | None = None
        self._no_budget = "this model has no run-time budget: leave budget and max_layers out"
        if not self.is_ours:
            if settings.budget is not None or settings.max_layers is not None:
                raise ValueError(self._no_budget)
            return
        try:
            self._calibration = calibration_of(model)  # here, once: it looks at all weights
        except ValueError as error:
            self._no_budget = str(error)
        model.set_budget(settings.budget, settings.max_layers)
        self._trial = copy.deepcopy(model.model.policy)  # the model's own may be generating

    @property
    def max_tokens(self) -> int:
        """Of a prompt and what comes after it; the last new token is not read."""
        return self.model.config.max_position_embeddings + 1

    def limit(self, work: Work, body: dict[str, Any]) -> None:
        """Takes `budget` and `max_layers` out of the body of a request; what it leaves out is the server's.

        Raises:
            ApiError: values that the model cannot run at.
        """
        budget = body.pop("budget", self.settings.budget)
        max_layers = body.pop("max_layers", self.settings.max_layers)
        if (budget, max_layers) == (None, None):
            return
        if not self.is_ours or (budget is not None and self._calibration is None):
            raise ApiError(400, self._no_budget, "budget" if budget is not None else "max_layers", "no_budget")
        try:
            if budget is not None and self._calibration is not None:
                work.score_scale = self._calibration.scale_for(budget)
        except ValueError as error:
            raise ApiError(400, str(error), "budget", "invalid_value") from error
        try:
            self._trial.set_limits(work.score_scale, max_layers)
        except ValueError as error:
            raise ApiError(400, str(error), "max_layers", "invalid_value") from error
        work.max_layers = max_layers


def load_served(settings: ServeSettings) -> Served:
    """As `midskip.runs.load_run` loads a folder, and with its errors."""
    return Served(settings, *load_run(settings.folder, settings.trust))
