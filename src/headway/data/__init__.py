"""From files to packed batches: sources -> documents -> tokens on disk -> batches with a cursor."""

from headway.data.batches import IGNORE, Batch, PackedBatches, evaluation_batches
from headway.data.corpus import Corpus, Prepared, open_corpus, prepare
from headway.data.sources import Document, ReadOptions, ReadReport, documents
from headway.data.store import TokenStore

__all__ = [
    "IGNORE",
    "Batch",
    "Corpus",
    "Document",
    "PackedBatches",
    "Prepared",
    "ReadOptions",
    "ReadReport",
    "TokenStore",
    "documents",
    "evaluation_batches",
    "open_corpus",
    "prepare",
]
