"""Fused inference on a GPU: runs of blocks as launches."""
