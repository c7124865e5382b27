"""What a pass costs, and a meter of what really ran."""

from midskip.cost.counting import Meter, is_backward, meter
from midskip.cost.flops import CONVENTIONS, Bytes, Flops, LayerWork, block_flops, dense_flops, head_flops

__all__ = [
    "CONVENTIONS",
    "Bytes",
    "Flops",
    "LayerWork",
    "Meter",
    "block_flops",
    "dense_flops",
    "head_flops",
    "is_backward",
    "meter",
]
