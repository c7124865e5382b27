"""Packed tokens: layouts, attention, layers. Knows nothing of Hugging Face, data or training."""
