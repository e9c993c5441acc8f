"""The C++ library as built: what it needs, what it offers, and what differs between its instruction sets."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from loku_kernels import backends
from loku_kernels.backends import cpp, reference
from loku_kernels.backends.weights import RowWeights

CSRC = Path(__file__).parents[1] / "csrc"
BOTH = RowWeights(None, 1.0, None, 1.0)  # IHL + CE
PLAIN = {"ignore_index": -100, "scale": 1.0, "softcap": 0.0}
built = pytest.mark.skipif(cpp.missing_reason() is not None, reason=str(cpp.missing_reason()))


def _problem(rows, columns, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(1, rows, columns, generator=generator)).to(dtype)
    labels = torch.randint(0, columns, (rows,), generator=generator)
    return logits, labels


@pytest.fixture(params=cpp.instruction_sets() or [pytest.param("none", marks=built)])
def kernels(request):
    return cpp.CppBackend(request.param)


@built
def test_every_processor_has_the_portable_kernels_and_the_best_is_the_default():
    assert cpp.instruction_sets()[0] == "portable"
    assert cpp.CppBackend().instruction_set == cpp.instruction_sets()[-1]
    assert cpp.CppBackend() == cpp.CppBackend(cpp.instruction_sets()[-1])


@built
def test_unknown_instruction_set_is_refused_in_python_and_below():
    with pytest.raises(ValueError, match=r"instruction_set must be one of portable.*'sse9'"):
        cpp.CppBackend("sse9")
    logits, labels = _problem(2, 5, torch.float32)
    table, index = torch.empty(7, 2), torch.empty(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="instruction set 99"):
        torch.ops.loku_kernels_cpp.row_losses(logits, labels, *BOTH, table, index, -100, 1.0, 0.0, 99)


def test_a_missing_library_is_a_reason_not_an_error(monkeypatch):
    monkeypatch.setattr(cpp.PathFinder, "find_spec", lambda *_: None)
    assert "not built" in cpp._load.__wrapped__()


def test_a_broken_library_is_a_reason_not_an_error(monkeypatch, tmp_path):
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(b"not a library")
    spec = type("Spec", (), {"origin": str(broken)})
    monkeypatch.setattr(cpp.PathFinder, "find_spec", lambda *_: spec)
    assert f"do not load with torch {torch.__version__}" in cpp._load.__wrapped__()


@built
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_library_needs_only_the_stable_interface():
    """No C++ symbol of torch and nothing of Python: either would tie the binary to one version."""
    library = cpp.PathFinder.find_spec("_C", [str(next(iter(backends.__path__)) + "/..")]).origin
    listing = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    needed = [line.split()[-1].partition("@")[0] for line in listing.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in needed)
    assert [name for name in needed if name.startswith("Py") or "3c10" in name or "2at6" in name] == []


@built
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_no_function_is_shared_between_instruction_sets():
    """The linker keeps one copy of an inline function; compiled for AVX-512, it would crash older processors."""
    library = cpp.PathFinder.find_spec("_C", [str(next(iter(backends.__path__)) + "/..")]).origin
    listing = subprocess.run(["nm", "-C", "--defined-only", library], capture_output=True, text=True, check=True)
    names = [line.split(maxsplit=2)[2] for line in listing.stdout.splitlines() if " W " in line or " t " in line]
    shared = ("loku::Rows::", "loku::PerRow::", "loku::Table::", "loku::Transform::")
    assert [name for name in names if any(part in name.partition("(")[0] for part in shared)] == []


@built
@pytest.mark.parametrize(("dtype", "softcap"), [(torch.float32, 0.0), (torch.float32, 20.0), (torch.bfloat16, 0.0)])
def test_gradient_larger_than_the_caches_equals_the_gradient_in_place(kernels, dtype, softcap):
    """Streaming stores need alignment; 5 rows of an odd length start at different offsets."""
    columns = (33 << 20) // 5 // dtype.itemsize | 1
    logits, labels = _problem(1, columns, dtype)
    logits, labels, ones = logits.repeat(1, 5, 1), labels.repeat(5), torch.ones(()).expand(5)
    transform = PLAIN | {"softcap": softcap}
    rows, index = kernels.row_losses(logits, labels, BOTH, **transform)
    out = torch.full_like(logits, math.nan)
    kernels.row_gradient(logits, labels, index, rows[3:], ones, out, **transform)
    kernels.row_gradient(logits, labels, index, rows[3:], ones, logits, **transform)
    assert torch.equal(out, logits)


@built
@pytest.mark.parametrize("lengths", [range(2, 70), (1023, 1024, 1025, 1026, 2049)], ids=["short", "block edges"])
def test_every_row_length_and_target_near_a_block_boundary(kernels, lengths):
    """Vector tails, block edges, and the target at either end of them; neighbours of the row stay untouched."""
    for columns in lengths:
        _check_row_length(kernels, columns)


def _check_row_length(kernels, columns):
    targets = sorted({0, 1, columns // 2, columns - 2, columns - 1, *range(1022, 1027)} & set(range(columns)))
    padded = torch.full((1, len(targets), columns + 40), 77.0)
    logits = padded[:, :, 20 : 20 + columns]
    logits.copy_(_problem(len(targets), columns, torch.float32, seed=columns)[0])
    labels, ones = torch.tensor(targets), torch.ones(()).expand(len(targets))
    truth, true_index = reference.row_losses(logits.double(), labels, BOTH, **PLAIN)
    gradient = torch.empty_like(logits, dtype=torch.float64)
    reference.row_gradient(logits.double(), labels, true_index, truth[3:], ones.double(), gradient, **PLAIN)
    rows, index = kernels.row_losses_and_gradient_(logits, labels, BOTH, **PLAIN)
    assert torch.equal(index, true_index)
    torch.testing.assert_close(rows.double(), truth, rtol=2e-6, atol=0)
    torch.testing.assert_close(logits.double(), gradient, rtol=2e-6, atol=1e-12)
    assert (padded[:, :, :20] == 77).all() and (padded[:, :, 20 + columns :] == 77).all()


@built
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_rounding_is_torchs(kernels, dtype):
    """A third of every value of the type, rounded to nearest even as torch does, subnormal halves included."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float() / 3
    # The processor's own conversion to bfloat16 takes subnormals for 0.
    values = values[values.isfinite() & ((values.abs() > 1.2e-38) | (values == 0))]
    count = values.numel()
    logits = torch.zeros(1, count, 3, dtype=dtype)
    coefficients = torch.zeros(4, count)
    coefficients[3] = values
    labels, index = torch.zeros(count, dtype=torch.int64), torch.ones(count, dtype=torch.int64)
    kernels.row_gradient(logits, labels, index, coefficients, torch.ones(()).expand(count), logits, **PLAIN)
    assert torch.equal(logits[0, :, 2], values.to(dtype))


