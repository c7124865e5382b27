"""Models of other code as midskip models, and back."""

from midskip.convert.export import to_transformers
from midskip.convert.load import pretrained, save_tokenizer, tokenizer_of

__all__ = ["pretrained", "save_tokenizer", "to_transformers", "tokenizer_of"]
