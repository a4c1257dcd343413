"""Finds stop strings in completions while they are decoded, whatever tokens spell them.

A stop string may begin and end inside of tokens. So an automaton reads the bytes of a row's tokens
(Aho and Corasick, Efficient string matching, 1975). Its state is the longest end of what it has
read that begins a stop string. The last state, which it never leaves: one of them has ended.

A token moves every state to another. A table of all moves has V x states entries, 150,000 x 100 for
five strings of 20 bytes. Most of its rows are equal, since only the beginning and the end of a
token can belong to a string, and few tokens share any with one. So the table has a row for each
kind of token, tokens of a kind having equal rows, and next to it stands the kind of each token. It
is made once, on the host; a token of a row then costs two lookups on the device.
"""

from __future__ import annotations

import functools
import json
import re
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxrft.types import Array, InputError

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase

CHUNK = 4096  # tokens whose moves are computed at once
CHECKED = 512  # tokens whose bytes are compared with the tokenizer's own text
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class StopMatcher(NamedTuple):
    """An automaton that reads tokens."""

    kinds: Array  # [V] int32, the kind of each token
    moves: Array  # [kinds, states] int32, the next state; the last state: a string has ended


def advance(matcher: StopMatcher, states: Array, tokens: Array) -> Array:
    """Returns the states [R] after one more token [R] of each row; rows begin in state 0."""
    return matcher.moves[matcher.kinds[tokens], states]


def has_ended(matcher: StopMatcher, states: Array) -> Array:
    """Returns whether a stop string has ended in the tokens of each row, [R] bool."""
    return states == matcher.moves.shape[1] - 1


@functools.lru_cache(maxsize=8)
def of_tokenizer(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, stop: tuple[str, ...]
) -> StopMatcher:
    """Builds the matcher of stop strings, of host arrays, for a policy of `vocab_size` tokens.

    Raises InputError for a tokenizer whose tokens cannot be read as bytes, and for a string that
    its tokens cannot spell.
    """
    pieces = token_bytes(tokenizer, vocab_size)
    spelled = set().union(*pieces)
    for text in stop:
        if not set(text.encode()) <= spelled:
            raise InputError(
                f"stop has {text!r:.100}, but no tokens of {tokenizer.name_or_path} spell it, so "
                "that it would never end a completion: leave it out"
            )
    return build(pieces, stop)


def build(pieces: Sequence[bytes], stop: Sequence[str]) -> StopMatcher:
    """Builds the matcher of stop strings for tokens of these bytes, of host arrays."""
    step = automaton([text.encode() for text in stop])
    kinds = np.zeros(len(pieces), np.int32)
    known: dict[bytes, int] = {}
    # of about one length in a chunk
    order = np.argsort([len(piece) for piece in pieces], kind="stable")
    for start in range(0, len(pieces), CHUNK):
        chunk = order[start : start + CHUNK]
        rows = _moves(step, [pieces[token] for token in chunk])
        kinds[chunk] = [known.setdefault(row.tobytes(), len(known)) for row in rows]
    moves = np.stack([np.frombuffer(row, step.dtype) for row in known])
    return StopMatcher(kinds, moves.astype(np.int32))  # pyright: ignore[reportArgumentType]


def automaton(strings: Sequence[bytes]) -> np.ndarray:
    """Returns the state [states, 256] int16 that follows each state by each byte; state 0 is the
    first.

    A state is a beginning of strings; it falls back to its longest end that is another one. All
    that a string ends in are the last state.
    """
    children: list[dict[int, int]] = [{}]
    ends = {0: False}
    for string in strings:
        state = 0
        for byte in string:
            if byte not in children[state]:
                children[state][byte] = len(children)
                ends[len(children)] = False
                children.append({})
            state = children[state][byte]
        ends[state] = True
    last = len(children)
    step = np.zeros((last + 1, 256), np.int16)
    fallback = [0] * last
    queue = deque([0])
    while queue:  # by depth: a state falls back to one of less depth
        state = queue.popleft()
        if state:
            step[state] = step[fallback[state]]
        for byte, child in children[state].items():
            fallback[child] = int(step[state, byte]) if state else 0
            ends[child] |= ends[fallback[child]]
            step[state, byte] = child
            queue.append(child)
    is_end = np.array([*ends.values(), True])
    step = np.where(is_end[step], last, step)
    step[is_end] = last
    return step.astype(np.int16)


