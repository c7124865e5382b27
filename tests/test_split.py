"""The split of documents into training and validation text."""

import pytest
from sample_text import sample_documents

from midskip.data import DataError, split, split_documents, split_stream


def test_the_split_depends_on_nothing_but_each_text() -> None:
    documents = sample_documents(200)
    training, validation = split_documents(documents, 0.2)
    assert 0.1 < len(validation) / 200 < 0.3
    assert [document for document in documents if document in validation] == validation
    backwards = split_documents(documents[::-1], 0.2)
    assert backwards == (training[::-1], validation[::-1])
    half = split_documents(documents[:100], 0.2)
    assert set(half[0]) <= set(training) and set(half[1]) <= set(validation)


@pytest.mark.parametrize("share", [1e-6, 1 - 1e-6])
def test_copies_of_a_text_are_on_one_side(share: float) -> None:
    training, validation = split_documents(["one", "two", "three"] * 10, share)
    assert {len(training), len(validation)} == {10, 20} and not set(training) & set(validation)
    documents = sample_documents(1000)
    sides = [side for side, _ in split_stream(documents + documents, share)]
    assert sides[:1000] == sides[1000:] and len(set(sides)) == 2, "also after those that are looked at together"


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


# Streams


def sides(documents: list[str], share: float) -> tuple[list[str], list[str]]:
    found = list(split_stream(iter(documents), share))
    assert [document for _, document in found] == documents
    training, validation = ([document for side, document in found if side == name] for name in split.SIDES)
    return training, validation


@pytest.mark.parametrize("head", [2, 7, 40, 1000])
def test_a_stream_is_split_as_a_list_is(head: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "_HEAD_DOCUMENTS", head)
    assert sides(sample_documents(), 0.5) == split_documents(sample_documents(), 0.5)


@pytest.mark.parametrize("limit", ["_HEAD_DOCUMENTS", "_HEAD_CHARACTERS"])
def test_no_side_of_a_stream_stays_empty(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, limit, 1)  # two are looked at all the same
    training, validation = sides(sample_documents(9), 1e-9)
    assert len(training) == 8 and validation[0] in sample_documents(2)
    training, validation = sides(sample_documents(9), 1 - 1e-9)
    assert len(validation) == 8 and training[0] in sample_documents(2)


def test_a_stream_is_read_no_further_than_the_head_before_it_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "_HEAD_DOCUMENTS", 5)
    documents = iter(sample_documents())
    next(split_stream(documents))
    assert next(documents) == sample_documents()[5]


def test_a_stream_of_one_document_is_cut() -> None:
    assert list(split_stream(["one two"], 0.5)) == [("training", "one "), ("validation", "two")]


def test_a_stream_is_refused_before_it_is_read() -> None:
    with pytest.raises(DataError, match="validation_share is 0"):
        split_stream(iter(()), 0)
    with pytest.raises(DataError, match="no documents"):
        list(split_stream(iter(())))
