"""The command line: midskip demo | prepare | train | evaluate | calibrate | generate | bench."""

from __future__ import annotations

import argparse
import json
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import transformers
from rich.console import Console

from midskip.budget.monitor import ON_DRIFT, BudgetDriftError

if TYPE_CHECKING:  # else `--help` would wait for them
    from transformers import PreTrainedTokenizerBase

    from midskip.data import TokenWindows
    from midskip.model.modeling import MidskipForCausalLM

COMMANDS = {
    "demo": "train a gated model, and a dense one of its FLOPs, in minutes, and compare them",
    "prepare": "turn text into shards of tokens",
    "train": "train a model from a recipe",
    "evaluate": "loss and work of a trained model on text",
    "calibrate": "measure what a budget at run time costs, and save it with the model",
    "generate": "go on with a prompt, coloured by the depth each token used",
    "bench": "time prefill, decode and training against Llama of the same shape, with the work that really ran",
}

HELD_OUT = "held-out text of the run"
_SHAPE = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 for a run that failed, 2 for input that cannot be used."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
        print("usage: midskip COMMAND ...\n\n" + "\n".join(lines) + "\n\n`midskip COMMAND --help` tells more.")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        return _fail(f"there is no command {command!r}; expected one of {', '.join(COMMANDS)}", 2)
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a recipe's own policy or regularizer may lie beside it
    transformers.utils.logging.disable_progress_bar()  # of loading and saving, which take no time here
    transformers.utils.logging.set_verbosity_error()
    try:
        {
            "demo": _demo,
            "prepare": _prepare,
            "train": _train,
            "evaluate": _evaluate,
            "calibrate": _calibrate,
            "generate": _generate,
            "bench": _bench,
        }[command](rest)
    except (ValueError, OSError) as error:
        return _fail(str(error), 2)
    except (FloatingPointError, BudgetDriftError) as error:
        return _fail(str(error), 1)
    except RuntimeError as error:
        from midskip.bench import DisagreementError

        if not isinstance(error, DisagreementError):
            raise
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def _fail(message: str, status: int) -> int:
    from midskip.report import visible

    line = visible("midskip: error: " + re.sub(r"\s*\n\s*", " ", message))
    Console(stderr=True).print(line, style="red", markup=False, highlight=False, emoji=False, soft_wrap=True)
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; `{self.prog} --help` tells more")


def _demo(arguments: list[str]) -> None:
    parser = _Parser("midskip demo", description=COMMANDS["demo"], allow_abbrev=False)
    parser.add_argument("--output", default="runs/demo", help="run folder (default: %(default)s)")
    parser.add_argument("--steps", type=_at_least_one, default=500, help="steps of each model (default: %(default)s)")
    parser.add_argument(
        "--source", default="pydocs", help="pydocs, a text file or a folder of .txt (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    from midskip.demo import demo

    demo(options.output, options.steps, options.source)


def _prepare(arguments: list[str]) -> None:
    parser = _Parser("midskip prepare", description=COMMANDS["prepare"], allow_abbrev=False)
    parser.add_argument(
        "source",
        help="pydocs; .txt, .jsonl (both also .gz or .xz) or .parquet, as files, folders or globs joined by commas; "
        "hub:NAME[:CONFIG[:SPLIT]]",
    )
    parser.add_argument("--output", required=True, help="folder for the shards")
    parser.add_argument(
        "--tokenizer",
        default="bpe",
        help="bpe (byte-level, trained on the text), bytes, or a Hugging Face one by folder or name (default: bpe)",
    )
    parser.add_argument("--vocab_size", type=_at_least_one, help="tokens of bpe (default: 2048)")
    parser.add_argument("--validation", help="held-out text, as SOURCE (default: a share of SOURCE's documents)")
    parser.add_argument("--validation_share", type=float, help="that share (default: 0.05)")
    parser.add_argument("--max_tokens", type=_at_least_one, help="stop after so many training tokens (default: all)")
    parser.add_argument("--max_validation_tokens", type=_at_least_one, help="the same for held-out text")
    parser.add_argument("--text_field", default="text", help="where records have the text (default: %(default)s)")
    parser.add_argument("--shard_tokens", type=_at_least_one, help="tokens of a shard (default: 100 million)")
    options = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    from midskip.data import prepare

    print(json.dumps(prepare(**options).summary, indent=1))


def _train(arguments: list[str]) -> None:
    from midskip.runs import to_json
    from midskip.train.recipe import read_recipe, recipe_parser
    from midskip.train.run import train

    parser = _Parser(
        "midskip train",
        usage="%(prog)s RECIPE.yaml [--resume [--accept_changes]] [--group.setting=value ...]",
        epilog="On several devices: torchrun --nproc-per-node=N -m midskip.cli train ...",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="a YAML file; the folder recipes has some")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest complete checkpoint in the output folder"
    )
    parser.add_argument(
        "--accept_changes",
        action="store_true",
        help="go on although the recipe or the text is not what the run began with",
    )
    if "-h" in arguments or "--help" in arguments:
        parser.print_help()
        print()
        recipe_parser().print_help()
        return
    options, settings = parser.parse_known_args(arguments)
    report = train(read_recipe(options.recipe, settings), options.resume, options.accept_changes)
    if report:  # of the first process
        print(to_json(report))


