"""Who skips: one file a policy."""

from midskip.policies.base import Decision, Policy, build_policy

__all__ = ["Decision", "Policy", "build_policy"]
