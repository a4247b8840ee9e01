"""What is kept of a model and of a run on disk: safetensors, state as tensors + JSON, checkpoint folders."""
