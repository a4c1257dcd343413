"""Memory traffic counted from the text of optimized HLO: every number worked by hand."""

import dataclasses

import pytest

from benchmarks import decode_bytes
from benchmarks._hlo import Block, Leaf, Program, pallas_bytes
from jaxrft.dry_run.bounds import Decode
from jaxrft.errors import InputError
from jaxrft.lm.model import ModelConfig

PRODUCT = """
HloModule jit_f, is_scheduled=true

ENTRY %main.1 (x.1: f32[4,64], w.1: f32[64,32]) -> f32[4,32] {
  %x.1 = f32[4,64]{1,0} parameter(0), metadata={op_name="x"}
  %w.1 = f32[64,32]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,32]{1,0} dot(%x.1, %w.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""

# Three trips, each of which writes a row of [3, 4, 64] in place and multiplies by a slice of [3,
# 64, 64].
LOOP = """
HloModule jit_f, is_scheduled=true

%update (param_0: f32[3,4,64], param_1: f32[4,64], param_2: s32[]) -> f32[3,4,64] {
  %param_0 = f32[3,4,64]{2,1,0} parameter(0)
  %param_1 = f32[4,64]{1,0} parameter(1)
  %bitcast.2 = f32[1,4,64]{2,1,0} bitcast(%param_1)
  %param_2 = s32[] parameter(2)
  %constant.23 = s32[] constant(0)
  ROOT %dus.5 = f32[3,4,64]{2,1,0} dynamic-update-slice(%param_0, %bitcast.2, %param_2, %constant.23, %constant.23)
}

%sliced (param_0.3: f32[3,64,64], param_1.7: s32[]) -> f32[64,64] {
  %param_0.3 = f32[3,64,64]{2,1,0} parameter(0)
  %param_1.7 = s32[] parameter(1)
  %constant.25 = s32[] constant(0)
  %ds.5 = f32[1,64,64]{2,1,0} dynamic-slice(%param_0.3, %param_1.7, %constant.25, %constant.25)
  ROOT %bitcast.3 = f32[64,64]{1,0} bitcast(%ds.5)
}

%compared (param_0.5: s32[], param_1.9: s32[]) -> pred[] {
  %param_0.5 = s32[] parameter(0)
  %param_1.9 = s32[] parameter(1)
  ROOT %lt.15 = pred[] compare(%param_0.5, %param_1.9), direction=LT
}

%body (arg: (s32[], f32[4,64], f32[3,4,64], /*index=3*/f32[3,64,64])) -> (s32[], f32[4,64], f32[3,4,64], f32[3,64,64]) {
  %arg = (s32[], f32[4,64]{1,0}, f32[3,4,64]{2,1,0}, f32[3,64,64]{2,1,0}) parameter(0)
  %time = s32[] get-tuple-element(%arg), index=0
  %x = f32[4,64]{1,0} get-tuple-element(%arg), index=1
  %cache = f32[3,4,64]{2,1,0} get-tuple-element(%arg), index=2
  %weights = f32[3,64,64]{2,1,0} get-tuple-element(%arg), index=3
  %one = s32[] constant(1)
  %next = s32[] add(%time, %one)
  %updated = f32[3,4,64]{2,1,0} fusion(%cache, %x, %time), kind=kLoop, calls=%update
  %slice = f32[64,64]{1,0} fusion(%weights, %time), kind=kLoop, calls=%sliced
  %dot = f32[4,64]{1,0} dot(%x, %slice), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %tuple = (s32[], f32[4,64]{1,0}, f32[3,4,64]{2,1,0}, f32[3,64,64]{2,1,0}) tuple(%next, %dot, %updated, %weights)
}

%condition (arg.5: (s32[], f32[4,64], f32[3,4,64], f32[3,64,64])) -> pred[] {
  %arg.5 = (s32[], f32[4,64]{1,0}, f32[3,4,64]{2,1,0}, f32[3,64,64]{2,1,0}) parameter(0)
  %three = s32[] constant(3)
  %now = s32[] get-tuple-element(%arg.5), index=0
  ROOT %less = pred[] fusion(%now, %three), kind=kLoop, calls=%compared
}

