"""The ways to run PyTorch that are compared."""

from typing import NamedTuple


class Variant(NamedTuple):
    """How PyTorch runs the networks.

    Attributes:
      backend: of torch.compile; "" runs them eagerly.
      channels_last: the memory format of convolutions.
    """

    backend: str = ""
    channels_last: bool = False


VARIANTS = {
    "eager": Variant(),
    "eager+channels_last": Variant(channels_last=True),
    "aot_eager": Variant("aot_eager"),
    "compile": Variant("inductor"),
    "compile+channels_last": Variant("inductor", channels_last=True),
}
