"""Fused inference on the CPU, on oneDNN's packed weights."""