def _evaluate(arguments: list[str]) -> None:
    parser = _Parser(
        "midskip evaluate",
        description=COMMANDS["evaluate"],
        epilog="On several devices: torchrun --nproc-per-node=N -m midskip.cli evaluate ...",
        allow_abbrev=False,
    )
    _add_text(parser)
    parser.add_argument("--output", type=Path, help="also write the numbers to this file")
    parser.add_argument(
        "--budgets", type=_numbers, help="shares of blocks, as 0.3,0.5,1: also loss at each, beside the calibration's"
    )
    parser.add_argument("--picture", type=Path, help="with --budgets: also draw loss against the share that ran (PNG)")
    options = parser.parse_args(arguments)
    if options.picture and not options.budgets:
        raise ValueError("--picture draws loss at several budgets: give --budgets too")
    if options.picture and not options.picture.parent.is_dir():
        raise ValueError(f"there is no folder {str(options.picture.parent)!r} to draw the picture into: make it first")
    from midskip.budget.calibrate import factors_for, loss_by_budget
    from midskip.data import DataError, token_bytes
    from midskip.evaluate import evaluate, joined_ranks
    from midskip.report import budget_table, write_curves
    from midskip.runs import load_run, to_json

    with joined_ranks() as rank:
        model, tokenizer = load_run(options.run)
        calibration = factors_for(model, options.budgets)[0] if options.budgets else None
        console = Console(stderr=True, quiet=rank > 0)
        windows = _text(options, model, tokenizer, console)
        num_bytes = None
        with suppress(DataError):  # not every kind of tokenizer tells
            num_bytes = token_bytes(tokenizer)
        result = evaluate(model, windows, num_bytes, options.batch_size, progress=True)
        if calibration:
            result["budgets"] = loss_by_budget(model, windows, options.budgets, options.batch_size, progress=True)
    if rank:
        return
    numbers = to_json(result)
    print(numbers)
    if options.output:
        options.output.write_text(numbers + "\n", encoding="utf-8")
    if calibration:
        console.print(budget_table(result["budgets"], options.data or HELD_OUT))
    if calibration and options.picture:
        here = [(row["executed_share"], row["loss"]) for row in result["budgets"]]
        there = list(zip(calibration.share, calibration.loss, strict=True))
        write_curves(options.picture, [(calibration.text, there), (options.data or HELD_OUT, here)])


