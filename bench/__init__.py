"""Benchmarks: ``pytest bench/``."""
