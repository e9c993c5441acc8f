"""Commands under FSDP, of which a JSON file has the words; run by torchrun."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import distributed
from two_processes import part, pretend_accelerators

from loku.cli import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")  # or the first command would end it
    pretend_accelerators()
    statuses = [main(words) for words in json.loads(Path(sys.argv[1]).read_text())]
    part()
    sys.exit(any(statuses))
