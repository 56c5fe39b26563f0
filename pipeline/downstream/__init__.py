"""Decoders on frozen features: splits, training, metrics."""
