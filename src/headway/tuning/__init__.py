"""Adapting a model that exists: adapters of low rank, on every family and on weights in codes."""
