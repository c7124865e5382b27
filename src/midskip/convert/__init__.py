"""Checkpoints of other code as midskip models."""
