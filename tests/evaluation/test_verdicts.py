import numpy as np
import pytest

from r0_jax.errors import InputError
from r0_jax.evaluation import statistics, verdicts
from r0_jax.evaluation.verdicts import Target

ACCURACY = Target("accuracy", "judge_accuracy", 1.0, least=-0.01)


def seeds(count=4, prompts=400, gain=0.0, spread=0.0, shared=0.0):
    """Values of runs: `spread` differs by seed, `shared` by prompt and for all seeds alike."""
    rng = np.random.default_rng(0)
    hard = shared * rng.standard_normal(prompts)
    found = []
    for i in range(count):
        base = rng.standard_normal(prompts)
        ours = base + gain + hard + spread * (-1) ** i + rng.standard_normal(prompts) / 10
        found.append({"base/judge_accuracy": base, "r0/judge_accuracy": ours})
    return found


def half_width(entry):
    return (entry["ci95"][1] - entry["ci95"][0]) / 2


def test_what_both_models_share_cancels():
    entry = verdicts.difference(seeds(gain=0.1), "r0", "base", ACCURACY)
    assert entry["value"] == pytest.approx(0.1, abs=0.01) and half_width(entry) < 0.02
    assert verdicts.verdict(entry, ACCURACY) == "yes"


@pytest.mark.parametrize("kind", ["spread", "shared"])
def test_the_interval_holds_for_other_trainings_and_other_prompts(kind):
    narrow = verdicts.difference(seeds(), "r0", "base", ACCURACY)
    wide = verdicts.difference(seeds(**{kind: 1.0}), "r0", "base", ACCURACY)
    # t / sqrt(n) standard deviations, of 4 seeds (which are +-1) or of 400 prompts.
    expected = 3.182 / 2 * np.sqrt(4 / 3) if kind == "spread" else 1.966 / 20
    assert half_width(wide) == pytest.approx(expected, rel=0.1) and half_width(narrow) < 0.02


@pytest.mark.parametrize(
    ("interval", "said"),
    [((-0.005, 0.1), "yes"), ((-0.3, -0.02), "no"), ((-0.02, 0.1), "undecided")],
)
def test_a_verdict_needs_the_whole_interval(interval, said):
    assert verdicts.verdict({"ci95": interval}, ACCURACY) == said


def test_frechet_distances_are_resampled_together():
    rng = np.random.default_rng(0)
    prompts = rng.standard_normal((300, 8))  # what the images of a prompt share

    def features():
        return prompts + 0.1 * rng.standard_normal((300, 8))

    values = [
        {f"{model}/features": features() for model in ("r0", "base", "reference")} for _ in range(2)
    ]
    target = next(t for t in verdicts.TARGETS if t.metric == "features")
    entry = verdicts.difference(values, "r0", "base", target)
    alone = (
        [seed["r0/features"] for seed in values],
        [seed["reference/features"] for seed in values],
    )
    distance = statistics.frechet_distance(alone[0][0], alone[1][0])
    assert abs(entry["value"]) < distance and half_width(entry) < 2 * distance
    [found] = verdicts.targets(values, "r0", "base")  # the accuracy was not measured
    assert "Frechet" in found["what"] and found["value"] == entry["value"]


def test_values_that_are_not_whole(tmp_path):
    for content in (None, b"", b"PK\x03\x04 cut", b"text"):
        if content is not None:
            (tmp_path / verdicts.VALUES).write_bytes(content)
        with pytest.raises(InputError, match=r"eval_values\.npz is missing or not whole"):
            verdicts.read_values(tmp_path)
