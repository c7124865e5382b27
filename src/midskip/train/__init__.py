"""Training on transformers.Trainer: a recipe, an objective with a gate regularizer, a run folder."""

from midskip.train.recipe import Recipe, read_recipe
from midskip.train.run import train

__all__ = ["Recipe", "read_recipe", "train"]
