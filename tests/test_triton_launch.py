"""The launch rules of the Triton kernels: they are launchable, suit the addresses, and all are compiled beforehand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from loku_kernels.backends.triton import fused, gradient, launch, losses

VOCABULARIES = st.integers(2, 2**31 - 1)
DTYPES = st.sampled_from(launch.DTYPES)
TRANSFORMS = st.sampled_from(list(launch.TRANSFORMS))


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


RULES = {losses: launch.sweep_launch, fused: launch.fused_launch}


@given(VOCABULARIES, DTYPES, TRANSFORMS, st.booleans(), st.sampled_from(list(RULES.values())))
def test_a_sweep_loads_128_bits_a_thread(vocabulary, dtype, transform, interpreted, rule):
    chosen = rule(vocabulary, dtype.itemsize, transform, interpreted)
    assert chosen["GRANULE"] * dtype.itemsize == 16
    assert _is_power_of_two(chosen["LANES"])
    if not interpreted:
        assert chosen["LANES"] == chosen["num_warps"] * 32


@given(VOCABULARIES, DTYPES)
def test_long_rows_are_swept_by_more_warps(vocabulary, dtype):
    sizes = vocabulary // 2, vocabulary
    shorter, chosen = (launch.fused_launch(v, dtype.itemsize, "none", interpreted=False) for v in sizes)
    assert shorter["num_warps"] <= chosen["num_warps"]
    assert (
        launch.fused_rows(sizes[0], dtype.itemsize, "none")
        >= launch.fused_rows(vocabulary, dtype.itemsize, "none")
        >= 1
    )
    assert launch.fused_programs(77, 2, torch.device("cpu")) == 77  # the interpreter has no multiprocessors


@given(VOCABULARIES, DTYPES, TRANSFORMS, st.booleans(), st.booleans())
def test_gradient_tiles_cover_a_row_part_exactly(vocabulary, dtype, transform, aligned, interpreted):
    chosen = launch.gradient_launch(vocabulary, dtype.itemsize, transform, aligned, interpreted)
    assert chosen["GRANULE"] == (16 // dtype.itemsize if aligned else 1)
    assert _is_power_of_two(chosen["TILE"])
    assert chosen["COLUMNS"] % chosen["TILE"] == 0
    assert chosen["TILE"] % chosen["GRANULE"] == 0


@pytest.mark.parametrize("module", [losses, fused])
@given(VOCABULARIES, DTYPES, st.sampled_from([1.0, 0.5]), st.sampled_from([0.0, 30.0]))
def test_every_sweep_is_compiled_beforehand(module, vocabulary, dtype, scale, softcap):
    chosen = RULES[module](vocabulary, dtype.itemsize, launch.transform_name(scale, softcap), interpreted=False)
    found = [(c.dtype, c.launch) for c in module.compile_configurations()]
    assert (dtype, chosen) in found
    assert (dtype, chosen | {"ihl_weight_ptr": None, "ce_weight_ptr": None}) in found


@given(VOCABULARIES, DTYPES, st.booleans(), st.sampled_from([1.0, 0.5]), st.sampled_from([0.0, 30.0]))
def test_every_gradient_is_compiled_beforehand(vocabulary, dtype, aligned, scale, softcap):
    transform = launch.transform_name(scale, softcap)
    chosen = launch.gradient_launch(vocabulary, dtype.itemsize, transform, aligned, interpreted=False)
    found = [(c.dtype, c.launch, c.wide) for c in gradient.compile_configurations()]
    assert (dtype, chosen, aligned) in found


@pytest.mark.parametrize("module", [losses, fused, gradient])
def test_compiled_types_are_those_of_the_kernel(module):
    for configuration in module.compile_configurations():
        annotations = configuration.kernel.fn.__annotations__
        constants = {name for name, annotation in annotations.items() if "constexpr" in str(annotation)}
        constants |= {name for name, value in configuration.launch.items() if value is None}
        arguments = set(configuration.kernel.arg_names)
        assert set(configuration.types) == arguments - constants
        assert constants == arguments & set(configuration.launch)
        short = {"tl.int64": "i64", "tl.int32": "i32", "tl.float32": "fp32"}
        for name, annotation in annotations.items():
            if name not in constants:
                assert configuration.types[name] == short[str(annotation)]


@st.composite
def _strided(draw, dtype):
    """A (B, T, V) view with arbitrary strides and offset, and its twin of the same shape with others."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.just(8)))

    def view():
        strides = draw(st.tuples(st.integers(0, 40), st.integers(0, 40)))
        return torch.zeros(512, dtype=dtype)[draw(st.integers(0, 16)) :].as_strided(shape, (*strides, 1))

    return view(), view()


@given(DTYPES.flatmap(_strided))
def test_same_alignment_agrees_with_the_addresses(pair):
    logits, out = pair
    B, T, _ = logits.shape
    apart = [out[b, t].data_ptr() - logits[b, t].data_ptr() for b in range(B) for t in range(T)]
    assert launch.same_alignment(logits, out) == all(bytes_apart % 16 == 0 for bytes_apart in apart)


@given(DTYPES.flatmap(_strided))
def test_a_tensor_is_aligned_with_itself(pair):
    assert launch.same_alignment(pair[0], pair[0])
