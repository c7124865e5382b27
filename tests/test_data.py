"""Documents, the learnt tokenizer, bytes per token, and windows."""

import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from midskip.data import (
    END_OF_TEXT,
    DataError,
    TokenWindows,
    corpus,
    encode_documents,
    load_documents,
    split_documents,
    token_bytes,
    tokenizer,
    train_tokenizer,
)

ODD_TEXTS = [
    "",
    " ",
    "   leading and trailing   ",
    "\n\n\t\n",
    "one\r\ntwo\rthree\n",
    "spaces before , and . and n't 're do n't",
    "naïve café, Straße, ﬁ ligature, e\u0301 combining",
    "emoji 🙂👩‍👩‍👧‍👦🇫🇷 and 日本語、العربية",
    "control \x00\x01\x7f and \u00a0\u200b\u2028\ufeff\ufffd",
    "1234567890 3.14 0xFF -- __init__ a_b",
    f"a {END_OF_TEXT} b{END_OF_TEXT}",
    "<0xAB> ▁ Ġ Ċ",
    "".join(map(chr, range(256))),
]


def sample_documents(count: int = 40) -> list[str]:
    return [f"Document {i} says that layer {i * 7 % 11} was left out.\n\nAnd so on, {i}.\n" for i in range(count)]


@pytest.fixture(scope="module")
def learnt() -> PreTrainedTokenizerFast:
    return train_tokenizer(sample_documents(), 320)


# Documents


def test_a_file_without_separator_is_one_document_kept_as_it_is(tmp_path: Path) -> None:
    text = "  first line\r\n\r\nlast line\n"
    file = tmp_path / "text"
    file.write_bytes(text.encode())
    assert load_documents(str(file)) == [text]


def test_only_a_whole_separator_line_separates_and_empty_documents_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    inside = f"not {END_OF_TEXT} here\n {END_OF_TEXT}\n"
    file.write_bytes(f"{END_OF_TEXT}\none\n{END_OF_TEXT}\r\n\n{END_OF_TEXT}\n{inside}{END_OF_TEXT}".encode())
    assert load_documents(str(file)) == ["one\n", inside]


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert load_documents(str(tmp_path / "text.txt")) == ["hello"]


