"""`midskip app`: its options, and what it does."""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path

from rich.console import Console

from midskip.commands.parser import Parser, add_trust, at_least_one


def run(arguments: list[str]) -> None:
    parser = Parser("app", epilog="Needs the extra: pip install 'midskip[app]'. It listens until Ctrl-C.")
    parser.add_argument("run", nargs="+", help="run folder; with two or more, they can be held side by side")
    parser.add_argument("--text_file", type=Path, help="a file with the text to begin with (UTF-8)")
    parser.add_argument(
        "--host", default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets everyone in who can reach this machine (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--port", type=at_least_one, help="default: the first that is free from 7860 on")
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    add_trust(parser)
    options = parser.parse_args(arguments)
    if options.port is not None and options.port > 65535:
        raise ValueError(f"port is {options.port}; expected 1 to 65535")
    if options.text_file is not None and not options.text_file.exists():
        raise ValueError(f"there is no file {str(options.text_file)!r}: give the path of a text")
    from midskip.runs import load_run

    loaded = {str(Path(folder)): load_run(folder, options.trust) for folder in options.run}
    try:
        text = None if options.text_file is None else options.text_file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the text in {str(options.text_file)!r} is not UTF-8: {error}") from error
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("`midskip app` needs gradio, which is not installed: pip install 'midskip[app]'")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported
    from midskip.app.blocks import EXAMPLE, serve
    from midskip.app.session import Session

    page, address = serve(Session(loaded), EXAMPLE if text is None else text, options.host, options.port, options.open)
    Console().print(f"{address}  (Ctrl-C ends it)", soft_wrap=True, highlight=False, markup=False)
    try:
        while True:  # Gradio's own wait swallows Ctrl-C, and the process then lives as long as a page is open
            time.sleep(1)
    finally:
        page.close(verbose=False)
