"""Loads tokenizers of Hugging Face folders, and finds the tokens that end a completion."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxrft.lm import config_json, panics, prompts
from jaxrft.lm.prompts import Prompt as Prompt
from jaxrft.types import InputError

if TYPE_CHECKING:  # transformers takes seconds to import: only `load` needs it
    from transformers import PreTrainedTokenizerBase

# files that may name tokens which end a completion
ENDS = ("generation_config.json", "config.json")


def load(folder: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a Hugging Face folder.

    It reads local files only, and runs no code from the folder.
    Raises InputError when there is no such folder or no tokenizer in it that can be read.
    """
    if not Path(folder).is_dir():
        raise InputError(
            f"no folder {folder}: give the folder of a Hugging Face checkpoint "
            "with its tokenizer files"
        )
    from transformers import AutoTokenizer

    try:
        with panics.caught():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            len(tokenizer)
    # transformers raises every kind for missing, broken and foreign files
    except Exception as error:
        raise _unreadable(folder, error) from error
    files = tokenizer.vocab_files_names.values()
    if files and not any((Path(folder) / file).is_file() for file in files):
        # transformers 5 then gives an empty vocabulary to a folder with only a config.json
        raise _unreadable(folder, FileNotFoundError(f"none of {', '.join(files)} is there"))
    return tokenizer


def _unreadable(folder: str, error: Exception) -> InputError:
    """Returns the sentence for a tokenizer that cannot be read; transformers reads config.json on
    the way.
    """
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if (Path(folder) / "config.json").is_file():
        from transformers import AutoConfig

        try:
            AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as config_error:
            if str(config_error) == str(error):
                return InputError(
                    f"{folder}/config.json cannot be read by transformers, which looks there "
                    "for the kind of tokenizer "
                    f"({reason}): correct it, or copy it again from the checkpoint"
                )
    return InputError(
        f"no tokenizer can be read from {folder}: put tokenizer.json and tokenizer_config.json "
        f"there ({reason})"
    )


def render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Returns the tokens that a completion of one prompt follows, as `prompts.encode` does."""
    (tokens,) = prompts.encode(tokenizer, [prompt])
    return tokens


def marks(tokenizer: PreTrainedTokenizerBase, eos_ids: tuple[int, ...]) -> frozenset[int]:
    """Returns the tokens that only begin, end or fill a text: BOS, EOS, padding, and those that end
    a completion.
    """
    special: Any = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return frozenset(eos_ids).union(token for token in special if token is not None)


def decode(
    tokenizer: PreTrainedTokenizerBase,
    token_ids: Iterable[int],
    *,
    without: Collection[int] = (),
    skip_special_tokens: bool = False,
) -> str:
    """Returns the text of tokens as they were sampled, but for those in `without`.

    Every option is explicit, since defaults differ between versions and tokenizers: no space
    is taken away before punctuation or put around added tokens. With `skip_special_tokens` all
    special tokens are left out, as TRL does.
    """
    ids = [int(token) for token in token_ids if int(token) not in without]
    options = {"spaces_between_special_tokens": False} if _puts_spaces(type(tokenizer)) else {}
    return str(
        tokenizer.decode(
            ids,
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
            **options,
        )
    )


@functools.cache
def _puts_spaces(kind: type) -> bool:
    """Checks whether a tokenizer class knows the option `spaces_between_special_tokens`.

    Some classes that do not know it refuse it.
    """
    methods = [vars(each)["_decode"] for each in kind.__mro__ if "_decode" in vars(each)]
    return any(
        "spaces_between_special_tokens" in inspect.signature(method).parameters
        for method in methods
    )


def eos_ids(tokenizer: PreTrainedTokenizerBase, folder: str) -> tuple[int, ...]:
    """Collects the distinct tokens that end a completion.

    The tokenizer, generation_config.json and config.json may each name some. Raises InputError when
    none of the three names one, and when a file names something that is no token.
    """
    candidates: list[Any] = [tokenizer.eos_token_id]
    for name in ENDS:
        path = Path(folder) / name
        if path.is_file():
            candidates += _ends_in(path)
    ids = tuple(dict.fromkeys(token for token in candidates if token is not None))
    if not ids:
        raise InputError(
            f"{folder} names no token that ends a completion: set eos_token in "
            "tokenizer_config.json or eos_token_id in generation_config.json"
        )
    return ids


def _ends_in(path: Path) -> list[int]:
    """Returns the tokens that `eos_token_id` of a file names, a number, a list of numbers or
    null.
    """
    value = config_json.read_object(path).get("eos_token_id")
    listed = value if isinstance(value, list) else [] if value is None else [value]
    for token in listed:
        if type(token) is not int or not 0 <= token < 2**31:
            raise InputError(
                f"{path} has the eos_token_id {value!r:.100}: give the number of a token, or a "
                "list of them"
            )
    return listed
