"""Weights that a run begins with in place of random ones: those of another run, or of any saved midskip model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, GenerationConfig

from midskip.data import LabelledData, Prepared
from midskip.model.config import SKIPPING_WEIGHTS, MidskipConfig
from midskip.model.modeling import MidskipForCausalLM
from midskip.runs import quiet_loading
from midskip.train.recipe import Recipe

SAME = (  # what a model computes, and its weights do not show
    "num_attention_heads", "num_key_value_heads", "head_dim", "norms", "rms_norm_eps", "rope_parameters",
    "tie_word_embeddings", "no_rope_layers",
)  # fmt: skip


class InitialWeights:
    """A folder with a midskip model.

    Raises:
        ValueError: there is no such folder, or no midskip model in safetensors files in it.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder).expanduser()
        self.name = f"model.init_from is {folder!r}"
        try:
            self.theirs = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            kind = self.theirs["model_type"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise self._refused(f"and its config.json cannot be read ({error})") from error
        if kind != "midskip":
            raise self._refused(f"a model of the type {kind!r}")
        self.files = sorted(self.folder.glob("model*.safetensors"))
        if not self.files:
            raise self._refused("and has no model.safetensors")

    def _refused(self, why: str) -> ValueError:
        return ValueError(f"{self.name}, {why}; expected the folder of a finished run or of a saved midskip model")

    def check(self, recipe: Recipe, text: Prepared | LabelledData) -> None:
        """Refuses weights of another shape than the recipe's model, or of another vocabulary than the text's.

        Raises:
            ValueError: with what differs.
        """
        config = recipe.build_config(text.vocab_size)
        settings = config.to_dict()
        wrong = [
            f"{name} is {settings[name]!r}, there {self.theirs[name]!r}"
            for name in SAME
            if name in self.theirs and settings[name] != self.theirs[name]
        ]
        with torch.device("meta"):
            model = MidskipForCausalLM(config)
        ours = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        if config.tie_word_embeddings:
            ours.pop("lm_head.weight", None)
        found = self._shapes()
        wrong += [
            f"{name} is {shape}, there {found.get(name, 'not')}"
            for name, shape in ours.items()
            if found.get(name) != shape and not (name not in found and name.startswith(SKIPPING_WEIGHTS))
        ]
        wrong += [f"{name} is not, there {found[name]}" for name in found.keys() - ours.keys()]
        if wrong:
            more = f"; and {len(wrong) - 3} more" * (len(wrong) > 3)
            raise ValueError(
                f"{self.name}, whose model has another shape than the recipe's ({'; '.join(wrong[:3])}{more}): give "
                "the settings of that model, or other weights"
            )
        if text.tokenizer is not None and text.tokenizer.get_vocab() != self._vocabulary():
            raise ValueError(
                f"{self.name}, and the text is encoded with another tokenizer than that model's: give "
                f"--data.tokenizer={self.folder}"
            )

    def _shapes(self) -> dict[str, list[int]]:
        shapes: dict[str, list[int]] = {}
        for path in self.files:
            try:
                with safe_open(path, framework="pt") as file:
                    shapes |= {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise self._refused(f"and {path.name} cannot be read ({error})") from error
        return shapes

    def _vocabulary(self) -> dict[str, int]:
        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False).get_vocab()
        except Exception as error:  # transformers and tokenizers each raise their own kinds
            raise self._refused(f"and its tokenizer cannot be read ({error})") from error

    def sha256(self) -> str:
        """Of all bytes of the weights."""
        found = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
        return found.hexdigest()

    def load(self, config: MidskipConfig) -> MidskipForCausalLM:
        """The model with these weights, in float32; what `SKIPPING_WEIGHTS` names is random where it is not there."""
        with quiet_loading():
            model = MidskipForCausalLM.from_pretrained(self.folder, config=config, dtype=torch.float32)
        model.generation_config = GenerationConfig.from_model_config(config)
        return model


def initial_weights(recipe: Recipe, checkpoint: Path | None) -> InitialWeights | None:
    """Those that the recipe names; None if it names none, or if they are gone and a checkpoint has what came of them.

    Raises:
        ValueError: as `InitialWeights`.
    """
    folder = recipe.model.init_from
    if folder is None or (checkpoint is not None and not Path(folder).expanduser().exists()):
        return None
    return InitialWeights(folder)


def start_of(initial: InitialWeights | None) -> dict[str, Any]:
    """What `start.json` says of it."""
    return {} if initial is None else {"init_from": initial.sha256()}
