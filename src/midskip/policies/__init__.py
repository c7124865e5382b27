"""Who skips: one file a policy."""

from midskip.policies.base import Decision, PassState, Policy, build_policy

__all__ = ["Decision", "PassState", "Policy", "build_policy"]
