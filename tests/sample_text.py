"""Documents for the tests of text, and tokenizers that lose nothing of any."""

DOCUMENTS = [f"Naïve café {i}: the cat sat on mat {i % 5}, 日本語, and saw it.\n" for i in range(8)]


def sample_documents(count: int = 40) -> list[str]:
    return [f"Document {i} says that layer {i * 7 % 11} was left out.\n\nAnd so on, {i}.\n" for i in range(count)]
