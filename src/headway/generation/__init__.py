"""Text from a model: options, sampling, the decoding loop, beam search, streaming."""

from headway.generation.decode import generate
from headway.generation.options import GenerationOptions
from headway.generation.result import Generation, TokenLogprob
from headway.generation.stream import EscapeFilter, TextStream, strip_escapes

__all__ = [
    "EscapeFilter",
    "Generation",
    "GenerationOptions",
    "TextStream",
    "TokenLogprob",
    "generate",
    "strip_escapes",
]
