"""`midskip retrofit`: its options, and what it does."""

from __future__ import annotations

from midskip.commands.parser import Parser, at_least_one


def run(arguments: list[str]) -> None:
    parser = Parser(
        "retrofit",
        epilog="A killed retrofit goes on when the same command is given again, a fit from its beginning, a training "
        "from its last checkpoint; --distil_steps and --finetune_steps may be asked for when the stage before is done. "
        "Budgets of the result: `midskip generate OUTPUT ... --budget 0.8`.",
    )
    parser.add_argument("model", help="folder or hub name of a pretrained model of the Llama family, or a dense run")
    parser.add_argument("--data", required=True, help="text to fit and train on, as `midskip prepare` takes it")
    parser.add_argument(
        "--validation", required=True, action="append", metavar="[NAME=]TEXT",
        help="held-out text on which budgets are priced; may be given several times, the first is also calibrated on",
    )  # fmt: skip
    parser.add_argument("--text_field", default="text", help="where records have the text (default: %(default)s)")
    parser.add_argument("--output", required=True, help="folder, made if it does not exist")
    parser.add_argument(
        "--choice", choices=("tokens", "spans", "exits", "layers"), default="tokens",
        help="who skips: each layer by token; tokens that leave come back at the mirrored layer, or never; or the same "
        "layers for all, to compare (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--order", choices=("loss", "influence", "adjacent"), default="loss",
        help="with --choice layers, by what layers are left out (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--skip_unit", choices=("block", "sublayer"), default="block", help="default: %(default)s")
    parser.add_argument(
        "--skip_path", choices=("linear", "low_rank"), default="linear",
        help="what a token gets instead of a layer: a linear map (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--skip_path_rank", type=at_least_one, help="of low_rank (default: 64)")
    parser.add_argument(
        "--skipped_kv", choices=("keep", "drop"), default="keep",
        help="whether a token has keys in layers that it skips (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--shares", type=float, nargs="+", metavar="SHARE",
        help="of block-tokens, of which each step of training draws one; one alone trains for that budget",
    )  # fmt: skip
    parser.add_argument(
        "--finetune", choices=("lora", "all"), default="lora",
        help="what --finetune_steps trains: low-rank adapters, or all weights (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--max_position_embeddings", type=at_least_one, help="longest input, if not the original's")
    for name, kind, default, what in (
        (
            "outer",
            int,
            1,
            "first and as many last layers (with sublayer: halves of them) that all run; of exits, first",
        ),
        ("first_tokens", int, 2, "tokens of a sequence that run every layer"),
        ("share", float, 0.75, "of block-tokens that run without a budget"),
        ("length", at_least_one, 512, "tokens of a window"),
        ("fit_tokens", at_least_one, 22_000, "tokens of --data that the fit looks at"),
        ("price_tokens", at_least_one, 6_144, "tokens of each held-out text for prices, and as many to calibrate"),
        ("distil_steps", int, 0, "steps of training after the fit"),
        ("finetune_steps", int, 0, "steps of training the original's weights too, after those"),
        ("finetune_learning_rate", float, 1e-4, "learning rate of --finetune_steps"),
        ("lora_rank", at_least_one, 16, "rank of the adapters of --finetune lora"),
        ("batch_size", at_least_one, 4, "windows of a step"),
        ("learning_rate", float, 3e-4, "learning rate of --distil_steps for the maps"),
        ("gate_learning_rate_scale", float, 0.3, "learning rate of routers, as a factor of that of all else"),
        ("seed", int, 0, "of the order of windows and budgets"),
        ("save_steps", at_least_one, 100, "steps between two checkpoints"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{what} (default: %(default)s)")
    options = vars(parser.parse_args(arguments))
    texts, validation = options.pop("validation"), {}
    for number, text in enumerate(texts, 1):
        name, equals, rest = text.partition("=")
        named = equals and not set(name) & set("/\\.")  # else the = is part of a path
        validation[name if named else f"text {number}"] = rest if named else text
    if len(validation) < len(texts):
        raise ValueError("two held-out texts have the same name; expected names that differ, NAME=TEXT")
    if options["shares"] is None:
        del options["shares"]
    from midskip.retrofit import RetrofitSettings, retrofit

    retrofit(RetrofitSettings(**options, validation=validation))
