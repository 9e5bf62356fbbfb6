import numpy as np

from benchmarks.reward_sight import preferred

ACCEPTED = np.array([[True, True, False], [False, True, False], [True, True, True]])


def test_share_of_pairs_of_one_prompt():
    scores = np.array([[3.0, 1.0, 2.0], [0.0, 5.0, 6.0], [9.0, 9.0, 9.0]])
    share = preferred(scores, ACCEPTED, ~ACCEPTED, seed=0)
    # 3 > 2, not 1 > 2; 5 > 0, not 5 > 6; nothing to compare in the third.
    assert share["value"] == 0.5 and share["ci95"][0] < 0.5 < share["ci95"][1]
    assert preferred(ACCEPTED + 0.0, ACCEPTED, ~ACCEPTED, seed=0)["value"] == 1
    assert preferred(~ACCEPTED + 0.0, ACCEPTED, ~ACCEPTED, seed=0)["value"] == 0


def test_no_pairs_is_no_number():
    share = preferred(np.ones((3, 3)), np.ones((3, 3), bool), np.zeros((3, 3), bool), seed=0)
    assert np.isnan(share["value"])
