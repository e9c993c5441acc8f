"""What the row kernels share: how a row is cut for 128-bit access, how it is swept, and the transform of its logits.

A row starts at any address: its bytes are V times the item size, which is no multiple of 16 for V = 50257. So a row is
cut into its *body*, granules of 16 bytes from a multiple of 64 on, and its *ends*, the few columns before and after.
The body is loaded and stored 128 bits at a time; nothing outside the row is touched.

    column        0 .. head-1 | head ............. head+body-1 | head+body .. V-1
    address                   ^ a multiple of 64 bytes          ^ a multiple of 16
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from loku_kernels.backends.triton import launch

INTERPRETED = tl.constexpr(launch.INTERPRETED)
LOG2_E = tl.constexpr(1.4426950216293335)  # in float32
HUGE = tl.constexpr(2.0**28)
ENOUGH = tl.constexpr(1.0)  # of a sum, for a 1 to be subtracted: it loses a digit of 24
LINE = tl.constexpr(4)  # granules
TWO_BFLOAT16_INFINITIES = tl.constexpr(-0x7F0080)  # both negative
TWO_FLOAT16_INFINITIES = tl.constexpr(-0x3FF0400)
NO_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit
def exp2(x):
    """2^x; results below 2^-126 are 0.

    The device library's becomes one instruction where tl.exp2 becomes four, three of them only to save those results. A
    sweep of half-precision logits is limited by instructions. The interpreter knows no device library.
    """
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return libdevice.exp2(x)


@triton.jit
def exp(x):
    return exp2(x * LOG2_E)


@triton.jit
def rounded_product(a, b):
    """a * b, which the compiler would else join to a sum it is used in, unrounded."""
    if INTERPRETED:
        return a * b
    else:
        return libdevice.mul_rn(a, b)


@triton.jit
def fma(a, b, c):
    """a * b + c, rounded once; the interpreter would round twice."""
    if INTERPRETED:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def finite(m):
    """What to subtract in an exponent: exp(-inf - -inf) would be NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def row_offset(row, T, stride_b, stride_t):
    """Where row ``row`` of a (B, T, V) tensor starts, in elements; 64 bits, since tensors exceed 2^31 elements."""
    batch = tl.full((), 0, tl.int64)
    if row >= T:  # a division of 64 bits takes a hundred instructions
        batch = row // T
    return batch * stride_b + (row - batch * T) * stride_t


@triton.jit
def read_label(labels_ptr, row, V, ignore_index):
    """(target column, safe to load), whether to leave the row alone, and what fills its results if so."""
    label = tl.load(labels_ptr + row)
    ignored = label == ignore_index
    skip = ignored | (label < 0) | (label >= V)
    target = tl.where(skip, 0, label).to(tl.int32)
    return target, skip, tl.where(ignored, 0.0, float("nan"))


@triton.jit
def cut(row_ptr, V, GRANULE: tl.constexpr):
    """(head, body) of the row at ``row_ptr``, in columns."""
    item: tl.constexpr = row_ptr.dtype.element_ty.primitive_bitwidth // 8
    line: tl.constexpr = LINE * GRANULE
    past = (row_ptr.to(tl.int64) & (line * item - 1)).to(tl.int32) // item
    head = tl.minimum((-past + line) % line, V)  # the interpreter of triton 3.8 wants tensors on the left
    return head, (V - head) // GRANULE * GRANULE


@triton.jit
def advance(ptr, head, GRANULE: tl.constexpr):
    """The start of the body, with the compiler told how ``cut`` aligned it."""
    item: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(ptr + head, GRANULE * item)


@triton.jit
def end_columns(head, body, hole, V, GRANULE: tl.constexpr, LANES: tl.constexpr):
    """The columns to be handled one by one, and which of these lanes hold one.

    They are those before and after the body and, if ``hole < body``, the body's granule at ``hole``.
    """
    lane = tl.arange(0, LANES)
    part = lane // GRANULE
    in_granule = lane % GRANULE
    column = tl.where(part < LINE, lane, tl.where(part == LINE, head + body, head + hole) + in_granule)
    in_hole = (part == LINE + 1) & (column < head + body)
    return column, (part < LINE) & (lane < head) | (part == LINE) & (column < V) | in_hole


@triton.jit
def transformed(x, scale, softcap, TRANSFORM: tl.constexpr):
    """z, the logit that the loss sees, in float32."""
    z = x.to(tl.float32)
    if TRANSFORM != "none":
        z = z * scale
    if TRANSFORM == "softcap":
        z = softcap * tanh(z / softcap)
    return z


@triton.jit
def slope(x, scale, softcap, TRANSFORM: tl.constexpr):
    """dz/dx of ``transformed``; 1 - tanh^2 is written so that it keeps its digits where tanh is close to 1."""
    if TRANSFORM == "softcap":
        e = exp(-2 * tl.abs(x.to(tl.float32) * scale / softcap))
        return scale * 4 * e / ((1 + e) * (1 + e))
    else:
        return scale


