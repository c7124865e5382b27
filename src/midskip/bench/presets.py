"""Named sets of options of `midskip bench`, one for each table of speed in docs/results.md.

A preset sets what the command line can set, and the command line wins over it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SHAPE_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"
)  # fmt: skip
GATES = ("fixed", "fractional", "hard")
OF_A_RUN = ("shape", "shares", "gates", "norms", *SHAPE_FIELDS)  # settings that a trained model brings itself

GPU: dict[str, Any] = {
    "device": "cuda", "dtypes": ("bfloat16",), "torch_compile": True, "gates": ("fixed", "fractional"),
    "training_batch_size": 32, "context_tokens": 1024, "prompt_batch_size": 32, "prompt_tokens": 1024,
    "repeats": 5,
}  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """Options, by name, and what they are for, in one line."""

    what: str
    options: dict[str, Any]


PRESETS = {
    "core": Preset(
        "nothing skipped: what our model costs beside Llama, with both kinds of norms and with fractional gates",
        {"tasks": ("prefill", "training"), "shares": (0.0,), "norms": ("sandwich", "pre")},
    ),
    "skipping": Preset(
        "a quarter, half and three quarters skipped: prefill, training, and the bare matrix products of the prefill",
        {"tasks": ("prefill", "training", "products"), "shares": (0.0, 0.25, 0.5, 0.75), "gates": GATES},
    ),
    "decode": Preset(
        "token by token, batches of 1, 8 and 32, against Llama with a growing and with a static cache",
        {"tasks": ("decode",), "shares": (0.0, 0.5), "gates": GATES, "batch_sizes": (1, 8, 32)},
    ),
    "training": Preset(
        "whole optimizer steps in transformers' Trainer, callbacks and batches included; with --run, of its model",
        {"tasks": ("trainer",), "shares": (0.0, 0.5), "gates": ("hard",), "dtypes": ("float32",)},
    ),
    "memory": Preset(
        "the most memory that a training step takes",
        {"tasks": ("training",), "shares": (0.0, 0.5), "gates": ("fractional",), "dtypes": ("float32",), "repeats": 1},
    ),
    "gpu": Preset(
        "on a GPU: paper and wiki-small in bfloat16, all compiled, several shares, with the share of its peak",
        GPU | {"shape": ("paper", "wiki-small"), "batch_sizes": (1, 32), "new_tokens": 16},
    ),
    "attention": Preset(
        "on a GPU: what the library chooses, beside SDPA for each sequence, padding and FlexAttention",
        GPU | {"shape": ("paper",), "tasks": ("prefill", "training"), "shares": (0.0, 0.5),
               "attention": ("auto", "sdpa", "padded", "flex")},
    ),
    "tiny": Preset(
        "a miniature of everything, in seconds",
        {"shape": ("tiny",), "tasks": ("prefill", "decode", "training", "trainer", "products"), "shares": (0.5,),
         "gates": ("fractional", "hard"), "dtypes": ("float32",), "attention": ("auto", "padded"), "repeats": 1},
    ),
}  # fmt: skip


def with_preset(name: str | None, given: dict[str, Any], of_a_run: bool = False) -> dict[str, Any]:
    """The options of a preset under those that were given; of a trained model, without what it brings itself.

    Raises:
        ValueError: there is no preset of this name.
    """
    if name is None:
        return given
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; expected one of {', '.join(PRESETS)}")
    options = {
        option: value for option, value in PRESETS[name].options.items() if not (of_a_run and option in OF_A_RUN)
    }
    return options | given | {"preset": name}
