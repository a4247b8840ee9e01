"""Weights in INT8 and INT4: rounding, calibration, and the walk that puts a model of any family in codes."""
