"""Measurement: timing, profiling, rooflines, tuning, results files."""
