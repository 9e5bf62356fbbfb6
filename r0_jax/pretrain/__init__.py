"""Trains the embedded world's models in stages; see configs/shapes_base.py."""
