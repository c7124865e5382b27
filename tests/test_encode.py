"""Documents to token ids."""

import threading
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from sample_text import sample_documents
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from midskip.data import (
    END_OF_TEXT,
    DataError,
    bytes_tokenizer,
    encode,
    encode_documents,
    encode_source,
    read_documents,
    token_bytes,
    tokenizer,
    train_tokenizer,
)

TEXTS = [
    "",
    "   leading and trailing   ",
    "one\r\ntwo\rthree\n",
    "naïve café, e\u0301 combining, emoji 🙂 and 日本語、العربية",
    f"a {END_OF_TEXT} b{END_OF_TEXT}",
    "".join(map(chr, range(256))),
]


def test_each_document_follows_the_end_of_text(lossless: PreTrainedTokenizerFast) -> None:
    ids = encode_documents(lossless, TEXTS)
    expected = [token for text in TEXTS for token in [lossless.eos_token_id, *lossless.encode(text)]]
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert ids.tolist() == expected
    assert encode_documents(lossless, []).tolist() == []


def test_bytes_after_a_change_to_the_text_are_not_plain_bytes() -> None:
    lower = bytes_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert encode_documents(lower, ["aBc"]).tolist() == [256, *b"abc"]


def test_a_source_gives_the_same_ids_as_its_documents(learnt: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"{END_OF_TEXT}\n".join(sample_documents()))
    (tmp_path / "b.jsonl").write_text('{"body": "line"}\n')
    ids = encode_source(learnt, str(tmp_path / "a.txt"))
    assert np.array_equal(ids, encode_documents(learnt, sample_documents()))
    assert encode_source(learnt, str(tmp_path / "b.jsonl"), "body").tolist() == [0, *learnt.encode("line")]


def test_the_pieces_of_a_long_document_give_the_same_ids(
    lossless: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(TEXTS) + "日本語 テスト  two  spaces\n a b\u0301 c" + "".join(sample_documents(5))
    documents = [text, "", "a", text * 3]
    whole = encode_documents(lossless, documents)
    for num_characters in (1, 7, 63, 500):
        monkeypatch.setattr(tokenizer, "_PIECE_CHARACTERS", num_characters)
        monkeypatch.setattr(encode, "_BATCH_CHARACTERS", 3 * num_characters)
        assert np.array_equal(encode_documents(lossless, documents), whole)
    assert int(token_bytes(lossless)[whole].sum()) == sum(len(document.encode()) for document in documents)


def test_the_stream_is_in_order_and_counts_documents_and_bytes(
    learnt: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "_PIECE_CHARACTERS", 30)
    monkeypatch.setattr(encode, "_BATCH_CHARACTERS", 100)
    documents = [("odd" if i % 2 else "even", text) for i, text in enumerate(TEXTS + sample_documents())]
    found = list(encode.encode_stream(learnt, iter(documents)))
    assert [encoded.side for encoded in found if encoded.starts] == [side for side, _ in documents]
    for name in ("odd", "even"):
        texts = [text for side, text in documents if side == name]
        ids = np.concatenate([encoded.ids for encoded in found if encoded.side == name])
        assert np.array_equal(ids, encode_documents(learnt, texts))
        assert sum(encoded.num_bytes for encoded in found if encoded.side == name) == len("".join(texts).encode())


def test_a_stream_that_is_left_ends_its_threads(
    learnt: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_BATCH_CHARACTERS", 100)
    before = threading.active_count()
    stream = encode.encode_stream(learnt, (("", "some words") for _ in iter(int, 1)))  # without end
    assert next(stream).starts and threading.active_count() > before
    del stream
    assert threading.active_count() == before


def test_text_is_not_read_far_ahead(learnt: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_BATCH_CHARACTERS", 100)
    num_read = num_encoded = 0

    def documents() -> Iterator[tuple[str, str]]:
        nonlocal num_read
        for document in sample_documents(200):
            num_read += 1
            yield "", document
            assert num_read - num_encoded < 10

    for _ in encode.encode_stream(learnt, documents()):
        num_encoded += 1
    assert num_read == num_encoded == 200


def test_an_error_in_the_text_comes_through(learnt: PreTrainedTokenizerFast) -> None:
    def documents() -> Iterator[tuple[str, str]]:
        yield "", "good"
        raise DataError("bad")

    with pytest.raises(DataError, match="bad"):
        list(encode.encode_stream(learnt, documents()))


def test_special_tokens_in_a_document_stay_text_whatever_the_tokenizer_does_by_default() -> None:
    backend = Tokenizer.from_str(train_tokenizer(sample_documents(), 300).backend_tokenizer.to_str())
    plain = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)
    assert plain.encode(END_OF_TEXT) == [0]
    ids = encode_documents(plain, [END_OF_TEXT, "b"])
    assert np.flatnonzero(ids == 0).tolist() == [0, len(ids) - 2]
    assert plain.encode(END_OF_TEXT) == [0], "encoding documents changes nothing of that"


def test_a_tokenizer_that_pads_and_cuts_does_neither_to_documents(learnt: PreTrainedTokenizerFast) -> None:
    backend = Tokenizer.from_str(learnt.backend_tokenizer.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    ids = encode_documents(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT), TEXTS)
    assert np.array_equal(ids, encode_documents(learnt, TEXTS))


def test_a_tokenizer_written_in_python_is_called_as_it_is(learnt: PreTrainedTokenizerFast) -> None:
    class Written:
        """What is used of one: no backend, and ids from a call."""

        eos_token_id = 0

        def __call__(self, texts: list[str], **settings: Any) -> dict[str, list[list[int]]]:
            assert settings == {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            return {"input_ids": [learnt.encode(text) for text in texts]}

    written: PreTrainedTokenizerBase = Written()  # pyright: ignore[reportAssignmentType]
    assert np.array_equal(encode_documents(written, TEXTS), encode_documents(learnt, TEXTS))


def test_a_source_is_encoded_with_a_bar(
    learnt: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(f"\n{END_OF_TEXT}\n".join(TEXTS), encoding="utf-8")
    for terminal in (True, False):
        screen = Console(file=StringIO(), force_terminal=terminal, width=120)
        ids = encode_source(learnt, str(file), console=screen)
        assert np.array_equal(ids, encode_documents(learnt, list(read_documents(str(file)))))
        assert isinstance(screen.file, StringIO)
        assert ("encoding text" in screen.file.getvalue()) == terminal
    assert capsys.readouterr() == ("", "")
