"""Fisher of one layer: time and memory beside the bare matrix products and other ways to per-sequence gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.harness import MIB, Candidate
from loku_kernels import gemm
from loku_kernels.fisher import fisher_accumulate, fisher_accumulate_grad

LAYERS = [(3072, 768), (4096, 4096)]  # out, in
BATCHES = {"8 sequences x 200": [200] * 8, "32 ragged sequences": torch.linspace(20, 120, 32).int().tolist()}
if torch.cuda.is_available():
    LAYERS = [(11008, 4096), (4096, 4096)]
    BATCHES = {"64 ragged sequences": torch.linspace(20, 120, 64).int().tolist()}
DTYPES = [torch.float32, torch.bfloat16]
WHOLE, READ_AND_WRITE = "bare GEMM of all tokens", "reading and writing fisher"
MOST_PER_SAMPLE_MIB = 600  # what a peer may hold of gradients of single sequences


class Problem:
    """A batch's tokens, packed, and the accumulator."""

    def __init__(self, out: int, columns: int, lengths: list[int], dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.lengths, tokens = lengths, sum(lengths)
        self.offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
        self.inputs = torch.randn(tokens, columns, generator=generator, device=device).to(dtype)
        self.grad_outputs = torch.randn(tokens, out, generator=generator, device=device).to(dtype)
        self.weights = torch.rand(len(lengths), generator=generator, device=device)
        self.fisher = torch.zeros(out, columns, device=device)
        self.flops = 2 * tokens * out * columns
        self.per_sample_mib = len(lengths) * out * columns * dtype.itemsize / MIB

    def sequences(self):
        return zip(self.grad_outputs.split(self.lengths), self.inputs.split(self.lengths), strict=True)

    def padded(self):
        """(sequences, longest, columns) of both operands, zeros past each sequence's end."""
        pad = torch.nn.utils.rnn.pad_sequence
        grad_outputs, inputs = zip(*self.sequences(), strict=True)
        return pad(grad_outputs, batch_first=True), pad(inputs, batch_first=True)

    def accumulate(self) -> None:
        fisher_accumulate(self.fisher, self.inputs, self.grad_outputs, offsets=self.offsets, weights=self.weights)

    def check(self) -> None:
        """A corner of ours against float64, before anything is timed."""
        corner = torch.zeros(64, 64, dtype=torch.float64, device=self.fisher.device)
        for weight, (d, a) in zip(self.weights, self.sequences(), strict=True):
            corner += weight * (d[:, :64].double().T @ a[:, :64].double()) ** 2
        self.fisher.zero_()
        self.accumulate()
        assert (self.fisher[:64, :64] - corner).abs().max() < 1e-5 * corner.max()


def bare_gemms(p: Problem) -> list[Candidate]:
    """The products alone, by each route that torch has, into one buffer where the route can."""
    product = torch.empty(p.fisher.shape, dtype=p.inputs.dtype, device=p.fisher.device)

    def by_mm():
        for d, a in p.sequences():
            torch.mm(d.T, a, out=product)

    def by_onednn():
        for d, a in p.sequences():
            torch.ops.mkldnn._linear_pointwise(d.T, a.T, None, "none", [], "")

    def in_float32():
        wide = torch.empty_like(p.fisher)
        for d, a in zip(p.grad_outputs.float().split(p.lengths), p.inputs.float().split(p.lengths), strict=True):
            torch.mm(d.T, a, out=wide)

    routes = [Candidate("bare GEMMs, torch.mm", "limit", by_mm)]
    if gemm.is_widened(p.inputs):
        routes.append(Candidate("bare GEMMs, cast to float32", "limit", in_float32))
    if p.inputs.device.type == "cpu" and p.inputs.dtype == torch.float32:
        routes.append(Candidate("bare GEMMs, oneDNN", "limit", by_onednn))
    return routes


def gpu_limits(p: Problem) -> list[Candidate]:
    """One product of all tokens, whatever their sequences, and what memory must do for fisher."""
    product = torch.empty(p.fisher.shape, dtype=p.inputs.dtype, device=p.fisher.device)
    whole = Candidate(WHOLE, "limit", lambda: torch.mm(p.grad_outputs.T, p.inputs, out=product))
    return [whole, Candidate(READ_AND_WRITE, "limit", lambda: p.fisher.mul_(1.0))]


def loops(p: Problem) -> list[Candidate]:
    """One sequence's gradient after the other."""
    product = torch.empty(p.fisher.shape, dtype=p.inputs.dtype, device=p.fisher.device)
    weights = p.weights.tolist()

    def by_mm():
        for weight, (d, a) in zip(weights, p.sequences(), strict=True):
            torch.mm(d.T, a, out=product)
            p.fisher.addcmul_(product, product, value=weight)

    def by_fastest_route():
        for weight, (d, a) in zip(weights, p.sequences(), strict=True):
            g = gemm.mm(d.T, a)
            p.fisher.addcmul_(g, g, value=weight)

    return [
        Candidate("mm and addcmul_", "peer", by_mm),
        Candidate("fastest mm and addcmul_", "peer", by_fastest_route),
    ]


def per_sample_gradients(bench, p: Problem) -> list[Candidate]:
    """All sequences' gradients at once, then their squares."""
    if p.per_sample_mib > MOST_PER_SAMPLE_MIB:
        bench.skip_peer("per-sample gradients", f"{p.per_sample_mib:.0f} MiB of them where over {MOST_PER_SAMPLE_MIB}")
        return []
    grad_outputs, inputs = p.padded()
    weight = torch.zeros(p.fisher.shape, dtype=inputs.dtype, device=inputs.device)

    def add(gradients):
        p.fisher.add_(torch.einsum("s,soi->oi", p.weights, gradients.float().square_()))

    def objective(weight, d, a):
        return (torch.nn.functional.linear(a, weight) * d).sum()

    gradients = torch.func.vmap(torch.func.grad(objective), in_dims=(None, 0, 0))
    return [
        Candidate("einsum", "peer", lambda: add(torch.einsum("sto,sti->soi", grad_outputs, inputs)), 3),
        Candidate("torch.func.vmap(grad)", "peer", lambda: add(gradients(weight, grad_outputs, inputs)), 3),
        *backpack_gradients(bench, weight, grad_outputs, inputs, add),
    ]


def backpack_gradients(bench, weight, grad_outputs, inputs, add) -> list[Candidate]:
    """BackPACK's, with the forward pass that its hooks need."""
    try:
        from backpack import backpack, extend
        from backpack.extensions import BatchGrad
    except ImportError as error:
        bench.skip_peer("BackPACK", f"not installed ({error})")
        return []
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    layer = extend(layer)

    def run():
        layer.zero_grad()
        with backpack(BatchGrad()):
            layer(inputs).backward(grad_outputs)
        add(layer.weight.grad_batch)
        del layer.weight.grad_batch

    return [Candidate("BackPACK BatchGrad", "peer", run, 3)]


@pytest.fixture(params=LAYERS, ids=lambda layer: "x".join(map(str, layer)))
def layer(request, bench):
    if bench.quick and request.param != LAYERS[0]:
        pytest.skip("--quick takes one small layer")
    return (96, 80) if bench.quick else request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_layer(bench, layer, batch, dtype):
    p = Problem(*layer, BATCHES[batch], dtype, bench.device)
    p.check()
    workload = f"fisher, {batch}, {layer[0]} x {layer[1]} {str(dtype)[6:]}"
    on_gpu = bench.device.type == "cuda"
    limits = gpu_limits(p) if on_gpu else bare_gemms(p)
    candidates = [Candidate("fisher_accumulate", "ours", p.accumulate), *limits, *loops(p)]
    candidates += per_sample_gradients(bench, p)
    found = bench.measure(workload, candidates, work=p.flops, unit="GFLOP/s", limit=sum if on_gpu else min)
    times = {name: m.median_ms for name, m in found.items()}
    ours = times["fisher_accumulate"]
    if on_gpu:
        ratio = (ours - times[READ_AND_WRITE]) / times[WHOLE]
        bench.target(workload, "ours without reading and writing fisher / bare GEMM", ratio, 1.3)
        return
    bench.target(workload, "ours / fastest bare GEMMs", ours / min(times[c.name] for c in limits), 1.1)
    if dtype == torch.float32 and layer == (4096, 4096):
        bench.target(workload, "mm and addcmul_ / ours", times["mm and addcmul_"] / ours, 2.0, at_least=True)
    per_thread = found["fisher_accumulate"].peak_mib / torch.get_num_threads()
    bench.target(workload, "peak memory per thread, MiB", per_thread, 1.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_a_gradient(bench, layer, dtype):
    fisher, grad = torch.zeros(layer, device=bench.device), torch.randn(layer, device=bench.device).to(dtype)
    fisher_accumulate_grad(fisher, grad, 0.5)
    torch.testing.assert_close(fisher, 0.5 * grad.float().square())
    workload = f"fisher from a gradient, {layer[0]} x {layer[1]} {str(dtype)[6:]}"
    found = bench.measure(
        workload,
        [
            Candidate("fisher_accumulate_grad", "ours", lambda: fisher_accumulate_grad(fisher, grad, 0.5)),
            Candidate("fisher.add_(grad)", "limit", lambda: fisher.add_(grad)),
            Candidate("addcmul_", "peer", lambda: fisher.addcmul_(grad, grad, value=0.5)),
            Candidate("float and addcmul_", "peer", lambda: fisher.addcmul_(grad.float(), grad.float(), value=0.5)),
        ],
        work=2 * fisher.nbytes + grad.nbytes,
        unit="GB/s",
    )
    ratio = found["fisher_accumulate_grad"].median_ms / found["fisher.add_(grad)"].median_ms
    bench.target(workload, "ours / reading both and writing one", ratio, 1.1)


def test_with_a_warm_allocator(bench):
    """Without the page faults that GEMMs pay for fresh outputs: the stricter limit."""
    bench.run_with_a_warm_allocator(Path(__file__))
