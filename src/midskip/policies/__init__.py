"""Who skips: one file a policy."""

from midskip.policies.base import PassState, Policy, build_policy
from midskip.policies.decision import Decision

__all__ = ["Decision", "PassState", "Policy", "build_policy"]