def _calibrate(arguments: list[str]) -> None:
    parser = _Parser(
        "midskip calibrate",
        description=COMMANDS["calibrate"],
        epilog="Windows are as long as the model takes. Prompts much shorter than that have a higher loss than a "
        "calibration on them expects, and look like drift: for those give --data of documents as short, which are kept "
        "apart.",
        allow_abbrev=False,
    )
    _add_text(parser, ", but text like the prompts to come is best")
    parser.add_argument("--name", help="what to call the text in reports and warnings (default: DATA)")
    parser.add_argument(
        "--lowest", type=float, default=0.1, help="share of blocks below which to stop (default: %(default)s)"
    )
    parser.add_argument(
        "--max_tokens", type=_at_least_one, default=2**16,
        help="of the text, evenly spread; it is read some 20 to 40 times (default: %(default)s)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    from midskip.budget.calibrate import calibrate, check_settings, save_calibration, thinned
    from midskip.evaluate import joined_ranks
    from midskip.report import calibration_table
    from midskip.runs import load_run, to_json

    with joined_ranks():
        model, tokenizer = load_run(options.run)
        check_settings(model, options.lowest)
        console = Console(stderr=True)
        windows = thinned(_text(options, model, tokenizer, console), options.max_tokens)
        name = options.name or options.data or HELD_OUT
        calibration = calibrate(
            model, windows, name, lowest=options.lowest, batch_size=options.batch_size, progress=True
        )
    save_calibration(options.run, calibration)
    print(to_json(calibration.to_dict()))
    console.print(calibration_table(calibration))


def _add_text(parser: argparse.ArgumentParser, more: str = "") -> None:
    parser.add_argument("run", help="run folder")
    parser.add_argument(
        "--data",
        help=f"text, as `midskip prepare` takes it, all of it used; by default the run's own held-out text{more}",
    )
    parser.add_argument("--batch_size", type=_at_least_one, default=8, help="windows a pass (default: %(default)s)")


def _text(
    options: argparse.Namespace, model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerBase, console: Console
) -> TokenWindows:
    """The text that the options of `_add_text` name."""
    from midskip.data import TokenWindows, encode_source, end_of_text_id
    from midskip.runs import RECIPE_FILE
    from midskip.train.recipe import DataSettings, read_recipe
    from midskip.train.text import cut_windows, open_text

    recipe_file = Path(options.run) / RECIPE_FILE
    if options.data is None and not recipe_file.is_file():
        raise ValueError(f"{options.run!r} has no {RECIPE_FILE} that names its held-out text: give text by --data")
    settings = read_recipe(recipe_file).data if recipe_file.is_file() else DataSettings()
    if options.data is None:
        return cut_windows(open_text(settings, Path(options.run), console), settings)[1]
    ids = encode_source(tokenizer, options.data, console=console)
    end_of_text = end_of_text_id(tokenizer) if settings.separate_documents else None
    return TokenWindows(ids, model.config.max_position_embeddings, drop_last=False, end_of_text=end_of_text)


def _generate(arguments: list[str]) -> None:
    parser = _Parser("midskip generate", description=COMMANDS["generate"], allow_abbrev=False)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--prompt", required=True, help="text to go on with")
    parser.add_argument("--max_new_tokens", type=_at_least_one, default=100, help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: the most likely token (default: %(default)s)"
    )
    parser.add_argument("--top_k", type=int, default=50, help="draw among the k most likely (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument("--budget", type=float, help="share of the blocks to run, in (0, 1] (default: as trained)")
    parser.add_argument("--ceiling", type=_at_least_one, help="the most blocks that a token may run (default: all)")
    parser.add_argument(
        "--on_drift", choices=ON_DRIFT, default="keep", help="if the prompt is unlike what the budget was calibrated on"
    )
    options = parser.parse_args(arguments)
    from midskip.cost import Meter
    from midskip.generate import blocks_counted, generate
    from midskip.report import TokenDepth, depth_text, legend, visible
    from midskip.runs import load_run

    model, tokenizer = load_run(options.run)
    model.set_budget(options.budget, options.ceiling, options.on_drift)
    with Meter(model) as meter, blocks_counted(model) as blocks:
        ids = generate(
            model, tokenizer, options.prompt, options.max_new_tokens, options.temperature, options.top_k, options.seed
        )
    console, num_layers = Console(), model.config.num_hidden_layers
    texts = [str(tokenizer.decode([token])) for token in ids]
    text = depth_text([TokenDepth(*token) for token in zip(texts, blocks)], num_layers)
    console.print(text.append(visible(texts[-1])))  # the last one was not run
    console.print(f"{meter.executed_share:.1%} of the blocks ran")
    console.print(legend(num_layers))


def _bench(arguments: list[str]) -> None:
    parser = _Parser("midskip bench", description=COMMANDS["bench"], allow_abbrev=False)
    add = parser.add_argument
    add("--shape", help="paper (12 layers, d 768), small or tiny; also sets sizes and repeats (default: paper)")
    for name in _SHAPE:
        add(f"--{name}", type=_at_least_one, help="instead of the shape's")
    add("--run", help="time the model of this run folder, with its own gates, against itself with nothing skipped")
    add("--data", help="with --run: text, as `midskip prepare` takes it (default: the run's held-out text)")
    add("--tasks", type=_words, help="default: prefill,decode,training")
    add("--batch_sizes", type=_counts, help="sequences decoded at once (default: 1,8,32)")
    add("--shares", type=_numbers, help="of block-tokens skipped (default: 0,0.25,0.5,0.75)")
    add("--dtypes", type=_words, help="default: float32,bfloat16; with --run float32")
    add("--gates", type=_words, help="fixed at 1, fractional, or hard ones by tokens (default: fixed,fractional)")
    add("--norms", help="sandwich or pre (default: sandwich)")
    add("--prompt_tokens", type=_at_least_one, help="prefilled (default: 1024)")
    add("--context_tokens", type=_at_least_one, help="before decoding, and of a training sequence (default: 512)")
    add("--new_tokens", type=_at_least_one, help="decoded in a stretch (default: 32)")
    add("--prompt_batch_size", type=_at_least_one, help="prompts prefilled at once (default: 1)")
    add("--training_batch_size", type=_at_least_one, help="sequences of a training step (default: 2)")
    add("--repeats", type=_at_least_one, help="of everything, in turns (default: 9)")
    add("--seed", type=int, help="of weights, tokens, depths and turns (default: 0)")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--output", default="runs/bench", help="folder for the numbers and the picture (default: %(default)s)")
    options = parser.parse_args(arguments)
    from midskip.bench import BenchSettings, bench, bench_run, run_settings
    from midskip.runs import load_run

    given = {name: value for name, value in vars(options).items() if value is not None}
    output, run, data = given.pop("output"), given.pop("run", None), given.pop("data", None)
    if run is None:
        if data is not None:
            raise ValueError("--data is text for a trained model: give its run folder by --run")
        shape = {name: given.pop(name) for name in _SHAPE if name in given}
        bench(BenchSettings.of(given.pop("shape", "paper"), shape, **given), output)
        return
    model, tokenizer = load_run(run)
    settings = run_settings(model, Path(run).resolve().name, **given)
    bench_run(settings, model, _text(options, model, tokenizer, Console(stderr=True)), output)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_at_least_one(part) for part in text.split(","))


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
