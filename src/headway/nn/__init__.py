"""The one stack: attention, positions, norms, feed-forward, block, stack, heads, cache and front ends."""

from headway.nn.cache import Cache
from headway.nn.model import Output, Transformer

__all__ = ["Cache", "Output", "Transformer"]
