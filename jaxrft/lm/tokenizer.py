"""Tokenizers and chat templates of Hugging Face folders: prompts to tokens, and which tokens end a completion."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from jaxrft.lm import weights
from jaxrft.types import InputError

if TYPE_CHECKING:  # transformers takes seconds to import: only `load` needs it
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Prompt = str | list[dict]  # text, or messages {"role", "content"}


def load(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder, read from local files only and without running code of theirs.

    Raises InputError when there is no such folder or no tokenizer in it.
    """
    if not Path(folder).is_dir():
        raise InputError(f"no folder {folder}: give the folder of a Hugging Face checkpoint with its tokenizer files")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises every kind for missing, broken and foreign files
        raise _unreadable(folder, " ".join(str(error).split())) from error
    files = tokenizer.vocab_files_names.values()
    if files and not any((Path(folder) / file).is_file() for file in files):
        # transformers 5 then gives an empty vocabulary to a folder with only a config.json
        raise _unreadable(folder, f"none of {', '.join(files)} is there")
    return tokenizer


def _unreadable(folder: str, reason: str) -> InputError:
    return InputError(
        f"no tokenizer can be read from {folder}: put tokenizer.json and tokenizer_config.json there ({reason})"
    )


def render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The tokens that a completion of `prompt` follows.

    Messages go through the chat template up to the header of the answer; without a template their contents are joined
    by blank lines, as text. Text is encoded as the tokenizer does it, which never puts a second BOS before one
    that the text spells out itself. Raises InputError when the chat template refuses the messages.
    """
    if not isinstance(prompt, str):
        if tokenizer.chat_template is not None:
            return _chat(tokenizer, prompt)
        _say_no_template(tokenizer.name_or_path)
        prompt = "\n\n".join(message["content"] for message in prompt)
    begun = bool(tokenizer.bos_token) and prompt.startswith(str(tokenizer.bos_token))
    return tokenizer.encode(prompt, add_special_tokens=not begun)


def _chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> list[int]:
    encoded: Any  # without an explicit return_dict, a list in version 4 and a BatchEncoding in version 5
    try:  # the template writes the BOS itself, and none is added
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"the chat template of {tokenizer.name_or_path} refuses messages of the roles {roles} ({error}): "
            "give it roles that it knows"
        ) from error
    return encoded["input_ids"]


@functools.cache
def _say_no_template(name: str) -> None:
    logger.warning("the tokenizer of %s has no chat template: messages are joined by blank lines", name)


def eos_ids(tokenizer: PreTrainedTokenizerBase, folder: str) -> tuple[int, ...]:
    """The distinct tokens that end a completion: the tokenizer's, generation_config.json's and config.json's.

    Raises InputError when none of the three names one.
    """
    found = [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        value = weights.read_json(path).get("eos_token_id") if path.is_file() else None
        found += value if isinstance(value, list) else [value]
    ids = tuple(dict.fromkeys(token for token in found if isinstance(token, int)))
    if not ids:
        raise InputError(
            f"{folder} names no token that ends a completion: set eos_token in tokenizer_config.json "
            "or eos_token_id in generation_config.json"
        )
    return ids