@triton.jit
def tanh(x):
    """By its Taylor series near 0, where the form in exponentials cancels."""
    a = tl.abs(x)
    e = exp(-2 * a)
    far = (1 - e) / (1 + e)
    q = x * x
    near = 62 / 2835 + q * (-1382 / 155925 + q * (21844 / 6081075 + q * (-929569 / 638512875)))
    near = a * (1 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * near))))
    magnitude = tl.where(a < 0.5, near, far)
    return tl.where(x < 0, -magnitude, magnitude)


# The sweep. A lane takes one granule of a tile at a time, and keeps the largest logit m it has met, the position best
# at which the granule with it starts, and R = sum of 2^(z log2 e - k) over all it met, k being m log2 e as rounded.
# Comparing whole granules costs a fraction of an instruction a logit, and a multiplication and a subtraction in one are
# one instruction less: a sweep of half-precision logits is limited by instructions. That k is rounded does no harm, as
# the rounded k is what R refers to, until the rounding is itself an exponent of some size, from HUGE on.
#
# The runner-up's own 1 must not stay in R. It is subtracted, but where that would leave few digits of what is small
# beside it: only one lane has met it, and that lane's logits are summed anew without it.


@triton.jit
def absorb(z, position, m, k, R, best):
    """One more granule for each lane, in ascending order of positions, so that the lowest of equal logits is kept."""
    top = tl.max(z, axis=1)
    larger = top > m
    m = tl.where(larger, top, m)
    higher = rounded_product(tl.maximum(m, -HUGE), LOG2_E)  # not of -inf, which less -inf would be NaN
    R = R * exp2(k - higher) + tl.sum(exp2(fma(z, LOG2_E, -higher[:, None])), axis=1)
    return m, higher, R, tl.where(larger, position, best)


@triton.jit
def is_swept(position, body, hole):
    """Whether the sweep takes the granule at ``position`` of the body: not if the target is in it."""
    return (position >= 0) & (position < body) & (position != hole)


