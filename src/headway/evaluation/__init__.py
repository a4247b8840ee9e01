"""Metrics with intervals, and the tasks they measure."""

from headway.evaluation.interval import Interval, ratio_interval
from headway.evaluation.perplexity import Perplexity, TextTokens, perplexity

__all__ = ["Interval", "Perplexity", "TextTokens", "perplexity", "ratio_interval"]
