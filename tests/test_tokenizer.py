import json
import logging

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jaxrft.lm import tokenizer as lm_tokenizer
from jaxrft.types import InputError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MESSAGES = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 2"}]


def make(folder, *, template=None, eos="<|end|>", bos=True):
    """A byte-level BPE tokenizer saved to `folder`; with `bos` it puts a BOS before text, as Llama's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["What is 1 + 2? Add the numbers."] * 4, trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|begin|>", eos_token=eos, chat_template=template)
    fast.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return make(tmp_path_factory.mktemp("chat"), template=TEMPLATE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make(tmp_path_factory.mktemp("plain"))


def test_messages_go_through_the_chat_template_with_one_bos_and_the_header_of_the_answer(chat):
    tokenizer = lm_tokenizer.load(chat)
    tokens = lm_tokenizer.render(tokenizer, MESSAGES)
    assert type(tokens) is list
    assert tokenizer.decode(tokens) == "<|begin|><|system|>Add.\n<|user|>1 + 2\n<|assistant|>"
    assert tokens.count(0) == 1 and tokens[-1] == 4


@pytest.mark.parametrize("text", ["What is 1 + 2?", "<|begin|>What is 1 + 2?"])
def test_text_is_encoded_as_the_tokenizer_does_with_one_bos(chat, text):
    tokenizer = lm_tokenizer.load(chat)
    tokens = lm_tokenizer.render(tokenizer, text)
    assert tokenizer.decode(tokens) == "<|begin|>What is 1 + 2?"
    assert tokens.count(0) == 1


def test_without_a_template_contents_are_joined_and_it_is_said_once(plain, caplog):
    tokenizer = lm_tokenizer.load(plain)
    with caplog.at_level(logging.WARNING):
        tokens = [lm_tokenizer.render(tokenizer, MESSAGES) for _ in range(3)]
    assert tokenizer.decode(tokens[0]) == "<|begin|>Add.\n\n1 + 2"
    assert len(caplog.records) == 1 and "no chat template" in caplog.text


def test_a_template_that_refuses_a_role_is_named(chat):
    with pytest.raises(InputError, match=r"refuses messages of the roles tool \(no tools here\)"):
        lm_tokenizer.render(lm_tokenizer.load(chat), [{"role": "tool", "content": "3"}])


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, (1,)),
        ({"eos_token_id": [7, 1]}, None, (1, 7)),
        ({"eos_token_id": 9}, {"eos_token_id": [7, 9]}, (1, 9, 7)),
        ({}, {"eos_token_id": None}, (1,)),
    ],
)
def test_eos_ids_are_the_union_of_the_three_files(plain, tmp_path, generation, config, expected):
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert lm_tokenizer.eos_ids(lm_tokenizer.load(plain), str(tmp_path)) == expected


def test_no_end_of_completion_is_an_error(tmp_path):
    folder = make(tmp_path, eos=None)
    with pytest.raises(InputError, match="names no token that ends a completion: set eos_token"):
        lm_tokenizer.eos_ids(lm_tokenizer.load(folder), folder)


def test_a_broken_generation_config_is_an_error(plain, tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match="generation_config.json is not JSON"):
        lm_tokenizer.eos_ids(lm_tokenizer.load(plain), str(tmp_path))


def test_a_folder_that_is_not_there_or_holds_no_tokenizer_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no folder .*missing"):
        lm_tokenizer.load(str(tmp_path / "missing"))
    with pytest.raises(InputError, match="no tokenizer can be read from .*: put tokenizer.json"):
        lm_tokenizer.load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(InputError, match="no tokenizer can be read from .*: put tokenizer.json"):
        lm_tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="no tokenizer can be read from .*: put tokenizer.json"):
        lm_tokenizer.load(str(tmp_path))


def test_code_of_a_checkpoint_is_never_run(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n")
    auto_map = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(auto_map))
    with pytest.raises(InputError, match="no tokenizer can be read"):
        lm_tokenizer.load(str(tmp_path))
