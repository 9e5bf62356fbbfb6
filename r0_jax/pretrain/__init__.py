"""Trains the embedded world's own models, stage by stage; see configs/shapes_base.py."""
