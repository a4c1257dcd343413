"""Several sets of tasks in one table: shares, order, columns, pass rates, domains."""

import json

import helpers
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer import make as make_tokenizer

from jaxrft import tasks
from jaxrft.config import Config, TasksConfig
from jaxrft.lm import tokenizer as lm_tokenizer
from jaxrft.tasks import mixture
from jaxrft.tasks.open_sets import open_mixture
from jaxrft.train.loop import train
from jaxrft.types import InputError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return lm_tokenizer.load(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def prepare(tokenizer):
    def make(name, prompts, limit=64, **fields):
        rows = tasks.Rows(prompts, fields.pop("columns", {}), *fields.values())
        return tasks.prepare(rows, tokenizer, limit, name=name)

    return make


def numbered(letter, count):
    return [f"{letter} {i}" for i in range(count)]


@pytest.mark.parametrize(
    ("counts", "weights", "expected"),
    [
        ((100, 100), (1, 1), [100, 100]),
        ((100, 50), (1, 1), [50, 50]),
        ((100, 50), (4, 1), [100, 25]),
        ((7473, 10240, 12), (0.5, 0.5, 0.001), [6000, 6000, 12]),
        ((10, 1000), (1, 1e-9), [10, 1]),
        ((10, 10, 10), (1, 1, 3), [3, 3, 10]),
    ],
)
def test_shares_by_hand(counts, weights, expected):
    assert mixture.proportional_sizes(counts, weights) == expected


@given(st.lists(st.tuples(st.integers(1, 10_000), st.floats(0.01, 100)), min_size=1, max_size=5))
def test_sizes_follow_the_weights_and_one_set_keeps_all_tasks(sets):
    counts, weights = zip(*sets, strict=True)
    sizes = mixture.proportional_sizes(counts, weights)
    assert all(1 <= size <= count for size, count in zip(sizes, counts, strict=True))
    assert any(size == count for size, count in zip(sizes, counts, strict=True))
    scale = min(count / weight for count, weight in sets)
    assert all(abs(size - scale * weight) <= 1 for size, weight in zip(sizes, weights, strict=True))


def test_sets_are_concatenated_and_missing_columns_are_none(prepare):
    rates = np.array([[0.1, 0.2], [0.3, 0.4]], np.float32)
    a = prepare("a", ["Z", "ZZ"], columns={"answer": ["1", "2"], "level": [5, 6]}, rates=rates)
    b = prepare("b", ["Z" * 30, "Z"], columns={"answer": ["3", "4"], "unit": ["m", "s"]})
    table = tasks.mix({"a": a, "b": b})
    assert table.prompts == ["Z", "ZZ", "Z" * 30, "Z"]
    assert table.columns == {
        "answer": ["1", "2", "3", "4"],
        "level": [5, 6, None, None],
        "unit": [None, None, "m", "s"],
    }
    assert (table.domains, table.domain.tolist(), table.domain.dtype) == (
        ("a", "b"),
        [0, 0, 1, 1],
        np.int32,
    )
    assert (
        table.lengths.tolist() == [*a.lengths, *b.lengths]
        and table.tokens.shape[1] == b.tokens.shape[1]
    )
    for row, (part, i) in enumerate([(a, 0), (a, 1), (b, 0), (b, 1)]):
        np.testing.assert_array_equal(
            table.tokens[row, : table.lengths[row]], part.tokens[i, : part.lengths[i]]
        )
        assert not table.tokens[row, table.lengths[row] :].any()
    np.testing.assert_array_equal(table.reference_pass_rates, [*rates, [np.nan] * 2, [np.nan] * 2])


def test_a_domain_that_two_sets_share_is_one(prepare):
    a = prepare("a", ["1", "2"], rates=None, domains=["x", "y"])
    b = prepare("b", ["3", "4"], rates=None, domains=["z", "y"])
    table = tasks.mix({"a": a, "b": b})
    assert table.domains == ("x", "y", "z") and table.domain.tolist() == [0, 1, 2, 1]


def test_pass_rates_of_other_policies_do_not_mix(prepare):
    a = prepare("a", ["1"], rates=np.zeros((1, 2), np.float32))
    b = prepare("b", ["2"], rates=np.zeros((1, 3), np.float32))
    with pytest.raises(
        InputError, match="a has the pass rates of 2 reference policies but b of 3: name the same"
    ):
        tasks.mix({"a": a, "b": b})


def test_thinning_keeps_order_repeats_nothing_and_depends_on_the_seed(prepare):
    sets = {"a": prepare("a", numbered("a", 40)), "b": prepare("b", numbered("b", 40))}
    table = tasks.mix(sets, (1, 3), seed=1)
    kept = [prompt for prompt in table.prompts if prompt.startswith("a")]
    assert len(set(kept)) == 13 and table.prompts == kept + sets["b"].prompts
    assert kept == sorted(kept, key=sets["a"].prompts.index) and kept != sets["a"].prompts[:13]
    assert np.bincount(table.domain).tolist() == [13, 40]
    assert table.dropped == (("a", 27, "thinned out by the weights of the mixture"),)
    assert tasks.mix(sets, (1, 3), seed=1).prompts == table.prompts
    assert tasks.mix(sets, (1, 3), seed=2).prompts != table.prompts
    other_order = tasks.mix(dict(reversed(sets.items())), (3, 1), seed=1)
    assert other_order.prompts == sets["b"].prompts + kept


def test_shares_hold_after_prompts_were_dropped(prepare):
    a = prepare("a", ["Z" * 50] * 6 + numbered("a", 4), 20)
    table = tasks.mix({"a": a, "b": prepare("b", numbered("b", 10))}, (1, 1))
    assert np.bincount(table.domain).tolist() == [4, 4]
    assert [(drop.name, drop.count) for drop in table.dropped] == [("a", 6), ("b", 6)]
    assert table.tokens.shape[1] == tasks.buckets(table.lengths)[-1]


def test_duplicates_have_the_prompt_and_the_answer_of_an_earlier_task(prepare):
    a = prepare("a", ["1", "1", "2"], columns={"answer": ["x", "y", "z"]})
    b = prepare("b", ["1", [{"role": "user", "content": "2"}]], columns={"answer": ["x", "z"]})
    assert tasks.duplicates(a) == 0 and tasks.duplicates(tasks.mix({"a": a, "b": b})) == 1


def two_sets(folder, **options):
    rows = helpers.task_rows()
    first, second = (
        TasksConfig(
            helpers.write_rows(folder / f"{name}.jsonl", part),
            pass_rate_columns=("weak", "strong"),
            **options,
        )
        for name, part in (("first", rows[:8]), ("second", rows[8:]))
    )
    return first, second


@pytest.mark.slow
def test_a_mixture_is_trained_on_with_metrics_by_domain(configure, tmp_path):
    config = configure(tmp_path / "run", tasks=two_sets(tmp_path), steps=1)
    train(config)
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    shares = [line[f"select/effective_group_ratio/{name}"] for name in ("first", "second")]
    known = [share for share in shares if share is not None]
    assert known and min(known) <= line["select/effective_group_ratio"] <= max(known)
    successes = [line[f"success/{name}"] for name in ("first", "second")]
    assert all(0 <= success <= 1 for success in successes if success is not None)
    assert [success is None for success in successes] == [share is None for share in shares]
    renamed = (*config.tasks[:1], TasksConfig(**vars(config.tasks[1]) | {"name": "other"}))
    with pytest.raises(
        InputError, match="checkpoint .* is of another run: its digest of the domains is"
    ):
        train(configure(tmp_path / "run", tasks=renamed, steps=2))


def test_a_set_of_a_mixture_without_ground_truths_is_named(configure, tokenizer, tmp_path):
    bare = TasksConfig(helpers.write_rows(tmp_path / "bare.jsonl", [{"prompt": "1"}]))
    config: Config = configure(
        tmp_path / "run", tasks=(two_sets(tmp_path)[0], bare), rewards=("exact",)
    )
    with pytest.raises(
        InputError, match="exact needs ground truths but .*bare.jsonl has prompts only"
    ):
        open_mixture(config, tokenizer)