@built
@pytest.mark.parametrize("order", ["ascending", "descending", "equal"])
def test_order_of_the_logits_does_not_matter(kernels, order):
    """Ascending rows bring a new runner-up in every block, equal ones a tie in every block."""
    logits, _ = _problem(3, 5000, torch.float32)
    logits = logits.sort(dim=-1, descending=order == "descending").values
    if order == "equal":
        logits = torch.full_like(logits, -7.25)
    labels = torch.tensor([0, 2500, 4999])
    truth, index = reference.row_losses(logits.double(), labels, BOTH, **PLAIN)
    rows, found = kernels.row_losses(logits, labels, BOTH, **PLAIN)
    assert torch.equal(found, index)
    torch.testing.assert_close(rows.double(), truth, rtol=1e-6, atol=0)


@built
@pytest.mark.parametrize("columns", [129, 2048, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runner_ups_and_targets_anywhere(kernels, dtype, columns):
    """A row is read in several places at once: in any, the target is left out and the lowest of equals is found."""
    rows = 400
    logits, _ = _problem(rows, columns, torch.float32)
    generator = torch.Generator().manual_seed(1)
    pairs = torch.rand(rows, columns, generator=generator).topk(3).indices
    labels = pairs[:, 2].contiguous()
    logits.clamp_(max=8)[0].scatter_(1, pairs, torch.tensor([9.0, 9.0, 11.0]).expand(rows, 3))
    logits = logits.to(dtype)
    truth, index = reference.row_losses(logits.double(), labels, BOTH, **PLAIN)
    found_rows, found = kernels.row_losses(logits, labels, BOTH, **PLAIN)
    assert torch.equal(found, index) and torch.equal(found, pairs[:, :2].amin(1))
    torch.testing.assert_close(found_rows[:4].double(), truth[:4], rtol=1e-6, atol=0)


@built
def test_probes_read_every_byte_and_sum_exponentials():
    for number, name in enumerate(cpp.instruction_sets()):
        data = torch.zeros(1 << 19, dtype=torch.int32)
        data[::4099] = 1 << 20
        data[-1] = 1 << 5
        assert torch.ops.loku_kernels_cpp.read_probe(data, number) == (1 << 20) + (1 << 5), name
        found = torch.ops.loku_kernels_cpp.exponential_probe(1 << 15, number)
        assert found == pytest.approx((1 << 15) * math.exp(-1), rel=1e-4), name


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="needs a compiler for aarch64")
@pytest.mark.parametrize("source", sorted(CSRC.glob("*.cpp")), ids=lambda path: path.stem)
def test_compiles_for_aarch64(source, tmp_path):
    command = ["aarch64-linux-gnu-g++", "-std=c++17", "-fPIC", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    includes = [f"-I{path}" for path in (CSRC, *include_paths())]
    subprocess.run([*command, *includes, "-c", str(source), "-o", str(tmp_path / "object.o")], check=True)
