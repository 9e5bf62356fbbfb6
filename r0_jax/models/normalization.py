"""flax's norms, with PyTorch's formula of the variance: the mean of (x - mean)^2.

flax's default is mean(x^2) - mean(x)^2. It subtracts nearly equal numbers where the mean is large:
at a mean of 10 standard deviations a GroupNorm loses two more of float32's seven digits.
"""

import functools

from flax import nnx

GroupNorm = functools.partial(nnx.GroupNorm, use_fast_variance=False)
LayerNorm = functools.partial(nnx.LayerNorm, use_fast_variance=False)
