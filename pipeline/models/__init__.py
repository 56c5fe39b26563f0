"""Encoders, projection heads and the one BatchNorm."""
