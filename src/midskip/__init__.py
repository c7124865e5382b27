"""midskip: Transformers whose tokens skip layers, with what is skipped really absent."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from midskip.budget.monitor import DriftMonitor
from midskip.cost import Meter, meter
from midskip.model.cache import SkipCache
from midskip.model.config import MidskipConfig
from midskip.model.modeling import MidskipForCausalLM, MidskipModel
from midskip.regularizers import build_regularizer

AutoConfig.register("midskip", MidskipConfig)
AutoModel.register(MidskipConfig, MidskipModel)
AutoModelForCausalLM.register(MidskipConfig, MidskipForCausalLM)

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
