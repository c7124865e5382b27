"""Gate regularizers: how much of its depth a model may spend.

A regularizer may add a term to the training loss that pushes the gates of each layer; after each optimizer step it may
change the weights of that term, or set what the policy leaves to it.
"""

from midskip.regularizers.base import Regularizer
from midskip.regularizers.build import build_regularizer
from midskip.regularizers.paper import DistanceRegularizer, FeedbackRegularizer, FixedRegularizer, gate_targets
from midskip.regularizers.target_share import TargetShare

__all__ = [
    "DistanceRegularizer",
    "FeedbackRegularizer",
    "FixedRegularizer",
    "Regularizer",
    "TargetShare",
    "build_regularizer",
    "gate_targets",
]
