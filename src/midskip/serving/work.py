"""What is known of a request beside its body: what it may spend, what it spent, and whether anybody still waits.

The server sets `REQUEST` before transformers' handlers see a request; all tasks of one request see the same object.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Work:
    """Of one request.

    Attributes:
        score_scale, max_layers: the limits of its budget, as `Policy.set_limits` takes them.
        seed: of sampling; None: whatever comes.
        gone: set once nobody waits for the answer any more.
        failure: what broke generation off.
        num_tokens: that were run.
        share_of_tokens: the share of layers that ran, summed over them.
    """

    score_scale: float = 1.0
    max_layers: int | None = None
    seed: int | None = None
    gone: threading.Event = field(default_factory=threading.Event)
    failure: Exception | None = None
    num_tokens: int = 0
    share_of_tokens: float = 0.0

    @property
    def executed_share(self) -> float | None:
        """Share of block-tokens that ran, of prompt and new tokens; None of a model that does not say."""
        return round(self.share_of_tokens / self.num_tokens, 4) if self.num_tokens else None


REQUEST: ContextVar[Work] = ContextVar("midskip_request")
