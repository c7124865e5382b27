"""A pretrained model, made ready to skip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from midskip.convert import pretrained
from midskip.model.config import MidskipConfig
from midskip.model.modeling import MidskipForCausalLM


def load_to_skip(
    source: str, *, policy_settings: dict[str, Any], **changes: Any
) -> tuple[MidskipForCausalLM, PreTrainedTokenizerBase]:
    """The model with the policy `independent` and new skip paths, in float32 and evaluation mode, and its tokenizer.

    Args:
        source: as in `midskip.convert.pretrained`, or the folder of a dense run.
        policy_settings: of the policy.
        changes: other settings of `MidskipConfig`.

    Raises:
        ValueError: no such model, one that is not supported, or one that already skips.
    """
    changes |= {"policy": "independent", "policy_settings": policy_settings}
    file = Path(source, "config.json")
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if values.get("model_type") != "midskip":
        model = pretrained(source, dtype=torch.float32, **changes)
    else:
        if values["policy"] != "dense":
            raise ValueError(
                f"the model in {source!r} already skips (policy {values['policy']!r}); expected a dense one"
            )
        theirs = {
            name: x for name, x in values.items() if name not in ("architectures", "dtype", "transformers_version")
        }
        config = MidskipConfig(**theirs | changes)
        model = MidskipForCausalLM.from_pretrained(source, config=config, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(source)
