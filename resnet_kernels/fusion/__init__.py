"""The functions that users call: fuse, unfuse, explain, refresh, verify; and the fused blocks."""
