"""Sweeps: a grid of recipes, settings and seeds, each run once, in any number of processes, through any kill."""

from midskip.sweep.read import read_sweep
from midskip.sweep.run import FailedRunsError, listed, run_sweep

__all__ = ["FailedRunsError", "listed", "read_sweep", "run_sweep"]
