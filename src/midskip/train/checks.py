"""What can be refused before a model is made: too much memory, a shape or a policy that does not fit, a regularizer."""

from __future__ import annotations

import os
from copy import deepcopy

import torch
from torch import Tensor

from midskip.model.config import MidskipConfig
from midskip.model.modeling import MidskipForCausalLM
from midskip.regularizers import Regularizer
from midskip.train.recipe import Recipe

BLOCK_OBJECTS_BYTES = 40_000  # of the modules of a block, however small its weights


def check_memory(recipe: Recipe, vocab_size: int = 2) -> None:
    """Refuses a model that is sure not to fit: activations and text come on top of what is counted here.

    On a CPU that is float32 weights, gradients and AdamW's two moments. On GPUs it is the weights, with which the model
    is made before it goes there.

    Args:
        vocab_size: of the tokenizer; by default a lower bound, for the time before the text is read.

    Raises:
        ValueError: more than the memory of the machine. It says how much it would be, and how much there is.
    """
    config, there = recipe.build_config(vocab_size), memory_bytes()
    num_parameters = fewest_parameters(config)
    copies, what = (1, "weights") if torch.cuda.is_available() else (4, "weights, gradients and AdamW's moments")
    needed = 4 * copies * num_parameters + BLOCK_OBJECTS_BYTES * config.num_hidden_layers
    if there is not None and needed > there:
        raise ValueError(
            f"the model of {recipe.output!r} has {config.num_hidden_layers:,} blocks with {num_parameters:,} parameters"
            f" or more, whose {what} need {needed / 2**30:,.1f} GiB, and this machine has {there / 2**30:,.1f} GiB of "
            "memory: lower model.num_hidden_layers, model.hidden_size or model.intermediate_size"
        )


def check_regularizer(regularizer: Regularizer) -> None:
    """Tries a copy, which no step has seen.

    Raises:
        ValueError: it cannot be saved and restored, or its loss is no scalar.
    """
    name = type(regularizer).__name__
    try:
        trial = deepcopy(regularizer)
        trial.load_state_dict(trial.state_dict())
        term = trial.loss(torch.ones(trial.num_layers, 1, 2, requires_grad=True), None)
    except Exception as error:  # one of the user's own raises what it likes
        raise ValueError(f"the regularizer {name} fails before the first step: {error}") from error
    if not isinstance(term, Tensor) or term.dim():
        form = list(term.shape) if isinstance(term, Tensor) else type(term).__name__
        raise ValueError(f"loss of the regularizer {name} gives {form}; expected a scalar tensor")


def check_model(recipe: Recipe, regularizer: Regularizer, vocab_size: int = 2) -> int:
    """The number of parameters of the model, which is not made.

    Raises:
        ValueError: shape, policy and regularizer do not fit.
    """
    with torch.device("meta"):
        model = MidskipForCausalLM(recipe.build_config(vocab_size))
    regularizer.steer(model.model.policy)
    return model.num_parameters()


def fewest_parameters(config: MidskipConfig) -> int:
    """Of the matrices of all blocks, the embedding and the head: all but norms, biases, policy and skip paths."""
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads)
    sizes, num_blocks = config.intermediate_size, config.num_hidden_layers
    # no list is made of a number: there may be too many blocks for one
    num_hidden = sum(sizes) if isinstance(sizes, list) else sizes * num_blocks
    blocks = config.hidden_size * (heads * config.head_dim * num_blocks + 3 * num_hidden)
    embeddings = config.hidden_size * config.vocab_size * (1 if config.tie_word_embeddings else 2)
    return blocks + embeddings


def memory_bytes() -> int | None:
    """Of the machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
