import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxrft.lm import panics
from jaxrft.lm import tokenizer as lm_tokenizer
from jaxrft.types import InputError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MESSAGES = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 2"}]


def make(folder, *, template=None, eos="<|end|>", bos=True, processor=None):
    """A byte-level BPE tokenizer saved to `folder`; with `bos` it puts a BOS before text, as
    Llama's does.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["What is 1 + 2? Add the numbers."] * 4, trainer)
    if processor is not None:
        bpe.post_processor = processor
    if bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|begin|>", eos_token=eos, chat_template=template
    )
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
    with pytest.raises(
        InputError,
        match=r"refuses messages of the roles tool \(no tools "
        r"here\), row 1 of the prompts",
    ):
        lm_tokenizer.render(lm_tokenizer.load(chat), [{"role": "tool", "content": "3"}])


BEGIN, END, CLASS = ("<|begin|>", 0), ("<|end|>", 1), ("<|system|>", 2)
# What a tokenizer puts around a text -> the tokens that it begins with, those that it ends with.
FRAMES = {
    "nothing": (None, [], []),
    "EOS": (
        processors.TemplateProcessing(single="$A <|end|>", special_tokens=[END]),
        [],
        ["<|end|>"],
    ),
    "BOS and EOS": (
        processors.TemplateProcessing(single="<|begin|> $A <|end|>", special_tokens=[BEGIN, END]),
        [0],
        ["<|end|>"],
    ),
    "[CLS] and [SEP]": (processors.BertProcessing(END, CLASS), [2], ["<|end|>"]),
    "two of RoBERTa": (processors.RobertaProcessing(CLASS, BEGIN), [0], ["<|system|>"]),
    "several": (
        processors.TemplateProcessing(
            single="<|system|> <|begin|> $A <|end|> <|begin|>", special_tokens=[BEGIN, END, CLASS]
        ),
        [2, 0],
        ["<|end|>", "<|begin|>"],
    ),
}


@pytest.mark.parametrize("name", FRAMES)
def test_no_token_follows_a_text_and_one_warning_says_so(tmp_path, caplog, name):
    processor, before, behind = FRAMES[name]
    folder = make(tmp_path, bos=False, processor=processor)
    tokenizer = lm_tokenizer.load(folder)
    with caplog.at_level(logging.WARNING):
        tokens = [
            lm_tokenizer.render(tokenizer, text)
            for text in ("What is 1 + 2?", "a", "<|begin|>a", "")
        ]
        tokens += [lm_tokenizer.render(tokenizer, MESSAGES)]
    words = tokenizer.encode("What is 1 + 2?", add_special_tokens=False)
    assert (
        tokens[0] == [*before, *words]
        and tokens[2] == [0, *tokens[1][len(before) :]]
        and tokens[3] == before
    )
    assert tokens[4] == [*before, *tokenizer.encode("Add.\n\n1 + 2", add_special_tokens=False)]
    said = [record.message for record in caplog.records if "behind every text" in record.message]
    assert len(said) == bool(behind) and all(" ".join(behind) in sentence for sentence in said)


def test_the_beginning_is_found_where_the_first_samples_are_unknown_words(tmp_path):
    words = Tokenizer(models.WordLevel({"<s>": 0, "1": 1, "</s>": 2}, unk_token="<s>"))
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<s>"
    )
    fast.save_pretrained(tmp_path)
    tokenizer = lm_tokenizer.load(str(tmp_path))
    assert lm_tokenizer.render(tokenizer, "1") == [0, 1] and lm_tokenizer.render(
        tokenizer, "what"
    ) == [0, 0]


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, (1,)),
        ({"eos_token_id": [7, 1]}, None, (1, 7)),
        ({"eos_token_id": 9}, {"eos_token_id": [7, 9]}, (1, 9, 7)),
        ({}, {"eos_token_id": None}, (1,)),
        ({"eos_token_id": []}, {"eos_token_id": 0}, (1, 0)),
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


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """A tokenizer that takes spaces away before punctuation if it is let, with special tokens for
    thinking.
    """
    folder = tmp_path_factory.mktemp("thinker")
    fast = lm_tokenizer.load(make(folder))
    thoughts = {
        "additional_special_tokens": ["<think>", "</think>", "<|fill|>"],
        "pad_token": "<|fill|>",
    }
    fast.add_special_tokens(thoughts)
    fast.add_tokens(["<tool>"])
    fast.clean_up_tokenization_spaces = True
    fast.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    fast.save_pretrained(folder)
    return lm_tokenizer.load(str(folder))


TEXTS = (
    "x != y , n't it ?",
    "<think>a < b</think> so \\boxed{ 5 }",
    "</think>\n\n2 <tool> 3<|user|>",
    " leading and trailing ",
    "",
)


@pytest.mark.parametrize("text", TEXTS)
def test_a_completion_is_decoded_to_the_text_that_was_sampled(thinker, text):
    """With what begins, ends and fills it, which is all that is left out."""
    tokens = thinker.encode(text, add_special_tokens=False)
    end = thinker.convert_tokens_to_ids("<|assistant|>")  # which generation_config.json may name
    without = lm_tokenizer.marks(thinker, (end, thinker.eos_token_id))
    around = [thinker.bos_token_id, *tokens, thinker.pad_token_id, end, thinker.eos_token_id]
    assert lm_tokenizer.decode(thinker, np.array(around, np.int32), without=without) == text


def test_special_tokens_are_left_out_on_demand_as_trl_does(thinker):
    tokens = thinker.encode("<think>a != b</think>2 <tool>", add_special_tokens=False)
    assert lm_tokenizer.decode(thinker, tokens, skip_special_tokens=True) == "a != b2 <tool>"


def test_options_go_to_those_tokenizers_that_know_them():
    """One kind puts spaces between added tokens unless it is told not to; another refuses what it
    does not know.
    """

    class Spaced:
        def decode(self, token_ids, **options):
            return self._decode(token_ids, **options)

        def _decode(
            self,
            token_ids,
            skip_special_tokens,
            clean_up_tokenization_spaces,
            spaces_between_special_tokens=1,
        ):
            return (" " if spaces_between_special_tokens else "").join(map(str, token_ids))

    class Wrapped(Spaced):
        def _decode(self, *arguments, **options):
            return super()._decode(*arguments, **options)

    class Strict:
        def decode(
            self, token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=True, **others
        ):
            assert not (skip_special_tokens or clean_up_tokenization_spaces or others)
            return "".join(map(str, token_ids))

    assert [lm_tokenizer.decode(kind(), [1, 2]) for kind in (Spaced, Wrapped, Strict)] == ["12"] * 3


def test_a_broken_generation_config_is_an_error(plain, tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match="generation_config.json cannot be read: it is not JSON"):
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


@pytest.mark.parametrize("value", ["2", True, 1.0, -1, 2**40, [1, "2"], [[1]], {"a": 1}, [None]])
def test_an_end_that_is_no_token_is_an_error(plain, tmp_path, value):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(
        InputError,
        match="generation_config.json has the eos_token_id .*: give the number of a token",
    ):
        lm_tokenizer.eos_ids(lm_tokenizer.load(plain), str(tmp_path))


def piece(name):
    return {"SpecialToken": {"id": name, "type_id": 0}}


# File of a checkpoint -> changes of what it holds, or its bytes; what the sentence says.
BROKEN = {
    "panic of a normalizer": (
        "tokenizer.json",
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        "Panic: .*Cannot parse precompiled_charsmap",
    ),
    "panic of a prefix": (
        "tokenizer.json",
        {
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
            | {"continuing_subword_prefix": "####"}
        },
        "Panic: .*out of (range|bounds)",
    ),
    "merges": (
        "tokenizer.json",
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "z"]]}},
        "out of vocab",
    ),
    "negative token": (
        "tokenizer.json",
        {"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}},
        "-1",
    ),
    "regular expression": (
        "tokenizer.json",
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "(("},
                "behavior": "Isolated",
                "invert": False,
            }
        },
        "Oniguruma|regex",
    ),
    "half a file": ("tokenizer.json", b'{"version": "1.0", "model"', ""),
    "a list": ("tokenizer.json", b"[1]", ""),
    "nested": ("tokenizer.json", b"[" * 100_000, ""),
    "number for EOS": ("tokenizer_config.json", {"eos_token": 5}, "eos_token"),
    "number for a class": ("tokenizer_config.json", {"tokenizer_class": 5}, ""),
    "list of added tokens": ("tokenizer_config.json", {"added_tokens_decoder": [1]}, ""),
    "nameless template": (
        "tokenizer_config.json",
        {"chat_template": [{"name": "default"}]},
        "template",
    ),
    "config as a list": ("tokenizer_config.json", b"[]", ""),
    "template not UTF-8": ("chat_template.jinja", b"\xff\xfe", "utf-8"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tokenizer_files_are_one_sentence(plain, tmp_path, capfd, name):
    file, change, said = BROKEN[name]
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    path = tmp_path / file
    if isinstance(change, dict):
        change = json.dumps(json.loads(path.read_text()) | change).encode()
    path.write_bytes(change)
    with pytest.raises(InputError, match=f"no tokenizer can be read from .*{said}") as raised:
        lm_tokenizer.load(str(tmp_path))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 700
    assert "panicked" not in capfd.readouterr().err


UNENCODABLE = {
    "panic": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [piece("<zz>")],
            "pair": [],
            "special_tokens": {},
        }
    },
    "no unknown word": {
        "model": {"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "?"},
        "post_processor": None,
    },
}


@pytest.mark.parametrize("name", UNENCODABLE)
def test_a_tokenizer_that_breaks_at_a_text_is_one_sentence(plain, tmp_path, capfd, name):
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | UNENCODABLE[name]))
    tokenizer = lm_tokenizer.load(str(tmp_path))
    with pytest.raises(
        InputError, match="the tokenizer of .* cannot encode .*: correct its tokenizer.json"
    ) as raised:
        lm_tokenizer.render(tokenizer, "x y")
    assert "\n" not in str(raised.value) and "panicked" not in capfd.readouterr().err


def test_output_without_a_panic_is_not_lost(capfd):
    with panics.caught():
        os.write(2, b"one\n")
    with pytest.raises(ValueError), panics.caught():
        os.write(2, b"two\n")
        raise ValueError
    assert capfd.readouterr().err == "one\ntwo\n"


@pytest.mark.parametrize("change", [{"layer_types": 5}, {"hidden_size": "x"}])
def test_a_wrong_value_in_config_json_is_not_put_down_to_the_tokenizer(plain, tmp_path, change):
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("tokenizer_class")  # then transformers looks into config.json
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"} | change))
    with contextlib.suppress(Exception):
        AutoTokenizer.from_pretrained(tmp_path)
        pytest.skip("this version of transformers does not look into config.json")
    with pytest.raises(
        InputError, match="config.json cannot be read by transformers, which looks there"
    ):
        lm_tokenizer.load(str(tmp_path))


def test_a_signal_is_reported_while_standard_error_is_redirected():
    code = (
        "import os, signal\n"
        "from jaxrft.host import signals\n"
        "from jaxrft.lm import panics\n"
        "signals.leave_early()\n"
        "with panics.caught():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    signal.pause()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 143 and done.stderr.startswith("jaxrft: stopped by SIGTERM")
