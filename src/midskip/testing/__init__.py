"""For tests of midskip and of policies written outside it."""

from midskip.testing.contract import check_policy
from midskip.testing.naive import NaiveOutput, naive_forward

__all__ = ["NaiveOutput", "check_policy", "naive_forward"]
