"""What is timed, at which size; everything about it that can be wrong is found here, before anything is built."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from midskip.bench.presets import GATES, OF_A_RUN, SHAPE_FIELDS
from midskip.model.config import MidskipConfig, intermediate_sizes
from midskip.model.modeling import MidskipForCausalLM
from midskip.policies.controls import LARGEST_SEED

TASKS = ("prefill", "decode", "training", "trainer", "products")
DTYPES = ("float32", "bfloat16", "float16")  # in float64 too Llama would turn by float32 angles, and not agree
NORMS = ("sandwich", "pre")
ATTENTION = ("auto", "sdpa", "padded", "flex")
# of what is checked before anything is timed: sequences, and columns of each pass of the run with a cache. Steps of one
# token are what is timed; the longer ones between make the cache grow a few times in few passes
CHECKED_ROWS, CHECKED_STEPS = 2, (9, *(1, 3) * 10)
CHECKED_COLUMNS = sum(CHECKED_STEPS)
SHAPES: dict[str, dict[str, Any]] = {  # of models, and the sizes at which such a model is timed
    "paper": {
        "shape": {"vocab_size": 50257, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                  "num_attention_heads": 12},
        "prompt_tokens": 1024, "context_tokens": 512, "new_tokens": 32, "batch_sizes": (1, 8, 32), "repeats": 9,
        "idle_s": 5.0, "energy_s": 2.0,
    },
    "wiki-small": {
        "shape": {"vocab_size": 50257, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
                  "num_attention_heads": 8},
        "prompt_tokens": 1024, "context_tokens": 512, "new_tokens": 32, "batch_sizes": (1, 8, 32), "repeats": 9,
        "idle_s": 5.0, "energy_s": 2.0,
    },
    "small": {
        "shape": {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8,
                  "num_attention_heads": 6},
        "prompt_tokens": 512, "context_tokens": 256, "new_tokens": 32, "batch_sizes": (1, 8), "repeats": 7,
        "idle_s": 3.0, "energy_s": 1.0,
    },
    "tiny": {
        "shape": {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
                  "num_attention_heads": 2},
        "prompt_tokens": 48, "context_tokens": 24, "new_tokens": 6, "batch_sizes": (1, 3), "repeats": 3,
        "idle_s": 0.5, "energy_s": 0.05,
    },
}  # fmt: skip


@dataclass(frozen=True)
class BenchSettings:
    """Settings of `bench`; `of` fills them from a named shape.

    Attributes:
        shape: fields of `MidskipConfig`; Llama gets the same.
        tasks: some of `TASKS`: `"training"` is forward and backward; `"trainer"` a whole optimizer step in the Trainer;
            `"products"` the matrix products with weights of a prefill, alone.
        batch_sizes: sequences decoded at once.
        prompt_batch_size, training_batch_size: prompts prefilled at once, and sequences of a training step.
        shares: of block-tokens that are skipped.
        dtypes: of weights and activations.
        gates: of the tokens present: `"fixed"`, all 1, or `"fractional"`, drawn from (0.5, 1), both by position; or
            `"hard"`, all 1, as `middle_out` with hard gates decides them, by the tokens.
        prompt_tokens: that are prefilled.
        context_tokens: that stand in the cache before decoding begins; also the length of a training sequence.
        new_tokens: decoded in a stretch.
        repeats: of everything that is timed.
        norms: some of `NORMS`, as in `MidskipConfig`; each is timed against the same Llama.
        attention: ways to compute the attention of packed tokens, some of `ATTENTION`: `"auto"` is the library's, the
            others are tried beside it (`bench/kernels.py`): `"sdpa"` for each sequence alone, `"padded"`, and
            `"flex"`, which needs a GPU.
        torch_compile: our blocks and Llama as a whole are compiled by torch, but not in decode, where the cache grows.
        seed: of weights, tokens, depths and the order of turns, from 0.
        device: that all of it runs on.
        idle_s, energy_s: for how long the power at rest is measured, and each side at work.
        run: the name of the run folder whose model is timed; None: depths are imposed.
        preset: the name of the preset that these settings began with, for the report.

    Raises:
        ValueError: a value that cannot be timed.
    """

    shape: dict[str, int]
    tasks: tuple[str, ...] = ("prefill", "decode", "training")
    batch_sizes: tuple[int, ...] = (1,)
    shares: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    gates: tuple[str, ...] = ("fixed", "fractional")
    prompt_tokens: int = 1024
    context_tokens: int = 512
    new_tokens: int = 32
    prompt_batch_size: int = 1
    training_batch_size: int = 2
    repeats: int = 9
    norms: tuple[str, ...] = ("sandwich",)
    attention: tuple[str, ...] = ("auto",)
    torch_compile: bool = False
    seed: int = 0
    device: str = "cpu"
    idle_s: float = 5.0
    energy_s: float = 2.0
    run: str | None = None
    preset: str | None = None

    @classmethod
    def of(cls, name: str = "paper", shape: dict[str, int] | None = None, **changes: Any) -> BenchSettings:
        """A named shape and its sizes, with some of its fields or of the settings changed; None: not changed."""
        if name not in SHAPES:
            raise ValueError(f"shape is {name!r}; expected one of {', '.join(SHAPES)}")
        given = {setting: value for setting, value in changes.items() if value is not None}
        settings = SHAPES[name] | given
        settings["shape"] = settings["shape"] | {k: v for k, v in (shape or {}).items() if v is not None}
        if "device" not in settings:
            settings["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(**settings)

    def __post_init__(self) -> None:
        known = {"tasks": TASKS, "dtypes": DTYPES, "gates": GATES, "norms": NORMS, "attention": ATTENTION}
        for name, values in known.items():
            self._check_list(name, values)
        self._check_list("batch_sizes")
        self._check_list("shares")
        for name, value in self.shape.items():
            self._check_count(name, value)
        tokens, sequences = ("prompt", "context", "new"), ("prompt", "training")
        counts = [f"{name}_tokens" for name in tokens] + [f"{name}_batch_size" for name in sequences]
        for name in (*counts, "repeats"):
            self._check_count(name, getattr(self, name))
        if self.takes_gradients and self.context_tokens < 2:
            raise ValueError("context_tokens is 1, and a training sequence needs a token to predict: give at least 2")
        for batch_size in self.batch_sizes:
            self._check_count("batch_sizes", batch_size)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < LARGEST_SEED:
            raise ValueError(f"seed is {self.seed!r}; expected a whole number from 0 to {LARGEST_SEED - 1}")
        for share in self.shares:
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
                raise ValueError(f"shares has {share!r}; expected shares of skipped block-tokens, from 0 to below 1")
        if len({f"{share:g}" for share in self.shares}) < len(self.shares):
            raise ValueError(f"shares has {self.shares}; expected shares that differ in their first six digits")
        for name in ("idle_s", "energy_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected seconds above 0")
        self._check_device()
        if "trainer" in self.tasks and "float16" in self.dtypes:
            raise ValueError("dtypes has 'float16' and tasks has 'trainer', which trains in float32 or bfloat16 alone")
        config = self.config()  # refuses a shape that cannot be built
        if self.attention != ("auto",) and config.num_key_value_heads != config.num_attention_heads:
            raise ValueError(
                f"attention is {', '.join(self.attention)!r} and the model has fewer key heads than query heads, which "
                "auto alone takes: leave attention out"
            )

    def _check_list(self, name: str, known: tuple[str, ...] | None = None) -> None:
        values = getattr(self, name)
        if not values or len(set(values)) != len(values):
            raise ValueError(f"{name} is {', '.join(map(str, values))!r}; expected at least one, none of them twice")
        if known and (unknown := [value for value in values if value not in known]):
            raise ValueError(f"{name} has {unknown[0]!r}; expected some of {', '.join(known)}")

    def _check_count(self, name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} has {value!r}; expected a whole number of at least 1")

    def _check_device(self) -> None:
        try:
            device = torch.device(self.device)
        except (RuntimeError, TypeError):
            device = None
        if device is None or device.type not in ("cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; expected cpu, cuda or cuda:N")
        if device.type == "cuda":
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if not count:
                raise ValueError(f"device is {self.device!r} and torch finds no GPU: leave it out, or give cpu")
            if "trainer" in self.tasks and device.index:
                raise ValueError(f"device is {self.device!r}, and the task trainer runs on the first GPU: give cuda")
            if (device.index or 0) >= count:
                raise ValueError(f"device is {self.device!r}; torch finds {count} GPU, cuda:0 to cuda:{count - 1}")
            return
        if "trainer" in self.tasks and torch.cuda.is_available():
            raise ValueError(
                f"device is {self.device!r}, and the task trainer runs where transformers' Trainer would, on the GPU: "
                "leave it out of the tasks, or set CUDA_VISIBLE_DEVICES to nothing"
            )
        if kernels := [name for name in self.attention if name == "flex"]:
            raise ValueError(f"attention has {kernels[0]!r}, which needs a GPU: leave it out, or give --device cuda")

    @property
    def takes_gradients(self) -> bool:
        return bool({"training", "trainer"} & set(self.tasks))

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of the largest batch of each task."""
        sizes = {
            "prefill": (self.prompt_batch_size, self.prompt_tokens),
            "decode": (max(self.batch_sizes), self.context_tokens + self.new_tokens),
            "training": (self.training_batch_size, self.context_tokens),
            "trainer": (self.training_batch_size, self.context_tokens),
            "products": (self.prompt_batch_size, self.prompt_tokens),
        }
        return {task: sizes[task] for task in self.tasks}

    @property
    def most_rows(self) -> int:
        """Sequences of the largest batch, what is checked included."""
        return max(CHECKED_ROWS, *(rows for rows, _ in self.sizes.values()))

    @property
    def most_columns(self) -> int:
        """Tokens of the longest sequence, what is checked included. Where depths are imposed, the first positions of
        two rows lie so far apart, and no two rows have one in common."""
        return max(CHECKED_COLUMNS, *(columns for _, columns in self.sizes.values()))

    def config(self, norms: str | None = None) -> MidskipConfig:
        """Of our models; by default with the first of the norms."""
        positions = self.most_rows * self.most_columns
        fields: dict[str, Any] = {
            "norms": norms or self.norms[0],
            "max_position_embeddings": positions,
            "policy": "dense",
        }
        fields |= self.shape
        return MidskipConfig(**fields)

    def check_memory(self) -> None:
        """Raises ValueError if weights, gradients and caches would not fit what is free on the device."""
        free_bytes = _free_bytes(torch.device(self.device))
        config = self.config()
        itemsize = max(getattr(torch, name).itemsize for name in self.dtypes)
        width, layers = config.hidden_size, config.num_hidden_layers
        num_weights = 2 * config.vocab_size * width + layers * width * (4 * width + 3 * max(intermediate_sizes(config)))
        copies = 4 if self.takes_gradients else 2  # Llama's and ours, and their gradients
        copies += 2 * ("trainer" in self.tasks)  # AdamW's of one of them
        needed_bytes = copies * num_weights * itemsize
        exact_bytes = num_weights * (32 if self.takes_gradients else 8)  # weights, gradients: all in float64
        needed_bytes = max(needed_bytes, 2 * num_weights * itemsize + exact_bytes)
        if "decode" in self.tasks:
            tokens = math.prod(self.sizes["decode"])
            token_bytes = 2 * layers * config.num_key_value_heads * config.head_dim * itemsize
            sides = 2 + sum(1 - share for share in self.shares)  # each with a cache and a copy of it
            needed_bytes = max(needed_bytes, 2 * num_weights * itemsize + int(2 * sides * tokens * token_bytes))
        if free_bytes is not None and needed_bytes > free_bytes:
            raise ValueError(
                f"this needs about {needed_bytes / 1e9:.1f} GB and {self.device} has {free_bytes / 1e9:.1f} GB free: "
                "give smaller --batch_sizes, fewer --shares, a smaller shape, or bfloat16 alone"
            )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_settings(model: MidskipForCausalLM, name: str, **given: Any) -> BenchSettings:
    """Settings to time a trained model of this name: its own shape and gates, no more tokens than it takes.

    Raises:
        ValueError: a setting that would change nothing, a value that cannot be timed, or blocks of different width.
    """
    if foreign := [setting for setting in OF_A_RUN if setting in given]:
        raise ValueError(f"--{foreign[0]} is of models with imposed depths; a run has its own: leave it out")
    config, paper = model.config, SHAPES["paper"]
    if isinstance(config.intermediate_size, list):
        raise ValueError(f"the run's intermediate_size is {config.intermediate_size}; Llama, its opponent, has but one")
    limit = config.max_position_embeddings
    new_tokens = given.pop("new_tokens", min(paper["new_tokens"], max(1, limit // 4)))
    sizes: dict[str, Any] = {
        "shape": {field: getattr(config, field) for field in (*SHAPE_FIELDS, "head_dim")},
        "prompt_tokens": min(paper["prompt_tokens"], limit),
        "context_tokens": max(1, min(paper["context_tokens"], limit - new_tokens)),
        "new_tokens": new_tokens, "norms": (config.norms,), "dtypes": ("float32",), "run": name,
    }  # fmt: skip
    sizes |= given
    return BenchSettings.of(**sizes)


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
