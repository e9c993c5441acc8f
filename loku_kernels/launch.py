"""How much work goes into one piece: pure functions, with the measurements behind them."""

from __future__ import annotations

# Fewer chunks mean less work of laying out the head's weight for the GEMMs. Loss and gradient of the hidden states in
# float32, of the two bare unchunked GEMMs' time, in chunks of 32, 64, 128, 256 MiB on 2 cores of an Emerald Rapids:
#     (N, D, V) = (2048, 768, 50257)   1.16   1.12   1.05   1.04
#                 (1024, 2048, 51200)  1.22   1.12   1.06   1.01
#                 (512, 4096, 32000)   1.07   0.99   0.99   1.01
# On 2 cores of Zen 5, from 31 MiB to no chunks at all, it made no difference of more than a tenth, either way; nor on
# Zen 3 from 31 to 128 MiB, where more was not tried.
_CPU_CHUNK_BYTES = 256 << 20
# On a GPU: enough rows for the GEMMs of a chunk to run at full speed.
_GPU_CHUNK_BYTES = 512 << 20
_ROW_MULTIPLE = 16


def default_chunk_bytes(device_type: str) -> int:
    """Bytes of logits in one chunk where the caller sets no budget."""
    return _CPU_CHUNK_BYTES if device_type == "cpu" else _GPU_CHUNK_BYTES


def chunk_rows(n_rows: int, vocabulary: int, itemsize: int, chunk_bytes: int) -> int:
    """Rows of logits in one chunk: as many as fit the budget, in chunks of nearly equal height, at least one row."""
    most = max(1, chunk_bytes // (vocabulary * itemsize))
    chunks = max(1, -(-n_rows // most))
    height = max(1, -(-n_rows // chunks))
    return min(most, -(-height // _ROW_MULTIPLE) * _ROW_MULTIPLE)
