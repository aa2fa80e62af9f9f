"""Measuring: timing, profiling, rooflines, tuning, results files."""