def test_a_folder_is_read_recursively_sorted_by_path(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "ignored.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "empty.txt").touch()
    assert load_documents(str(tmp_path)) == ["text of a/b/c.txt", "text of a/z.txt", "text of b.txt"]


def test_a_bar_is_shown_on_a_terminal_only_and_only_if_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    load_documents(str(tmp_path))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any stream for a terminal
    for progress in (True, False):
        assert load_documents(str(tmp_path), progress) == ["a", "b"]
        printed = capsys.readouterr()
        assert printed.out == "" and ("Reading text" in printed.err) == progress


@pytest.mark.parametrize("source", ["nowhere/to/be.txt", ""])
def test_a_path_that_does_not_exist(source: str) -> None:
    with pytest.raises(DataError, match=r"does not exist.*'pydocs'.*relative paths start at"):
        load_documents(source)


def test_a_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("text")
    with pytest.raises(DataError, match=r"no \.txt file"):
        load_documents(str(tmp_path))


@pytest.mark.parametrize("text", ["", " \n\t\n", f"\n{END_OF_TEXT}\n \n{END_OF_TEXT}\n"])
def test_no_text_in_a_file_or_a_folder(tmp_path: Path, text: str) -> None:
    file = tmp_path / "blank.txt"
    file.write_text(text)
    for source in (file, tmp_path):
        with pytest.raises(DataError, match=r"holds no text: 1 file\(s\) read"):
            load_documents(str(source))


def test_a_file_that_is_not_utf8_is_named_with_the_offset(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1") + b" and on")
    with pytest.raises(DataError, match=r"latin\.txt.*byte 0xe9 at offset 1 .*UTF-8"):
        load_documents(str(tmp_path))


# The embedded corpus


def make_library(folder: Path) -> None:
    """A small standard library with everything the builder must read or leave alone."""
    long = "A docstring that is long enough to be kept in the corpus: "
    sources = {
        "mod.py": f'"""{long}module."""\nif True:\n  class C:\n    """{long}class."""\n'
        f'    async def f(self):\n      """{long}method.\n\n         Indented.\n      """\n'
        f'      def inner():\n        """Short."""\ndef g():\n  """{long}module."""\n',
        "pack/__init__.py": f'"""{long}package."""',
        "pack/deep.py": f'r"""{long}half a pair \\d."""\nx = "\\d"\ndef h():\n  "{long}half \\ud800"\n',
        "broken.py": f'"""{long}broken."""\ndef (:\n',
        "null.py": "\0",
        "bare.py": "x = 1\n",
    }
    for skipped in ("test", "pack/tests", "site-packages", "__pycache__", "config-3"):
        sources[f"{skipped}/skipped.py"] = f'"""{long}skipped."""'
    for name, source in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source)


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_library(tmp_path / "library")
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path / "library"))
    monkeypatch.setattr("pydoc_data.topics.topics", {"b": "Topic b\n", "a": "\nTopic a\n", "c": "Topic b\n"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_pydocs_holds_topics_and_docstrings(small_library: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        documents = load_documents("pydocs")
    kept = "A docstring that is long enough to be kept in the corpus: "
    assert documents == [
        "Topic a\n",
        "Topic b\n",
        f"mod\n{kept}module.\n\nmod.C\n{kept}class.\n\nmod.C.f\n{kept}method.\n\nIndented.\n",
        f"pack\n{kept}package.\n",
        f"pack.deep\n{kept}half a pair \\d.\n\npack.deep.h\n{kept}half ?\n",
    ]


def test_pydocs_is_cached_whole_and_built_again_when_the_cache_is_bad(small_library: Path) -> None:
    documents = load_documents("pydocs")
    (cached,) = (small_library / "cache" / "midskip").iterdir()
    (small_library / "library" / "mod.py").unlink()
    assert load_documents("pydocs") == documents
    for bad in (b"", b"\xff"):
        cached.write_bytes(bad)
        assert len(load_documents("pydocs")) == len(documents) - 1
    assert list(cached.parent.iterdir()) == [cached]


def test_pydocs_needs_no_cache(small_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small_library / "cache").write_text("a file where the folder should be")
    assert len(load_documents("pydocs")) == 5

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setenv("XDG_CACHE_HOME", str(small_library / "elsewhere"))
    monkeypatch.setattr(os, "replace", refuse)
    assert len(load_documents("pydocs")) == 5
    assert not list((small_library / "elsewhere" / "midskip").iterdir())


def test_pydocs_cache_is_in_the_home_folder_by_default(small_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(small_library / "home"))
    monkeypatch.setenv("USERPROFILE", str(small_library / "home"))
    load_documents("pydocs")
    (cached,) = (small_library / "home" / ".cache" / "midskip").iterdir()
    assert corpus.platform.python_version() in cached.name


def test_pydocs_without_any_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path / "nothing"))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DataError, match=r"'pydocs' is empty.*folder of \.txt files instead"):
        load_documents("pydocs")


def test_pydocs_of_this_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    documents = load_documents("pydocs", progress=False)
    assert len(documents) > 300 and sum(map(len, documents)) > 1_000_000
    assert any(document.startswith("json\nJSON ") for document in documents)
    training, validation = split_documents(documents)
    assert 0.02 < len(validation) / len(documents) < 0.09
    assert len(training) + len(validation) == len(documents)


# The split


def test_the_split_depends_on_nothing_but_each_text() -> None:
    documents = sample_documents(200)
    training, validation = split_documents(documents, 0.2)
    assert 0.1 < len(validation) / 200 < 0.3
    assert [document for document in documents if document in validation] == validation
    backwards = split_documents(documents[::-1], 0.2)
    assert backwards == (training[::-1], validation[::-1])
    half = split_documents(documents[:100], 0.2)
    assert set(half[0]) <= set(training) and set(half[1]) <= set(validation)


@pytest.mark.parametrize("share", [1e-6, 0.05, 0.5, 1 - 1e-6])
@pytest.mark.parametrize("documents", [["a", "b"], ["same", "same"], sample_documents(3)])
def test_two_documents_are_enough(documents: list[str], share: float) -> None:
    training, validation = split_documents(documents, share)
    assert training and validation and sorted(training + validation) == sorted(documents)


@pytest.mark.parametrize(
    "text, share, cut",
    [
        ("line\n" * 90 + "\n" + "line\n" * 9, 0.1, "\n\n"),  # a paragraph ends about there
        ("head\n\n" + "line\n" * 99, 0.1, "\n"),  # one does, but too far away
        ("word " * 99, 0.1, " "),
        ("two\nlines", 0.05, "\n"),
        (" a b ", 0.5, " "),
    ],
)
def test_a_single_document_is_cut_near_its_end(text: str, share: float, cut: str) -> None:
    (training,), (validation,) = split_documents([text], share)
    assert training + validation == text
    assert training.strip() and validation.strip()
    assert training.endswith(cut)
    if len(text) > 100:
        assert 0.5 * share < len(validation) / len(text) < 1.5 * share


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_validation_share_outside_its_range(share: float) -> None:
    with pytest.raises(DataError, match=r"validation_share is .* between 0 and 1"):
        split_documents(["a", "b"], share)


