"""`midskip prepare`: its options, and what it does."""

from __future__ import annotations

import json

from midskip.commands.parser import Parser, at_least_one


def run(arguments: list[str]) -> None:
    parser = Parser("prepare")
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
    parser.add_argument("--vocab_size", type=at_least_one, help="tokens of bpe (default: 2048)")
    parser.add_argument("--pad_token", help="a special token for padding, as '<|pad|>' (default: the end of text)")
    parser.add_argument("--validation", help="held-out text, as SOURCE (default: a share of SOURCE's documents)")
    parser.add_argument("--validation_share", type=float, help="that share (default: 0.05)")
    parser.add_argument("--max_tokens", type=at_least_one, help="stop after so many training tokens (default: all)")
    parser.add_argument("--max_validation_tokens", type=at_least_one, help="the same for held-out text")
    parser.add_argument("--text_field", default="text", help="where records have the text (default: %(default)s)")
    parser.add_argument("--shard_tokens", type=at_least_one, help="tokens of a shard (default: 100 million)")
    options = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    from midskip.data import prepare

    print(json.dumps(prepare(**options).summary, indent=1))
