"""How the tests are run: which go first, and which together. What they share is in `shared_fixtures.py`."""

from __future__ import annotations

import signal
from typing import Any

import pytest

# parts of the names of tests that take longest, or share what does; of tests that have one in common, all run together
TOGETHER = (
    "test_train_ranks.py", "test_ranks.py", "test_bench.py", "test_checkpoints.py", "test_cli.py", "test_compile.py",
    "test_kill", "test_disk_full.py", "page_runs[README.md]", "_pydocs", "test_demo.py",
)  # fmt: skip


def group_of(name: str) -> str:
    """The part of `TOGETHER` that a test's name has, or the name itself."""
    return next((part for part in TOGETHER if part in name), name)


def pytest_configure(config: pytest.Config) -> None:
    """A process that only hands tests out to others does without what takes seconds to import."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a script's shell has it for what runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)  # or what tests start and interrupt would ignore it
    if config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("shared_fixtures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, so that no process has it left at the end."""
    items.sort(key=lambda item: group_of(item.nodeid) == item.nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several processes, each group runs in one of them, and any other test where there is room."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)
