"""`midskip bench`: check every side, time all in turns, write table, picture and numbers.

B sequences, T columns.
"""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from midskip.bench.agree import Agreement, check_llama, check_ours
from midskip.bench.energy import EnergyMeter
from midskip.bench.models import Side, build_llama, build_ours, by_attention, compiled, imposed, placed, with_policy
from midskip.bench.peak import flops_per_s
from midskip.bench.results import LLAMA, case_rows, machine
from midskip.bench.settings import CHECKED_COLUMNS, CHECKED_ROWS, BenchSettings
from midskip.bench.table import case_table
from midskip.bench.tasks import Decode, Prefill, Products, Task, Training
from midskip.bench.timing import WARM_UP_TURNS, Clock
from midskip.bench.trainer import TrainerSteps
from midskip.budget.measured_on import hashes_of
from midskip.budget.monitor import not_live
from midskip.card import BENCH_FILE
from midskip.data.labelled import Items
from midskip.model.config import MidskipConfig
from midskip.model.modeling import MidskipForCausalLM
from midskip.regularizers import Regularizer
from midskip.report.speed import write_speed_picture
from midskip.report.tokens import visible
from midskip.runs import to_json, write_atomically

BENCH_PICTURE_FILE = "bench.png"
ENERGY_ROUNDS = 3
WIDTH = 140  # of tables that go to a file

Tokens = Callable[[int, int], Tensor]  # so many rows of so many columns, int64


@dataclass(frozen=True)
class _Group:
    """Sides that are compared with each other."""

    dtype: str
    norms: str
    gates: str
    config: MidskipConfig
    llamas: list[Side]
    ours: list[Side]


def bench(settings: BenchSettings, output: str | Path = "runs/bench", console: Console | None = None) -> dict[str, Any]:
    """Time models whose tokens skip an imposed share of layers against transformers' Llama of the same shape.

    Returns:
        what `bench.json` holds: machine, settings, agreement (each comparison with the reference implementation),
        energy (counters, or why there are none), a row for each side of each case, and whether these are all cases
        (`complete`), as the file says from case to case.

    Raises:
        ValueError: the output cannot be written, or the models do not fit in memory.
        DisagreementError: a side does not compute what it should; it is not timed.
    """
    config = settings.config()
    draw = torch.Generator().manual_seed(settings.seed)

    def tokens(num_rows: int, num_columns: int) -> Tensor:
        return torch.randint(config.vocab_size, (num_rows, num_columns), generator=draw).to(settings.device)

    groups_a_dtype = len(settings.norms) * len(settings.gates)
    return _Bench(settings, Path(output), console).run(_imposed_groups(settings), groups_a_dtype, tokens)


