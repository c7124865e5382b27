"""Pretrained models of the Llama family as midskip models."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from midskip.convert.configs import SUPPORTED, check_model_type, midskip_settings
from midskip.model.config import SKIPPING_WEIGHTS, MidskipConfig
from midskip.model.layers import RotaryEmbedding
from midskip.model.modeling import MidskipForCausalLM
from midskip.policies import build_policy

_TOKENIZER = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")  # a tokenizer has one of them
_OF_TOKENIZER = ("merges.txt", "*.jinja")  # and these may lie beside it
_INDEX = "model.safetensors.index.json"
_HUB_NAME = r"[\w][\w.-]*(/[\w][\w.-]*)?"

Readers = dict[str, Callable[[], Tensor]]  # by transformers' names; nothing is read before one is called


def pretrained(
    source: str | Path,
    *,
    policy: str = "dense",
    policy_settings: dict[str, Any] | None = None,
    skipped_kv: str = "keep",
    dtype: torch.dtype | str | None = None,
    gguf_file: str | None = None,
    revision: str | None = None,
    **config_changes: Any,
) -> MidskipForCausalLM:
    """A midskip model with the weights of a Llama, SmolLM, Mistral, Qwen2, Qwen2.5, Qwen3 or SmolLM3.

    With the policy `dense` it computes what transformers' model computes. Any other policy is new, and as it begins.
    Weights are read one at a time, so memory stays near one copy of them.

    Args:
        source: a folder with `config.json` and safetensors files, a name on the Hugging Face Hub, or a `.gguf` file.
        policy, policy_settings, skipped_kv: as in `MidskipConfig`. `"keep"` leaves attention as it was trained: tokens
            that skip a layer still have a key and a value there.
        dtype: of the weights, `torch.bfloat16` or `"bfloat16"`; by default, or with `"auto"`, that in `config.json`, or
            of the first weight if none is there, and float32 for GGUF.
        gguf_file: the name of a GGUF file in the folder or repository, which transformers reads and dequantizes.
        revision: branch, tag or commit on the hub.
        config_changes: other settings of `MidskipConfig`, such as `skip_unit` or `max_position_embeddings`.

    Returns:
        The model on the CPU, in evaluation mode, with the generation configuration of the original.

    Raises:
        ValueError: the source cannot be found or read, or the model has what midskip does not compute.
    """
    folder, gguf_file = _find(source, gguf_file, revision)
    theirs = _read_config(folder, gguf_file, source)
    settings = midskip_settings(theirs, config_changes.get("max_position_embeddings"))
    settings |= {"policy": policy, "policy_settings": policy_settings, "skipped_kv": skipped_kv} | config_changes
    readers: Readers = {}
    generation = None
    if gguf_file is None:
        readers = _readers(folder, source)
        if (folder / "generation_config.json").is_file():
            with reading(folder / "generation_config.json"):
                generation = GenerationConfig.from_pretrained(folder)
    else:
        if "rope_parameters" not in config_changes:
            _check_gguf(folder / gguf_file)
        original = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf_file, dtype=torch.float32 if dtype in (None, "auto") else _dtype(dtype)
        )
        for name, tensor in original.state_dict().items():
            readers[name] = tensor.detach
        generation = original.generation_config
    if settings["tie_word_embeddings"] and "lm_head.weight" in readers:
        # as in transformers: what is in the files counts
        head, embedding = readers.pop("lm_head.weight"), readers.get("model.embed_tokens.weight")
        if embedding is not None and not torch.equal(head(), embedding()):
            settings["tie_word_embeddings"], readers["lm_head.weight"] = False, head
    if dtype in (None, "auto"):
        dtype = (gguf_file is None and theirs.dtype) or next(iter(readers.values()))().dtype
    model = _build(MidskipConfig(**settings), readers, _dtype(dtype))
    if generation is not None:
        model.generation_config = generation
    return model


def save_tokenizer(
    source: str | Path, folder: str | Path, gguf_file: str | None = None, revision: str | None = None
) -> None:
    """Writes the tokenizer of `source`, its chat template with it, into the folder of a saved model.

    Args:
        source, gguf_file, revision: as in `pretrained`.
        folder: as in `save_pretrained`.
    """
    tokenizer_of(source, gguf_file, revision).save_pretrained(folder)


def tokenizer_of(
    source: str | Path, gguf_file: str | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of `source`; arguments as in `save_tokenizer`."""
    where, gguf_file = _find(source, gguf_file, revision)
    if gguf_file is None and not any(next(where.glob(name), None) for name in _TOKENIZER):
        # transformers makes an empty one for some models
        raise ValueError(f"{str(source)!r} has no tokenizer: put one beside the model")
    try:
        return AutoTokenizer.from_pretrained(where, gguf_file=gguf_file, trust_remote_code=False)
    except (ValueError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{str(source)!r} has a tokenizer that cannot be read: {reason}") from error


def _find(source: str | Path, gguf_file: str | None, revision: str | None) -> tuple[Path, str | None]:
    """The local folder, and the GGUF file in it if there is one to be read."""
    path = Path(source)
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, path.name
    if not path.is_dir():
        if path.exists() or not re.fullmatch(_HUB_NAME, str(source)):
            raise ValueError(f"{source} is no folder here; expected one, a .gguf file, or a name on the hub")
        patterns = [*_TOKENIZER, *_OF_TOKENIZER]
        patterns += ["*.json", "model*.safetensors"] if gguf_file is None else [gguf_file]
        try:
            path = Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
        except Exception as error:  # of many kinds: of the name, the hub, the network
            reason = str(error).split("\n", 1)[0].strip(" .") or type(error).__name__
            raise ValueError(
                f"{source} is no folder here, and could not be fetched from the Hugging Face Hub: {reason}. Check the "
                "name and the network, or give a local folder."
            ) from None
    if gguf_file is not None and not (path / gguf_file).is_file():
        raise ValueError(f"{source} has no file {gguf_file!r}; expected the name of a GGUF file in it")
    return path, gguf_file


def _read_config(folder: Path, gguf_file: str | None, source: object) -> Any:
    if gguf_file is not None:
        try:
            theirs = AutoConfig.from_pretrained(folder, gguf_file=gguf_file)
        except ValueError as error:
            raise ValueError(
                f"transformers cannot read {gguf_file}: {' '.join(str(error).split())} Supported are "
                f"{', '.join(SUPPORTED)}, as far as transformers reads them from GGUF."
            ) from None
    else:
        file = folder / "config.json"
        if not file.is_file():
            others = sorted(path.name for path in folder.glob("*.gguf"))
            hint = f"; name one of its GGUF files as gguf_file: {', '.join(others)}" if others else ""
            raise ValueError(f"{source} has no config.json; expected a Hugging Face folder{hint}")
        with reading(file):
            named = dict(json.loads(file.read_text(encoding="utf-8")))
        check_model_type(named.get("model_type"), source)
        with reading(file):
            theirs = AutoConfig.from_pretrained(folder)
    check_model_type(theirs.model_type, source)
    return theirs


def _check_gguf(file: Path) -> None:
    """transformers takes no scaling of the rotary embedding from GGUF."""
    reader = importlib.import_module("gguf").GGUFReader(file)
    kinds = [field.parts[-1] for key, field in reader.fields.items() if key.endswith(".rope.scaling.type")]
    if any(bytes(kind) != b"none" for kind in kinds) or any(
        tensor.name == "rope_freqs.weight" for tensor in reader.tensors
    ):
        raise ValueError(
            f"{file.name} scales its rotary embedding, which transformers does not read from GGUF: load safetensors, "
            "or give rope_parameters as they are in the original's config.json"
        )


def _readers(folder: Path, source: object) -> Readers:
    if (folder / _INDEX).is_file():
        with reading(folder / _INDEX):
            files = dict(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"])
    elif (folder / "model.safetensors").is_file():
        with _opened(folder / "model.safetensors") as saved:
            files = dict.fromkeys(saved.keys(), "model.safetensors")
    else:
        raise ValueError(
            f"{source} has neither model.safetensors nor {_INDEX}; .bin files are pickles and are not loaded: write "
            "safetensors with AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) first"
        )
    missing = sorted({file for file in files.values() if not (folder / file).is_file()})
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}, which its {_INDEX} names: fetch it again")
    return {name: partial(_read, folder / file, name) for name, file in files.items()}


def _read(file: Path, name: str) -> Tensor:
    # opened for each: what was read would stay in memory as long as the file is open
    with _opened(file) as saved:
        return saved.get_tensor(name).clone()  # not a view of the file, which may be written over


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    with reading(file, SafetensorError), safe_open(file, framework="pt") as saved:  # to run out of memory is no damage
        yield saved


@contextlib.contextmanager
def reading(file: Path, kind: type[Exception] = Exception) -> Iterator[None]:
    """An error of that kind becomes a ValueError that names the file. By default all do: JSON, transformers' checks of
    settings and its loaders each raise their own."""
    try:
        yield
    except kind as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{file} cannot be read ({reason}): is it whole? Fetch it again.") from error


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}; expected a floating-point type such as 'float32' or 'bfloat16'")
    return found


