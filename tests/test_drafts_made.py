"""How lossless drafts are made, what is left afterwards, what is refused, and the command."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_curve import CURVE
from tiny_drafts import (
    DRAFTS,
    POLICIES,
    Make,
    generate,
    left_padded,
    model_that_drafts,
    passes_of,
    prompt,
    report_of,
    whole,
)
from transformers import PreTrainedTokenizerFast

from midskip.cli import main
from midskip.data import token_texts
from midskip.generate import generate as generate_text
from midskip.model.cache import SkipCache
from midskip.report import visible


@pytest.fixture
def make(make_model: Make) -> Make:
    return partial(model_that_drafts, make_model)


# ---- how they are made


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("skip_unit", ["block", "sublayer"])
def test_drafts_run_fewer_blocks_and_checks_all(make: Make, policy: str, skip_unit: str) -> None:
    model, ids_1T = make(policy, skip_unit=skip_unit), prompt(1, 9)
    expected = whole(model, ids_1T)
    passes = passes_of(model)
    assert torch.equal(generate(model, ids_1T, **DRAFTS, num_draft_tokens=3), expected)
    scale = (0.8 - 0.6) / (0.8 - 0.5) + 1  # on the line of the calibration
    drafts = [one for one in passes if one.score_scale]
    checks = [one for one in passes if not one.score_scale]
    assert [one.score_scale for one in drafts] == pytest.approx([scale] * len(drafts))
    assert {(one.num_columns, one.max_layers) for one in drafts} == {(1, None)}
    assert all(one.executed_share == 1 and one.max_layers is None for one in checks)
    assert [one.num_columns for one in checks[:3]] == [9, 4, 4]
    report = report_of(model)
    assert report.num_drafted == len(drafts) and report.num_passes == sum(one.num_columns > 1 for one in checks[1:])
    share = sum(one.executed_share for one in drafts) / len(drafts)
    assert report.executed_share == pytest.approx(share) and 0 < share < 0.8
    assert len(checks) < 40 and report.num_tokens == 40
    rate = (report.num_accepted / report.num_passes + 1) / (report.num_drafted / report.num_passes * share + 1)
    assert report.speedup == pytest.approx(rate)


def test_drafts_with_every_block_are_all_right(make: Make) -> None:
    """Drafts see the columns, the processors and the end that the whole model sees; at the model's greatest length."""
    model = make(max_position_embeddings=64)
    ids_BT, mask_BT = left_padded()
    options = {"attention_mask": mask_BT, "max_new_tokens": 56, "repetition_penalty": 1.3, "suppress_tokens": [3, 4]}
    drafts = {"draft_budget": 1.0, "draft_confidence": 0.0, "num_draft_tokens": 6}
    expected = whole(model, ids_BT, **options)
    assert torch.equal(generate(model, ids_BT, **options, **drafts), expected)
    report = report_of(model)
    assert report.num_accepted == report.num_drafted == 56 - 1 - report.num_passes and report.num_passes == 8
    assert report.executed_share == 1


def test_drafting_ends_where_a_row_is_not_sure(make: Make) -> None:
    model = make()
    passes = passes_of(model)
    for confidence, expected in ((1.0, [2] * 5), (0.0, [5] * 5)):
        passes.clear()
        generate(model, prompt(2, 9), draft_budget=0.6, draft_confidence=confidence)
        assert [one.num_columns for one in passes if not one.score_scale][1:6] == expected
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # sure in some places, not in others
    passes.clear()
    generate(model, prompt(1, 9), draft_budget=0.6)
    lengths = {one.num_columns for one in passes[9:-9] if not one.score_scale}
    assert 5 in lengths and lengths & {2, 3, 4}


# ---- budget and cache afterwards


@pytest.mark.parametrize("at", ["prompt", "draft", "check"])
def test_an_interrupt_leaves_budget_and_cache_as_they_should_be(make: Make, at: str) -> None:
    model, cache = make(), None
    model.set_budget(0.9, 3)
    limits = model.model.policy.score_scale, model.model.policy.max_layers
    passes, cache = passes_of(model), SkipCache(model.config)

    def interrupt(*_: Any) -> None:
        drafts = sum(one.score_scale > 0 for one in passes)
        is_draft = model.model.policy.score_scale > 0
        if at == "prompt" or (drafts >= 6 and is_draft == (at == "draft")):
            raise KeyboardInterrupt

    hook = model.model.norm.register_forward_hook(interrupt)
    ids_1T = prompt(1, 9)
    with pytest.raises(KeyboardInterrupt):
        generate(model, ids_1T, past_key_values=cache, **DRAFTS)
    hook.remove()
    assert (model.model.policy.score_scale, model.model.policy.max_layers) == limits
    tokens = whole(model, ids_1T)
    assert cache.num_columns == (0 if at == "prompt" else 9 + report_of(model).num_tokens - 1)
    if at != "prompt":
        held = cache._seen_BC2
        assert held is not None and torch.equal(held[0, : cache.num_columns, 1], tokens[0, : cache.num_columns].int())
        options = DRAFTS | {"max_new_tokens": 9, "past_key_values": cache}
        got = generate(model, tokens[:, : cache.num_columns + 1], **options)
        assert torch.equal(got, tokens[:, : got.shape[1]])
    assert (model.model.policy.score_scale, model.model.policy.max_layers) == limits


