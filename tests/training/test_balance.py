import pytest

from r0_jax.training.balance import Balance


def step(rewards=1.0, guidance=0.0, **others):
    return {"norm/x0/rewards": rewards, "norm/x0/guidance": guidance, "norm/grads": 9.0, **others}


def checked(balance, values, steps=10):
    for _ in range(steps):
        balance.add(values)
    balance.check()


def test_regularizers_that_pull_too_little_are_told_once():
    balance = Balance()
    with pytest.warns(UserWarning, match=r"together pull 4\.0% as much as the rewards") as told:
        checked(balance, step(guidance=0.04))
        checked(balance, step(guidance=0.01))
    assert len(told) == 1


@pytest.mark.parametrize(
    "values",
    [
        step(guidance=0.06),
        step(**{"norm/x0/output": 0.06}),
        # The decoupled pull to the pretrained weights, beside what Adam adds.
        step(**{"norm/weight_pull": 0.006, "norm/updates": 0.1}),
        step(rewards=0.0),  # a control without rewards
        {"norm/x0/guidance": 0.01},
    ],
)
def test_enough_is_not_told(values):
    checked(Balance(), values)


def test_the_first_few_steps_tell_nothing():
    checked(Balance(), step(), steps=9)
