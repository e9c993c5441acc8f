"""What the row kernels share: how a row is cut for 128-bit access, how it is swept, and the transform of its logits.

A row starts at any address: its bytes are V times the item size, which is no multiple of 16 for V = 50257. So a row is
cut into its *body*, the granules of 16 bytes that lie inside it, and its *ends*, the few columns before and after. The
body is loaded and stored 128 bits at a time; nothing outside the row is touched.

    column        0 .. head-1 | head ............ head+body-1 | head+body .. V-1
    address                   ^ a multiple of 16 bytes         ^ likewise
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from loku_kernels.backends.triton import launch

INTERPRETED = tl.constexpr(launch.INTERPRETED)
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the smallest finite float32
NO_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit
def exp(x):
    """e^x for the sweeps; results below 2^-126 are 0.

    The device library's exp2 becomes one instruction where tl.exp2 becomes four, three of them only to save those
    results. A sweep of half-precision logits is limited by instructions. The interpreter knows no device library.
    """
    if INTERPRETED:
        return tl.exp2(x * LOG2_E)
    else:
        return libdevice.exp2(x * LOG2_E)


@triton.jit
def row_offset(row, T, stride_b, stride_t):
    """Where row ``row`` of a (B, T, V) tensor starts, in elements; 64 bits, since tensors exceed 2^31 elements."""
    row = row.to(tl.int64)
    return (row // T) * stride_b + (row % T) * stride_t


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
    past = (row_ptr.to(tl.int64) // item % GRANULE).to(tl.int32)
    head = tl.minimum((GRANULE - past) % GRANULE, V)
    return head, (V - head) // GRANULE * GRANULE


@triton.jit
def advance(ptr, head, GRANULE: tl.constexpr):
    """The start of the body, with the compiler told that ``cut`` aligned it."""
    item: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(ptr + head, GRANULE * item)


@triton.jit
def end_columns(head, body, hole, V, GRANULE: tl.constexpr):
    """The columns to be handled one by one, and which of these 4 * GRANULE lanes hold one.

    They are those before and after the body and, if ``hole < body``, the body's granule at ``hole``.
    """
    lane = tl.arange(0, 4 * GRANULE)
    part = lane // GRANULE
    first = tl.where(part == 0, 0, tl.where(part == 1, head + body, head + hole))
    last = tl.where(part == 0, head, tl.where(part == 1, V, tl.where((part == 2) & (hole < body), V, 0)))
    column = first + lane % GRANULE
    return column, column < last


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


# The sweep. Each lane keeps the largest logit m it has met, where it met it, and R = sum of exp(z - m) over the others
# it met. A lane that has met nothing but -inf has m = LOWEST and R = -1, so that R + 1 counts what it met, and the
# first logit needs no case of its own. Columns come in descending order, so that the last of equal logits is the lowest
# column.


@triton.jit
def absorb(z, start, m, R, best):
    """One more logit for each lane, at the cost of one exponential."""
    e = exp(-tl.abs(z - m))
    larger = z >= m
    R = tl.fma(R, tl.where(larger, e, 1.0), e)
    return tl.where(larger, z, m), R, tl.where(larger, start, best)


@triton.jit
def lowest_column(column, m, R, top):
    """The lowest column in which a lane met ``top``."""
    return tl.min(tl.where((m == top) & (R >= 0), column, NO_COLUMN))


@triton.jit
def rest_of(column, m, R, top, index):
    """The lanes' sum of exp(z - top), without the logit at ``index``."""
    e = tl.where(m == top, 1.0, exp(m - top))
    return tl.sum((R + tl.where((column == index) & (R >= 0), 0.0, 1.0)) * e)


@triton.jit
def absorb_ends(
    row_ptr, head, body, hole, target, V, scale, softcap, GRANULE: tl.constexpr, TRANSFORM: tl.constexpr
):  # fmt: skip
    """(column, m, R) of the ends and of the target's neighbours, so that the sweep need not look for the target."""
    column, inside = end_columns(head, body, hole, V, GRANULE)
    inside &= column != target
    z = transformed(tl.load(row_ptr + column, mask=inside, other=0.0), scale, softcap, TRANSFORM)
    m, R, _ = absorb(tl.where(inside, z, float("-inf")), 0, LOWEST, -1.0, 0)
    return column, m, R


