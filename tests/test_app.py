"""`midskip app` without its page: what the page asks of the models, and the HTML that it is given."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny_curve import CURVE
from transformers import PreTrainedTokenizerFast

from midskip import MidskipForCausalLM
from midskip.app.session import Limits, Session
from midskip.app.style import SCRIPT, style
from midskip.app.view import HINT, amount, charts_html, duration, picked_html, stream_html, view_html
from midskip.cli import main
from midskip.data import token_texts
from midskip.report import TokenDepth, palette

HOSTILE = (
    "<script>alert(1)</script> <img src=x onerror=alert(2)> \u202eevil\u2066 **bold** [a](javascript:b) \x1b[2J ' \" &"
)


class Tags(HTMLParser):
    def __init__(self, source: str):
        super().__init__()
        self.tags: list[str] = []
        self.names: set[str] = set()
        self.text, self.data = "", None
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.names |= {name for name, _ in attrs}
        found = dict(attrs).get("data-look")
        self.data = json.loads(found) if found else self.data
        self.text += "\n" if tag == "br" else ""

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def session(model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Session:
    model.config.calibration = CURVE
    return Session({"runs/tiny": (model, tokenizer)})


LIMITS = Limits("runs/tiny")


def test_budget_and_ceiling_hold_for_one_pass(session: Session) -> None:
    text = "the cat sat on the mat and the dog saw it. " * 10
    policy = session.runs["runs/tiny"][0].model.policy
    seen = {
        name: session.see(text, limits)
        for name, limits in {
            "trained": LIMITS, "all": Limits("runs/tiny", 1.0), "few": Limits("runs/tiny", max_layers=2)
        }.items()
    }  # fmt: skip
    shares = {name: one.look.executed_share for name, one in seen.items() if one}
    assert shares["all"] == 1 > shares["trained"] and len(shares) == 3
    assert max(token.blocks for token in seen["few"].look.tokens) == 2  # pyright: ignore[reportOptionalMemberAccess]
    assert (policy.score_scale, policy.max_layers) == (1.0, None)


def test_what_can_be_set_is_said(session: Session, make_model, tokenizer: PreTrainedTokenizerFast) -> None:
    assert (session.choices["runs/tiny"].lowest, session.choices["runs/tiny"].why) == (CURVE["share"][-1], "")
    models = {policy: make_model(policy=policy, vocab_size=len(tokenizer)).eval() for policy in ("middle_out", "dense")}
    choices = Session({name: (model, tokenizer) for name, model in models.items()}).choices
    assert choices["middle_out"].adjustable and "midskip calibrate" in choices["middle_out"].why
    assert not choices["dense"].adjustable and "no run-time budget" in choices["dense"].why
    assert choices["dense"].lowest is choices["middle_out"].lowest is None


def test_nothing_is_seen_of_nothing(session: Session) -> None:
    assert session.see("", LIMITS) is None and HINT in view_html(None) and charts_html(None) == ""


def test_too_long_a_text_is_cut_and_that_is_said(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("midskip.app.session.MOST_TOKENS", 100)
    seen = session.see("the cat " * 200, LIMITS)
    assert seen and len(seen.look.tokens) == 100 and seen.left_out > 0
    assert f"{seen.left_out:,} more tokens are left out" in view_html(seen)


def test_no_text_becomes_markup(session: Session) -> None:
    plain, hostile = (session.see(text, LIMITS) for text in ("a plain text\n", HOSTILE + "\ud800"))
    assert plain and hostile
    pages = [
        Tags(view_html(seen) + picked_html(seen, 3, session.what_if(seen, 3)) + charts_html(seen))
        for seen in (plain, hostile)
    ]
    assert set(pages[1].tags) <= {*pages[0].tags, "s"} and pages[1].names <= {*pages[0].names, "data-from"}
    assert "<script>alert(1)</script>" in pages[1].text and "\x1b" not in pages[1].text
    shown = pages[1].text + json.dumps(pages[1].data, ensure_ascii=False)  # the script shows what is in `data-look`
    assert not re.search("[\u202e\u2066]", shown) and "\\u001b" not in shown, "nothing steers the order of letters"


def test_the_card_has_every_number(session: Session) -> None:
    seen = session.see("the cat sat on the mat", LIMITS)
    assert session.is_seen(seen, "the cat sat on the mat", LIMITS)
    assert not session.is_seen(seen, "the cat sat on the hat", LIMITS) and not session.is_seen(None, "the cat", LIMITS)
    assert not session.is_seen(seen, "the cat sat on the mat", replace(LIMITS, max_layers=1))
    assert seen
    data, tokens = Tags(view_html(seen)).data, seen.look.tokens
    assert data and {len(values) for values in data.values() if isinstance(values, list)} == {len(tokens)}
    assert data["blocks"] == [token.blocks for token in tokens]
    assert data["rank"] == [token.next_rank for token in tokens] and data["rank"][-1] is None
    assert data["gates"][2] == pytest.approx(tokens[2].gates, abs=5e-4)
    names = set(re.findall(r"all\.(\w+)", SCRIPT))
    assert names == set(data), "the script reads what is there, and all of it"


def test_what_if_is_of_the_tokens_own_window(session: Session) -> None:
    seen = session.see("the cat sat on the mat and the dog saw it. " * 10, LIMITS)
    assert seen and len(seen.look.tokens) > 70
    token = seen.look.tokens[70]
    found = session.what_if(seen, 70)
    assert found["as_it_is"].next_loss_nats == pytest.approx(token.next_loss_nats, abs=1e-5)
    shown = picked_html(seen, 70, found)
    assert f"{token.next_loss_nats:.3f}" in shown and "one layer earlier" in shown and "every layer" in shown
    last = session.what_if(seen, 63)["as_it_is"]
    assert last.next_loss_nats == pytest.approx(seen.look.tokens[63].next_loss_nats, abs=1e-5), "it has a next one"
    with pytest.raises(ValueError, match="the token is -1 of"):
        session.what_if(seen, -1)


def test_text_goes_on_under_the_limits(session: Session) -> None:
    _, tokenizer = session.runs["runs/tiny"]
    prompt = "the cat " * 60  # more than the model takes: its end is the prompt
    ids, left_out = session.prompt(prompt, "runs/tiny", 10)
    assert prompt.endswith(tokenizer.decode(ids)) and left_out == len(tokenizer(prompt)["input_ids"]) - len(ids) > 0
    *_, (ids, blocks) = session.go_on(ids, Limits("runs/tiny", max_layers=2), 10, 0.0, 0)
    assert 54 < len(ids) == len(blocks) <= 64 and max(blocks) == 2
    tokens = [TokenDepth(text, ran, part=part, num_parts=count) for (text, part, count), ran in zip(
        token_texts(tokenizer, ids), blocks
    )]  # fmt: skip
    assert "data-look" not in stream_html(tokens, 4), "the card waits for the whole"
    assert "26 tokens before these are not read" in stream_html(tokens, 4, left_out=26)
    assert len(session.prompt(prompt, "runs/tiny", 400)[0]) == 32, "half of the context, however much is to come"
    assert session.prompt("", "runs/tiny", 10) == ([], 0)


@pytest.mark.extras
def test_as_trained_lifts_all_limits(session: Session) -> None:
    pytest.importorskip("gradio")
    from midskip.app.blocks import _keep, _limits

    assert _limits(session, "runs/tiny", True, 0.5, 2) == LIMITS
    assert _limits(session, "runs/tiny", False, 0.5, 2) == Limits("runs/tiny", 0.5, 2)
    assert _keep("the cat", ("the cat", "the cat sat"))[0] == "the cat sat", "stopped, it keeps what came"
    assert _keep("my own", ("the cat", "the cat sat"))[0] != "the cat sat", "changed meanwhile"


@pytest.mark.extras
@pytest.mark.parametrize("host", ["203.0.113.1", "no-such-host.invalid"])
def test_an_address_of_another_machine_is_refused_at_once(session: Session, host: str) -> None:
    pytest.importorskip("gradio")
    from midskip.app.blocks import serve

    started_s = time.monotonic()
    with pytest.raises(ValueError, match=f"cannot listen on {host}: give another --port, or --host an address of this"):
        serve(session, "", host, None, False)
    assert time.monotonic() - started_s < 10, "and not port by port"


def test_each_number_of_layers_has_its_shades() -> None:
    sheet = style([4, 12, 4])
    for layers in (4, 12):
        for blocks, shade in enumerate(palette(layers)):
            rule = f".l{layers} .d{blocks}{{background:{shade.background};color:{shade.ink}}}"
            assert sheet.count(rule) == 1
    assert not re.search(r"https?:|url\(|@import", sheet + SCRIPT.replace("http://www.w3.org/2000/svg", ""))
    assert "innerHTML" not in SCRIPT, "texts are put in as text"


def test_amounts_are_short() -> None:
    assert [amount(value) for value in (0, 12, 2134567, 3.4e12)] == ["0", "12", "2.13 M", "3.4 T"]
    assert (amount(999_600), duration(0.9996)) == ("1 M", "1 s"), "rounded up to the next unit"
    assert [duration(value) for value in (2, 0.0123, 4.5e-6)] == ["2 s", "12.3 ms", "4.5 µs"]


def test_a_wrong_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["app", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_without_gradio_it_says_what_to_install(
    saved_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["app", str(saved_model)]) == 2
    assert "pip install 'midskip[app]'" in capsys.readouterr().err
