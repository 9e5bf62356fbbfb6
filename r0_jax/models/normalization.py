"""flax's norms, with the variance as PyTorch takes it: the mean of (x - mean)^2.

flax's default, mean(x^2) - mean(x)^2, subtracts nearly equal numbers where the mean is large: at a
mean of 10 standard deviations a GroupNorm loses two more of float32's seven digits.
"""

import functools

from flax import nnx

GroupNorm = functools.partial(nnx.GroupNorm, use_fast_variance=False)
LayerNorm = functools.partial(nnx.LayerNorm, use_fast_variance=False)
