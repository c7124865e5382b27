"""midskip: Transformers whose tokens skip layers, with what is skipped really absent."""

import sys
from typing import TYPE_CHECKING

from midskip.lazy import lazy_names

if TYPE_CHECKING:
    from midskip.budget.monitor import DriftMonitor
    from midskip.cost import Meter, meter
    from midskip.model.cache import SkipCache
    from midskip.model.config import MidskipConfig
    from midskip.model.modeling import MidskipForCausalLM, MidskipModel
    from midskip.regularizers import build_regularizer

__version__ = "0.1.0"
__all__ = [
    "DriftMonitor",
    "Meter",
    "MidskipConfig",
    "MidskipForCausalLM",
    "MidskipModel",
    "SkipCache",
    "build_regularizer",
    "meter",
]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "DriftMonitor": "midskip.budget.monitor",
        "Meter": "midskip.cost",
        "MidskipConfig": "midskip.model.config",
        "MidskipForCausalLM": "midskip.model.modeling",
        "MidskipModel": "midskip.model.modeling",
        "SkipCache": "midskip.model.cache",
        "build_regularizer": "midskip.regularizers",
        "meter": "midskip.cost",
    },
)

# `import midskip` is enough for transformers' Auto classes to know its models, which they are told in that module. The
# program `midskip` alone imports it when it needs it.
if "midskip_command" not in sys.modules:
    from midskip.model import modeling as _modeling  # noqa: F401
