"""Tiles to batches of augmented views."""
