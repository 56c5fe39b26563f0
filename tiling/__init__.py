"""Slides to tiles: everything before the first tensor. Imports neither torch nor pipeline."""
