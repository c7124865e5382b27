"""`midskip bench`: prefill, decode and training of skipping models, timed against transformers' Llama in one run."""

from midskip.bench.agree import DisagreementError
from midskip.bench.presets import PRESETS, with_preset
from midskip.bench.run import BENCH_FILE, BENCH_PICTURE_FILE, bench, bench_run
from midskip.bench.settings import BenchSettings, run_settings
from midskip.bench.trainer import last_regularizer

__all__ = [
    "BENCH_FILE",
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