def _moves(step: np.ndarray, pieces: Sequence[bytes]) -> np.ndarray:
    """Returns the state [n, states] that follows each state by each of n tokens."""
    moves = np.tile(np.arange(len(step), dtype=step.dtype), (len(pieces), 1))
    longest = max(map(len, pieces))
    codes = np.zeros((len(pieces), longest), np.uint8)
    for row, piece in enumerate(pieces):
        codes[row, : len(piece)] = np.frombuffer(piece, np.uint8)
    lengths = np.array([len(piece) for piece in pieces])
    for position in range(longest):
        rows = np.flatnonzero(lengths > position)
        moves[rows] = step[moves[rows], codes[rows, position, None]]
    return moves


def token_bytes(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[bytes]:
    """Returns the bytes of the text of each token; those that the tokenizer has not are empty.

    Special tokens are spelled as they are. The decoder of the tokenizer says what stands for a
    byte: the alphabet of byte-level BPE (GPT-2, Qwen, Llama 3), or the "▁" for a space and the
    tokens <0x00> to <0xFF> of SentencePiece (Llama 2, Gemma). Raises InputError for other ones.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    decoder = None if backend is None else json.loads(backend.to_str()).get("decoder")
    read = _reader(decoder)
    if read is None:
        kind = type(tokenizer).__name__ if decoder is None else decoder["type"]
        raise _unreadable(tokenizer, f"it is decoded by {kind}")
    pieces = [b""] * vocab_size
    for piece, token in tokenizer.get_vocab().items():
        if token < vocab_size:
            pieces[token] = read(piece)
    _check_text(tokenizer, pieces)
    return pieces


def _unreadable(tokenizer: PreTrainedTokenizerBase, reason: str) -> InputError:
    return InputError(
        f"stop needs the bytes of every token, but those of {tokenizer.name_or_path} cannot be "
        f"read ({reason}): leave stop empty, or take a policy whose tokenizer is a byte-level BPE "
        "or one of SentencePiece"
    )


def _reader(decoder: dict[str, Any] | None) -> Callable[[str], bytes] | None:
    """Returns the function from a token to its bytes; None for a decoder that joins tokens in
    another way.
    """
    if decoder is None:
        return None
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    names = {part["type"] for part in parts}
    if names == {"ByteLevel"}:
        return _read_byte_level
    if not names <= {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}:
        return None
    replaced: list[tuple[str, str]] = []
    for part in parts:
        if part["type"] == "Metaspace":
            replaced.append((part["replacement"], " "))
        elif part["type"] == "Replace":
            if "String" not in part["pattern"]:
                return None
            replaced.append((part["pattern"]["String"], part["content"]))

    def read(piece: str) -> bytes:
        for old, new in replaced:
            piece = piece.replace(old, new)
        code = BYTE_TOKEN.fullmatch(piece) if "ByteFallback" in names else None
        return piece.encode() if code is None else bytes([int(code[1], 16)])

    return read


def _byte_alphabet() -> dict[str, int]:
    """Returns the bytes by the characters that stand for them in byte-level BPE (GPT-2).

    Printable bytes stand for themselves, the others are numbered from 256 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }


BYTE_ALPHABET = _byte_alphabet()


def _read_byte_level(piece: str) -> bytes:
    """Reads a token as the decoder ByteLevel does, which spells those of other characters out."""
    if all(character in BYTE_ALPHABET for character in piece):
        return bytes(BYTE_ALPHABET[character] for character in piece)
    return piece.encode()


def _check_text(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[bytes]) -> None:
    """Raises InputError unless the bytes of some tokens are the text that the tokenizer gives."""
    from jaxrft.lm.tokenizer import decode

    # text begins with it, because some decoders drop a space before the first word
    letters = [token for token, piece in enumerate(pieces) if piece.isalnum() and len(piece) == 1]
    before = letters[:1]
    start = b"".join(pieces[token] for token in before)
    for token in range(0, len(pieces), max(1, len(pieces) // CHECKED)):
        expected = (start + pieces[token]).decode(errors="replace")
        if not pieces[token] or "\ufffd" in expected:  # a part of a character has no text
            continue
        text = decode(tokenizer, [*before, token])
        if text != expected:
            raise _unreadable(tokenizer, f"{expected!r:.50} is decoded as {text!r:.50}")