@triton.jit
def load_granules(body_ptr, position, body, hole, GRANULE: tl.constexpr):
    """The granules of the body that start at ``position``, a column of positions; -inf where there is none to sweep."""
    inside = is_swept(position, body, hole)
    dtype: tl.constexpr = body_ptr.dtype.element_ty
    if dtype != tl.float32:
        pair = tl.arange(0, GRANULE // 2)[None, :]
        pointers = body_ptr.to(tl.pointer_type(tl.int32)) + (position // 2 + pair)
        none: tl.constexpr = TWO_BFLOAT16_INFINITIES if dtype == tl.bfloat16 else TWO_FLOAT16_INFINITIES
        return tl.load(pointers, mask=inside, other=none)
    else:
        return tl.load(body_ptr + (position + tl.arange(0, GRANULE)[None, :]), mask=inside, other=float("-inf"))


@triton.jit
def widened(tile, dtype: tl.constexpr):
    """The logits, of ``dtype``, of a tile of ``load_granules``, in float32."""
    if dtype == tl.bfloat16:  # the upper half of a float32, so that a pair takes two instructions
        lower, upper = tile << 16, tile & -65536
        return tl.interleave(lower.to(tl.float32, bitcast=True), upper.to(tl.float32, bitcast=True))
    elif dtype == tl.float16:
        lower, upper = tile.to(tl.int16).to(dtype, bitcast=True), (tile >> 16).to(tl.int16).to(dtype, bitcast=True)
        return tl.interleave(lower.to(tl.float32), upper.to(tl.float32))
    else:
        return tile


@triton.jit
def transformed_granules(tile, dtype: tl.constexpr, position, body, hole, scale, softcap, TRANSFORM: tl.constexpr):
    z = transformed(widened(tile, dtype), scale, softcap, TRANSFORM)
    if TRANSFORM != "none":
        z = tl.where(is_swept(position, body, hole), z, float("-inf"))
    return z


@triton.jit
def sweep_tile(
    tiles, position, m, k, R, best, body_ptr, body, hole, scale, softcap,
    GRANULE: tl.constexpr, AHEAD: tl.constexpr, TRANSFORM: tl.constexpr,
):  # fmt: skip
    """Take in the first of ``tiles``, whose granules start at ``position``, and send for that AHEAD columns on."""
    z = transformed_granules(
        tiles[0], body_ptr.dtype.element_ty, position[:, None], body, hole, scale, softcap, TRANSFORM
    )
    m, k, R, best = absorb(z, position, m, k, R, best)
    following = load_granules(body_ptr, (position + AHEAD)[:, None], body, hole, GRANULE)
    return tiles[1:] + (following,), m, k, R, best  # noqa: RUF005 (Triton does not unpack)


@triton.jit
def summed_anew(
    body_ptr, first, spacing, runner_up, body, hole, scale, softcap,
    GRANULE: tl.constexpr, LANES: tl.constexpr, TRANSFORM: tl.constexpr,
):  # fmt: skip
    """Of every ``spacing``-th granule of the body from ``first`` on: R of the logits below the runner-up, and how many
    equal it."""
    reference = finite(runner_up)
    total = tl.zeros([LANES], tl.float32)
    equal = tl.zeros([LANES], tl.int32)
    for start in range(first, body // GRANULE, spacing * LANES):
        position = ((start + tl.arange(0, LANES) * spacing) * GRANULE)[:, None]
        tile = load_granules(body_ptr, position, body, hole, GRANULE)
        z = transformed_granules(tile, body_ptr.dtype.element_ty, position, body, hole, scale, softcap, TRANSFORM)
        ties = z == runner_up
        total += tl.sum(tl.where(ties, 0.0, exp(z - reference)), axis=1)
        equal += tl.sum(ties.to(tl.int32), axis=1)
    return tl.sum(total), tl.sum(equal)


@triton.jit
def row_statistics(
    row_ptr, target, V, scale, softcap,
    GRANULE: tl.constexpr, LANES: tl.constexpr, AHEAD: tl.constexpr, TRANSFORM: tl.constexpr,
):  # fmt: skip
    """(target logit, rest, runner-up logit, its column) of one row, in one sweep over it."""
    head, body = cut(row_ptr, V, GRANULE)
    in_body = (target >= head) & (target < head + body)
    hole = tl.where(in_body, (target - head) // GRANULE * GRANULE, body)
    body_ptr = advance(row_ptr, head, GRANULE)
    TILE: tl.constexpr = LANES * GRANULE

    lane = tl.arange(0, LANES) * GRANULE
    tiles = ()
    for step in tl.static_range(AHEAD):
        tiles += (load_granules(body_ptr, (step * TILE + lane)[:, None], body, hole, GRANULE),)
    z_target = transformed(tl.load(row_ptr + target), scale, softcap, TRANSFORM)

    m = tl.full([LANES], float("-inf"), tl.float32)
    k = tl.full([LANES], -HUGE * LOG2_E, tl.float32)
    R = tl.zeros([LANES], tl.float32)
    best = lane
    unrolled = (body + AHEAD // 2 * TILE) // (AHEAD * TILE) * (AHEAD * TILE)  # to the nearest round
    for start in range(0, unrolled, AHEAD * TILE):
        for step in tl.static_range(AHEAD):
            tiles, m, k, R, best = sweep_tile(
                tiles, start + step * TILE + lane, m, k, R, best, body_ptr, body, hole, scale, softcap,
                GRANULE, AHEAD * TILE, TRANSFORM,
            )  # fmt: skip
    for start in range(unrolled, body, TILE):  # or a last round would take in tiles most of which are not there
        tiles, m, k, R, best = sweep_tile(
            tiles, start + lane, m, k, R, best, body_ptr, body, hole, scale, softcap, GRANULE, AHEAD * TILE, TRANSFORM
        )

    column, inside = end_columns(head, body, hole, V, GRANULE, LANES)
    inside &= column != target
    z = transformed(tl.load(row_ptr + column, mask=inside, other=0.0), scale, softcap, TRANSFORM)
    z = tl.where(inside, z, float("-inf"))
    runner_up = tl.max(tl.maximum(m, z))
    reference = finite(runner_up)
    best += head
    index = tl.where(m == runner_up, best, NO_COLUMN)
    index = tl.min(tl.minimum(index, tl.where(z == runner_up, column, NO_COLUMN)))

    huge = tl.abs(reference) >= HUGE
    swept = tl.where(huge, 0.0, R * exp2(fma(-reference, LOG2_E, k)))
    beside = tl.where(column == index, 0.0, exp(z - reference))  # in the ends
    granule = tl.maximum(index - head, 0) // GRANULE * GRANULE
    runner_up_in_body = (index >= head) & is_swept(granule, body, hole)
    place = tl.where(runner_up_in_body, index, 0) + tl.arange(0, GRANULE)
    z = transformed(tl.load(row_ptr + place, mask=place < V, other=0.0), scale, softcap, TRANSFORM)
    column = tl.where(runner_up_in_body, tl.min(tl.where(z == runner_up, place, NO_COLUMN)), index)

    rest = tl.sum(swept + beside) - runner_up_in_body.to(tl.float32)
    if huge | (runner_up_in_body & (rest < ENOUGH)):
        first = tl.where(huge, 0, granule // GRANULE % LANES)
        spacing = tl.where(huge, 1, LANES)
        below, equal = summed_anew(
            body_ptr, first, spacing, runner_up, body, hole, scale, softcap, GRANULE, LANES, TRANSFORM
        )
        swept = tl.where((m == runner_up) & (best == index), 0.0, swept)
        rest = tl.sum(swept + beside) + below + (equal - runner_up_in_body.to(tl.int32))
    nothing_met = (runner_up == float("-inf")) | (index == NO_COLUMN)
    return z_target, rest, runner_up, tl.where(nothing_met, (target == 0).to(tl.int32), column)


# The gradient. Elementwise, so a tile's loads are independent and one tile holds as many as should be in flight. The
# columns of target and runner-up are written over afterwards, which spares a comparison with every column.


@triton.jit
def write_rest(
    ptr, out_ptr, position, inside, power, scale, softcap, TRANSFORM: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """The gradient at ``position`` of ``ptr``, as that of a logit that is neither the target nor the runner-up."""
    rate, k, g_rest = power
    x = tl.load(ptr + position, mask=inside, other=0.0, eviction_policy=EVICTION)
    g = g_rest * exp2(fma(transformed(x, scale, softcap, TRANSFORM), rate, -k))
    if TRANSFORM != "none":
        g = g * slope(x, scale, softcap, TRANSFORM)
    tl.store(out_ptr + position, g.to(out_ptr.dtype.element_ty), mask=inside, eviction_policy=EVICTION)


@triton.jit
def power_of(g_rest, reference):
    """(rate, k, factor) so that factor 2^(rate z - k) is g_rest e^(z - reference), k rounded as in the sweep.

    From HUGE on neighbouring numbers are at least 32 apart, and what is not equal to the reference vanishes with any
    base: 2 takes no rounding.
    """
    rate = tl.where(tl.abs(reference) >= HUGE, 1.0, LOG2_E)
    k = rounded_product(rate, reference)
    return rate, k, g_rest * exp2(fma(-reference, rate, k))


@triton.jit
def is_part(column, head, body, begin, end):
    """Whether ``write_gradient`` from ``begin`` up to ``end`` of the body writes ``column``."""
    position = column - head
    in_body = (position >= 0) & (position < body)
    return tl.where(in_body, (position >= begin) & (position < end), begin == 0)


@triton.jit
def write_gradient(
    row_ptr, out_ptr, begin, end, V, coefficients, scale, softcap,
    GRANULE: tl.constexpr, TILE: tl.constexpr, TRANSFORM: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """The gradient of the body's columns from ``begin`` up to ``end``, and of the row's ends if ``begin`` is 0."""
    target, index, runner_up, g_target, g_runner_up, g_rest = coefficients
    power = power_of(g_rest, finite(runner_up))
    if TRANSFORM != "none":
        g_target *= slope(tl.load(row_ptr + target), scale, softcap, TRANSFORM)
        g_runner_up *= slope(tl.load(row_ptr + index), scale, softcap, TRANSFORM)
        tl.debug_barrier()  # the output may be the logits
    head, body = cut(row_ptr, V, GRANULE)
    if begin == 0:
        column, inside = end_columns(head, body, body, V, GRANULE, 2 * LINE * GRANULE)
        write_rest(row_ptr, out_ptr, column, inside, power, scale, softcap, TRANSFORM, EVICTION)
    body_ptr = advance(row_ptr, head, GRANULE)
    body_out_ptr = advance(out_ptr, head, GRANULE)
    end = tl.minimum(end, body)
    last = begin + (tl.cdiv(end - begin, TILE) - 1) * TILE
    for start in range(begin, end, TILE):  # backwards, as what was read last is still in the cache
        position = last - (start - begin) + tl.arange(0, TILE)
        swept = position < body
        write_rest(body_ptr, body_out_ptr, position, swept, power, scale, softcap, TRANSFORM, EVICTION)
    tl.debug_barrier()
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + index, g_runner_up.to(dtype), mask=is_part(index, head, body, begin, end))
    tl.store(out_ptr + target, g_target.to(dtype), mask=is_part(target, head, body, begin, end))


@triton.jit
def write_constant(out_ptr, begin, end, V, value, GRANULE: tl.constexpr, TILE: tl.constexpr):
    """``value`` in the columns that ``write_gradient`` would write."""
    head, body = cut(out_ptr, V, GRANULE)
    if begin == 0:
        column, inside = end_columns(head, body, body, V, GRANULE, 2 * LINE * GRANULE)
        tl.store(out_ptr + column, value.to(out_ptr.dtype.element_ty), mask=inside)
    body_out_ptr = advance(out_ptr, head, GRANULE)
    for start in range(begin, tl.minimum(end, body), TILE):
        position = start + tl.arange(0, TILE)
        tl.store(body_out_ptr + position, value.to(out_ptr.dtype.element_ty), mask=position < body)