# ---- what is refused, and the warning


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"skipped_kv": "drop"}, {}, "is for models with skipped_kv='keep' and this one has 'drop'"),
        ({}, {"do_sample": True}, "is for greedy search and this call asks for sample: give do_sample=False"),
        ({}, {"num_beams": 2}, "asks for beam_search"),
        ({}, {"prompt_lookup_num_tokens": 3}, "asks for assisted_generation"),
        ({}, {"use_cache": False}, "draft_budget needs a cache"),
        ({}, {"return_dict_in_generate": True, "output_hidden_states": True}, "gives no hidden states"),
        ({}, {"synced_gpus": True}, "is for one process"),
        ({}, {"custom_generate": lambda *_: None}, "custom_generate decodes in a way of its own"),
        ({}, {"num_return_sequences": 2}, "num_return_sequences"),
        ({}, {"num_draft_tokens": 0}, "num_draft_tokens is 0; expected a whole number of at least 1"),
        ({}, {"draft_confidence": 1.5}, r"draft_confidence is 1\.5; expected a probability"),
        ({}, {"draft_budget": 0.0}, r"budget is 0\.0; expected a share of the blocks"),
        ({}, {}, "has no calibration"),
        ({"name": "dense"}, {}, "has no run-time budget"),
    ],
)
def test_what_drafts_cannot_do_is_refused_in_a_line(make: Make, changes: Any, options: Any, message: str) -> None:
    model = make(**changes)
    if message == "has no calibration":
        model.config.calibration = None
    passes = passes_of(model)
    with pytest.raises(ValueError, match=message) as error:
        generate(model, prompt(1, 9), **(DRAFTS | options))
    assert not passes and "\n" not in str(error.value)
    assert (model.model.policy.score_scale, model.model.policy.max_layers) == (1.0, None)


def test_drafts_that_do_not_pay_warn_once(make: Make) -> None:
    model, costly = make("independent"), {"draft_budget": 0.9, "draft_confidence": 0.0}
    ids_1T = prompt(1, 9)
    generate(model, ids_1T, max_new_tokens=63, **costly)  # too few to tell
    assert report_of(model).speedup < 1
    with pytest.warns(UserWarning, match=r"drafts do not pay: \d+% of them were .* 0\.\d\d times the speed") as found:
        model.generate(ids_1T, max_new_tokens=64, do_sample=False, pad_token_id=0, **costly)
    assert len(found) == 1 and found[0].filename == __file__ and "\n" not in str(found[0].message)
    generate(model, ids_1T, max_new_tokens=64, **costly)  # a second warning would be an error


# ---- the command


def test_the_command_says_what_was_accepted(
    make_model: Make, learnt: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    model = make_model("mixed", torch.float32, vocab_size=len(learnt), skipped_kv="keep")
    model.save_pretrained(folder)
    learnt.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"calibration": CURVE}))
    arguments = ["generate", str(folder), "--prompt", "the cat", "--max_new_tokens", "20", "--draft_budget", "0.6"]
    assert main([*arguments, "--temperature", "0"]) == 0
    text, accepted, share = capsys.readouterr().out.rstrip("\n").rsplit("\n", 2)
    model.config.calibration = CURVE
    ids = generate_text(model.eval(), learnt, "the cat", 20, 0, draft_budget=0.6)
    report = report_of(model)
    expected = f"{report.num_accepted} of {report.num_drafted} drafted tokens were accepted"
    assert "".join(text.split()) == "".join(
        visible("".join(part.text for part in token_texts(learnt, ids) if not part.part)).split()
    )
    assert accepted == f"{expected} ({report.accepted_share:.1%})" and report.num_accepted > 0
    assert share == f"{report.executed_share:.1%} of the blocks ran in drafts"
    for more, message in (
        ([], "temperature is 0.8 and draft_budget is for the most likely tokens: give temperature 0"),
        (["--temperature", "0", "--budget", "0.5"], "leave out --budget"),
        (["--temperature", "0", "--max_layers", "2"], "leave out --budget and --max_layers"),
        (["--temperature", "0", "--draft_budget", "3"], "budget is 3.0"),
    ):
        assert main([*arguments, *more]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and message in err, err
