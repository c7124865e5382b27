"""`midskip generate`: its options, and what it does."""

from __future__ import annotations

from contextlib import nullcontext

from rich.console import Console

from midskip.budget.monitor import ON_DRIFT, DriftMonitor
from midskip.commands.parser import Parser, at_least_one


def run(arguments: list[str]) -> None:
    parser = Parser("generate")
    parser.add_argument("run", help="run folder")
    parser.add_argument("--prompt", required=True, help="text to go on with")
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
    options = parser.parse_args(arguments)
    from midskip.cost import Meter
    from midskip.generate import blocks_counted, generate
    from midskip.report import TokenDepth, depth_text, legend, visible
    from midskip.runs import load_run

    model, tokenizer = load_run(options.run)
    model.set_budget(options.budget, options.max_layers)
    if options.budget is None and options.on_drift != "keep":
        raise ValueError(
            f"on_drift is {options.on_drift!r} and there is no budget whose drift to look for: add --budget"
        )
    monitor = nullcontext() if options.budget is None else DriftMonitor(model, options.on_drift)
    with monitor, Meter(model) as meter, blocks_counted(model) as blocks:
        ids = generate(
            model, tokenizer, options.prompt, options.max_new_tokens, options.temperature, options.top_k, options.seed
        )
    console, num_layers = Console(), model.config.num_skip_units
    texts = [str(tokenizer.decode([token])) for token in ids]
    text = depth_text([TokenDepth(*token) for token in zip(texts, blocks)], num_layers)
    console.print(text.append(visible(texts[-1])))  # the last one was not run
    console.print(f"{meter.executed_share:.1%} of the blocks ran")
    console.print(legend(num_layers))
