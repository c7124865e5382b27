"""A calibration that was never measured."""

from typing import Any

CURVE: dict[str, Any] = {
    "text": "news",
    "num_tokens": 4000,
    "block_tokens": 8,
    "num_dropped": 0,
    "score_scale": [0.0, 1.0, 2.0, 4.0],
    "share": [1.0, 0.8, 0.5, 0.25],
    "loss": [2.0, 2.1, 2.5, 3.0],
    "share_by_bucket": [[share] * 12 for share in (1.0, 0.8, 0.5, 0.25)],
    "loss_by_bucket": [[loss] * 12 for loss in (2.0, 2.1, 2.5, 3.0)],
    "share_std": [0.0, 0.01, 0.03, 0.02],
    "loss_std": [0.05, 0.05, 0.1, 0.1],
}
