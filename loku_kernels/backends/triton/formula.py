"""``backends.formulas`` for one row, on float32 scalars inside a kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def combine(target, runner_up, rest, ihl_weight, ce_weight):
    """ihl_weight * IHL + ce_weight * CE: (loss, g_target, g_runner_up, g_rest)."""
    distance = tl.where(tl.maximum(target, runner_up) == float("inf"), float("nan"), target - runner_up)
    target_leads = distance > 0
    smaller = tl.exp(-tl.abs(distance))
    e_t = tl.where(target_leads, 1.0, smaller)
    e_m = tl.where(target_leads, smaller, 1.0)
    r = rest * e_m
    share = 1 / (e_t + e_m + r)  # one division, as every thread of a program does all of this
    p_t = e_t * share
    p_m = e_m * share

    lead = expm1_negative(-tl.abs(distance))
    gap = tl.where(target_leads, lead, -lead) * share  # p_m - p_t
    ihl_loss = (r + 2 * e_t) * share
    ce_loss = log1p_positive(tl.where(target_leads, e_m, e_t) + r) - tl.where(target_leads, 0.0, distance)

    loss = weighted(ihl_weight, ihl_loss) + weighted(ce_weight, ce_loss)
    g_target = weighted(ihl_weight, p_t * (r + 2 * e_m) * share) + weighted(ce_weight, -(e_m + r) * share)
    g_runner_up = weighted(ihl_weight, -p_m * ihl_loss) + weighted(ce_weight, p_m)
    g_rest = weighted(ihl_weight, p_m * gap) + weighted(ce_weight, p_m)
    return loss, g_target, g_runner_up, g_rest


@triton.jit
def weighted(weight, value):
    """A weight of 0 drops its loss even where that loss is infinite."""
    return tl.where(weight == 0, 0.0, weight * value)


@triton.jit
def log1p_positive(x):
    """log(1 + x), x >= 0. The hardware's logarithm has an absolute error, useless where 1 + x is close to 1."""
    s = x / (2 + x)
    q = s * s
    series = 1 / 13 + q * (1 / 15 + q * (1 / 17))
    series = 1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * series)))
    series = 2 * s * (1 + q * (1 / 3 + q * series))  # 2 atanh(s); s <= 1/3 here
    return tl.where(x < 1, series, tl.log(1 + x))


@triton.jit
def expm1_negative(x):
    """exp(x) - 1, x <= 0, without the cancellation near 0."""
    series = 1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320))))
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * series)))
    return tl.where(x > -0.5, series, tl.exp(x) - 1)
