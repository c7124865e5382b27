"""Tokenizers, documents to token ids, and the bytes a token stands for."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sample_text import sample_documents
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from midskip.data import (
    END_OF_TEXT,
    DataError,
    bytes_tokenizer,
    encode_documents,
    load_tokenizer,
    token_bytes,
    tokenizer,
    train_tokenizer,
    vocabulary_size,
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


# The tokenizer


def test_any_text_survives(lossless: PreTrainedTokenizerFast) -> None:
    num_bytes = token_bytes(lossless)
    for text in ODD_TEXTS:
        ids = lossless.encode(text)
        assert lossless.decode(ids) == lossless.decode(ids, skip_special_tokens=True) == text
        assert lossless.eos_token_id not in ids
        assert int(num_bytes[ids].sum()) == len(text.encode())


def test_a_saved_tokenizer_is_the_same(lossless: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    lossless.save_pretrained(tmp_path)
    end = lossless.eos_token_id
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert loaded.eos_token_id == loaded.pad_token_id == lossless.pad_token_id == end
        for text in ODD_TEXTS:
            assert loaded.encode(text) == lossless.encode(text)
            assert loaded.decode(loaded.encode(text)) == text
        assert torch.equal(token_bytes(loaded), token_bytes(lossless))
        assert np.array_equal(encode_documents(loaded, ODD_TEXTS), encode_documents(lossless, ODD_TEXTS))


@pytest.mark.parametrize("name, vocab_size", [("bpe", 300), ("bytes", None)])
def test_a_pad_token_of_its_own_leaves_the_end_of_text_to_be_learnt(
    name: str, vocab_size: int | None, tmp_path: Path
) -> None:
    plain = load_tokenizer(name, sample_documents(), vocab_size)
    padded = load_tokenizer(name, sample_documents(), vocab_size, pad_token="<|pad|>")
    padded.save_pretrained(tmp_path)
    for one in (padded, load_tokenizer(str(tmp_path))):
        assert len(one) == vocabulary_size(one) == (vocab_size or 258)
        assert one.pad_token_id == len(one) - 1 and one.eos_token_id == plain.eos_token_id
        assert token_bytes(one)[-1] == 0
        for text in [*ODD_TEXTS, "spelt <|pad|> in a text"]:
            assert one.decode(one.encode(text)) == text and one.pad_token_id not in one.encode(text)
        ids = [[one.eos_token_id, *one.encode(text), one.eos_token_id] for text in ("a", "longer than that")]
        rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]
        batch = DataCollatorForLanguageModeling(one, mlm=False)(rows)
        assert ((batch["labels"] == one.eos_token_id).sum(1) == 2).all()
        assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)
        assert (batch["attention_mask"] == 0).any()
    if name == "bytes":
        assert [padded.encode(text) for text in ODD_TEXTS] == [plain.encode(text) for text in ODD_TEXTS]


@pytest.mark.parametrize("pad_token, vocab_size", [("a", 300), ("", 300), (END_OF_TEXT, 300), ("<|pad|>", 257)])
def test_a_pad_token_that_stands_for_something_else_is_refused(pad_token: str, vocab_size: int) -> None:
    with pytest.raises(DataError, match=r"pad_token"):
        load_tokenizer("bpe", sample_documents(), vocab_size, pad_token=pad_token)


def test_plain_bytes_are_their_own_ids() -> None:
    plain = bytes_tokenizer()
    for text in ODD_TEXTS:
        assert plain.encode(text) == list(text.encode())
    assert plain.eos_token_id == 256 and len(plain) == vocabulary_size(plain) == 257
    assert token_bytes(plain).tolist() == [1] * 256 + [0]


def test_training_is_deterministic_and_learns_words(learnt: PreTrainedTokenizerFast) -> None:
    assert train_tokenizer(sample_documents(), 320).get_vocab() == learnt.get_vocab()
    assert len(learnt) == 320
    assert len(learnt.encode("Document")) == 1


def test_a_small_text_gives_a_smaller_vocabulary() -> None:
    assert len(train_tokenizer(["a"], 257)) == len(train_tokenizer(["a"], 5000)) == 257


def test_a_vocabulary_without_room_for_all_bytes_or_for_the_memory() -> None:
    with pytest.raises(DataError, match=r"vocab_size is 256\. Expected 257 or more"):
        train_tokenizer(["text"], 256)
    for size in (2**24 + 1, 2**63 - 1):  # tokenizers would end the process
        with pytest.raises(DataError, match=rf"vocab_size is {size}\. Expected 16777216 or fewer"):
            train_tokenizer(["text"], size)


@pytest.mark.parametrize("documents", [[], ["", ""]])
def test_nothing_to_learn_from(documents: list[str]) -> None:
    with pytest.raises(DataError, match="no text to learn"):
        train_tokenizer(documents, 300)


def test_documents_to_learn_from_may_come_one_by_one(learnt: PreTrainedTokenizerFast) -> None:
    assert train_tokenizer(iter(["", *sample_documents()]), 320).get_vocab() == learnt.get_vocab()


# By name


def test_tokenizers_by_name(learnt: PreTrainedTokenizerFast) -> None:
    assert load_tokenizer("bpe", iter(sample_documents()), 320).get_vocab() == learnt.get_vocab()
    assert len(load_tokenizer("bpe", ["a"])) == 257
    assert load_tokenizer("bytes").get_vocab() == bytes_tokenizer().get_vocab()


def test_only_the_start_of_a_corpus_is_learnt_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_SAMPLE_CHARACTERS", 100)

    def documents() -> Iterator[str]:
        yield "seen " * 10
        yield "seen " * 20 + "unseen " * 20
        raise AssertionError("read too far")

    vocabulary = load_tokenizer("bpe", documents(), 300).get_vocab()
    assert "Ġseen" in vocabulary and "Ġun" not in vocabulary


def test_a_folder_with_no_more_than_vocabulary_and_merges(
    learnt: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = json.loads(learnt.backend_tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.eos_token_id == 0
    assert encode_documents(loaded, ODD_TEXTS).tolist() == encode_documents(learnt, ODD_TEXTS).tolist()
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert load_tokenizer(f"~/{tmp_path.name}").get_vocab() == loaded.get_vocab()
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(DataError, match=r"^The tokenizer .* cannot be loaded: .*Expected 'bpe', 'bytes', a folder"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/nowhere", "a/b/c"])
def test_a_folder_that_does_not_exist(name: str) -> None:
    with pytest.raises(DataError, match=rf"no tokenizer at '{name}': no such folder.*spelling"):
        load_tokenizer(name)


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing"])
def test_a_name_that_cannot_be_loaded_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no network,\nno tokenizer.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(
        DataError,
        match=rf"tokenizer '{name}' cannot be loaded: OSError: no network, no tokenizer\. Expected .*network\.$",
    ):
        load_tokenizer(name)


def test_a_folder_that_holds_no_tokenizer(tmp_path: Path) -> None:
    for files in ([], ["text.txt", "model.safetensors"]):
        for file in files:
            (tmp_path / file).touch()
        with pytest.raises(DataError, match=r"^There is no tokenizer in the folder .*; give another folder\.$"):
            load_tokenizer(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(DataError, match=r"cannot be loaded"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["bytes", "./somewhere"])
def test_a_size_for_a_tokenizer_that_has_one(name: str) -> None:
    with pytest.raises(DataError, match=r"vocab_size is 300, and the tokenizer .* own size.*leave it out"):
        load_tokenizer(name, [], 300)


def test_a_tokenizer_without_an_end(learnt: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=learnt.backend_tokenizer)
    with pytest.raises(DataError, match="no end-of-text token"):
        encode_documents(endless, ["text"])
    endless.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path))


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
