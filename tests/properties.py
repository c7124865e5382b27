"""How often hypothesis tries: few cases, the same for everybody, by default; many, drawn anew each time, if asked."""

from typing import Any

from hypothesis import HealthCheck, settings


def few(num_cases: int, **more: Any) -> settings:
    """The same cases in every run."""
    return settings(_ANY, max_examples=num_cases, derandomize=True, **more)


def many(num_cases: int, **more: Any) -> settings:
    """Other cases in every run."""
    return settings(_ANY, max_examples=num_cases, derandomize=False, **more)


_ANY = settings(database=None, deadline=None, print_blob=False, suppress_health_check=list(HealthCheck))