def test_nothing_to_split() -> None:
    with pytest.raises(DataError, match="no documents"):
        split_documents([])


@pytest.mark.parametrize("text", ["word", " word\n", ""])
def test_a_single_document_that_cannot_be_cut(text: str) -> None:
    with pytest.raises(DataError, match=r"single document of \d+ characters"):
        split_documents([text])


# The tokenizer


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_any_text_survives(learnt: PreTrainedTokenizerFast, text: str) -> None:
    ids = learnt.encode(text)
    assert learnt.decode(ids) == text
    assert learnt.decode(ids, skip_special_tokens=True) == text
    assert learnt.eos_token_id not in ids
    assert int(token_bytes(learnt)[ids].sum()) == len(text.encode())


def test_a_saved_tokenizer_is_the_same(learnt: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    learnt.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.eos_token_id, loaded.pad_token_id) == (learnt.eos_token_id, learnt.pad_token_id) == (0, 0)
    for text in ODD_TEXTS:
        assert loaded.encode(text) == learnt.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    assert torch.equal(token_bytes(loaded), token_bytes(learnt))


def test_training_is_deterministic_and_learns_words(learnt: PreTrainedTokenizerFast) -> None:
    assert train_tokenizer(sample_documents(), 320).get_vocab() == learnt.get_vocab()
    assert len(learnt) == 320
    assert len(learnt.encode("Document")) == 1


def test_a_small_text_gives_a_smaller_vocabulary() -> None:
    assert len(train_tokenizer(["a"], 257)) == len(train_tokenizer(["a"], 5000)) == 257


def test_a_vocabulary_without_room_for_all_bytes() -> None:
    with pytest.raises(DataError, match=r"vocab_size is 256\. Expected 257 or more"):
        train_tokenizer(["text"], 256)


@pytest.mark.parametrize("documents", [[], ["", ""]])
def test_nothing_to_learn_from(documents: list[str]) -> None:
    with pytest.raises(DataError, match="no text to learn"):
        train_tokenizer(documents, 300)


# Encoding


def test_each_document_is_followed_by_the_end(learnt: PreTrainedTokenizerFast) -> None:
    ids = encode_documents(learnt, ODD_TEXTS)
    expected = [token for text in ODD_TEXTS for token in [*learnt.encode(text), 0]]
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert ids.tolist() == expected
    assert encode_documents(learnt, []).tolist() == []


def test_the_pieces_of_a_long_document_give_the_same_ids(
    learnt: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(ODD_TEXTS) + "日本語 テスト  two  spaces\n a b\u0301 c" + "".join(sample_documents(5))
    documents = [text, "", "a", text * 3]
    whole = encode_documents(learnt, documents)
    for num_characters in (1, 7, 63, 500):
        monkeypatch.setattr(tokenizer, "_PIECE_CHARACTERS", num_characters)
        monkeypatch.setattr(tokenizer, "_BATCH_CHARACTERS", 3 * num_characters)
        assert np.array_equal(encode_documents(learnt, documents), whole)
    assert int(token_bytes(learnt)[whole].sum()) == sum(len(document.encode()) for document in documents)


def test_special_tokens_in_a_document_stay_text_whatever_the_tokenizer_does_by_default() -> None:
    backend = Tokenizer.from_str(train_tokenizer(sample_documents(), 300).backend_tokenizer.to_str())
    plain = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)
    assert plain.encode(END_OF_TEXT) == [0]
    ids = encode_documents(plain, [END_OF_TEXT, "b"])
    assert np.flatnonzero(ids == 0).tolist() == [len(ids) - 3, len(ids) - 1]


def test_a_tokenizer_without_an_end(learnt: PreTrainedTokenizerFast) -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=learnt.backend_tokenizer)
    with pytest.raises(DataError, match="no end-of-text token"):
        encode_documents(endless, ["text"])


# Bytes per token


def make_tokenizer(vocabulary: list[str], decoder: decoders.Decoder | None) -> PreTrainedTokenizerFast:
    model = models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=vocabulary[0])
    backend = Tokenizer(model)
    if decoder is not None:
        backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=vocabulary[0], eos_token=vocabulary[1])


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
        decoders.Metaspace(),
    ],
)
def test_bytes_of_sentencepiece_tokens(decoder: decoders.Decoder) -> None:
    vocabulary = ["<unk>", "</s>", "<0x0A>", "<0xFF>", "▁the", "▁▁▁", "é", "日本", "<0xfg>"]
    num_bytes = token_bytes(make_tokenizer(vocabulary, decoder))
    assert num_bytes.dtype == torch.int64
    assert num_bytes.tolist() == [0, 0, 1, 1, 4, 3, 2, 6, 6]


