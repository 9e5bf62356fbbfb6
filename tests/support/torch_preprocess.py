"""How published rewards prepare images, in PyTorch."""

import math

import numpy as np
import torch

from r0_jax.rewards.preprocess import CLIP_MEAN, CLIP_STD

SIZE = 16


def noise(h, w, seed=0):
    return np.random.default_rng(seed).random((2, h, w, 3)).astype(np.float32)


def in_torch(images, policy, corner="floor"):
    """What the published code does, on floats and with antialiasing."""
    x = torch.as_tensor(images).permute(0, 3, 1, 2)
    h, w = x.shape[-2:]
    if policy == "crop":  # torchvision's Resize, then its centre crop or that of transformers
        new = (SIZE, int(SIZE * w / h)) if h <= w else (int(SIZE * h / w), SIZE)
    elif policy == "pad":  # hpsv2's ResizeMaxSize
        new = tuple(round(n * (SIZE / max(h, w))) for n in (h, w))
    else:
        new = (SIZE, SIZE)
    if new != (h, w):
        x = torch.nn.functional.interpolate(x, new, mode="bicubic", antialias=True)
    if policy == "crop":
        halve = {"floor": math.floor, "round": round}[corner]
        top, left = halve((new[0] - SIZE) / 2), halve((new[1] - SIZE) / 2)
        x = x[..., top : top + SIZE, left : left + SIZE]
    if policy == "pad":
        tall, wide = SIZE - new[0], SIZE - new[1]
        x = torch.nn.functional.pad(x, (wide // 2, wide - wide // 2, tall // 2, tall - tall // 2))
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    return ((x - mean) / std).permute(0, 2, 3, 1)
