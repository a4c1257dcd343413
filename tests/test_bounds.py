"""What a stage needs at least, and the least time that takes: every number worked by hand."""

import dataclasses

import pytest

from jaxrft.dry_run import bounds
from jaxrft.dry_run.bounds import AtBest, Decode, Need
from jaxrft.dry_run.chips import CHIPS, Chip
from jaxrft.lm.model import ModelConfig

DECODE = Decode(
    config=ModelConfig(8, 4, 8, 2, 2, 1, 2, tie_word_embeddings=True, attention_bias=False),
    rows=4, group_size=2, prompt_length=3, new_tokens=5,
)  # fmt: skip
# Inputs: 2 prompts of 3 tokens, and 4 tokens of each of 4 completions. Pairs of a query and a key:
# 1 + 2 + 3 of each prompt, 4 + 5 + 6 + 7 of each completion. A layer's products: 4 x 4 of q and o,
# 4 x 2 of k and v, three of 4 x 8.
TOKENS = 22
PAIRS = 2 * 6 + 4 * 22
FORWARD = 2 * 288 * TOKENS + 4 * 2 * 2 * 2 * PAIRS
LOGITS = 2 * 8 * 4 * 4 * 5


def test_a_pass_reads_weights_and_filled_cache_once_and_writes_one_position():
    # 4 x 4 of q and o, 4 x 2 of k and v, three of 4 x 8, two norms of 4: 152 a layer; 8 x 4 of the
    # embedding, a norm.
    assert DECODE.weight_bytes == 2 * (2 * 152 + 32 + 4)
    assert DECODE.position_bytes == 2 * 2 * 2 * 2
    assert DECODE.bytes_per_pass(4) == 680 + 16 * (2 * 3 + 4 * 5)
    assert DECODE.cache_bytes == 16 * 4 * 5


def test_a_rollout_computes_every_token_once_and_moves_weights_and_cache_for_each():
    assert bounds.forward_flops(DECODE) == FORWARD == 15_872
    assert bounds.logits_flops(DECODE) == LOGITS == 1_280
    # The weights for the prompts; passes 1 to 4 read them again, the prompts' 6 positions and 4 (t
    # + 1) own ones.
    moved = 680 + 4 * (680 + 16 * 6) + 16 * 4 * (2 + 3 + 4 + 5)
    assert bounds.rollout_need(DECODE) == Need(FORWARD + LOGITS, moved, 0)
    # two rows at once: each half reads the weights in its four passes
    halves = Need(FORWARD + LOGITS, moved + 4 * 680, 0)
    assert bounds.rollout_need(DECODE, max_rows=2) == halves
    assert bounds.rollout_need(DECODE, max_rows=4) == bounds.rollout_need(DECODE)


def test_a_rollout_on_several_chips_gathers_weights_and_sums_outputs():
    assert bounds.rollout_need(DECODE, fsdp=4).interconnect == 680 * 3 / 4
    assert bounds.rollout_need(DECODE, fsdp=4, gather=False).interconnect == 4 * 680 * 3 / 4
    split = dataclasses.replace(DECODE, model_parallel=2)
    # Of 2 layers, attention and MLP: 4 bfloat16 of each token, of which a ring of two chips sends
    # all once.
    assert bounds.rollout_need(split).interconnect == 2 * 2 * 4 * 2 * TOKENS
    assert bounds.rollout_need(split).flops == (FORWARD + LOGITS) / 2


def test_an_update_is_four_forward_passes_and_an_optimizer_step():
    need = bounds.update_need(
        DECODE, trained=10, data=2, fsdp=4, num_iterations=2, updates=2, rounds=3
    )
    assert need.flops == 2 * 4 * (FORWARD + LOGITS)
    # Each round reads 680 bytes of weights three times; each update moves seven float32 of 10
    # numbers.
    assert need.memory == 3 * 3 * 680 + 2 * 7 * 4 * 10
    # Each round gathers twice and reduces once; each update sums 10 float32 over two chips.
    assert need.interconnect == 3 * 3 * 510 + 2 * 40


def test_a_reference_policy_is_one_more_forward_pass():
    need = bounds.update_need(DECODE, trained=10, reference=True)
    assert need == Need(5 * (FORWARD + LOGITS), 4 * 680 + 280, 0)


def test_activations_that_are_kept_save_a_forward_pass():
    need = bounds.update_need(DECODE, trained=10, repeated=False)
    assert need == Need(3 * (FORWARD + LOGITS), 2 * 680 + 280, 0)


@pytest.mark.parametrize(
    ("need", "seconds", "bound"),
    [
        (Need(4000, 100, 10), (4, 1, 1), "matrix products"),
        (Need(2000, 500, 10), (2, 5, 1), "memory bandwidth"),
        (Need(2000, 500, 60), (2, 5, 6), "interconnect"),
    ],
)
def test_stage_is_bound_by_the_resource_that_takes_longest(need, seconds, bound):
    least = bounds.at_best(need, Chip(1, flops=1000, memory=100, interconnect=10))
    assert least == AtBest(*seconds)
    assert least.seconds == max(seconds) and least.bound == bound


def test_a_small_model_on_a_small_chip_is_bounded_by_memory():
    # 988 MB of weights, 12,288 bytes a position: 4.31 GB at the last position, which 0.81 TB/s take
    # 5.3 ms for.
    config = ModelConfig(151936, 896, 4864, 24, 14, 2, 64, tie_word_embeddings=True)
    decode = Decode(config)
    assert decode.bytes_per_pass(1023) == 4_309_954_304
    least = bounds.at_best(bounds.rollout_need(decode), CHIPS["v5e"])
    assert least.bound == "memory bandwidth"
    assert least.seconds == pytest.approx(1023 * (decode.bytes_per_pass(512) / 0.81e12), rel=2e-3)
