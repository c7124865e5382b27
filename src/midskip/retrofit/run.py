"""A retrofit, from a pretrained model to a folder with one that skips, stage by stage."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from midskip.data import TokenWindows, encode_source
from midskip.model.modeling import MidskipForCausalLM
from midskip.report import comparison_table
from midskip.retrofit.distil import distil
from midskip.retrofit.fit import fit
from midskip.retrofit.load import load_to_skip
from midskip.retrofit.price import calibrated_prices
from midskip.retrofit.shares import DrawnShares
from midskip.runs import to_json, write_atomically
from midskip.train.recipe import TrainingSettings

REPORT = "retrofit.json"
OF_DISTILLING = ("distil_steps", "batch_size", "learning_rate", "gate_learning_rate_scale", "seed", "shares")
FEWEST_TOKENS = 2048  # that a calibration needs
SHARES = [0.95, 0.9, 0.83, 0.75, 0.6, 0.5]


@dataclass
class RetrofitSettings:
    """A retrofit.

    Args:
        model: folder or hub name of the pretrained model.
        data: text to fit and to train on, as `midskip prepare` takes it.
        validation: held-out text by name, on which budgets are priced; the first is also calibrated on.
        output: folder, made if it does not exist.
        choice: who skips: `"tokens"`, each layer by token, or `"layers"`, the same layers for all.
        skip_unit: what a token skips: `"block"`, or `"sublayer"`.
        skip_path: what it gets instead: `"linear"`, or `"low_rank"`.
        skip_path_rank: of the latter; None for 64.
        skipped_kv: whether keys of skipped tokens are kept.
        outer: first and as many last layers that every token runs.
        first_tokens: of a sequence, which run every layer.
        share: of block-tokens that run as the model is left, without a budget.
        length: tokens of a window.
        fit_tokens: of `data`, on which the fit looks.
        price_tokens: of each held-out text.
        distil_steps: of training; 0 for none.
        batch_size: windows of a step of training.
        learning_rate: of the skip paths.
        gate_learning_rate_scale: of the routers, as a factor of it.
        seed: of the order of windows and shares.
        save_steps: steps between two checkpoints.
    """

    model: str
    data: str
    validation: dict[str, str]
    output: str
    choice: Literal["tokens", "layers"] = "tokens"
    skip_unit: Literal["block", "sublayer"] = "block"
    skip_path: Literal["linear", "low_rank"] = "linear"
    skip_path_rank: int | None = None
    skipped_kv: Literal["keep", "drop"] = "keep"
    outer: int = 1
    first_tokens: int = 2
    share: float = 0.75
    length: int = 512
    fit_tokens: int = 22_000
    price_tokens: int = 6_144
    distil_steps: int = 0
    batch_size: int = 4
    learning_rate: float = 1e-3
    gate_learning_rate_scale: float = 0.3
    seed: int = 0
    save_steps: int = 100
    shares: list[float] = field(default_factory=lambda: list(SHARES))


def retrofit(settings: RetrofitSettings, console: Console | None = None) -> dict[str, Any]:
    """Run the stages that are not done yet; each prints what budgets cost after it.

    Returns:
        What is in `retrofit.json`: the settings, and for each stage its seconds and its prices (`prices`).

    Raises:
        ValueError: a model, text or setting that does not fit; other settings in the folder.
    """
    console = console or Console(stderr=True)
    folder = Path(settings.output)
    report = _begun(folder, settings)
    if report["stages"].keys() >= _stages(settings):
        return report
    model, tokenizer = load_to_skip(
        settings.model, skip_path=settings.skip_path, skip_path_rank=settings.skip_path_rank,
        skip_unit=settings.skip_unit, skipped_kv=settings.skipped_kv,
        policy_settings={"router": "linear", "outer": settings.outer, "first_tokens": settings.first_tokens},
    )  # fmt: skip
    texts = Texts(settings, tokenizer, model.config.max_position_embeddings, console)
    folder.mkdir(parents=True, exist_ok=True)
    progress = console.is_terminal
    if "fit" in report["stages"]:
        model = MidskipForCausalLM.from_pretrained(folder / "fit").eval()
    else:
        started = time.perf_counter()
        found = fit(model, texts.fitting, choice=settings.choice, share=settings.share, progress=progress)
        seconds = time.perf_counter() - started
        _end_of_stage("fit", model, tokenizer, texts, report, {"seconds": seconds, "layers": asdict(found)}, console)
    if settings.distil_steps and "distil" not in report["stages"]:
        _distil(model, tokenizer, texts, settings, report, folder, console)
    return report


def _stages(settings: RetrofitSettings) -> set[str]:
    return {"fit", "distil"} if settings.distil_steps else {"fit"}


def _begun(folder: Path, settings: RetrofitSettings) -> dict[str, Any]:
    """The report in the folder, if it was begun with the same settings."""
    now = asdict(settings)
    file = folder / REPORT
    if not file.is_file():
        return {"settings": now, "begun": [], "stages": {}}
    report = json.loads(file.read_text(encoding="utf-8"))
    free = ("output", "save_steps", *(() if "distil" in report["begun"] else OF_DISTILLING))
    changed = [
        f"{name}: {value!r} -> {now[name]!r}"
        for name, value in report["settings"].items()
        if name not in free and value != now[name]
    ]
    if changed:
        raise ValueError(
            f"{str(folder)!r} holds a retrofit with other settings ({'; '.join(changed)}): give another --output, or "
            "the settings that it was begun with"
        )
    return report | {"settings": now}


class Texts:
    """Windows of all texts, read and checked before anything long begins."""

    def __init__(self, settings: RetrofitSettings, tokenizer: PreTrainedTokenizerBase, limit: int, console: Console):
        if settings.length > limit:
            raise ValueError(f"length is {settings.length}; the model takes at most {limit} tokens: give --length less")
        if settings.price_tokens < FEWEST_TOKENS:
            raise ValueError(f"price_tokens is {settings.price_tokens}; expected at least {FEWEST_TOKENS}")
        if not settings.validation:
            raise ValueError("there is no held-out text: give validation, NAME=TEXT")
        self.data = encode_source(tokenizer, settings.data, console=console)
        every = TokenWindows(self.data, settings.length)
        count = max(2, settings.fit_tokens // settings.length)
        if len(every) < count:
            raise ValueError(
                f"{settings.data!r} has {len(self.data)} tokens; expected at least fit_tokens, {settings.fit_tokens}"
            )
        self.training = every
        step = len(every) // count
        self.fitting = [every[row * step] for row in range(count)]
        self.held_out: dict[str, list[Any]] = {}
        self.calibration: list[Any] = []
        num_windows = max(1, settings.price_tokens // settings.length)
        for name, source in settings.validation.items():
            ids: np.ndarray = encode_source(tokenizer, source, console=console)
            windows = TokenWindows(ids, settings.length)
            windows.require(2 * num_windows)
            rows = [windows[row * len(windows) // (2 * num_windows)] for row in range(2 * num_windows)]
            self.held_out[name] = rows[::2]
            self.calibration = self.calibration or rows[1::2]


def _distil(
    model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: Texts, settings: RetrofitSettings,
    report: dict[str, Any], folder: Path, console: Console,
) -> None:  # fmt: skip
    training = TrainingSettings(
        max_steps=settings.distil_steps, per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        gate_learning_rate_scale=settings.gate_learning_rate_scale if settings.choice == "tokens" else 0.0,
        warmup_ratio=0.05, save_steps=settings.save_steps, save_total_limit=1, report_to=[], seed=settings.seed,
    )  # fmt: skip
    calibration = model.config.calibration
    scales = [_scale_at(calibration, share) for share in settings.shares]
    shares = DrawnShares(model.config.num_skip_units, settings.shares, scales, settings.seed)
    report["begun"] = ["distil"]
    write_atomically(folder / REPORT, to_json(report) + "\n")
    started = time.perf_counter()
    history = distil(model, texts.training, folder / "distil", training, shares, lambda model: {}, None, console)
    seconds = time.perf_counter() - started
    more = {"seconds": seconds, "tokens": sum(row["num_tokens"] for row in history)}
    more |= {"history": [[row["cross_entropy"], row["executed_share"], row["expected_share"]] for row in history]}
    _end_of_stage("distil", model.eval(), tokenizer, texts, report, more, console)


def _scale_at(calibration: dict[str, Any], share: float) -> float:
    from midskip.budget.calibration import Calibration

    return max(Calibration.from_dict(calibration).scale_at(share), 1e-6)


def _end_of_stage(
    stage: str, model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: Texts, report: dict[str, Any],
    more: dict[str, Any], console: Console,
) -> None:  # fmt: skip
    """Price the model, and write it and the report."""
    folder = Path(report["settings"]["output"])
    first = next(iter(texts.held_out))
    rows = calibrated_prices(model, texts.calibration, texts.held_out, first, 8, console.is_terminal)
    for place in (folder / stage, folder):
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    report["stages"][stage] = more | {"prices": rows}
    write_atomically(folder / REPORT, to_json(report) + "\n")
    console.print(price_table(rows, stage))


def price_table(rows: list[dict[str, Any]], stage: str) -> Any:
    """For a terminal."""
    texts = [name for name in rows[0] if name != "budget"]
    columns = ["budget", *(f"{name}: {what}" for name in texts for what in ("ran", "nats", "above"))]
    cells = [
        [
            f"{row['budget']:.2f}",
            *(
                cell
                for name in texts
                for cell in (
                    f"{row[name]['executed_share']:.1%}",
                    f"{row[name]['loss']:.3f}",
                    f"{row[name]['price']:+.3f}",
                )
            ),
        ]
        for row in rows
    ]
    return comparison_table(cells, columns, f"after the stage {stage!r}")