def _build(config: MidskipConfig, readers: Readers, dtype: torch.dtype) -> MidskipForCausalLM:
    with torch.device("meta"):
        model = MidskipForCausalLM(config)
    body, width = model.model, config.hidden_size
    policy = build_policy(config.policy, config.num_skip_units, width, config.initializer_range, config.policy_settings)
    policy.reset_parameters()
    policy.has_skip_paths = body.policy.has_skip_paths
    body.policy = policy.to(dtype)
    body.skip_paths.to_empty(device="cpu").to(dtype)
    for path in body.skip_paths.values():
        path.reset_parameters()  # pyright: ignore[reportCallIssue]
    body.rotary = RotaryEmbedding(config.head_dim, config.rope_parameters)
    shapes = {name: x.shape for name, x in model.named_parameters() if not name.startswith(SKIPPING_WEIGHTS)}
    ours = {our_name(name): name for name in readers if not name.endswith("rotary_emb.inv_freq")}  # of old files
    for names, what in (
        (shapes.keys() - ours.keys(), "missing in the files"),
        (ours.keys() - shapes.keys(), "in the files that have no place in the model"),
    ):
        if names:
            raise ValueError(f"the weights do not fit the configuration: {len(names)} {what}, among them {min(names)}")
    for name, shape in shapes.items():
        tensor = readers[ours[name]]()
        if tensor.shape != shape:
            raise ValueError(
                f"the weights do not fit the configuration: {name} has the shape {list(tensor.shape)}, expected "
                f"{list(shape)}"
            )
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor.to(dtype)))
    model.tie_weights()
    config.dtype = dtype
    return model.eval()


def our_name(name: str) -> str:
    """The name that one of transformers' Llama has here: the second norm of a block stands before its feed-forward."""
    return name.replace(".post_attention_layernorm.", ".pre_feedforward_layernorm.")


def their_name(name: str) -> str:
    """The other way around, for `norms="pre"`."""
    return name.replace(".pre_feedforward_layernorm.", ".post_attention_layernorm.")
