"""Fused inference on the CPU with oneDNN's packed weights."""
