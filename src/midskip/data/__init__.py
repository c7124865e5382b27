"""Text to tokens to batches: load documents, learn a tokenizer, encode, cut into windows."""

from .batches import TokenWindows
from .corpus import DataError, load_documents, split_documents
from .tokenizer import END_OF_TEXT, encode_documents, token_bytes, train_tokenizer

__all__ = [
    "END_OF_TEXT",
    "DataError",
    "TokenWindows",
    "encode_documents",
    "load_documents",
    "split_documents",
    "token_bytes",
    "train_tokenizer",
]
