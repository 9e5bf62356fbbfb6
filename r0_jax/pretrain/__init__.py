"""Trains the embedded world's own models; `python -m r0_jax.pretrain --config=configs/shapes_base.py:STAGE`."""
