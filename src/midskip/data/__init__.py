"""Text to tokens to batches: read documents, tokenize them, keep them in shards, cut these into windows."""

from .batches import TokenWindows, WindowOrder
from .encode import encode_documents, encode_source
from .errors import END_OF_TEXT, DataError
from .labelled import LabelledData
from .prepare import prepare
from .prepared import Prepared, open_prepared, open_shards
from .shards import ShardWriter, check_shards, open_shard
from .sources import read_documents
from .split import split_documents, split_stream
from .token_text import TokenText, token_texts
from .tokenizer import bytes_tokenizer, end_of_text_id, load_tokenizer, token_bytes, train_tokenizer, vocabulary_size

__all__ = [
    "END_OF_TEXT",
    "DataError",
    "LabelledData",
    "Prepared",
    "ShardWriter",
    "TokenText",
    "TokenWindows",
    "WindowOrder",
    "bytes_tokenizer",
    "check_shards",
    "encode_documents",
    "encode_source",
    "end_of_text_id",
    "load_tokenizer",
    "open_prepared",
    "open_shard",
    "open_shards",
    "prepare",
    "read_documents",
    "split_documents",
    "split_stream",
    "token_bytes",
    "token_texts",
    "train_tokenizer",
    "vocabulary_size",
]
