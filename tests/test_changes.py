"""What a run may find changed when it goes on: a rule for every field of the config."""

import dataclasses
import json
from typing import get_type_hints

import pytest

from jaxrft import changes
from jaxrft import config as configs
from jaxrft.config import Config, ReplayConfig, TasksConfig

CONFIG = Config(model="a", tasks=TasksConfig("b.jsonl"), output_dir="c")
REPLAY = dataclasses.replace(CONFIG, replay=ReplayConfig(capacity=64))
FIELDS = sorted(configs.flat(json.loads(configs.to_json(CONFIG))))


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_has_one_rule(field):
    rules = [name for name, fields in changes.RULES.items() if {field, field.partition(".")[0]} & {*fields}]
    assert rules == [changes.rule(field)], f"{field}: put it into one of changes.RULES"
    for config, names in ((CONFIG, {"kept"}), (REPLAY, {"kept", "kept with replay"})):
        assert (field in changes.kept(config)) == (changes.rule(field) in names)


def test_every_rule_is_for_fields_that_there_are():
    sections = {field.partition(".")[0] for field in FIELDS}
    assert {*FIELDS, *sections} >= {field for fields in changes.RULES.values() for field in fields}
    assert sections == {*get_type_hints(Config)}


def test_what_is_kept_has_its_value():
    assert changes.kept(dataclasses.replace(CONFIG, seed=7))["seed"] == 7
    assert changes.kept(REPLAY)["replay.capacity"] == 64 and "max_completion_length" in changes.kept(REPLAY)
