"""Which checkpoints are whole: a run may have died, or the disk been full, while one was written."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

logger = logging.get_logger(__name__)
_STATE = "trainer_state.json"  # the trainer writes it last


def last_whole_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest checkpoint folder of a run that is whole, or None; warns of newer ones that are not."""
    found = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = [(int(path.name.rpartition("-")[2]), path) for path in found if path.name.rpartition("-")[2].isdigit()]
    for _, path in sorted(numbered, reverse=True):
        fault = checkpoint_fault(path)
        if fault is None:
            return str(path)
        logger.warning(f"Passing over the checkpoint {path}: {fault}.")
    return None


def checkpoint_fault(path: str | os.PathLike) -> str | None:
    """What a checkpoint folder lacks, None if it is whole. Reads headers, not tensors."""
    path = Path(path)
    if not (path / _STATE).is_file():
        return f"it has no {_STATE}, which is written last"
    files = sorted(file for file in path.rglob("*") if file.is_file())  # DeepSpeed and FSDP make folders of their own
    return next((f"{file.relative_to(path)} is cut short" for file in files if not _is_whole(file)), None)


def _is_whole(file: Path) -> bool:
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                return True
        if file.suffix == ".json":
            json.loads(file.read_bytes())
    except (SafetensorError, ValueError):
        return False
    # torch.save writes a zip archive, whose directory stands at its end.
    return file.suffix not in (".pt", ".pth", ".bin") or zipfile.is_zipfile(file)
