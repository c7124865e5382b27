"""One invocation of a sweep: what is left of it, where it is to run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from rich.console import Console

from midskip.runs import RECIPE_FILE
from midskip.sweep.executors import in_processes, on_ray
from midskip.sweep.plan import Sweep
from midskip.sweep.store import Store
from midskip.sweep.watch import watched
from midskip.sweep.work import left, work


class FailedRunsError(RuntimeError):
    """Some runs of a sweep failed, or were not begun; all others have ended."""


def run_sweep(
    sweep: Sweep, jobs: int | None = None, ray: bool = False, address: str | None = None, console: Console | None = None
) -> None:
    """Do all runs of the sweep that have no result yet.

    Args:
        jobs: how many at once; None for one, or under Ray for as many as it has GPUs, or else CPUs.
        ray: on Ray: on this machine, or on the cluster at `address`.

    Raises:
        ValueError: the folder holds something else, or Ray cannot be used.
        FailedRunsError: a run failed; all others were done.
    """
    if sweep.output.exists() and not sweep.output.is_dir():
        raise ValueError(f"output is {str(sweep.output)!r}, which is a file; expected a folder")
    if (sweep.output / RECIPE_FILE).is_file():
        raise ValueError(f"output is {str(sweep.output)!r}, which holds a run of `midskip train`; give another folder")
    store, died = Store(sweep.output), []
    store.make()
    store.tidy(sweep.keep_runs)
    store.forget_failures(sweep)
    store.write_index(sweep)
    if changed := [run for run in sweep.runs(store.losses(sweep)) if store.user_code_changed(run)]:
        warnings.warn(
            f"the code of your own classes has changed since {len(changed)} runs ended, which count as done. To train "
            f"them again, remove these files from {str(store.output / 'results')!r}: "
            f"{', '.join(f'{run.key}.json' for run in changed)}",
            stacklevel=2,
        )
    with watched(sweep, console or Console(stderr=True)):
        if ray:
            died = on_ray(sweep, address, jobs)
        elif (jobs or 1) > 1:
            died = in_processes(sweep, jobs or 1)
        else:
            work(sweep)
    store.write_index(sweep)
    if rest := left(sweep, store):
        raise FailedRunsError(f"{len(rest)} runs are left, since {'; '.join(died) or 'workers ended early'}")
    runs = sweep.runs(store.losses(sweep))
    failed = {run.label: why for run in runs if (why := store.failure(run.key)) is not None}
    if failed:
        raise FailedRunsError(
            f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}. The first said: "
            f"{next(iter(failed.values()))} (all are in {str(store.output / 'failed')!r}, and "
            "are tried again at the next call, but for trials of learning rates that diverged)"
        )


def listed(sweep: Sweep) -> Iterator[str]:
    """A line for each run, with its key and what is known of it, and one for those that wait for a learning rate."""
    store = Store(sweep.output)
    losses = store.losses(sweep)
    waiting = 0
    for point in sweep.points:
        tried = 0 if point.tuned_at is not None else len(point.learning_rates)
        waiting += 0 if point.of_seeds(losses) else point.num_runs() - tried
    for run in sweep.runs(losses):
        if (loss := store.loss(run.key)) is not None:
            changed = ", and your own code has changed since" if store.user_code_changed(run) else ""
            state = f"done, loss {loss:.4f}{changed}"
        else:
            state = "to do" if store.failure(run.key) is None else f"failed: {store.failure(run.key)}"
        yield f"{run.key}  {run.label}: {state}"
    if waiting:
        yield f"and {waiting} runs more, once the learning rates of their points are chosen"
