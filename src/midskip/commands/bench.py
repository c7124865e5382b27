"""`midskip bench`: its options, and what it does."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from midskip.commands.parser import Parser, add_text_field, add_trust, at_least_one, counts, numbers, text_of, words

SHAPE = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"
)  # fmt: skip


def parser() -> Parser:
    from midskip.bench import PRESETS

    lines = [f"  {name:<10} {preset.what}" for name, preset in PRESETS.items()]
    about = "presets (an option that is given wins over the preset):\n" + "\n".join(lines)
    made = Parser("bench", epilog=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--preset", help="a named set of these options, listed below")
    add(
        "--shape", type=words,
        help="some of paper (12 layers, d 768), wiki-small, small, tiny; also sets sizes and repeats (default: paper)",
    )  # fmt: skip
    for name in SHAPE:
        add(f"--{name}", type=at_least_one, help="instead of the shape's")
    about = "time the model of this run folder, with its own gates, against itself with nothing skipped"
    add("--run", type=os.path.expanduser, help=about)
    add("--data", help="with --run: text, as `midskip prepare` takes it (default: the run's held-out text)")
    add_text_field(made)
    add("--tasks", type=words, help="also trainer (optimizer steps), products (default: prefill,decode,training)")
    add("--batch_sizes", type=counts, help="sequences decoded at once (default: 1,8,32)")
    add("--shares", type=numbers, help="of block-tokens skipped (default: 0,0.25,0.5,0.75)")
    add("--dtypes", type=words, help="default: float32,bfloat16; with --run float32")
    add("--gates", type=words, help="fixed at 1, fractional, or hard ones by tokens (default: fixed,fractional)")
    add("--norms", type=words, help="sandwich, pre or both (default: sandwich)")
    add("--attention", type=words, help="auto (the library's), and beside it sdpa, padded or flex (default: auto)")
    add(
        "--torch_compile",
        action=argparse.BooleanOptionalAction,
        help="our blocks and Llama, but in decode (default: no)",
    )
    add("--prompt_tokens", type=at_least_one, help="prefilled (default: 1024)")
    add("--context_tokens", type=at_least_one, help="before decoding, and of a training sequence (default: 512)")
    add("--new_tokens", type=at_least_one, help="decoded in a stretch (default: 32)")
    add("--prompt_batch_size", type=at_least_one, help="prompts prefilled at once (default: 1)")
    add("--training_batch_size", type=at_least_one, help="sequences of a training step (default: 2)")
    add("--repeats", type=at_least_one, help="of everything, in turns (default: 9)")
    add("--seed", type=int, help="of weights, tokens, depths and turns (default: 0)")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add_trust(made)
    about = "folder for the numbers and the picture (default: %(default)s)"
    add("--output", type=Path, default=Path("runs/bench"), help=about)
    return made


def run(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    from midskip.bench import BenchSettings, bench, bench_run, last_regularizer, run_settings, with_preset
    from midskip.runs import load_run

    given: dict[str, Any] = {name: value for name, value in vars(options).items() if value is not None}
    output, run, data = given.pop("output"), given.pop("run", None), given.pop("data", None)
    trust, text_field = given.pop("trust"), given.pop("text_field", None)
    given = with_preset(given.pop("preset", None), given, of_a_run=run is not None)
    if run is None:
        if data is not None or text_field is not None:
            raise ValueError("--data and --text_field are of text for a trained model: give its run folder by --run")
        shape = {name: given.pop(name) for name in SHAPE if name in given}
        names = given.pop("shape", ("paper",))
        settings_of = {name: BenchSettings.of(name, shape, **given) for name in names}  # all are checked first
        for name, settings in settings_of.items():
            bench(settings, output / name if len(names) > 1 else output)
        return
    model, tokenizer = load_run(run, trust)
    settings = run_settings(model, Path(run).resolve().name, **given)
    windows = text_of(options, model, tokenizer, Console(stderr=True))
    bench_run(settings, model, windows, output, regularizer=last_regularizer(Path(run), trust))
