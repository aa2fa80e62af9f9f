"""Contenders of a case: eager PyTorch, ours, and the peers."""
