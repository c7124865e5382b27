"""For tests of midskip and of policies written outside it."""

from midskip.reference import NaiveOutput, naive_forward
from midskip.testing.contract import check_policy

__all__ = ["NaiveOutput", "check_policy", "naive_forward"]
