"""Blocks traced once and compiled: ``parallelize(..., compile=True)``."""
