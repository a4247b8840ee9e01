"""The only native code: fused operations, each with a plain PyTorch twin that defines it."""
