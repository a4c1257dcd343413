"""Resume compatibility: a rule for every field of the config."""

import dataclasses
import json
from typing import get_type_hints

import pytest

from jaxrft import config as configs
from jaxrft.config import Config, ReplayConfig, TasksConfig
from jaxrft.train.resume import fixed_fields

CONFIG = Config(model="a", tasks=TasksConfig("b.jsonl"), output_dir="c")
REPLAY = dataclasses.replace(CONFIG, replay=ReplayConfig(capacity=64))
FIELDS = sorted(configs.flat(json.loads(configs.to_json(CONFIG))))
RULES = {
    "fixed": {"seed", "batch_size", "num_generations", "select.name", "select.per_domain"}
    | {"select.per_token", "replay.capacity"},
    "fixed with replay": {"max_completion_length", "importance_sampling_correction"},
    "content": {
        "model",
        "tasks",
        "lora",
        "dtype",
        "max_prompt_length",
        "chat_template_kwargs",
        "chat_template_date",
    }
    | {"select.predictor", "select.embeddings", "select.num_references"},
}


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_has_one_rule(field):
    rules = [name for name, fields in RULES.items() if {field, field.partition(".")[0]} & fields]
    assert (rules or ["free"]) == [configs.resume_rule(field)]
    for config, names in ((CONFIG, {"fixed"}), (REPLAY, {"fixed", "fixed with replay"})):
        assert (field in fixed_fields(config)) == (configs.resume_rule(field) in names)


def test_every_resume_rule_names_existing_fields():
    sections = {field.partition(".")[0] for field in FIELDS}
    assert {*FIELDS, *sections} >= {field for fields in RULES.values() for field in fields}
    assert sections == {*get_type_hints(Config)}
    with pytest.raises(KeyError):
        configs.resume_rule("sead")


def test_fields_fixed_for_a_run_have_their_values():
    assert fixed_fields(dataclasses.replace(CONFIG, seed=7))["seed"] == 7
    assert fixed_fields(REPLAY)[
        "replay.capacity"
    ] == 64 and "max_completion_length" in fixed_fields(REPLAY)
