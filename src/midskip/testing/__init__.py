"""For tests of midskip and of policies written outside it."""

from midskip.reference import ReferenceOutput, reference_forward
from midskip.testing.contract import check_policy

__all__ = ["ReferenceOutput", "check_policy", "reference_forward"]
