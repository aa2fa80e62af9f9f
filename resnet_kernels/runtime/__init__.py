"""Calling a fused module: may this call run fused, and how it then runs."""
