"""The Fisher kernels in Triton, called as the operators call them, and their launch rules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from loku_kernels.backends.triton import fisher, fisher_launch, launch

EPS = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A tile is 128 x 128 in the interpreter, a step has 16 tokens, and 8 or 4 elements are loaded at a time where all rows
# are aligned: one below, at and above each.
SHAPES = [(1, 1), (8, 8), (127, 9), (128, 128), (129, 130), (136, 264), (300, 24)]
LENGTHS = [[], [0], [1], [16], [17, 15], [20, 0, 33, 1, 0, 0, 48], [1] * 40, [0, 0, 5]]


def _matrix(rows: int, columns: int, dtype: torch.dtype, device, pad: int = 0, shift: int = 0) -> Tensor:
    """Random, with ``pad`` elements between rows and ``shift`` before the first."""
    flat = torch.randn(shift + rows * (columns + pad), device=device).to(dtype)
    return flat[shift:].view(rows, columns + pad)[:, :columns]


def _offsets(lengths: list[int], device) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0)


def _check(matrix: Tensor, inputs: Tensor, grad_outputs: Tensor, offsets: Tensor, weights: Tensor) -> None:
    """Against float64, with room for a rounding of every product and sum of a sequence, and of every square."""
    truth, bound = matrix.double(), EPS * matrix.double().abs()
    bounds = offsets.clamp(0, len(inputs)).tolist()
    for begin, end, weight in zip(bounds, bounds[1:], weights.tolist(), strict=False):
        d, a = grad_outputs[begin:end].double().T, inputs[begin:end].double()
        g, g_error = d @ a, EPS * max(1, end - begin) ** 0.5 * (d.abs() @ a.abs())
        truth = truth + weight * g**2
        bound = bound + 2 * EPS * truth.abs() + abs(weight) * (2 * g.abs() + g_error) * g_error
    fisher.fisher_accumulate(matrix, inputs, grad_outputs, offsets, weights)
    assert ((matrix.double() - truth).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, dtype, device):
    torch.manual_seed(0)
    (out, columns), lengths = shape, [20, 0, 33, 1]
    inputs, grad_outputs = _matrix(54, columns, dtype, device), _matrix(54, out, dtype, device)
    weights = torch.tensor([0.5, 7.0, 0.0, 2.0], device=device)
    _check(torch.rand(shape, device=device), inputs, grad_outputs, _offsets(lengths, device), weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_ragged_sequences(lengths, dtype, device):
    torch.manual_seed(0)
    inputs, grad_outputs = _matrix(sum(lengths), 24, dtype, device), _matrix(sum(lengths), 40, dtype, device)
    weights = torch.rand(len(lengths), device=device)
    _check(torch.rand(40, 24, device=device), inputs, grad_outputs, _offsets(lengths, device), weights)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 40), max_size=6),
    st.sampled_from(DTYPES),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.lists(st.integers(0, 9), min_size=6, max_size=6),
)
def test_strides_and_alignment(lengths, dtype, shape, gaps):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    matrix = _matrix(*shape, torch.float32, device, *gaps[:2])
    whole = matrix._base.clone() if matrix._base is not None else None
    inputs = _matrix(sum(lengths), shape[1], dtype, device, *gaps[2:4])
    grad_outputs = _matrix(sum(lengths), shape[0], dtype, device, *gaps[4:])
    _check(matrix, inputs, grad_outputs, _offsets(lengths, device), torch.rand(len(lengths), device=device))
    if whole is not None:
        outside = torch.ones_like(whole, dtype=torch.bool)
        outside.as_strided(matrix.shape, matrix.stride(), matrix.storage_offset()).fill_(False)
        assert torch.equal(matrix._base[outside], whole[outside])


def test_offsets_are_kept_inside_the_operands(device):
    torch.manual_seed(0)
    guarded = [_matrix(80, n, torch.float32, device) for n in (24, 40)]
    for operand in guarded:
        operand[:20] = operand[60:] = float("nan")
    inputs, grad_outputs = (operand[20:60] for operand in guarded)
    offsets = torch.tensor([-7, 13, 35, 2**40, 2**62], device=device)
    _check(torch.rand(40, 24, device=device), inputs, grad_outputs, offsets, torch.rand(4, device=device))


def test_falling_offsets_make_empty_sequences(device):
    torch.manual_seed(0)
    matrix = torch.zeros(8, 8, device=device)
    inputs, grad_outputs = _matrix(40, 8, torch.float32, device), _matrix(40, 8, torch.float32, device)
    offsets = torch.tensor([0, 30, 10, 40], device=device)
    fisher.fisher_accumulate(matrix, inputs, grad_outputs, offsets, torch.ones(3, device=device))
    first, last = grad_outputs[:30].T @ inputs[:30], grad_outputs[10:].T @ inputs[10:]
    torch.testing.assert_close(matrix, first**2 + last**2)


def test_an_empty_sequence_adds_nothing_whatever_its_weight(device):
    matrix = torch.ones(8, 8, device=device)
    weights = torch.tensor([float("inf"), float("nan")], device=device)
    empty = torch.zeros(0, 8, device=device)
    fisher.fisher_accumulate(matrix, empty, empty, torch.zeros(3, dtype=torch.int64, device=device), weights)
    assert torch.equal(matrix, torch.ones_like(matrix))


def test_a_bad_token_spoils_no_other_sequence(device):
    """The last step of a sequence reaches into the next one's tokens: they must not be multiplied by 0."""
    torch.manual_seed(0)
    inputs, grad_outputs = _matrix(20, 8, torch.float32, device), _matrix(20, 8, torch.float32, device)
    inputs[10:], grad_outputs[10:] = float("inf"), float("nan")
    offsets, weights = torch.tensor([0, 10], device=device), torch.ones(1, device=device)
    matrix = torch.zeros(8, 8, device=device)
    fisher.fisher_accumulate(matrix, inputs, grad_outputs, offsets, weights)
    torch.testing.assert_close(matrix, (grad_outputs[:10].T @ inputs[:10]) ** 2)


