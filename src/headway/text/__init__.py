"""Tokenizers: train, load, save; text to token ids and back."""

from headway.text.tokenizer import Tokenizer
from headway.text.train import train_tokenizer

__all__ = ["Tokenizer", "train_tokenizer"]
