"""A regularizer by its name, or your own by import path."""

import inspect
from typing import Any

from midskip.names import near
from midskip.plugins import load_class
from midskip.regularizers.base import Regularizer
from midskip.regularizers.paper import DistanceRegularizer, FeedbackRegularizer, FixedRegularizer
from midskip.regularizers.target_share import TargetShare

# Name: the family, the settings that make it this one, defaults of settings left to the user.
_REGULARIZERS: dict[str, tuple[type[Regularizer], dict[str, Any], dict[str, Any]]] = {
    "none": (FixedRegularizer, {"mean_coefficient": None, "variance_coefficient": None}, {}),
    "sparsity": (FixedRegularizer, {"variance_coefficient": None}, {"mean_coefficient": 0.01}),
    "sparsity_variance": (FixedRegularizer, {}, {"mean_coefficient": 0.01, "variance_coefficient": -0.01}),
    "sparsity_variance_l2": (DistanceRegularizer, {}, {"mean_coefficient": 0.1, "variance_coefficient": 0.1}),
    "adaptive": (FeedbackRegularizer, {"rule": "sign"}, {"coef_update_multiplier": 1e-3}),
    "proportional": (FeedbackRegularizer, {"rule": "error"}, {"coef_update_multiplier": 1e-3}),
    "proportional_derivative": (FeedbackRegularizer, {"rule": "growing"}, {"coef_update_multiplier": 1e-2}),
    "target_share": (TargetShare, {}, {}),
}


def build_regularizer(name: str, num_layers: int, /, **settings: Any) -> Regularizer:
    """A gate regularizer for a model of `num_layers` layers, odd or even.

    `name` is a released one or `"package.module:Class"` for a subclass of `Regularizer` elsewhere. The
    released names, their settings and the released code's defaults:

    - `none` (there: `dummy`, accepted too): no term and no setting.
    - `sparsity`: mean_coefficient 0.01, on every layer.
    - `sparsity_variance`: mean_coefficient 0.01, variance_coefficient -0.01.
    - `sparsity_variance_l2`: mean_coefficient 0.1 and variance_coefficient 0.1, times the distances from
      targets. Targets are set by mean_target_start and mean_target_end, or mean_targets; and
      var_target_delta, 0.
    - `adaptive`, `proportional`, `proportional_derivative`: targets as above; coef_update_multiplier 1e-3,
      1e-3 and 1e-2; delta_min 0.01; coef_min and coef_max, unbounded. The first goes by the sign of the
      error, the second by the error (an integral regularizer, for the coefficients add it up), the third only
      while the error grows.

    And one of our own:

    - `target_share`: target_share, the share of block-tokens that run; lowest_share, to train for all shares from
      there to 1; outer 0, spread 0.8, gain 0.5, ramp_steps 50.

    Raises:
        ValueError: a name that is not known; a setting the regularizer does not have, lacks or cannot take.
    """
    family, fixed, defaults = _REGULARIZERS.get("none" if name == "dummy" else name, (None, {}, {}))
    if family is None:
        family = load_class(name, Regularizer, "regularizer", tuple(_REGULARIZERS))
    signature = inspect.signature(family)
    arguments = {**defaults, **settings, **fixed}
    try:
        if taken := sorted(set(settings) & set(fixed)):
            raise TypeError(f"{', '.join(taken)} cannot be set")
        signature.bind(num_layers, **arguments)
    except TypeError as error:
        known = [parameter for parameter in signature.parameters if parameter not in fixed][1:]
        unknown = next((setting for setting in settings if setting not in known), "")
        raise ValueError(
            f"regularizer {name!r} got {settings}: {error}; its settings are: {', '.join(known) or 'none'}"
            f"{near(unknown, known)}"
        ) from error
    return family(num_layers, **arguments)