def test_bytes_of_added_tokens_and_of_tokens_outside_the_byte_alphabet() -> None:
    vocabulary = ["<unk>", "</s>", "Ġthe", "Ã©", "日"]
    byte_level = make_tokenizer(vocabulary, decoders.ByteLevel())
    byte_level.add_tokens(["Ġé"])  # not special: found in a text just as it is
    byte_level.add_special_tokens({"pad_token": "<pad>"})
    assert token_bytes(byte_level).tolist() == [0, 0, 4, 2, 3, 4, 0]


@pytest.mark.parametrize("decoder, name", [(decoders.WordPiece(), "WordPiece"), (None, "unknown")])
def test_tokens_that_do_not_tell_their_bytes(decoder: decoders.Decoder | None, name: str) -> None:
    with pytest.raises(DataError, match=rf"Bits per byte cannot be computed .*decoder {name}.*loss per token"):
        token_bytes(make_tokenizer(["<unk>", "</s>", "the", "##se"], decoder))


# Windows


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_training_windows_are_whole(dtype: type[np.integer]) -> None:
    windows = TokenWindows(np.arange(65520, 65520 + 15).astype(dtype), length=4)
    assert len(windows) == 3
    items = list(windows)  # pyright: ignore[reportArgumentType]  # the old iteration protocol, by IndexError
    assert [set(item) for item in items] == [{"input_ids", "labels"}] * 3
    assert torch.cat([item["input_ids"] for item in items]).tolist() == list(range(65520, 65532))
    for item in items:
        assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
        assert torch.equal(item["input_ids"], item["labels"])
        assert item["input_ids"].data_ptr() != item["labels"].data_ptr()


@pytest.mark.parametrize("num_tokens, num_windows, num_valid", [(8, 2, 8), (9, 2, 8), (10, 3, 10), (2, 1, 2)])
def test_validation_windows_hold_every_token(num_tokens: int, num_windows: int, num_valid: int) -> None:
    windows = TokenWindows(np.arange(1, num_tokens + 1, dtype=np.int32), length=4, drop_last=False)
    assert len(windows) == num_windows
    batch = {key: torch.stack([windows[i][key] for i in range(len(windows))]) for key in windows[0]}
    valid = batch["attention_mask"].bool()
    assert all(value.dtype == torch.int64 and value.shape == (num_windows, 4) for value in batch.values())
    assert batch["input_ids"][valid].tolist() == batch["labels"][valid].tolist() == list(range(1, num_valid + 1))
    assert (batch["labels"][~valid] == -100).all() and (batch["input_ids"][~valid] == 0).all()
    assert (valid[:, :2]).all()  # every window predicts something


def test_changing_an_item_changes_nothing_else() -> None:
    token_ids = np.arange(8)
    for drop_last in (True, False):
        windows = TokenWindows(token_ids, 4, drop_last)
        item = windows[0]
        item["input_ids"][0] = 77
        assert item["labels"][0] == 0 and windows[0]["input_ids"][0] == 0 and token_ids[0] == 0


@pytest.mark.parametrize("index", [-1, 2])
def test_a_window_that_is_not_there(index: int) -> None:
    with pytest.raises(IndexError, match=rf"no window {index}: there are 2"):
        TokenWindows(np.arange(8), 4)[index]


@pytest.mark.parametrize(
    "num_tokens, drop_last, message",
    [
        (3, True, r"has 3 tokens, and one window needs 4\..*shorter length"),
        (1, False, r"has 1 tokens.*needs 2\."),
    ],
)
def test_too_little_text_for_a_window(num_tokens: int, drop_last: bool, message: str) -> None:
    with pytest.raises(DataError, match=message):
        TokenWindows(np.arange(num_tokens), 4, drop_last)


@pytest.mark.parametrize("token_ids", [np.zeros((2, 8), np.int64), np.zeros(8)])
def test_token_ids_that_are_no_row_of_integers(token_ids: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"token_ids has shape .* type .*one dimension of integers"):
        TokenWindows(token_ids, 4)


def test_a_length_without_anything_to_predict() -> None:
    with pytest.raises(DataError, match="length is 1 tokens"):
        TokenWindows(np.arange(8), 1)
