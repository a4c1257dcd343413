"""The README.md of an exported policy: what its run has recorded, and nothing else."""

import dataclasses
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from jaxrft import config as configs
from jaxrft.config import Config, EvalConfig, LoRAConfig, SelectConfig, TasksConfig
from jaxrft.host.files import parse_json
from jaxrft.host.yaml_files import format_yaml, parse_yaml
from jaxrft.train.card import model_card, run_fields, shown_path

HOSTILE = (
    "---\nlicense: mit\n---",
    "a: b # c",
    "``` \n# heading\n```",
    "| a | b |\n|---|",
    "<script>alert(1)</script>",
    "`code` `` more",
    "[x](javascript:alert(1))",
    "'single' \"double\" \\ %TAG ! & * @",
    "\u202eturned\u2028 \x1b[2J \x85",
    "1e-6",
    "- [ ] {a: b}",
    "~",
)

TITLES = ("Run", "Evaluation", "To repeat it", "What it has not been tested for")
# of a parser's tokens: no HTML, no links, no pictures
MARKDOWN = {"inline", "text", "softbreak", "code_inline", "fence"} | {
    f"{name}_{end}"
    for name in "heading paragraph table thead tbody tr th td bullet_list list_item".split()
    for end in ("open", "close")
}


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """(**changes) -> a config of a run whose records are in runs/first."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "runs/first"):
        Path(name).mkdir(parents=True)
    entries = (
        {"step": 0, "eval/test/greedy": 0.25, "eval/test/avg@4": 0.125, "eval/test/pass@4": 0.5},
        {"step": 1, "rollouts": 64, "num_tokens": 1500},
        {"step": 2, "rollouts": 1280, "num_tokens": 30_000, "eval/test/greedy": 0.75},
        {"step": 2, "eval/test/avg@4": 0.625, "eval/test/pass@4": 1.0},
        {"step": 3, "rollouts": 9999, "eval/test/greedy": 0.9},
    )
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    Path("runs/first/metrics.jsonl").write_text(lines + "damaged\n")
    versions = {"python": "3.12.1", "jaxrft": "0.9", "jax": "0.10"}
    counts = {"devices": "8 x TPU v5e", "training tasks": 2048, "held-out tasks": {"test": 100}}
    Path("runs/first/versions.json").write_text(json.dumps(versions | counts))
    held_out = TasksConfig("data/held.jsonl", name="test")
    settings = {
        "model": "Qwen/Qwen3-0.6B@main",
        "tasks": TasksConfig("hub:openai/gsm8k@v1", subset="main"),
        "evaluation": EvalConfig((held_out,), num_samples=4, temperature=0.5),
        "output_dir": "runs/first",
        "steps": 3,
    }
    return lambda **changes: Config(**settings | changes)


def card_of(config, step=2, kind="policy"):
    return model_card(config, step, Path("base"), kind)


def header(card):
    """The header by a YAML parser, which is the one that the hub's own client finds."""
    found = yaml.safe_load(re.match(r"---\n(.*?\n)---\n", card, re.DOTALL)[1])
    assert ModelCard(card).data.to_dict() == found
    return found


def cells(card):
    """The rows of the table about the run."""
    rows = re.findall(r"^\| (.*?) \| (.*) \|$", card, re.MULTILINE)
    return {name: value for name, value in rows if name != "---"}


def test_header_has_what_the_hub_reads(recorded):
    assert header(card_of(recorded())) == {
        "base_model": "Qwen/Qwen3-0.6B",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "datasets": ["openai/gsm8k"],
        "tags": ["jaxrft", "reinforcement-learning", "grpo", "dapo"],
    }


def test_header_of_adapters_is_of_peft(recorded):
    lora = LoRAConfig(rank=8)
    found = header(card_of(recorded(lora=lora), kind="adapter"))
    assert (found["library_name"], found["base_model_relation"]) == ("peft", "adapter")
    assert "lora" in found["tags"]


