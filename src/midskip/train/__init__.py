"""Training on transformers.Trainer: a recipe, an objective with a gate regularizer, a run folder."""

from typing import TYPE_CHECKING

from midskip.lazy import lazy_names
from midskip.train.read import read_recipe
from midskip.train.recipe import Recipe

if TYPE_CHECKING:
    from midskip.train.run import train

__all__ = ["Recipe", "read_recipe", "train"]
__getattr__, __dir__ = lazy_names(__name__, {"train": "midskip.train.run"})