def test_an_empty_matrix_is_left_alone(device):
    inputs, offsets = torch.ones(3, 4, device=device), torch.tensor([0, 3], device=device)
    none = torch.zeros(0, 4, device=device)
    fisher.fisher_accumulate(none, inputs, torch.zeros(3, 0, device=device), offsets, torch.ones(1, device=device))
    fisher.fisher_accumulate_grad(none, none, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (33, 64), (5, 70000)])
def test_squares_of_a_gradient(shape, dtype, device):
    torch.manual_seed(0)
    rows, columns = shape
    aligned, padded = _matrix(*shape, dtype, device), _matrix(*shape, dtype, device, 3, 1)
    for grad in (aligned, padded, _matrix(columns, rows, dtype, device).t()):
        for matrix in (torch.rand(shape, device=device), _matrix(*shape, torch.float32, device, 8)):
            truth = matrix.double() - 0.3 * grad.double() ** 2
            size = matrix.abs() + 0.3 * grad.double() ** 2
            fisher.fisher_accumulate_grad(matrix, grad, -0.3)
            assert ((matrix - truth).abs() <= 2 * EPS * size).all()


ITEM_BYTES = st.sampled_from([2, 4])


SIDES = st.integers(1, 200_000)


@given(SIDES, SIDES, st.integers(0, 2**31), st.integers(0, 2**31), st.sampled_from(DTYPES), st.booleans())
def test_every_launch_is_compiled_beforehand(out, columns, tokens, sequences, dtype, aligned):
    granule = 16 // dtype.itemsize if aligned else 1
    chosen = fisher_launch.accumulate_launch(
        (out, columns), tokens, sequences, dtype.itemsize, granule, interpreted=False
    )
    chosen |= {"GRANULE": granule}
    assert (dtype, chosen, aligned) in [(c.dtype, c.launch, c.wide) for c in fisher.compile_configurations()]


@given(st.integers(1, 2**40), st.sampled_from(DTYPES), st.booleans())
def test_every_grad_launch_is_compiled_beforehand(columns, dtype, aligned):
    granule = 4 if aligned else 1
    chosen = fisher_launch.grad_launch(columns, granule, interpreted=False) | {"GRANULE": granule}
    assert (dtype, chosen) in [(c.dtype, c.launch) for c in fisher.compile_configurations()]


def _launch(shape: tuple[int, int], tokens: int, sequences: int, item_bytes: int = 2) -> dict[str, int]:
    return fisher_launch.accumulate_launch(shape, tokens, sequences, item_bytes, 16 // item_bytes, interpreted=False)


def test_short_sequences_take_short_steps():
    def step(*arguments) -> int:
        return _launch((4096, 4096), *arguments)["BLOCK_TOKENS"]

    assert step(1000, 1000) == 16
    assert step(64 * 70, 64) == 32
    assert step(64 * 70, 64, 4) == 16
    assert step(0, 0) == 16


def test_a_matrix_of_few_tiles_has_small_ones():
    assert _launch((768, 768), 4480, 64)["BLOCK_OUT"] == 64
    assert _launch((4096, 4096), 4480, 64)["BLOCK_OUT"] == 128
    assert _launch((1 << 20, 8), 4480, 64)["BLOCK_OUT"] == 128


@pytest.mark.parametrize("configuration", list(fisher.compile_configurations()), ids=lambda c: str(c.launch))
def test_compiled_types_are_those_of_the_kernel(configuration):
    annotations = configuration.kernel.fn.__annotations__
    constants = {name for name, annotation in annotations.items() if "constexpr" in str(annotation)}
    arguments = set(configuration.kernel.arg_names)
    assert set(configuration.types) == arguments - constants
    assert constants == arguments & set(configuration.launch)
    short = {"tl.int64": "i64", "tl.int32": "i32", "tl.float32": "fp32"}
    for name in set(annotations) - constants:
        assert configuration.types[name] == short[str(annotations[name])]


@given(ITEM_BYTES, st.integers(1, 32), st.integers(0, 8), st.integers(0, 8))
def test_a_granule_needs_every_row_aligned(item_bytes, columns, pad, shift):
    dtype = torch.float32 if item_bytes == 4 else torch.bfloat16
    odd = torch.zeros(shift + 3 * (columns + pad), dtype=dtype)[shift:].view(3, columns + pad)[:, :columns]
    even = torch.zeros(3, 32, dtype=dtype)
    rows_aligned = all(row.data_ptr() % 16 == 0 for row in odd)
    expected = rows_aligned and columns * item_bytes % 16 == 0
    assert fisher_launch.granule(item_bytes, even, odd) == (16 // item_bytes if expected else 1)
    assert launch.LOAD_BYTES == 16