ENTRY %main.4 (w: f32[3,64,64], x: f32[4,64], c: f32[3,4,64]) -> f32[4,64] {
  %w = f32[3,64,64]{2,1,0} parameter(0)
  %x0 = f32[4,64]{1,0} parameter(1)
  %c = f32[3,4,64]{2,1,0} parameter(2)
  %zero = s32[] constant(0)
  %all = (s32[], f32[4,64]{1,0}, f32[3,4,64]{2,1,0}, f32[3,64,64]{2,1,0}) tuple(%zero, %x0, %c, %w)
  %while.1 = (s32[], f32[4,64]{1,0}, f32[3,4,64]{2,1,0}, f32[3,64,64]{2,1,0}) while(%all), condition=%condition, body=%body
  ROOT %out = f32[4,64]{1,0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501

# The same loop, which also ends when a flag is set.
ENDING = LOOP.replace(
    "ROOT %less = pred[] fusion(%now, %three), kind=kLoop, calls=%compared",
    "%less = pred[] fusion(%now, %three), kind=kLoop, calls=%compared\n"
    "  %flag = pred[] constant(true)\n"
    "  ROOT %both = pred[] and(%less, %flag)",
)


def moved(text):
    program = Program(text)
    return {
        each.instruction.name: (each.trips, each.read, each.written)
        for each in program.traffic(program.entry)
    }


def test_a_product_reads_both_matrices_and_writes_one():
    assert moved(PRODUCT) == {"dot.1": (1, 4 * (4 * 64 + 64 * 32), 4 * 4 * 32)}


def test_an_update_in_place_writes_itself_and_a_slice_is_read_alone():
    row = 4 * 4 * 64
    matrix = 4 * 64 * 64
    assert moved(LOOP) == {
        "next": (3, 8, 4),
        "updated": (3, row + 4, row),  # not the 3 rows of the cache
        "slice": (3, matrix + 4, matrix),  # not the 3 matrices
        "dot": (3, row + matrix, row),
        "less": (3, 8, 1),
    }


def test_slices_and_updates_count_alike_outside_of_fusions():
    text = """
    ENTRY %main.1 (c: f32[3,4,64], x: f32[1,4,64], i: s32[]) -> f32[1,4,64] {
      %c = f32[3,4,64]{2,1,0} parameter(0)
      %x = f32[1,4,64]{2,1,0} parameter(1)
      %i = s32[] parameter(2)
      %put = f32[3,4,64]{2,1,0} dynamic-update-slice(%c, %x, %i, %i, %i)
      ROOT %get = f32[1,4,64]{2,1,0} dynamic-slice(%put, %i, %i, %i), dynamic_slice_sizes={1,4,64}
    }
    """
    text = "\n".join(line.strip() for line in text.splitlines())
    assert moved(text) == {"put": (1, 1024 + 12, 1024), "get": (1, 1024 + 12, 1024)}


def test_vmem_is_free_and_its_copy_reads_memory_once():
    text = """
ENTRY %main.1 (a: bf16[16,256]) -> bf16[16,256] {
  %a = bf16[16,256]{1,0:T(8,128)(2,1)} parameter(0)
  %near = bf16[16,256]{1,0:T(8,128)(2,1)S(1)} copy(%a)
  %twice = bf16[16,256]{1,0:T(8,128)(2,1)S(1)} add(%near, %near)
  ROOT %far = bf16[16,256]{1,0:T(8,128)(2,1)} copy(%twice)
}
"""
    assert moved(text) == {"near": (1, 8192, 0), "far": (1, 0, 8192)}


def test_values_passed_on_by_nested_fusions_are_counted():
    text = """
%inner (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  ROOT %same = f32[8,8]{1,0} bitcast(%p)
}

%outer (q: f32[8,8]) -> f32[8,8] {
  %q = f32[8,8]{1,0} parameter(0)
  %handed = f32[8,8]{1,0} fusion(%q), kind=kLoop, calls=%inner
  ROOT %sum = f32[8,8]{1,0} add(%handed, %handed)
}

ENTRY %main.1 (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  ROOT %f = f32[8,8]{1,0} fusion(%a), kind=kLoop, calls=%outer
}
"""
    assert moved(text) == {"f": (1, 256, 256)}


@pytest.mark.parametrize(
    ("leaf", "size"),
    [
        (Leaf("f32", (3, 5), "1,0"), 60),
        (Leaf("bf16", (4, 64), "1,0:T(8,128)(2,1)"), 8 * 128 * 2),  # a head of 64 fills half a lane
        # of the first axis, which is minor
        (Leaf("bf16", (4, 256), "0,1:T(8,128)(2,1)"), 256 * 128 * 2),
        (Leaf("s32", (24,), "0:T(128)"), 128 * 4),
        (Leaf("pred", (), ""), 1),
    ],
)
def test_a_tile_pads_the_minor_dimensions(leaf, size):
    assert leaf.bytes == size


def test_a_loop_that_ends_by_data_is_the_decode_loop():
    assert Program(LOOP).loops() == []
    (loop,) = Program(ENDING).loops()
    assert (loop.name, loop.limit) == ("while.1", 3)
    each = {item.instruction.name: item.bytes for item in loop.traffic}
    assert each["dot"] == 2 * 1024 + 16384 and each["updated"] == 2 * 1024 + 4
    assert loop.bytes == sum(each.values())


def test_a_kernel_is_counted_by_its_grid_and_blocks_only():
    # Six steps (i, j). x[i] changes twice; y[j] six times; the last stays.
    blocks = [
        Block((8, 128), 2, lambda i, j: (i, 0)),
        Block((128, 4), 4, lambda i, j: (0, j)),
        Block((16,), 4, lambda i, j: (0,)),
    ]
    assert pallas_bytes((2, 3), blocks) == 2 * 2048 + 6 * 2048 + 64
    text = """
ENTRY %main.1 (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  ROOT %decode.3 = f32[8,8]{1,0} custom-call(%a), custom_call_target="tpu_custom_call"
}
"""
    (found,) = Program(text, {"decode": 77}).traffic("main.1")
    assert found.bytes == 77
    with pytest.raises(InputError, match="decode.3 is a Pallas kernel whose grid is not known"):
        moved(text)


DECODE = Decode(
    config=ModelConfig(8, 4, 8, 2, 2, 1, 2, tie_word_embeddings=True, attention_bias=False),
    rows=4, group_size=2, prompt_length=3, new_tokens=5,
)  # fmt: skip


def test_the_decoding_kernel_reads_blocks_up_to_the_slot():
    # 4 rows of one head, 2 queries of 2 numbers each; a cache of 5 slots is one block.
    assert decode_bytes.kernel_bytes(DECODE, 5, 0) == 2 * (16 + 40 + 40) + 4 * (8 + 16 + 8 + 8)
    # Of 256 slots a block has 128: from slot 128 on there are two of keys and two of values.
    others = 2 * 16 + 4 * (8 + 16 + 8 + 8)
    found = [decode_bytes.kernel_bytes(DECODE, 256, slot) for slot in (0, 127, 128, 255)]
    assert found == [others + blocks * 4 * 2 * 128 * 2 for blocks in (2, 2, 4, 4)]


def test_ratios_are_of_the_last_position_and_of_the_sums():
    text = ENDING.replace("constant(3)", "constant(5)")
    (loop,) = Program(text).loops()
    full, mean = decode_bytes.ratios(DECODE, [(loop.limit, loop.bytes)])
    assert full == loop.bytes / 1096
    # Positions 1 to 4, the first token being drawn before the loop: 680 + 16 * (6 + 4 (t + 1)).
    assert mean == pytest.approx(4 * loop.bytes / (4 * 776 + 64 * (2 + 3 + 4 + 5)))
    _, both = decode_bytes.ratios(DECODE, [(3, 0), (loop.limit, loop.bytes)])
    assert both == pytest.approx(mean / 2)  # two of four positions move nothing
    with pytest.raises(InputError, match="no loop whose end depends on data"):
        decode_bytes.ratios(DECODE, [])


def test_segments_between_the_first_and_the_last_are_linear_in_their_length():
    filled = decode_bytes.fill_in([(257, 1000), (600, 1344)], (256, 512, 600))
    assert filled == [(257, 1000), (513, 1256), (600, 1344)]


def test_the_segments_compiled_for_this_machine_are_counted():
    segments = [*decode_bytes.compile_segments(DECODE, "cpu")]
    assert [segment.length for segment in segments] == [5]
    found = decode_bytes.count(DECODE, segments)
    assert [limit for limit, _ in found.loops] == [5]
    assert found.must == 1096 and found.full > 1 and found.bytes > 1096
    assert found.mean is not None
    assert found.exchanged == 0


def test_figures_of_two_depths_are_linear_in_the_layers():
    counted = {}
    for layers in (1, 3):
        decode = dataclasses.replace(DECODE, config=DECODE.config._replace(num_layers=layers))
        counted[layers] = decode_bytes.count(decode, decode_bytes.compile_segments(decode, "cpu"))
    found = decode_bytes.extrapolate(DECODE, counted, "all")
    assert found.bytes == round((counted[1].bytes + counted[3].bytes) / 2)
    assert found.must == 1096 and found.full == found.bytes / 1096
    assert found.cache == DECODE.cache_bytes


def test_collectives_are_counted_inside_and_outside_of_fusions():
    exchange = "%near = f32[4,64]{1,0:S(1)} all-gather(%x), dimensions={0}"
    text = ENDING.replace("  %one = s32[] constant(1)", f"  {exchange}\n  %one = s32[] constant(1)")
    (loop,) = Program(text).loops()
    assert [(each.instruction.name, each.trips, each.bytes) for each in loop.exchanges] == [
        ("near", 1, 1024)
    ]
    assert Program(ENDING).loops()[0].exchanges == ()
