"""The measurement of selectors: that it measures the same thing twice."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import select
from jaxrft.select import selectors
from jaxrft.types import Feedback, Tasks


def test_the_published_estimator_in_numpy_believes_what_bots_does():
    rng = np.random.default_rng(0)
    weak = rng.uniform(0, 0.5, 20)
    strong = weak + 0.4
    tasks = Tasks(jnp.asarray(np.stack([weak, strong], axis=1), jnp.float32))
    bots = selectors.bots(8)
    ours, theirs = bots.init(tasks, 20), select.Published(np.ones(20), np.ones(20), float("nan"))
    for _ in range(3):
        ids, successes = rng.permutation(20)[:4], rng.integers(0, 9, 4).astype(np.float64)
        theirs = select.observe(theirs, weak, strong, ids, successes, num_generations=8)
        counts = jnp.asarray(successes, jnp.float32)
        ours = bots.update(
            ours, tasks, Feedback(jnp.asarray(ids, jnp.int32), counts, jnp.full(4, 8.0), counts)
        )
    np.testing.assert_allclose(ours.posterior.alpha, theirs.alpha, rtol=1e-4)
    np.testing.assert_allclose(ours.posterior.beta, theirs.beta, rtol=1e-4)
    assert len(set(select.choose(rng, theirs, 4))) == 4


@pytest.mark.slow
def test_steps_are_measured_side_by_side_and_fill_a_page():
    subjects = {select.PUBLISHED: select.published(64, 4, 8)}
    subjects |= {name: select.ours(name, 64, 4, 8) for name in ("uniform", select.WITH_EMBEDDINGS)}
    found = select.side_by_side(subjects, 1)
    assert set(found) == {*subjects} and min(found.values()) > 0
    figures = {
        "steps": {"64": found, "54400": found, "1000000": found},
        "quickstart": 0.1,
        "sharded": {"bots": {"seconds": 2.0, "tasks a device": 1_250_000}},
        "attention": {"all references": 0.05},
    }
    page = select.page(
        {name: {"conditions": "here", "figures": figures[name]} for name in select.PARTS}
    )
    assert "32 x 16 rollouts" in page and "1,250,000 tasks a device" in page and "{" not in page


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repeats", "0"], "repeats is 0: it must be at least 1"),
        (["--json", "nowhere/x.json"], "nowhere/x.json: its folder does not exist"),
        (["--json", "broken.json"], "broken.json does not hold the figures of this benchmark"),
        (["--json", "other.json"], "other.json does not hold the figures of this benchmark"),
    ],
)
def test_mistake_is_reported_before_measuring(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("[1]")
    (tmp_path / "other.json").write_text('{"steps": 3}')
    with pytest.raises(SystemExit):
        select.main(flags)
    assert message in capsys.readouterr().err
