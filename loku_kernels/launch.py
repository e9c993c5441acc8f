"""How much work goes into one piece: pure functions, with the measurements behind them."""

from __future__ import annotations

# (hidden size up to and including, bytes of logits in a chunk) on a CPU. Two costs pull apart. The C library keeps
# freed blocks under 32 MiB, so that smaller chunks cost no page faults (90 ms of 2048 x 50257 float32 logits). And
# every chunk's GEMM lays out the head's weight anew, so that wide heads want fewer chunks. Two GEMMs of a frozen head
# in float32 on 2 cores of Zen 5, ms, unchunked and in chunks of 31, 64, 128 MiB:
#     (N, D, V) = (2048, 768, 50257)    918    863   990   936
#                 (1024, 2048, 51200)  1086   1209  1081  1071
#                 (512, 4096, 32000)    659    676   658   648
_CPU_CHUNK_BYTES = ((1024, 31 << 20), (2**31, 128 << 20))
# On a GPU: enough rows for the GEMMs of a chunk to run at full speed.
_GPU_CHUNK_BYTES = 512 << 20
_ROW_MULTIPLE = 16


def default_chunk_bytes(hidden_size: int, device_type: str) -> int:
    """Bytes of logits in one chunk where the caller sets no budget."""
    if device_type != "cpu":
        return _GPU_CHUNK_BYTES
    return next(chunk_bytes for limit, chunk_bytes in _CPU_CHUNK_BYTES if hidden_size <= limit)


def chunk_rows(n_rows: int, vocabulary: int, itemsize: int, chunk_bytes: int) -> int:
    """Rows of logits in one chunk: as many as fit the budget, in chunks of nearly equal height, at least one row."""
    most = max(1, chunk_bytes // (vocabulary * itemsize))
    chunks = max(1, -(-n_rows // most))
    height = max(1, -(-n_rows // chunks))
    return min(most, -(-height // _ROW_MULTIPLE) * _ROW_MULTIPLE)
