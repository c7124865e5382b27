"""A run folder: a model, its tokenizer and its reports, as `save_pretrained` leaves them."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from midskip.model import MidskipForCausalLM

REPORT_FILE, PICTURE_FILE, PAGE_FILE, RECIPE_FILE = "report.json", "picture.png", "page.html", "recipe.yaml"


def load_run(folder: str | Path) -> tuple[MidskipForCausalLM, PreTrainedTokenizerBase]:
    """The trained model, in evaluation mode on a GPU if there is one, and its tokenizer.

    Raises:
        ValueError: the folder does not exist, or holds no finished run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}; expected a run folder, as `midskip train` writes it")
    lacking = [name for name in ("config.json", "model.safetensors", "tokenizer.json") if not (folder / name).is_file()]
    if lacking:
        unfinished = any(folder.glob("checkpoint-*")) or (folder / RECIPE_FILE).is_file()
        remedy = "go on with `midskip train ... --resume`" if unfinished else "give a run folder"
        raise ValueError(f"{str(folder)!r} holds no finished run (it lacks {', '.join(lacking)}): {remedy}")
    model = MidskipForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {str(folder)!r} has {len(tokenizer)} tokens and its model {model.config.vocab_size}: "
            "they do not belong together"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return model.eval(), tokenizer
