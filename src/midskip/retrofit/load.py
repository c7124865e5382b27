"""A pretrained model, made ready to skip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from midskip.convert import pretrained, tokenizer_of
from midskip.model.config import MidskipConfig
from midskip.model.modeling import MidskipForCausalLM
from midskip.runs import quiet_loading

NOT_SETTINGS = ("architectures", "dtype", "transformers_version")


def load_to_skip(source: str, changes: dict[str, Any]) -> tuple[MidskipForCausalLM, PreTrainedTokenizerBase]:
    """The model with new skip paths and a policy, in float32 and evaluation mode, and its tokenizer.

    Args:
        source: as in `midskip.convert.pretrained`, or the folder of a dense run.
        changes: settings of `MidskipConfig`, of the policy and the skip paths among them.

    Raises:
        ValueError: no such model, one that is not supported, or one that already skips.
    """
    file = Path(source, "config.json")
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if values.get("model_type") != "midskip":
        return pretrained(source, dtype=torch.float32, **changes), tokenizer_of(source)
    if values["policy"] != "dense":
        raise ValueError(f"the model in {source!r} already skips (policy {values['policy']!r}); expected a dense one")
    theirs = {name: x for name, x in values.items() if name not in NOT_SETTINGS}
    with quiet_loading():
        model = MidskipForCausalLM.from_pretrained(
            source, config=MidskipConfig(**theirs | changes), dtype=torch.float32
        )
    return model.eval(), tokenizer_of(source)
