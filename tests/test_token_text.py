"""What each token adds to a text: no character is cut in two, none is lost, and no byte becomes U+FFFD."""

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from midskip import MidskipForCausalLM
from midskip.data import END_OF_TEXT, TokenText, bytes_tokenizer, token_texts, train_tokenizer
from midskip.data.token_text import MOST_PARTS
from midskip.evaluate import depth_of_tokens

CHARACTERS = ["中", "文", "é", "e\u0301", "👨‍👩‍👧", "🇩🇪", "👍🏽", "क्षि", "\ufffd", "a"]
TEXT = " ".join(CHARACTERS)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """The second has tokens that end within a character: they join the space with the first byte of what follows."""
    return bytes_tokenizer() if request.param == "bytes" else train_tokenizer([" 中 与 丰 " * 90, "é è ê " * 90], 270)


def test_characters_that_span_tokens_are_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode(TEXT)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(token.text for token in texts if token.part == 0) == TEXT
    for number, (text, part, num_parts) in enumerate(texts):
        assert {(text, other, num_parts) for other in range(num_parts)} == set(
            texts[number - part : number - part + num_parts]
        )
        assert text.strip(" ") in ["", *CHARACTERS], "one character at most, and a whole one"
    assert max(token.num_parts for token in texts) == len("👨‍👩‍👧".encode()) if len(tokenizer) == 257 else True


def test_bytes_that_are_no_characters_are_shown() -> None:
    tokenizer = bytes_tokenizer()
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    texts = token_texts(tokenizer, [0xFF, 97, 0xE4, 0xB8, end, 0xE4, 0xB8, 0xAD, 0xF0, 0x9F])
    shown = ["<0xFF>", "a", "<0xE4>", "<0xB8>", END_OF_TEXT, *["中"] * 3, "<0xF0>", "<0x9F>"]
    assert [token.text for token in texts] == shown
    assert [token.part for token in texts] == [0, 0, 0, 0, 0, 0, 1, 2, 0, 0]
    assert token_texts(tokenizer, []) == []


def test_a_row_of_accents_without_end_is_cut() -> None:
    ids = bytes_tokenizer().encode("e" + "\u0301" * 5000)
    texts = token_texts(bytes_tokenizer(), ids)
    assert len(texts) == len(ids) and max(token.num_parts for token in texts) <= MOST_PARTS + 1
    shown = "".join(token.text for token in texts if token.part == 0)
    assert shown == "e" + "\u0301" * 5000, "no sign is cut in two"


def test_other_kinds_of_tokenizers() -> None:
    """Of SentencePiece's kind, with bytes for what has no token, and one whose tokens do not tell bytes."""
    entries = [("<unk>", 0.0), ("▁the", -1.0), ("<0xE4>", -9.0), ("<0xB8>", -9.0), ("<0xAD>", -9.0)]
    unigram = Tokenizer(models.Unigram(entries, unk_id=0, byte_fallback=True))
    unigram.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    spm = PreTrainedTokenizerFast(tokenizer_object=unigram)
    assert [token.text for token in token_texts(spm, [1, 2, 3, 4, 1])] == [" the", "中", "中", "中", " the"]
    pieces = Tokenizer(models.WordPiece({"un": 0, "##e": 1, "##\u0301": 2}, unk_token="un"))
    pieces.decoder = decoders.WordPiece()
    assert token_texts(PreTrainedTokenizerFast(tokenizer_object=pieces), [0]) == [TokenText("un")]


def test_depths_of_tokens_have_whole_characters(make_model: Callable[..., MidskipForCausalLM]) -> None:
    tokenizer = bytes_tokenizer()
    model = make_model("mixed", torch.float32, vocab_size=len(tokenizer)).eval()
    tokens = depth_of_tokens(model, tokenizer, tokenizer.encode("a中"))
    assert [(token.text, token.part, token.num_parts) for token in tokens] == [
        ("a", 0, 1), ("中", 0, 3), ("中", 1, 3), ("中", 2, 3)
    ]  # fmt: skip
