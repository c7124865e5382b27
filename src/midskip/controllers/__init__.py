"""Gate regularisers: how much of its depth a model may spend.

A controller may add a term to the training loss that pushes the gates of each layer; after each optimizer step it may
change the weights of that term, or set what the policy leaves to it.
"""

from midskip.controllers.base import Controller
from midskip.controllers.budget import BudgetController
from midskip.controllers.build import build_controller
from midskip.controllers.released import DistanceController, FeedbackController, FixedController, gate_targets

__all__ = [
    "BudgetController",
    "Controller",
    "DistanceController",
    "FeedbackController",
    "FixedController",
    "build_controller",
    "gate_targets",
]
