"""`midskip bench`: prefill, decode and training of skipping models, timed against transformers' Llama in one run."""

from typing import TYPE_CHECKING

from midskip.bench.presets import PRESETS, with_preset
from midskip.lazy import lazy_names

if TYPE_CHECKING:
    from midskip.bench.agree import DisagreementError
    from midskip.bench.run import BENCH_PICTURE_FILE, bench, bench_run
    from midskip.bench.settings import BenchSettings, run_settings
    from midskip.bench.trainer import last_regularizer

__all__ = [
    "BENCH_PICTURE_FILE",
    "PRESETS",
    "BenchSettings",
    "DisagreementError",
    "bench",
    "bench_run",
    "last_regularizer",
    "run_settings",
    "with_preset",
]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "BENCH_PICTURE_FILE": "midskip.bench.run",
        "BenchSettings": "midskip.bench.settings",
        "DisagreementError": "midskip.bench.agree",
        "bench": "midskip.bench.run",
        "bench_run": "midskip.bench.run",
        "last_regularizer": "midskip.bench.trainer",
        "run_settings": "midskip.bench.settings",
    },
)