def bench_run(
    settings: BenchSettings, model: MidskipForCausalLM, windows: Items, output: str | Path = "runs/bench",
    console: Console | None = None, regularizer: Regularizer | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The same with the learned gates of a trained model, on text: against the model with nothing skipped, and Llama.

    Under a budget or a max_layers (`set_budget`) the model is timed as it then runs, and
    `limits` in what is returned says which.

    Args:
        settings: as `run_settings` gives them.
        windows: text in the model's own tokens; as many as the largest batch are used, each as one document.
        regularizer: of the run, as it ended, for the task `trainer`; by default the gates stay as they are there.

    Raises:
        ValueError: as `bench`, and too little text, more tokens than the model takes, or training under a budget.
    """
    policy, limit = model.model.policy, model.config.max_position_embeddings
    if settings.takes_gradients and (policy.score_scale, policy.max_layers) != (1.0, None):
        raise ValueError(
            "training is to be timed and the model is under a run-time budget, which is for evaluation: leave "
            '"training" and "trainer" out of the tasks, or call model.set_budget() to go back to the gates as trained'
        )
    rows = settings.most_rows
    if (columns := max(columns for _, columns in settings.sizes.values())) > limit:
        raise ValueError(
            f"{columns} tokens are asked for and the model takes at most {limit}: give smaller --prompt_tokens, "
            "--context_tokens or --new_tokens"
        )
    columns = min(settings.most_columns, limit)
    found = []
    for index in range(len(windows)):
        ids_T = windows[index]["input_ids"]
        if len(ids_T) >= columns and windows[index].get("attention_mask", ids_T[:1] + 1).all():
            found.append(ids_T[:columns])
        if len(found) == rows:
            break
    else:
        raise ValueError(
            f"the text has {len(found)} windows of {columns} tokens; {rows} are needed: give more text by --data, "
            "smaller batches, or fewer --prompt_tokens, --context_tokens or --new_tokens"
        )
    ids_WT = torch.stack(found).long().to(settings.device)
    job = _Bench(settings, Path(output), console)
    job.regularizer = regularizer
    job.result["regularizer"] = regularizer and type(regularizer).__name__
    job.result["weights"] = hashes_of(model)
    job.result["limits"] = {"score_scale": policy.score_scale, "max_layers": policy.max_layers}
    with not_live():
        return job.run(
            _trained_groups(settings, model), 1, lambda num_rows, num_columns: ids_WT[:num_rows, :num_columns]
        )


def _imposed_groups(settings: BenchSettings) -> Iterator[_Group]:
    for name in settings.dtypes:
        dtype = getattr(torch, name)
        llamas = _llamas(settings, settings.config(), dtype)
        for norms in settings.norms:
            dense = build_ours(settings, dtype, norms)
            if settings.torch_compile:
                compiled(dense)
            for gates in settings.gates:
                yield _Group(name, norms, gates, dense.config, llamas, imposed(settings, dense, gates))


def _trained_groups(settings: BenchSettings, model: MidskipForCausalLM) -> Iterator[_Group]:
    for name in settings.dtypes:
        dtype = getattr(torch, name)
        trained = placed(copy.deepcopy(model), dtype, settings.device)
        if settings.torch_compile:
            compiled(trained)
        twin = with_policy(trained, "dense", {})
        ours = by_attention([Side("dense twin", twin), Side("trained", trained)], settings.attention)
        llamas = _llamas(settings, twin.config, dtype)
        yield _Group(name, settings.norms[0], "learned", twin.config, llamas, ours)


def _llamas(settings: BenchSettings, config: MidskipConfig, dtype: torch.dtype) -> list[Side]:
    llama = build_llama(config, dtype, settings.device, settings.seed)
    if settings.torch_compile:
        compiled(llama)
    return [Side(LLAMA, llama), Side(f"{LLAMA}, static cache", llama, static=True)]


class _Bench:
    def __init__(self, settings: BenchSettings, folder: Path, console: Console | None):
        self.settings, self.folder = settings, folder
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"output is {str(folder)!r}, which is a file; expected a folder")
        settings.check_memory()
        folder.mkdir(parents=True, exist_ok=True)
        self.console = console or Console()
        if not self.console.is_terminal:
            self.console.width = max(self.console.width, WIDTH)
        self.messages = Console(stderr=True)
        self.clock, self.order = Clock(settings.device), random.Random(settings.seed)
        self.regularizer: Regularizer | None = None
        self.energy = EnergyMeter(settings.device)
        self.dtypes_seen: set[str] = set()
        self.result: dict[str, Any] = {
            "machine": machine(settings.device), "settings": settings.as_dict(), "energy": {}, "agreement": [],
            "rows": [], "complete": False,
        }  # fmt: skip

    def run(self, groups: Iterator[_Group], groups_a_dtype: int, tokens: Tokens) -> dict[str, Any]:
        columns = TextColumn("{task.description}"), BarColumn(bar_width=20), TimeRemainingColumn()
        quiet = not self.messages.is_terminal
        with Progress(*columns, console=self.messages, transient=True, disable=quiet) as bar:
            cases = len(self.settings.tasks) + ("decode" in self.settings.tasks) * (len(self.settings.batch_sizes) - 1)
            self.bar, self.job = bar, bar.add_task("", total=len(self.settings.dtypes) * groups_a_dtype * (cases + 1))
            self._say("power at rest")
            self.energy.measure_idle(self.settings.idle_s)
            self.result["energy"] = self.energy.as_dict()
            for group in groups:
                self._group(group, tokens)
                self._write()
                del group
                gc.collect()
        self._finish()
        return self.result

    def _group(self, group: _Group, tokens: Tokens) -> None:
        self._say(f"checking {group.dtype}, {group.norms} norms, gates {group.gates}")
        ids_BT = tokens(CHECKED_ROWS, CHECKED_COLUMNS)  # fewer columns of a model that takes fewer
        for side in group.ours:
            found = check_ours(side, ids_BT, gradients=self.settings.takes_gradients)
            self._agree(found, dtype_timed=group.dtype, norms=group.norms, gates=group.gates)
        if group.dtype not in self.dtypes_seen:  # Llama has no gates, and is the same beside all of ours
            self.dtypes_seen.add(group.dtype)
            for side in group.llamas:
                found = check_llama(side, group.config, ids_BT)
                self._agree(found, dtype_timed=group.dtype, norms=None, gates=None)
        self.bar.advance(self.job)
        for task in self._tasks(tokens):
            self._case(group, task)

    def _agree(self, found: list[Agreement], **case: str | None) -> None:
        self.result["agreement"] += [case | one.as_dict() for one in found]

    def _tasks(self, tokens: Tokens) -> Iterator[Task]:
        settings = self.settings
        for name in settings.tasks:
            if name in ("prefill", "products"):
                kind = Prefill if name == "prefill" else Products
                yield kind(tokens(settings.prompt_batch_size, settings.prompt_tokens))
            elif name == "training":
                yield Training(tokens(settings.training_batch_size, settings.context_tokens))
            elif name == "trainer":
                ids_BT = tokens(settings.training_batch_size, settings.context_tokens)
                yield TrainerSteps(ids_BT, self.regularizer, settings.torch_compile)
            else:
                for batch_size in settings.batch_sizes:
                    ids_BT = tokens(batch_size, settings.context_tokens + settings.new_tokens)
                    yield Decode(ids_BT, settings.new_tokens)

    def _case(self, group: _Group, task: Task) -> None:
        sides = [side for side in (*group.llamas, *group.ours) if task.is_for(side)]
        compiles = self.settings.torch_compile and task.compiles
        case = {"dtype": group.dtype, "norms": group.norms, "gates": group.gates, "compiled": compiles}
        self._say(f"{task.name} of {task.batch_size}, {group.dtype}, {group.norms} norms, gates {group.gates}")
        if compiles:
            torch.compiler.reset()  # or earlier shapes would count against torch's limit of graphs
        parts = len(sides) * (WARM_UP_TURNS + self.settings.repeats)
        stance = torch.compiler.set_stance("default" if compiles else "force_eager")
        with torch.set_grad_enabled(task.trains), stance:
            works = {side.name: task.work(side) for side in sides}
            device, repeats = self.settings.device, self.settings.repeats
            seconds = task.time(sides, repeats, self.order, device, lambda: self.bar.advance(self.job, 1 / parts))
            joules = self._joules(task, sides)
            peaks = {side.name: task.peak_bytes(side, device) for side in sides}
        peak = flops_per_s(device, getattr(torch, group.dtype))
        rows = case_rows(case, task, sides, seconds, works, joules, peaks, peak)
        self.result["rows"] += rows
        self.console.print(case_table(rows))
        self._write()

    def _joules(self, task: Task, sides: Sequence[Side]) -> dict[str, list[float]]:
        """Joules of a unit, in some rounds: stretch after stretch, what lies between them left out."""
        rounds: dict[str, list[float]] = {side.name: [] for side in sides}
        if self.energy.unavailable:
            return {}
        for _ in range(ENERGY_ROUNDS):
            for side in self.order.sample(sides, len(sides)):
                joules = duration_s = num_units = 0
                while duration_s < self.settings.energy_s:
                    step = task.begin(side)
                    self.clock.wait()
                    self.energy.start()
                    for number in range(task.num_steps):
                        step(number)
                        self.clock.wait()
                    if (used := self.energy.stop()) is None:
                        return {}
                    joules, duration_s = joules + used.joules, duration_s + used.duration_s
                    num_units += task.num_units
                rounds[side.name].append(joules / num_units)
        return rounds

    def _say(self, what: str) -> None:
        self.bar.update(self.job, description=what)
        if not self.messages.is_terminal:
            self.messages.print(what, markup=False, highlight=False)

    def _write(self) -> None:
        """What there is so far, whole or not at all. A picture that an earlier call left does not show it."""
        (self.folder / BENCH_PICTURE_FILE).unlink(missing_ok=True)
        write_atomically(self.folder / BENCH_FILE, to_json(self.result) + "\n")

    def _finish(self) -> None:
        lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for row in self.result["rows"]:
            if not row["side"].startswith(LLAMA):
                batch = f", batch {row['batch_size']}" if row["task"] == "decode" else ""
                words = [row["dtype"], row["gates"]] + [row["norms"]] * (len(self.settings.norms) > 1)
                case = lines.setdefault(row["task"], {}).setdefault(", ".join(words) + batch, [])
                case.append((row["ratios"]["llama"]["work"], row["ratios"]["llama"]["time"]))
        where = self.result["machine"]
        self.result["complete"] = True
        self._write()
        part = self.folder / f"{BENCH_PICTURE_FILE}.part"
        write_speed_picture(part, lines, where.get("gpu", where["cpu"]))
        part.replace(self.folder / BENCH_PICTURE_FILE)
        energy = self.energy
        if energy.unavailable:
            words = f"energy: unavailable: {energy.unavailable}"
        else:
            watts = ", ".join(f"{name} {value:.3g} W" for name, value in energy.as_dict()["idle_watts"].items())
            words = f"energy: joules above what is used at rest ({watts})"
            words += f"; not counted: {energy.left_out}" if energy.left_out else ""
        for line in (
            words,
            "time / work: share of Llama's time over share of Llama's FLOPs (decode: of the bytes that must be read)",
            f"numbers {self.folder / BENCH_FILE}, picture {self.folder / BENCH_PICTURE_FILE}",
        ):
            self.console.print(Text(visible(line)), soft_wrap=True)
