"""Gate regularisers: how much of its depth a model may spend.

A controller may add a term to the training loss that pushes the gates of each layer; after each optimizer step it may
change the weights of that term, or set what the policy leaves to it.
"""

from midskip.regularizers.base import Controller
from midskip.regularizers.build import build_controller
from midskip.regularizers.paper import DistanceController, FeedbackController, FixedController, gate_targets
from midskip.regularizers.target_share import BudgetController

__all__ = [
    "BudgetController",
    "Controller",
    "DistanceController",
    "FeedbackController",
    "FixedController",
    "build_controller",
    "gate_targets",
]
