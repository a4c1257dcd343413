from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jaxrft.assets import TINY
from jaxrft.lm import stop_strings, tokenizer
from jaxrft.types import InputError

TEXT = "naïve – «naïve» 12.5 € ... the answer\n\nQuestion: the answers the question 😀 naïve\n"


def first_end(matcher, tokens):
    """The number of tokens in which a stop string has ended, None if none has."""
    state = jnp.zeros(1, jnp.int32)
    for count, token in enumerate(tokens, 1):
        state = np.asarray(matcher.moves)[np.asarray(matcher.kinds)[token], state]
        if stop_strings.has_ended(matcher, state)[0]:
            return count
    return None


def first_end_by_hand(pieces, stop, tokens):
    """The same by joining what the tokens spell."""
    for count in range(1, len(tokens) + 1):
        joined = b"".join(pieces[token] for token in tokens[:count])
        if any(text.encode() in joined for text in stop):
            return count
    return None


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.text("ab", max_size=4), min_size=1, max_size=6),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4),
    st.lists(st.integers(0, 5), max_size=12),
)
@example(["aab", "b", "a"], ["aaab"], [2, 0])  # falls back from aaa to aa
@example(["abab"], ["babb", "ba"], [0])  # one string ends within another
@example(["", "a"], ["aa"], [1, 0, 1])  # a token without text changes nothing
def test_the_first_token_in_which_a_string_ends_is_found_however_it_is_split(pieces, stop, tokens):
    pieces = [piece.encode() for piece in pieces]
    tokens = [token % len(pieces) for token in tokens]
    matcher = stop_strings.build(pieces, stop)
    assert first_end(matcher, tokens) == first_end_by_hand(pieces, stop, tokens)


def test_the_states_and_kinds_of_an_automaton_by_hand():
    """For the string ab: nothing, a, ab as a beginning that is never stayed in, and the end."""
    pieces = [b"a", b"b", b"xx", b"ya", b"zab", b"", b"x"]
    matcher = stop_strings.build(pieces, ["ab"])
    of_token = matcher.moves[matcher.kinds]
    assert of_token.shape == (7, 4)
    assert of_token[:, 0].tolist() == [1, 0, 0, 1, 3, 0, 0]
    assert of_token[:, 1].tolist() == [1, 3, 0, 1, 3, 1, 0]
    assert of_token[:, 3].tolist() == [3] * 7
    assert len(matcher.moves) == 5  # a and ya move alike, as xx and x do
    rows = jax.jit(stop_strings.advance)(matcher, jnp.array([1, 1, 0]), jnp.array([1, 2, 4]))
    assert rows.tolist() == [3, 0, 3]
    assert stop_strings.has_ended(matcher, rows).tolist() == [True, False, True]


def fast(model, trainer, decoder, pre_tokenizer):
    tokens = Tokenizer(model)
    tokens.pre_tokenizer = pre_tokenizer
    tokens.decoder = decoder
    tokens.train_from_iterator([TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokens, name_or_path="some/model")


def byte_level():
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|end|>", "<with space>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return fast(models.BPE(), trainer, decoders.ByteLevel(), pre_tokenizer)


def sentence_piece():
    decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    model = models.BPE(byte_fallback=True, unk_token="<unk>")
    return fast(model, trainer, decoder, pre_tokenizers.Metaspace())


def word_piece():
    trainer = trainers.WordPieceTrainer(vocab_size=60, show_progress=False)
    return fast(models.WordPiece(), trainer, decoders.WordPiece(), pre_tokenizers.Whitespace())


TOKENIZERS = {
    "tiny": lambda: tokenizer.load(TINY),
    "byte level": byte_level,
    "sentence piece": sentence_piece,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_strings_are_found_in_what_a_tokenizer_decodes(kind):
    text = TOKENIZERS[kind]()
    vocab = len(text)
    stop = (
        ("the a", "12.", " q") if kind == "tiny" else ("the a", "ïve –", "5 €", " q", "\n\n", "😀")
    )
    matcher = stop_strings.of_tokenizer(text, vocab + 3, stop)
    assert matcher.kinds.shape == (vocab + 3,)  # a policy may have more tokens
    random = np.random.default_rng(0)
    lines = ["the answer 12", "5 € naïve – the", "so\n\n12.5", "😀 question"]
    ends = []
    for line in lines if kind != "tiny" else ["the answer 12", "2.5 12.5", "a q"]:
        tokens = [*random.integers(0, vocab, 5).tolist(), *text(line)["input_ids"]]
        prefixes = (tokenizer.decode(text, tokens[:count]) for count in range(1, len(tokens) + 1))
        spelled = [any(each in prefix for each in stop) for prefix in prefixes]
        ends.append(first_end(matcher, tokens))
        assert ends[-1] == (spelled.index(True) + 1 if any(spelled) else None)
    assert None not in ends


def test_special_tokens_are_spelled_as_they_are():
    text = byte_level()
    pieces = stop_strings.token_bytes(text, len(text))
    assert pieces[:2] == [b"<|end|>", b"<with space>"]
    assert set().union(*pieces) == set(range(256))


@pytest.mark.parametrize(
    ("make", "stop", "words"),
    [
        (word_piece, "the", "stop needs the bytes of every token, but those of some/model cannot "),
        (lambda: tokenizer.load(TINY), "né", f"stop has 'né', but no tokens of {TINY} spell it"),
    ],
)
def test_what_no_tokens_can_spell_is_refused(make, stop, words):
    text = make()
    with pytest.raises(InputError) as error:
        stop_strings.of_tokenizer(text, len(text), (stop,))
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


def test_a_tokenizer_that_does_more_than_its_decoder_says_is_refused(monkeypatch):
    text = byte_level()
    monkeypatch.setattr(
        PreTrainedTokenizerFast, "decode", lambda self, ids, **options: "x" * len(ids)
    )
    with pytest.raises(InputError, match="is decoded as 'xx'"):
        stop_strings.token_bytes(text, len(text))


def test_the_table_of_a_large_vocabulary_is_small():
    """Of 20,000 tokens of up to 12 bytes, and strings of 60 bytes in all."""
    random = np.random.default_rng(0)
    letters = np.frombuffer(b"etaoin shrdlu\n.:Q", np.uint8)
    draw = partial(random.choice, letters)
    pieces = [draw(size=size).tobytes() for size in random.integers(1, 13, 20_000)]
    stop = ("\n\n", "Question:", "</answer>", "in the end", "one two three", "that is all.")
    matcher = stop_strings.build(pieces, stop)
    assert matcher.moves.size < 20_000
