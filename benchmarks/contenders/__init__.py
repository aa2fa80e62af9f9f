"""Who takes part in a case: eager PyTorch, ours, and the peers."""
