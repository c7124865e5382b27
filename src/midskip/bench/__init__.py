"""`midskip bench`: prefill, decode and training of skipping models, timed against transformers' Llama in one run."""

from midskip.bench.agree import DisagreementError
from midskip.bench.run import BENCH_FILE, BENCH_PICTURE_FILE, bench, bench_run
from midskip.bench.settings import BenchSettings, run_settings

__all__ = [
    "BENCH_FILE",
    "BENCH_PICTURE_FILE",
    "BenchSettings",
    "DisagreementError",
    "bench",
    "bench_run",
    "run_settings",
]
