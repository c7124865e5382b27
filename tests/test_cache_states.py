"""A cache after anything that can be done to it, in any order, against the reference from scratch.

B sequences, T new columns, C columns seen, L layers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from properties import few, many
from shared_fixtures import TINY, set_gates
from torch import Tensor, nn

import midskip
from midskip import MidskipConfig, MidskipForCausalLM
from midskip.model import attention
from midskip.model.cache import SkipCache
from midskip.model.layer_cache import NO_COLUMN
from midskip.policies.middle_out import MiddleOut
from midskip.testing import reference_forward

PACKAGE = Path(midskip.__file__).parent
VOCABULARY, MOST_COLUMNS, MOST_ROWS = 11, 28, 6
SHAPE = TINY | {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
FIXED = "midskip.policies.controls:FixedDepths"
HARD = {"gates": "hard", "scores": "hidden_states"}
MODELS: dict[str, dict[str, Any]] = {
    "soft": {},
    "soft, 3 layers, a key head each": {"num_hidden_layers": 3, "num_key_value_heads": 2, "norms": "pre"},
    "hard, by tokens": {"policy_settings": {"gates": "hard"}},
    "hard, by loss": {"policy_settings": {"gates": "hard", "scores": "difficulty", "first_tokens": 1}},
    "hard, by states": {"policy_settings": HARD, "skip_path": "linear"},
    "fixed": {"policy": FIXED, "policy_settings": {"skip_share": 0.4, "fractional": True}},
    "exits": {"policy": "early_exit", "policy_settings": {"scores": "straight_through"}, "num_hidden_layers": 3},
    "sublayers": {"policy": "independent", "skip_unit": "sublayer", "num_hidden_layers": 2},
    "some layers": {"policy": "static", "policy_settings": {"share": 0.5}},
}
BY_TOKENS = ("hard, by tokens", "hard, by loss")  # these take no embeddings
Row = tuple[tuple[int, int], ...]  # of each column the token and its position, which is -1 for a pad


@lru_cache
def model_of(kind: str, skipped_kv: str) -> MidskipForCausalLM:
    torch.manual_seed(0)
    changes = {"num_key_value_heads": 1, "skipped_kv": skipped_kv} | MODELS[kind]
    model = MidskipForCausalLM(MidskipConfig(**(SHAPE | changes))).double().eval()
    policy: Any = model.model.policy
    if isinstance(policy, MiddleOut):
        set_gates(policy, "mixed", scale=5.0 if model.config.norms == "pre" else 1.5)
    elif kind in ("exits", "sublayers"):
        nn.init.constant_(policy.bias, -0.2)
    return model


@lru_cache(2**14)
@torch.no_grad()
def from_scratch(kind: str, skipped_kv: str, row: Row) -> tuple[Tensor, Tensor]:
    """The logits [C, V] of a row, and bool [L, C], who ran which layer."""
    valid = [(token, position) for token, position in row if position >= 0]
    columns = [column for column, (_, position) in enumerate(row) if position >= 0]
    model = model_of(kind, skipped_kv)
    logits_CV = torch.zeros(len(row), VOCABULARY, dtype=torch.float64)
    ran_LC = torch.zeros(model.config.num_skip_units, len(row), dtype=torch.bool)
    if valid:
        token_1C, position_1C = torch.tensor(valid).T[:, None]
        found = reference_forward(model, token_1C, position_ids=position_1C)
        logits_CV[columns], ran_LC[:, columns] = found.logits[0], found.gates[:, 0] > 0
    return logits_CV, ran_LC


@contextmanager
def broken_off(where: str, after_lines: int, error: type[BaseException]) -> Iterator[None]:
    """Raise it before that line of the code that is run, of the lines in files whose path begins so."""
    left = after_lines

    def in_function(frame: Any, event: str, _: Any) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if not left:
                raise error("in the middle")
        return in_function

    def trace(frame: Any, event: str, _: Any) -> Any:
        code = frame.f_code  # `forward` is there again when the pass is over
        inside = code.co_filename.startswith(f"{PACKAGE}/{where}")
        return in_function if inside and code.co_name not in ("forward", "unchanged_if_broken_off") else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


class Passes(RuleBasedStateMachine):
    """`rows` is what the cache should hold."""

    @initialize(kind=st.sampled_from(list(MODELS)), skipped_kv=st.sampled_from(["drop", "keep"]), data=st.data())
    def begin(self, kind: str, skipped_kv: str, data: st.DataObject) -> None:
        self.key, self.model = (kind, skipped_kv), model_of(kind, skipped_kv)
        self.cache = SkipCache(self.model.config)
        self.rows: list[Row] = []
        self.num_valid = self.num_ran = 0
        self.a_pass(data, 5)

    @property
    def num_columns(self) -> int:
        return len(self.rows[0]) if self.rows else 0

    # ---- passes

    def new_rows(self, data: st.DataObject, most_columns: int) -> list[Row]:
        """The rows after a pass to come."""
        rows = self.rows or [()] * data.draw(st.integers(1, 3), "rows")
        num_new = data.draw(st.integers(1, most_columns), "columns")
        step, pads = data.draw(st.integers(1, 2), "step of positions"), data.draw(st.booleans(), "pads")
        numbers = st.integers(0, (2 if pads else 1) * VOCABULARY - 1)
        size = num_new * len(rows)
        drawn = data.draw(st.lists(numbers, min_size=size, max_size=size), "tokens")
        made = []
        for row in rows:
            position = max((position for _, position in row), default=-1)
            for number in [drawn.pop() for _ in range(num_new)]:
                is_pad = number >= VOCABULARY
                position += 0 if is_pad else step
                row = (*row, (number % VOCABULARY, -1 if is_pad else position))
            made.append(row)
        return made

    def run(self, rows: list[Row], with_mask: bool, with_positions: bool, embedded: bool = False) -> Any:
        row_BC2 = torch.tensor(rows)
        ids_BT, position_BT = row_BC2[:, self.num_columns :].unbind(-1)
        given = {"inputs_embeds": self.model.model.embed_tokens(ids_BT)} if embedded else {"input_ids": ids_BT}
        if with_mask:
            given["attention_mask"] = (row_BC2[..., 1] >= 0).long()
        if with_positions:
            given["position_ids"] = position_BT
        return self.model(**given, past_key_values=self.cache)

    def needs(self, rows: list[Row]) -> tuple[bool, bool]:
        """Whether such a pass has to be given a mask, and positions."""
        new = [(row[: self.num_columns], row[self.num_columns :]) for row in rows]
        counted = True
        for before, after in new:
            last = max((position for _, position in before), default=-1)
            positions = [position for _, position in after if position >= 0]
            counted &= positions == list(range(last + 1, last + 1 + len(positions)))
        return any(position < 0 for _, after in new for _, position in after), not counted

    def done(self, rows: list[Row], output: Any) -> None:
        logits, rans = zip(*(from_scratch(*self.key, row) for row in rows), strict=True)
        new = slice(self.num_columns, None)
        atol = 1e-6 if self.key[0] == "fixed" else 1e-11  # of gates in float32
        torch.testing.assert_close(output.logits, torch.stack(logits)[:, new], rtol=0, atol=atol)
        ran_LBT = torch.stack(rans, 1)[..., new]
        assert torch.equal(output.executed, ran_LBT)
        self.num_valid += sum(position >= 0 for row in rows for _, position in row[new])
        self.num_ran += int(ran_LBT.sum())
        self.rows = rows

    @precondition(lambda self: self.num_columns < MOST_COLUMNS)
    @rule(data=st.data(), most_columns=st.sampled_from([1, 5]))
    def a_pass(self, data: st.DataObject, most_columns: int) -> None:
        rows = self.new_rows(data, most_columns)
        mask, positions = (one or data.draw(st.booleans(), "mask, positions") for one in self.needs(rows))
        embedded = self.key[0] not in BY_TOKENS and data.draw(st.booleans(), "embedded")
        one_launch = data.draw(st.booleans(), "one launch for all rows, as on a GPU")
        inference = data.draw(st.booleans(), "inference mode")
        with torch.inference_mode(inference), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            if one_launch:
                patch.setattr(attention, "_alone_is_cheaper", lambda device: False)
            output = self.run(rows, mask, positions, embedded)
        self.done(rows, output)

    @precondition(lambda self: self.num_columns < MOST_COLUMNS)
    @rule(
        data=st.data(),
        where=st.sampled_from(["model/layer_cache.py", "model/cache.py", "model", ""]),
        after_lines=st.integers(1, 150),
        error=st.sampled_from([RuntimeError, KeyboardInterrupt]),
    )
    def a_pass_that_breaks_off(
        self, data: st.DataObject, where: str, after_lines: int, error: type[BaseException]
    ) -> None:
        rows = self.new_rows(data, 5)
        try:
            with torch.no_grad(), broken_off(where, after_lines, error):
                output = self.run(rows, *self.needs(rows))
        except error:
            return
        self.done(rows, output)

    @precondition(lambda self: 0 < self.num_columns < MOST_COLUMNS)
    @rule(data=st.data(), number=st.sampled_from([float("nan"), float("inf"), 1e300]))
    def a_pass_of_nonsense_that_is_taken_back(self, data: st.DataObject, number: float) -> None:
        """As of a broken draft."""
        rows = self.new_rows(data, 5)
        hook = self.model.model.layers[0].register_forward_pre_hook(lambda _, x: (x[0] * number, *x[1:]))
        with torch.no_grad():
            try:
                self.run(rows, *self.needs(rows))
            finally:
                hook.remove()
        self.cache.crop(self.num_columns - len(rows[0]))
        self.num_valid, self.num_ran = self.cache.num_valid_tokens, self.cache.num_block_tokens

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), wrong=st.sampled_from(["rows", "mask", "positions", "token", "length", "labels"]))
    def a_pass_that_is_refused(self, data: st.DataObject, wrong: str) -> None:
        num_rows, num_past = len(self.rows), self.num_columns
        given: dict[str, Any] = {"input_ids": torch.zeros(num_rows, 1, dtype=torch.int64)}
        if wrong == "rows":
            given["input_ids"] = given["input_ids"].new_zeros(num_rows + 1, 1)
        elif wrong == "mask":
            mask_BC = torch.tensor([[position >= 0 for _, position in row] + [True] for row in self.rows])
            mask_BC[data.draw(st.integers(0, num_rows - 1)), data.draw(st.integers(0, num_past - 1))] ^= True
            given["attention_mask"] = mask_BC
        elif wrong == "positions":
            last = max(position for row in self.rows for _, position in row)
            given["position_ids"] = given["input_ids"] + (last if last >= 0 else 64)
        elif wrong == "token":
            given["input_ids"] += VOCABULARY
        elif wrong == "labels":  # which the pass looks at when it is nearly over
            given["labels"] = given["input_ids"][:, :0]
        else:
            given["input_ids"] = given["input_ids"].expand(-1, 65 - num_past)
        with torch.no_grad(), pytest.raises(ValueError):
            self.model(**given, past_key_values=self.cache)

    # ---- what else can be done

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), inference=st.booleans())
    def crop(self, data: st.DataObject, inference: bool) -> None:
        left = self.num_columns - data.draw(st.integers(0, self.num_columns), "columns to forget")
        with torch.inference_mode() if inference else nullcontext():
            self.cache.crop(left - self.num_columns)
        self.rows = [row[:left] for row in self.rows] if left else []

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), how=st.sampled_from(["reorder", "select", "mask"]))
    def choose_rows(self, data: st.DataObject, how: str) -> None:
        count = len(self.rows)
        if how == "mask":
            wanted = data.draw(st.lists(st.booleans(), min_size=count, max_size=count).filter(any), "rows")
            chosen = [row for row in range(count) if wanted[row]]
            self.cache.batch_select_indices(torch.tensor(wanted))
        else:
            least, most = (count, count) if how == "reorder" else (1, MOST_ROWS)
            chosen = data.draw(st.lists(st.integers(0, count - 1), min_size=least, max_size=most), "rows")
            change = self.cache.reorder_cache if how == "reorder" else self.cache.batch_select_indices
            change(torch.tensor(chosen))
        self.rows = [self.rows[row] for row in chosen]

    @precondition(lambda self: self.rows and len(self.rows) <= MOST_ROWS // 2)
    @rule(repeats=st.integers(1, 2))
    def repeat_rows(self, repeats: int) -> None:
        self.cache.batch_repeat_interleave(repeats)
        self.rows = [row for row in self.rows for _ in range(repeats)]

    @rule(reset=st.booleans())
    def go_on_with_a_copy_or_anew(self, reset: bool) -> None:
        if reset:
            self.cache.reset()
            self.rows, self.num_valid, self.num_ran = [], 0, 0
        self.cache = deepcopy(self.cache)

    @invariant()
    def it_holds_what_ran(self) -> None:
        cache, valid = self.cache, [[position >= 0 for _, position in row] for row in self.rows]
        assert cache.num_columns == self.num_columns and cache.batch_size == len(self.rows)
        assert cache.seqlens == [sum(row) for row in valid]
        assert (cache.num_valid_tokens, cache.num_block_tokens) == (self.num_valid, self.num_ran)
        halves = self.model.config.num_skip_units // len(cache.layers)
        for number, layer in enumerate(cache.layers):
            if self.key[1] == "drop":
                held = [from_scratch(*self.key, row)[1][number * halves].tolist() for row in self.rows]
            elif number * halves in self.model.model.policy.closed_layers:
                held = [[False] * len(row) for row in self.rows]
            else:
                held = valid
            assert (layer.seqlens or [0] * len(held)) == [sum(row) for row in held]
            if layer.seqlens:
                columns = [[column for column, is_held in enumerate(row) if is_held] for row in held]
                spare = [layer.columns.shape[1] - length for length in layer.seqlens]
                assert layer.columns.tolist() == [
                    row + [NO_COLUMN] * num for row, num in zip(columns, spare, strict=True)
                ]


@pytest.mark.integration
def test_the_first_tokens_of_a_layer_broken_off_at_any_line() -> None:
    """The first column runs two layers, the second all four."""
    key = ("fixed", "drop")
    model, row = model_of(*key), ((5, 0), (5, 1))
    ids_1T, position_1T = torch.tensor(row).T[:, None]
    logits_TV, ran_LT = from_scratch(*key, row)
    assert ran_LT.T.tolist() == [[True, False, False, True], [True] * 4]
    after_lines, was_broken_off = 0, True
    while was_broken_off:
        after_lines, was_broken_off, cache = after_lines + 1, False, SkipCache(model.config)
        with torch.no_grad():
            model(ids_1T[:, :1], position_ids=position_1T[:, :1], past_key_values=cache)
            try:
                with broken_off("model/layer_cache.py", after_lines, KeyboardInterrupt):
                    model(ids_1T[:, 1:], position_ids=position_1T[:, 1:], past_key_values=cache)
            except KeyboardInterrupt:
                was_broken_off = True
                columns = [layer.columns[layer.columns < NO_COLUMN].tolist() for layer in cache.layers if layer.buffers]
                assert columns in ([[0], [0]], [[0], [], [0]], [[0], [], [], [0]])
                new = model(ids_1T[:, 1:], position_ids=position_1T[:, 1:], past_key_values=cache)
                torch.testing.assert_close(new.logits[0], logits_TV[1:], rtol=0, atol=1e-6)
    assert after_lines > 50


def test_a_cache_is_what_its_history_makes_it() -> None:
    run_state_machine_as_test(Passes, settings=few(60, stateful_step_count=24, phases=[Phase.explicit, Phase.generate]))


@pytest.mark.slow
def test_a_cache_is_what_any_history_makes_it() -> None:
    run_state_machine_as_test(Passes, settings=many(3000, stateful_step_count=40))
