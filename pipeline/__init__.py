"""Tiles to an evaluated encoder: pretraining, features, decoders, the command line."""
