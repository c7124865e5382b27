"""`midskip generate`: its options, and what it does."""

from __future__ import annotations

import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from midskip.budget.calibration import ON_DRIFT
from midskip.commands.parser import Parser, add_trust, at_least_one

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from midskip.model.modeling import MidskipForCausalLM


def run(arguments: list[str]) -> None:
    parser = Parser("generate")
    parser.add_argument("run", help="run folder")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", help="text to go on with; - reads it from standard input")
    given.add_argument("--prompt_file", type=Path, help="a file with that text (UTF-8)")
    parser.add_argument("--max_new_tokens", type=at_least_one, default=100, help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: the most likely token (default: %(default)s)"
    )
    parser.add_argument("--top_k", type=int, default=50, help="draw among the k most likely (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument("--budget", type=float, help="share of the blocks to run, in (0, 1] (default: as trained)")
    parser.add_argument("--max_layers", type=at_least_one, help="the most blocks that a token may run (default: all)")
    parser.add_argument(
        "--on_drift", choices=ON_DRIFT, default="keep", help="if the prompt is unlike what the budget was calibrated on"
    )
    parser.add_argument(
        "--draft_budget", type=float, help="of lossless drafts, for --temperature 0 (default: nothing is drafted)"
    )
    add_trust(parser)
    options = parser.parse_args(arguments)
    options.prompt = _prompt(options)
    from midskip.budget.monitor import DriftMonitor
    from midskip.cost import Meter
    from midskip.data import token_texts
    from midskip.generate import blocks_counted, generate
    from midskip.report import TokenDepth, depth_text, legend, visible
    from midskip.runs import load_run

    model, tokenizer = load_run(options.run, options.trust)
    model.set_budget(options.budget, options.max_layers)
    if options.budget is None and options.on_drift != "keep":
        raise ValueError(
            f"on_drift is {options.on_drift!r} and there is no budget whose drift to look for: add --budget"
        )
    if options.draft_budget is not None:
        if options.budget is not None or options.max_layers is not None:
            raise ValueError("draft_budget gives what the whole model does: leave out --budget and --max_layers")
        return _with_drafts(model, tokenizer, options)
    monitor = nullcontext() if options.budget is None else DriftMonitor(model, options.on_drift)
    with monitor, Meter(model) as meter, blocks_counted(model) as blocks:
        ids = generate(
            model, tokenizer, options.prompt, options.max_new_tokens, options.temperature, options.top_k, options.seed
        )
    console, num_layers = Console(), model.config.num_skip_units
    *texts, last = token_texts(tokenizer, ids)  # the last one was not run
    tokens = [TokenDepth(text, run, part=part, num_parts=count) for (text, part, count), run in zip(texts, blocks)]
    text = depth_text(tokens, num_layers)
    console.print(text if last.part else text.append(visible(last.text)), soft_wrap=True)
    console.print(f"{meter.executed_share:.1%} of the blocks ran")
    console.print(legend(num_layers))


def _prompt(options: Namespace) -> str:
    """The text as it is, but for the line end that editors and `echo` put last."""
    if options.prompt not in (None, "-"):
        return options.prompt
    if options.prompt_file is not None and not options.prompt_file.exists():
        raise ValueError(f"there is no file {str(options.prompt_file)!r}: give the path of a text to go on with")
    place = "standard input" if options.prompt_file is None else repr(str(options.prompt_file))
    raw = sys.stdin.buffer.read() if options.prompt_file is None else options.prompt_file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt in {place} is not UTF-8 text: {error}") from error
    return text.removesuffix("\n").removesuffix("\r")


def _with_drafts(model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerBase, options: Namespace) -> None:
    """Print the text, whose tokens all ran every block, and how many were drafted and accepted."""
    from midskip.data import token_texts
    from midskip.generate import generate
    from midskip.report import print_line

    ids = generate(
        model, tokenizer, options.prompt, options.max_new_tokens, options.temperature, options.top_k, options.seed,
        options.draft_budget,
    )  # fmt: skip
    report = model.last_drafts
    assert report is not None
    console = Console()
    text = "".join(token.text for token in token_texts(tokenizer, ids) if not token.part)
    print_line(console, text)
    accepted = f"{report.num_accepted} of {report.num_drafted} drafted tokens were accepted"
    console.print(f"{accepted} ({report.accepted_share:.1%})")
    console.print(f"{report.executed_share:.1%} of the blocks ran in drafts")
