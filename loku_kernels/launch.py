"""How much work goes into one piece: pure functions, with the measurements behind them."""

from __future__ import annotations

# Fewer chunks mean less work of laying out the head's weight for the GEMMs. Two GEMMs of a frozen head in float32, ms,
# unchunked and in chunks of 31, 64, 128 MiB, on 2 cores of Zen 5:
#     (N, D, V) = (2048, 768, 50257)    918    863   990   936
#                 (1024, 2048, 51200)  1086   1209  1081  1071
#                 (512, 4096, 32000)    659    676   658   648
# and the first of them with its losses on 2 cores of Zen 3: 2738, 2856, 2802 in chunks.
_CPU_CHUNK_BYTES = 128 << 20
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
