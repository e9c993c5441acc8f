"""The command ``loku``: fine-tune, measure importance, unlearn, evaluate, export, report, demo."""

from __future__ import annotations

import importlib
import os
import sys

COMMANDS = {
    "demo": "invent people, train a model until it has memorised them, and unlearn some",
    "finetune": "train the model that will have to forget, or a reference that never saw what is forgotten",
    "importance": "measure which rows of which weights matter for the forget set, to a file",
    "unlearn": "make a model forget one data set and keep another",
    "evaluate": "run a benchmark or measure perplexity",
    "export": "write an adapter for the unmodified base model, or merged weights",
    "report": "compare runs in a table and a page",
}
_DISTRIBUTED = ("finetune", "importance", "unlearn")  # what several processes do together


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status. `loku COMMAND --help` lists its options."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] not in COMMANDS:
        print(f"loku: error: there is no command {argv[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    if argv[0] not in _DISTRIBUTED and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        print(f"loku: error: loku {argv[0]} runs in one process; start it without torchrun", file=sys.stderr)
        return 2
    try:
        from loku.cli.errors import run_command

        command = importlib.import_module(f"loku.cli.{argv[0]}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("loku", "loku_kernels"):
            raise
        print(
            f"loku: error: {error}; the commands need more packages than the kernels: pip install loku-kernels[train]",
            file=sys.stderr,
        )
        return 1
    is_guest = _is_in_process_group()
    status = run_command(command.main, argv[1:])
    if status == 0 and not is_guest and _is_in_process_group():
        _leave_process_group()
    return status


def _is_in_process_group() -> bool:
    distributed = sys.modules.get("torch.distributed")  # a command that needs no torch should not wait for it
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _leave_process_group() -> None:
    """Once all of torchrun's processes are done: the threads of a group can abort an interpreter that just ends."""
    import torch.distributed

    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def usage() -> str:
    lines = [f"  {name:<12}{what}" for name, what in COMMANDS.items()]
    advice = "loku COMMAND --help lists a command's options. LOKU_TRACEBACK=1 shows where an error comes from."
    return "\n".join(["usage: loku COMMAND [options]", "", *lines, "", advice])
