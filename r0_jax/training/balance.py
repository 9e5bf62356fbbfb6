"""Warns where the regularizers are too weak to matter beside the rewards."""

import warnings
from collections.abc import Mapping

LEAST_SHARE = 0.05
_FEW = 10  # steps; terms begin at 0, since the generator begins as the base
_AT_X0 = "norm/x0/"


class Balance:
    """Compares the pulls of a run's steps, and warns once."""

    def __init__(self) -> None:
        self._shares: list[float] = []
        self._warned = False

    def add(self, values: Mapping) -> None:
        """Take the metrics of a step, {name: number}."""
        pulls = {k.removeprefix(_AT_X0): v for k, v in values.items() if k.startswith(_AT_X0)}
        rewards = pulls.pop("rewards", 0.0)
        if not rewards:
            return
        share = sum(pulls.values()) / rewards
        if "norm/weight_pull" in values and values["norm/updates"]:
            share += values["norm/weight_pull"] / values["norm/updates"]
        self._shares.append(share)

    def check(self) -> None:
        """Warn if the regularizers of the steps since the last check pulled too little."""
        shares, self._shares = self._shares, []
        if self._warned or len(shares) < _FEW:
            return
        share = sum(shares) / len(shares)
        if share < LEAST_SHARE:
            self._warned = True
            warnings.warn(
                f"all regularizers together pull {share:.1%} as much as the rewards: expect reward "
                "hacking; raise their weights (norm/x0/* in metrics.jsonl has each pull)",
                stacklevel=2,
            )
