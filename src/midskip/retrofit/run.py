"""A retrofit, from a pretrained model to a folder with one that skips, stage by stage."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from shutil import rmtree as remove_folder
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from midskip.budget.calibration import Calibration
from midskip.card import RETROFIT_FILE, try_card
from midskip.data import TokenWindows, encode_source
from midskip.data.sources import Source, require_apart
from midskip.distributed import num_launched
from midskip.locks import LOCK_FILE, locked
from midskip.model.modeling import MidskipForCausalLM
from midskip.report import comparison_table
from midskip.retrofit.distil import distil
from midskip.retrofit.fit import fit
from midskip.retrofit.load import load_to_skip
from midskip.retrofit.price import calibrated_prices
from midskip.retrofit.settings import OF_STAGE, RetrofitSettings
from midskip.retrofit.shares import DrawnShares
from midskip.runs import save_whole, to_json, write_atomically

CHECKPOINTS = "checkpoints"


def retrofit(settings: RetrofitSettings, console: Console | None = None) -> dict[str, Any]:
    """Run the stages that are not done yet; what budgets cost after each is printed.

    Returns:
        What is in `retrofit.json`: `settings`; `from_hub`, whether the model has its name from there; `texts`, a
        checksum of the tokens of each; and in `stages`, by name of those that are done, `seconds` and what budgets cost
        after it (`prices`).

    Raises:
        ValueError: a model, text or setting that does not fit; an output that holds something else, or a retrofit with
            other settings or of other text, or is written by another process; several processes.
    """
    console = console or Console(stderr=True)
    folder = Path(settings.output)
    report = _begun(folder, settings)
    if num_launched() > 1:
        raise ValueError("a retrofit runs in one process, and there are several: start it without torchrun")
    for stage in report["stages"]:
        console.print(price_table(report["stages"][stage]["prices"], stage))
    if all(stage in report["stages"] for stage in settings.stages()):
        if (folder / CHECKPOINTS).exists() or (folder / LOCK_FILE).exists():  # of one that was killed at its very end
            with suppress(ValueError, OSError), locked(folder):
                for stage in report["stages"]:
                    remove_folder(folder / CHECKPOINTS / stage, ignore_errors=True)
                (folder / CHECKPOINTS).rmdir()  # unless a further stage has begun
        return report
    with locked(folder):
        return _run(settings, _begun(folder, settings), console)


def _run(settings: RetrofitSettings, report: dict[str, Any], console: Console) -> dict[str, Any]:
    """The stages that are not done, in a folder that is checked and locked."""
    folder = Path(settings.output)
    if report["stages"]:
        newest = folder / list(report["stages"])[-1]
        model = MidskipForCausalLM.from_pretrained(newest).eval()
        tokenizer = AutoTokenizer.from_pretrained(newest, trust_remote_code=False)
    else:
        model, tokenizer = load_to_skip(settings.model, settings.changes())
    for parameter in model.parameters():  # mapped from a file they are aligned otherwise, and kernels round otherwise
        parameter.data = parameter.data.clone()
    settings.check_layers(model.config.num_skip_units)
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # pyright: ignore[reportArgumentType, reportCallIssue]
    texts = Texts(settings, tokenizer, model.config.max_position_embeddings, console)
    report.setdefault("from_hub", not Path(settings.model).exists())
    if report["stages"] or any((folder / CHECKPOINTS / stage).exists() for stage in OF_STAGE):
        _check_same(texts, report.get("texts", {}), settings)
    report["texts"] = texts.checksums
    write_atomically(folder / RETROFIT_FILE, to_json(report) + "\n")
    for stage in settings.stages():
        if stage in report["stages"]:
            continue
        if stage == "fit":
            more = _fit(model, texts, settings)
        else:
            more = _train(stage, model, texts, settings, folder / CHECKPOINTS / stage, console)
        _finish(stage, model.eval(), tokenizer, texts, settings, report, more, console)
        remove_folder(folder / CHECKPOINTS, ignore_errors=True)
    return report


def _begun(folder: Path, settings: RetrofitSettings) -> dict[str, Any]:
    """The report in the folder, if it was begun with the same settings."""
    file = folder / RETROFIT_FILE
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output is {str(folder)!r}, which is a file; expected a folder")
    if not file.is_file():
        left = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if left - {LOCK_FILE, f"{RETROFIT_FILE}.part"}:  # of one that did not come to its first stage
            raise ValueError(f"output is {str(folder)!r}, which holds other files; give a new or empty folder")
        return {"settings": asdict(settings), "stages": {}}
    begun = [stage for stage in OF_STAGE if (folder / CHECKPOINTS / stage).exists()]
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        changed = settings.changed(report["settings"], [*report["stages"], *begun])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(file)!r} cannot be read ({error}): remove the folder, or give another") from error
    if changed:
        raise ValueError(
            f"{str(folder)!r} holds a retrofit with other settings ({'; '.join(changed)}): give another --output, or "
            "the settings that it was begun with; a stage that is not done begins anew if its folder in "
            f"{str(folder / CHECKPOINTS)!r} is removed"
        )
    return report | {"settings": asdict(settings)}


def _check_same(texts: Texts, before: dict[str, str], settings: RetrofitSettings) -> None:
    """Raises ValueError if a text is another than it was: losses before and after would not be of the same."""
    for name, checksum in texts.checksums.items():
        if before.get(name, checksum) != checksum:
            raise ValueError(
                f"the text of {name} has changed since the retrofit in {settings.output!r} began, and prices of its "
                "stages would be of different text: put it back as it was, or give another --output"
            )


class Texts:
    """Windows of all texts, read and checked before anything long begins.

    Attributes:
        training: windows of `data`; fitting: some of them, evenly spread.
        held_out: windows by name of the text; calibration: others of the first.
        checksums: SHA-256 of the tokens of each text.
    """

    def __init__(self, settings: RetrofitSettings, tokenizer: PreTrainedTokenizerBase, limit: int, console: Console):
        length = settings.length
        if length > limit:
            raise ValueError(f"length is {length}; the model takes at most {limit} tokens: give --length less")
        training = Source(settings.data, settings.text_field)
        for source in settings.validation.values():
            require_apart(training, Source(source, settings.text_field), "give --validation text that is held out")
        count = max(2, settings.fit_tokens // length)
        self.checksums: dict[str, str] = {}
        self.training = self._windows("data", settings.data, count, settings, tokenizer, console)
        step = len(self.training) // count
        self.fitting = [self.training[row * step] for row in range(count)]
        self.held_out: dict[str, list[Any]] = {}
        self.calibration: list[Any] = []
        count = 2 * (settings.price_tokens // length)
        for name, source in settings.validation.items():
            windows = self._windows(f"validation {name}", source, count, settings, tokenizer, console)
            if self.checksums[f"validation {name}"] == self.checksums["data"]:
                raise ValueError(
                    f"{source!r} holds the same text as {settings.data!r}: give --validation text that is held out"
                )
            rows = [windows[row * len(windows) // count] for row in range(count)]
            self.held_out[name] = rows[::2]
            self.calibration = self.calibration or rows[1::2]

    def _windows(
        self, name: str, source: str, count: int, settings: RetrofitSettings, tokenizer: PreTrainedTokenizerBase,
        console: Console,
    ) -> TokenWindows:  # fmt: skip
        """Of a text that has `count` of them."""
        ids, length = encode_source(tokenizer, source, settings.text_field, console), settings.length
        if len(ids) < count * length:
            raise ValueError(
                f"{source!r} has {len(ids)} tokens; expected at least {count * length}, {count} windows of {length}: "
                "give more text, or ask for fewer tokens (--fit_tokens, --price_tokens)"
            )
        self.checksums[name] = sha256(ids.data).hexdigest()
        return TokenWindows(ids, length)


def _fit(model: MidskipForCausalLM, texts: Texts, settings: RetrofitSettings) -> dict[str, Any]:
    started = time.perf_counter()
    found = fit(
        model, texts.fitting, choice="layers" if settings.choice == "layers" else "tokens", order=settings.order,
        outer=settings.outer, share=settings.share, progress=True,
    )  # fmt: skip
    return {"seconds": time.perf_counter() - started, "layers": asdict(found)}


def _train(
    stage: str, model: MidskipForCausalLM, texts: Texts, settings: RetrofitSettings, folder: Path, console: Console
) -> dict[str, Any]:
    calibration = Calibration.from_dict(model.config.calibration)
    shares = list(settings.trained_shares(model.config.num_skip_units))
    trainable = "skips" if stage == "distil" else settings.finetune
    if trainable != "skips" and 1.0 not in shares:
        shares.append(1.0)  # which moves with the weights
    scales = [max(calibration.scale_at(share), 1e-6) for share in shares]
    drawn = DrawnShares(model.config.num_skip_units, shares, scales, settings.seed)
    history = distil(
        model, texts.training, folder, settings.training(stage), drawn, console, trainable, settings.lora_rank
    )
    names = ("cross_entropy", "executed_share", "expected_share")
    return {
        "seconds": history[-1]["seconds"],
        "tokens": sum(row["num_tokens"] for row in history),
        "history": [[row[name] for name in names] for row in history],
    }


def _finish(
    stage: str, model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: Texts, settings: RetrofitSettings,
    report: dict[str, Any], more: dict[str, Any], console: Console,
) -> None:  # fmt: skip
    """Price the model, and write it and the report."""
    folder = Path(settings.output)
    first, original = next(iter(texts.held_out)), None
    if "fit" in report["stages"]:
        whole = report["stages"]["fit"]["prices"][0]["texts"]
        original = {name: whole[name]["loss"] for name in texts.held_out}
    shares = settings.trained_shares(model.config.num_skip_units)
    rows = calibrated_prices(model, texts.calibration, texts.held_out, first, original, shares)
    for place in (folder / stage, folder):
        save_whole(place, model, tokenizer)
    report["stages"][stage] = more | {"prices": rows}
    try_card(folder, model, retrofit=report)
    write_atomically(folder / RETROFIT_FILE, to_json(report) + "\n")  # last: then the stage is done
    console.print(price_table(rows, stage))


def price_table(rows: list[dict[str, Any]], stage: str) -> Table:
    """For a terminal. FLOPs are shares of those of budget 1.0, head, maps and routers included."""
    columns = ["budget"]
    columns += [f"{name}: {what}" for name in rows[0]["texts"] for what in ("ran", "FLOPs", "nats", "above")]
    cells = []
    for row in rows:
        cells.append([f"{row['budget']:g}"])
        for name, found in row["texts"].items():
            flops = found["flops_per_token"] / rows[0]["texts"][name]["flops_per_token"]
            cells[-1] += [f"{found['executed_share']:.1%}", f"{flops:.1%}"]
            cells[-1] += [f"{found['loss']:.3f}", f"{found['price']:+.3f}"]
    return comparison_table(cells, columns, f"after the stage {stage!r}")
