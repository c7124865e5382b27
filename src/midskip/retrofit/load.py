"""A pretrained model, made ready to skip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from midskip.model.config import MidskipConfig
from midskip.model.modeling import MidskipForCausalLM


def load_to_skip(
    source: str, *, policy_settings: dict[str, Any], **changes: Any
) -> tuple[MidskipForCausalLM, PreTrainedTokenizerBase]:
    """The model in a folder with the policy `independent` and new skip paths, in float32 and evaluation mode, and its
    tokenizer.

    Raises:
        ValueError: no such folder, or a model that already skips.
    """
    folder = Path(source)
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"there is no model in {source!r} (it has no config.json): give the folder of one")
    values = json.loads(file.read_text(encoding="utf-8"))
    if values.get("model_type") != "midskip":
        raise ValueError(f"the model in {source!r} is of the type {values.get('model_type')!r}; expected 'midskip'")
    if values["policy"] != "dense":
        raise ValueError(f"the model in {source!r} already skips (policy {values['policy']!r}); expected a dense one")
    values = {name: values[name] for name in values if name not in ("architectures", "dtype", "transformers_version")}
    config = MidskipConfig(**values | {"policy": "independent", "policy_settings": policy_settings} | changes)
    model = MidskipForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)