@triton.jit
def is_swept(position, body, hole, GRANULE: tl.constexpr):
    """Whether the sweep over the body meets ``position``; the same for all of a granule, so a granule is one load."""
    return (position >= 0) & (position < body) & (position // GRANULE != hole // GRANULE)


@triton.jit
def load_tile(body_ptr, position, body, hole, GRANULE: tl.constexpr):
    return tl.load(body_ptr + position, mask=is_swept(position, body, hole, GRANULE), other=float("-inf"))


@triton.jit
def row_statistics(
    row_ptr, target, V, scale, softcap,
    GRANULE: tl.constexpr, LANES: tl.constexpr, AHEAD: tl.constexpr, TRANSFORM: tl.constexpr,
):  # fmt: skip
    """(target logit, rest, runner-up logit, its column) of one row, in one sweep over it."""
    head, body = cut(row_ptr, V, GRANULE)
    in_body = (target >= head) & (target < head + body)
    hole = tl.where(in_body, (target - head) // GRANULE * GRANULE, body)

    end, end_m, end_R = absorb_ends(row_ptr, head, body, hole, target, V, scale, softcap, GRANULE, TRANSFORM)

    lane = tl.arange(0, LANES)
    body_ptr = advance(row_ptr, head, GRANULE)
    m = tl.full([LANES], LOWEST, tl.float32)
    R = tl.full([LANES], -1.0, tl.float32)
    best = tl.zeros([LANES], tl.int32)
    first = tl.cdiv(body, AHEAD * LANES) * (AHEAD * LANES) - LANES
    tiles = ()
    for step in tl.static_range(AHEAD):
        tiles += (load_tile(body_ptr, first - step * LANES + lane, body, hole, GRANULE),)
    for swept in range(0, body, AHEAD * LANES):
        for step in tl.static_range(AHEAD):
            start = first - swept - step * LANES
            z = transformed(tiles[0], scale, softcap, TRANSFORM)
            if TRANSFORM != "none":
                z = tl.where(is_swept(start + lane, body, hole, GRANULE), z, float("-inf"))
            m, R, best = absorb(z, start, m, R, best)
            following = load_tile(body_ptr, start - AHEAD * LANES + lane, body, hole, GRANULE)
            tiles = tiles[1:] + (following,)  # noqa: RUF005 (Triton does not unpack)

    column = head + best + lane
    runner_up = tl.maximum(tl.max(m), tl.max(end_m))
    index = tl.minimum(lowest_column(column, m, R, runner_up), lowest_column(end, end_m, end_R, runner_up))
    rest = rest_of(column, m, R, runner_up, index) + rest_of(end, end_m, end_R, runner_up, index)
    only_infinite = index == NO_COLUMN
    return (
        transformed(tl.load(row_ptr + target), scale, softcap, TRANSFORM),
        rest,
        tl.where(only_infinite, float("-inf"), runner_up),
        tl.where(only_infinite, (target == 0).to(tl.int32), index),
    )


# The gradient. Elementwise, so a tile's loads are independent and one tile holds as many as should be in flight.


@triton.jit
def write_gradient_at(
    ptr, out_ptr, position, column, inside, coefficients, scale, softcap, TRANSFORM: tl.constexpr
):  # fmt: skip
    """The gradient at ``position`` of ``ptr``, which holds the logits of ``column``."""
    target, index, runner_up, g_target, g_runner_up, g_rest = coefficients
    reference = tl.where(runner_up == float("-inf"), 0.0, runner_up)  # exp(-inf - -inf) would be NaN
    x = tl.load(ptr + position, mask=inside, other=0.0)
    g = g_rest * exp(transformed(x, scale, softcap, TRANSFORM) - reference)
    g = tl.where(column == index, g_runner_up, g)
    g = tl.where(column == target, g_target, g)
    if TRANSFORM != "none":
        g = g * slope(x, scale, softcap, TRANSFORM)
    tl.store(out_ptr + position, g.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def write_gradient(
    row_ptr, out_ptr, begin, end, V, coefficients, scale, softcap,
    GRANULE: tl.constexpr, TILE: tl.constexpr, TRANSFORM: tl.constexpr,
):  # fmt: skip
    """The gradient of the body's columns from ``begin`` up to ``end``, and of the row's ends if ``begin`` is 0."""
    head, body = cut(row_ptr, V, GRANULE)
    if begin == 0:
        column, inside = end_columns(head, body, body, V, GRANULE)
        write_gradient_at(row_ptr, out_ptr, column, column, inside, coefficients, scale, softcap, TRANSFORM)
    body_ptr = advance(row_ptr, head, GRANULE)
    body_out_ptr = advance(out_ptr, head, GRANULE)
    for start in range(begin, tl.minimum(end, body), TILE):
        position = start + tl.arange(0, TILE)
        write_gradient_at(
            body_ptr, body_out_ptr, position, head + position, position < body, coefficients, scale, softcap, TRANSFORM
        )


@triton.jit
def write_constant(out_ptr, begin, end, V, value, GRANULE: tl.constexpr, TILE: tl.constexpr):
    """``value`` in the columns that ``write_gradient`` would write."""
    head, body = cut(out_ptr, V, GRANULE)
    if begin == 0:
        column, inside = end_columns(head, body, body, V, GRANULE)
        tl.store(out_ptr + column, value.to(out_ptr.dtype.element_ty), mask=inside)
    body_out_ptr = advance(out_ptr, head, GRANULE)
    for start in range(begin, tl.minimum(end, body), TILE):
        position = start + tl.arange(0, TILE)
        tl.store(body_out_ptr + position, value.to(out_ptr.dtype.element_ty), mask=position < body)