def test_facts_are_those_of_the_step(recorded):
    select = SelectConfig("mopps", discount=0.25)
    facts = cells(card_of(recorded(select=select, rewards=("exact", "my:reward"), warmup_steps=5)))
    assert facts["base model"] == "`Qwen/Qwen3-0.6B@main`"
    assert facts["tasks"] == "`hub:openai/gsm8k@v1`"
    assert facts["number of tasks"] == "2,048"
    assert facts["rewards"] == "`exact`, `my:reward` (the user's own, not in this folder)"
    assert facts["selector"] == "`mopps`, discount `0.25`"
    assert (facts["rollouts"], facts["tokens sampled"]) == ("1,280", "30,000")
    assert facts["learning rate"] == "1e-06, constant after 5 updates of warm-up"
    assert facts["devices"] == "8 x TPU v5e"
    assert facts["versions"] == "python 3.12.1, jaxrft 0.9, jax 0.10"


def test_evaluation_is_before_and_after_with_tasks_and_samples(recorded):
    card = card_of(recorded())
    assert "| `test` | 100 | greedy | 0.250 | 0.750 |" in card
    assert "| `test` | 100 | avg@4 | 0.125 | 0.625 |" in card
    assert "| `test` | 100 | pass@4 | 0.500 | 1.000 |" in card
    assert "the mean success of 4 samples a task" in card
    assert "Samples are drawn at temperature 0.5; completions have at most 1,024 tokens." in card


def test_evaluation_says_how_it_sampled(recorded):
    """By its own settings, else by those of training, stop strings being foreign text."""
    own = EvalConfig((TasksConfig("held.jsonl", name="test"),), 4, min_p=0.1, stop=("\n\n", "`Q`"))
    card = card_of(recorded(evaluation=own, repetition_penalty=1.2, top_k=7, min_p=0.3))
    assert (
        "Samples are drawn at temperature 1, top_k 7, min_p 0.1; completions have at most 1,024 "
        r"tokens, a repetition penalty of 1.2, and end with any of `\n\n`, `` `Q` ``."
    ) in card
    # 1.96 sqrt(0.25 / 100)
    assert "Over 100 tasks, chance alone moves a figure by up to 0.098 (95 %)" in card


def test_unknown_is_said_to_be_unknown(recorded):
    card = card_of(recorded(), step=1)
    assert "There is none of step 1, only the one before training." in card
    assert "Success of this policy on held-out tasks was not measured." in card
    for name in ("metrics.jsonl", "versions.json"):
        Path("runs/first", name).unlink()
    card = card_of(recorded())
    facts = cells(card)
    for name in ("number of tasks", "rollouts", "tokens sampled", "devices", "versions"):
        assert facts[name] == "not recorded"
    assert "There is none of step 2." in card


def test_best_says_that_its_figure_is_chosen(recorded):
    config = recorded(keep_best="test/greedy", eval_steps=1)
    sentence = "chosen by `test/greedy`, the highest of 1 evaluations so far"
    assert sentence in card_of(config, kind="best")


