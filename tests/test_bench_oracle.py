"""Runs whose selector knows the policy's own pass rates."""

import helpers
import numpy as np
import pytest

from benchmarks import _oracle as oracle
from jaxrft.config import SelectConfig
from jaxrft.select import selectors
from jaxrft.train.loop import train
from jaxrft.types import InputError


@pytest.mark.slow
def test_resumed_oracle_has_the_same_pass_rates(configure, tmp_path):
    """Of 12 of the 16 tasks, measured at steps 1, 3 and 5."""
    select = SelectConfig("oracle")
    with oracle.known_pass_rates(measured=12, measure_every=2):
        whole = tmp_path / "whole"
        state = train(configure(whole, select=select))
        run = helpers.stopped_after(3, whole, tmp_path / "run")
        helpers.assert_same_bits(train(configure(run, select=select)), state)
    lines = helpers.metrics(whole)
    assert helpers.metrics(run) == lines
    # it knew a pass rate of all that it chose
    assert all(0 <= line["select/brier"] <= 1 for line in lines)
    assert [line["rollouts"] for line in lines] == [
        32 * step for step in range(1, 7)
    ]  # what is measured is not counted
    assert np.isfinite(state.selector.pass_rates).sum() == 12


def test_oracle_exists_only_within_the_measurement():
    assert "oracle" not in selectors.SELECTORS
    with pytest.raises(
        InputError, match="no selector 'oracle': it is a measurement now, benchmarks/_oracle.py"
    ):
        selectors.make("oracle", 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measured": 3}, "measured is 3: it must be at least batch_size 8"),
        ({"measured": 0}, "measured is 0: it must be a whole number, at least 1"),
        ({"measure_every": 0}, "measure_every is 0: it must be a whole number, at least 1"),
    ],
)
def test_a_mistake_is_one_sentence(configure, tmp_path, options, message):
    with pytest.raises(InputError, match=message), oracle.known_pass_rates(**options):
        train(configure(tmp_path, select=SelectConfig("oracle")))
