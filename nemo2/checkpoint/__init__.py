"""Checkpoints: what of a model they hold, and the files that they are."""