@pytest.mark.parametrize(
    "text, found",
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# Base", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: qwen\nlicense_link: https://a.b/LICENSE\n---\n",
            {"license": "other", "license_name": "qwen", "license_link": "https://a.b/LICENSE"},
        ),
        ("---\nlicense: [mit, gpl]\n---\n", {}),
        ('---\nlicense: "mit\\n---\\n# Owned"\n---\n', {}),
        ("---\nlicense_name: alone\n---\n", {}),
        ("---\nlicense: {\n---\n", {}),
        ("---\n- license\n---\n", {}),
        ("license: mit", {}),
        ("\0\xff", {}),
        ("---\nlicense: mit\n---\n" + "x" * (1 << 20), {}),
    ],
)
def test_license_is_that_of_the_base_model_or_unknown(recorded, text, found):
    Path("base/README.md").write_bytes(text.encode("latin-1"))
    card = card_of(recorded())
    assert {k: v for k, v in header(card).items() if k.startswith("license")} == found
    assert ("license" in cells(card)) == (not found)
    assert "Base" not in card and "Owned" not in card


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_stay_text(recorded, text):
    config = recorded(
        model=f"./{text}",
        tasks=TasksConfig(f"data/{text}", system_prompt=text, name=text),
        evaluation=EvalConfig((TasksConfig(text.replace("/", "-"), name=text),), num_samples=0),
        rewards=(f"{text.replace(':', '')}:f".replace("~", "x"),),
    )
    Path("runs/first/versions.json").write_text(
        json.dumps({"jaxrft": text, text: "1", "devices": text, "held-out tasks": {text: 3}})
    )
    card = card_of(config)
    assert header(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["jaxrft", "reinforcement-learning", "grpo", "dapo"],
    }
    assert card.isprintable() or set("".join(filter(lambda c: not c.isprintable(), card))) == {"\n"}
    tokens = MarkdownIt("commonmark").enable("table").parse(card.partition("\n---\n")[2])
    inline = [child for token in tokens for child in token.children or ()]
    assert {token.type for token in (*tokens, *inline)} <= MARKDOWN
    titles = [after.children for token, after in pairwise(tokens) if token.type == "heading_open"]
    assert [title[0].content for title in titles] == ["first", *TITLES]
    rows = [token for token in tokens if token.type in ("tr_open", "th_open", "td_open")]
    widths = [len(row.split()) for row in " ".join(t.tag for t in rows).split("tr")[1:]]
    number = len(cells(card.partition("## Evaluation")[0]))
    assert widths == [2] * number + [5] * 2
    # the config reads back
    fence, body = re.search(r"^(`{3,})yaml\n(.*?)^\1$", card, re.M | re.S).group(1, 2)
    assert parse_yaml(body.encode()) == run_fields(config)
    assert fence not in body


def test_config_of_the_card_is_the_run_again(recorded):
    config = recorded(
        tasks=(TasksConfig("a.jsonl", name="1e-6"), TasksConfig("b.jsonl", limit=3)),
        chat_template_kwargs='{"enable_thinking": false}',
        chat_template_date="2025-01-31",
        learning_rate=1e-7,
        reward_weights=(0.5,),
        output_dir="first",
    )
    again = configs.from_json(parse_yaml(format_yaml(run_fields(config)).encode()), "the card")
    assert again == config


def test_absolute_paths_are_not_published(recorded, tmp_path):
    data = TasksConfig(f"{tmp_path}/secret/tasks.jsonl", embeddings=f"{tmp_path}/e.safetensors")
    config = dataclasses.replace(
        recorded(),
        model=f"{tmp_path}/base",
        tasks=data,
        output_dir=f"{tmp_path}/runs/first",
        rewards=(f"{tmp_path}/secret/mine.py:f", "exact"),
        reward_path=(f"{tmp_path}/secret",),
        select=SelectConfig("uniform", predictor=f"{tmp_path}/p.safetensors"),
    )
    card = card_of(config)
    assert str(tmp_path) not in card and "secret" not in card
    assert "base_model" not in header(card)
    fields = run_fields(config)
    assert fields["model"] == ".../base" and fields["output_dir"] == "first"
    assert fields["tasks"] == {"source": ".../tasks.jsonl", "embeddings": ".../e.safetensors"}
    assert fields["rewards"] == [".../mine.py:f", "exact"] and "reward_path" not in fields
    assert "`.../` stands for a folder" in card
    assert shown_path("/") == ".../"
    assert "stands for" not in card_of(recorded())


def test_function_in_python_is_named_as_one(recorded):
    facts = cells(card_of(recorded(rewards=("mine",))))
    assert facts["rewards"] == "`mine` (a function in Python, not in this folder)"


def test_yaml_is_read_back_by_both_versions():
    """As YAML 1.1, which PyYAML reads, and as 1.2."""
    tree = {"a": ["on", "1e-6", "010", "~", "<<", "2025-01-31", ""], "b": {"c": 1e-6, "d": None}}
    tree |= {"e": True, "f": 3, "g": "日本", "h": "\u202e", "i": [[1], {"k": []}], "j": "x\n---\ny"}
    text = format_yaml(tree)
    assert parse_yaml(text.encode()) == yaml.safe_load(text) == tree
    assert parse_json(json.dumps(tree), dict) == tree
    assert "日本" not in text and "日本" in format_yaml({"g": "日本"})  # escapes for all or none
