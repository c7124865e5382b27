"""The page, in Gradio: what there is to set, what is shown, and what happens when."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]

from midskip.app.session import Choices, Limits, Seen, Session, clean
from midskip.app.style import SCRIPT, style
from midskip.app.view import HINT, charts_html, picked_html, stream_html, view_html
from midskip.data.token_text import token_texts
from midskip.look.stream import text_of_new
from midskip.report import TokenDepth, safe

EXAMPLE = "The function returns a new list of all the words in the file, sorted by how often each of them is used."
PICK = "Point at a token to see its numbers. Click it, or press Enter on it, to run it at other depths."
REDRAW_S = 0.1  # between two pictures of text that is being written


@dataclass(frozen=True)
class Pane:
    """One of the two sides."""

    column: Any
    run: Any
    trained: Any
    budget: Any
    ceiling: Any
    why: Any
    view: Any
    picked: Any
    charts: Any
    seen: Any

    @property
    def settings(self) -> list[Any]:
        return [self.run, self.trained, self.budget, self.ceiling]

    @property
    def shown(self) -> list[Any]:
        return [self.view, self.seen, self.picked, self.charts]


def build(session: Session, text: str = EXAMPLE) -> Any:
    """The page, as gr.Blocks: the first run on the left; on the right, once it is asked for, the second, or the first
    again."""
    names = list(session.runs)
    with gr.Blocks(title="midskip", analytics_enabled=False) as page:
        gr.Markdown("## Where does the model spend its depth?")
        box = gr.Textbox(text, label="Text", lines=3, max_lines=12, elem_id="ms-box", autofocus=True)
        with gr.Row():
            go_on = gr.Button(
                "Go on with this text", variant="primary", size="sm", scale=0, min_width=220, elem_id="ms-go-on"
            )
            stop = gr.Button("Stop", size="sm", scale=0, min_width=120, elem_id="ms-stop")
            both = gr.Checkbox(False, label="Side by side", elem_id="ms-both", container=False)
        with gr.Accordion("How it goes on", open=False), gr.Row():
            count = gr.Slider(1, 400, 80, step=1, label="New tokens")
            temperature = gr.Slider(0, 1.5, 0.8, step=0.05, label="Temperature (0: the most likely token)")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53)
        with gr.Row():
            left = _pane(session, names, names[0], "a", visible=True)
            right = _pane(session, names, names[min(1, len(names) - 1)], "b", visible=False)

        for pane in (left, right):
            _connect(session, pane, box)
        redraw_right = {"fn": _seer(session), "inputs": [box, *right.settings], "outputs": right.shown}
        gr.on(
            [page.load, box.change], _seer(session), [box, *left.settings], left.shown,
            trigger_mode="always_last", show_progress="hidden",
        )  # fmt: skip

        def if_shown(shown: bool, *given: Any) -> Any:
            return _seer(session)(*given) if shown else (gr.skip(),) * 4

        box.change(
            if_shown, [both, box, *right.settings], right.shown, trigger_mode="always_last", show_progress="hidden"
        )
        both.change(lambda shown: gr.Column(visible=shown), both, right.column).then(**redraw_right)

        def write(*given: Any) -> Iterator[Any]:
            yield from _write(session, *given)

        written = gr.State(None)  # the text and what was added to it, while it is written
        writing = go_on.click(
            write, [box, *left.settings, count, temperature, seed], [*left.shown, written], show_progress="hidden"
        )
        for ended in (writing, stop.click(None, cancels=[writing])):
            kept = ended.then(_keep, [box, written], [box, written])
            kept.then(_seer(session), [box, *left.settings], left.shown)
    return page


def _pane(session: Session, names: list[str], name: str, side: str, visible: bool) -> Pane:
    choices = session.choices[name]
    with gr.Column(visible=visible, min_width=320, elem_id=f"ms-{side}") as column:
        run = gr.Dropdown(names, value=name, label="Run", visible=len(names) > 1)
        with gr.Row():
            with gr.Column(min_width=200):
                trained = gr.Checkbox(True, label="As trained", elem_id=f"ms-trained-{side}", **_of_trained(choices))
                budget = gr.Slider(**_of_budget(choices), elem_id=f"ms-budget-{side}")
            ceiling = gr.Slider(**_of_ceiling(choices), elem_id=f"ms-ceiling-{side}")
        why = gr.HTML(_why(choices), visible=bool(choices.why))
        view = gr.HTML(f"<p class=ms-hint>{HINT}</p>", js_on_load=SCRIPT, elem_id=f"ms-view-{side}")
        picked = gr.HTML(f"<p class=ms-hint>{PICK}</p>", js_on_load=None, elem_id=f"ms-picked-{side}")
        charts = gr.HTML("", js_on_load=None, elem_id=f"ms-charts-{side}")
        seen = gr.State(None)
    return Pane(column, run, trained, budget, ceiling, why, view, picked, charts, seen)


def _why(choices: Choices) -> str:
    return f"<p class=ms-hint>{safe(choices.why)}</p>" if choices.why else ""


def _of_trained(choices: Choices) -> dict[str, Any]:
    return {"interactive": choices.lowest is not None or choices.adjustable}


def _of_budget(choices: Choices) -> dict[str, Any]:
    lowest = choices.lowest or 0.0
    return {
        "minimum": round(lowest + 0.005, 2), "maximum": 1, "value": 1, "step": 0.01,
        "label": "Budget: share of blocks, on average", "interactive": choices.lowest is not None,
    }  # fmt: skip


def _of_ceiling(choices: Choices) -> dict[str, Any]:
    return {
        "minimum": 1, "maximum": choices.num_layers, "value": choices.num_layers, "step": 1,
        "label": "Ceiling: the most blocks of a token", "interactive": choices.adjustable,
    }  # fmt: skip


def _limits(session: Session, run: str, trained: bool, budget: float, ceiling: int) -> Limits:
    choices = session.choices[run]
    if trained:
        return Limits(run)
    free = choices.lowest is None
    open_ = not choices.adjustable or ceiling >= choices.num_layers
    return Limits(
        run,
        None if free else min(1.0, max(choices.lowest or 0.0, float(budget))),
        None if open_ else max(1, int(ceiling)),
    )


def _seer(session: Session) -> Any:
    def see(text: str, run: str, trained: bool, budget: float, ceiling: int) -> tuple[str, Seen | None, str, str]:
        seen = session.see(text or "", _limits(session, run, trained, budget, ceiling))
        return view_html(seen), seen, f"<p class=ms-hint>{PICK}</p>", charts_html(seen)

    return see


def _connect(session: Session, pane: Pane, box: Any) -> None:
    see = _seer(session)
    quick = {"trigger_mode": "always_last", "show_progress": "hidden"}

    def budget_moved(text: str, run: str, budget: float, ceiling: int) -> tuple[Any, ...]:
        return (False, *see(text, run, False, budget, ceiling))

    pane.budget.input(
        budget_moved, [box, pane.run, pane.budget, pane.ceiling], [pane.trained, *pane.shown], **quick
    )  # fmt: skip

    def moved(before: Seen | None, text: str, *settings: Any) -> tuple[Any, ...]:
        if session.is_seen(before, text or "", _limits(session, *settings)):
            return (gr.skip(),) * 4  # nothing was changed: what is picked stays
        return see(text, *settings)

    def ceiling_moved(before: Seen | None, text: str, run: str, trained: bool, *sliders: Any) -> tuple[Any, ...]:
        found = moved(before, text, run, False, *sliders)
        return (gr.skip() if found[0] == gr.skip() else False, *found)

    pane.trained.input(moved, [pane.seen, box, *pane.settings], pane.shown, **quick)
    pane.ceiling.input(ceiling_moved, [pane.seen, box, *pane.settings], [pane.trained, *pane.shown], **quick)

    def run_changed(run: str) -> tuple[Any, ...]:
        choices = session.choices[run]
        why = gr.HTML(_why(choices), visible=bool(choices.why))
        trained = gr.Checkbox(True, **_of_trained(choices))
        return trained, gr.Slider(**_of_budget(choices)), gr.Slider(**_of_ceiling(choices)), why

    # not `input`, which comes whenever the keyboard leaves the list too
    pane.run.change(run_changed, pane.run, [pane.trained, pane.budget, pane.ceiling, pane.why]).then(
        moved, [pane.seen, box, *pane.settings], pane.shown
    )

    def pick(seen: Seen | None, event: gr.SelectData) -> str:
        number = event.index
        if seen is None or not isinstance(number, int) or not 0 <= number < len(seen.look.tokens):
            return f"<p class=ms-hint>{PICK}</p>"
        return picked_html(seen, number, session.what_if(seen, number))

    pane.view.select(pick, pane.seen, pane.picked, **quick)


def _write(
    session: Session, text: str, run: str, trained: bool, budget: float, ceiling: int, count: float,
    temperature: float, seed: float | None,
) -> Iterator[tuple[Any, ...]]:  # fmt: skip
    """The view as tokens come, and the text before and after; that goes into the box when all is written."""
    text, limits, whole = clean(text), _limits(session, run, trained, budget, ceiling), ""
    tokenizer, num_layers = session.runs[run][1], session.choices[run].num_layers
    prompt, left_out = session.prompt(text, run, int(count))
    drawn, steps = 0.0, session.go_on(prompt, limits, int(count), float(temperature), int(seed or 0)) if prompt else ()
    for ids, blocks in steps:
        whole = text + text_of_new(tokenizer, ids, len(prompt))
        if time.monotonic() - drawn < REDRAW_S:
            continue
        drawn = time.monotonic()
        texts = token_texts(tokenizer, ids)
        tokens = [TokenDepth(one.text, ran, part=one.part, num_parts=one.num_parts) for one, ran in zip(texts, blocks)]
        yield stream_html(tokens, num_layers, left_out), None, "", gr.skip(), (text, whole)
    yield *(gr.skip(),) * 4, (text, whole)


def _keep(text: str, written: tuple[str, str] | None) -> tuple[Any, None]:
    """What was written, whole or until it was stopped, unless the text was changed meanwhile."""
    return (written[1] if written is not None and clean(text) == written[0] else gr.skip()), None


def serve(session: Session, text: str, host: str, port: int | None, in_browser: bool) -> tuple[Any, str]:
    """Start to listen, and return the page and its address. Nothing is asked for from anywhere else."""
    font = ["sans-serif"]
    theme = gr.themes.Default(font=font, font_mono=["monospace"])  # system fonts  # pyright: ignore[reportPrivateImportUsage]
    try:
        # of another machine's address Gradio would try one port after the other
        family, *_, own = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        socket.create_server(own[:2], family=family).close()
        page = build(session, text)
        _, address, _ = page.launch(
            server_name=host, server_port=port, inbrowser=in_browser, share=False, prevent_thread_lock=True, quiet=True,
            footer_links=[], ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False, show_error=True,
            theme=theme, css=style(choices.num_layers for choices in session.choices.values()),
        )  # fmt: skip
    except OSError as error:  # whose text names settings of Gradio
        where = host if port is None else f"{host}:{port}"
        raise ValueError(
            f"cannot listen on {where}: give another --port, or --host an address of this machine"
        ) from error
    return page, address
