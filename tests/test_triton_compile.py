"""The compile check itself: it must see a spill and a narrow load, and one kernel must pass it for real."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TOOL = Path(__file__).parents[1] / "tools" / "compile_kernels.py"
USAGE = " Function k:\n  REG:40 STACK:{stack} SHARED:1024 LOCAL:0 CONSTANT[0]:640 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
SASS = """
        /*0000*/                   LDG.E.U16 R1, desc[UR4][R2.64] ;
.L_x_0:
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 {inside} ;
        /*0030*/               @P0 BRA `(.L_x_0) ;
        /*0040*/                   STG.E desc[UR4][R2.64], R1 ;
        /*0050*/                   BRA `(.L_x_1) ;
.L_x_1:
        /*0060*/                   EXIT ;
"""


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("compile_kernels", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _faults(tool, inside: str, *, stack: int = 0, wide: bool = True) -> list[str]:
    report = tool.read_report(USAGE.format(stack=stack), SASS.format(inside=inside))
    assert (report.registers, report.shared) == (40, 1024)
    return tool.faults(tool.configurations()[0]._replace(wide=wide), report)


@pytest.mark.parametrize(
    "wide", ["LDG.E.128 R8, desc[UR4][R2.64]", "STG.E.128 desc[UR4][R2.64], R8", "FADD R1, R1, R2"]
)
def test_narrow_accesses_outside_loops_are_no_fault(tool, wide):
    assert _faults(tool, wide) == []


@pytest.mark.parametrize(
    "narrow", ["LDG.E.64 R8, desc[UR4][R2.64]", "LDG.E.U16 R8, [R2]", "STG.E desc[UR4][R2.64], R8"]
)
def test_a_narrow_access_in_a_loop_is_a_fault(tool, narrow):
    assert _faults(tool, narrow) == ["an access narrower than 128 bits in a loop"]
    assert _faults(tool, narrow, wide=False) == []


@pytest.mark.parametrize("spill", ["STL [R1+0x8], R9", "LDL.LU R9, [R1+0x8]"])
def test_a_spill_is_a_fault(tool, spill):
    assert _faults(tool, spill) == ["1 spills"]
    assert _faults(tool, "FADD R1, R1, R2", stack=8) == ["8 spills"]


def test_programs_that_do_not_fit_a_multiprocessor_are_a_fault(tool):
    report = tool.read_report(USAGE.format(stack=0), SASS.format(inside="FADD R1, R1, R2"))  # 40 registers a thread
    eight_warps = tool.configurations()[0]._replace(launch={"num_warps": 8})
    assert tool.faults(eight_warps._replace(programs=6), report) == []
    assert tool.faults(eight_warps._replace(programs=7), report) == ["7 programs of 40 registers a thread do not fit"]


def test_a_kernel_without_loops_is_a_fault(tool):
    report = tool.read_report(USAGE.format(stack=0), "        /*0000*/  EXIT ;\n")
    assert tool.faults(tool.configurations()[0], report) == ["no global access found in a loop"]


def test_what_an_outer_loop_does_between_inner_ones_is_no_fault(tool):
    inner = ".L_x_7:\n        /*0010*/  LDG.E.128 R4, [R2] ;\n        /*0020*/  @P0 BRA `(.L_x_7) ;\n"
    outer = f".L_x_6:\n        /*0000*/  LDG.E R1, [R2] ;\n{inner}        /*0030*/  @P1 BRA `(.L_x_6) ;\n"
    assert [line.strip() for line in tool.instructions_in_loops(outer)] == ["LDG.E.128 R4, [R2]", "@P0 BRA `(.L_x_7)"]
    waiting = outer.replace("LDG.E.128 R4, [R2]", "SYNCS.PHASECHK")
    assert "LDG.E R1, [R2]" in [line.strip() for line in tool.instructions_in_loops(waiting)]


def test_the_way_back_of_a_diverged_warp_is_no_loop(tool):
    way = ".L_x_8:\n /*0010*/ LDG.E R0, [R10] ;\n /*0020*/ EXIT ;\n.L_x_9:\n /*0030*/ BRA `(.L_x_8) ;\n"
    sass = f" /*0000*/ BRA.DIV ~URZ, `(.L_x_9) ;\n{way}"
    assert list(tool.instructions_in_loops(sass)) == []
    assert list(tool.instructions_in_loops(sass.replace("BRA.DIV ~URZ", "BRA"))) != []


def test_scalars_beside_copies_of_tiles_are_no_fault(tool):
    assert _faults(tool, "LDGSTS.E.BYPASS.128 [R7], desc[UR4][R2.64]") == []
    assert _faults(tool, "LDGSTS.E.BYPASS.64 [R7], desc[UR4][R2.64]") != []
    copies = "LDGSTS.E.BYPASS.128 [R7], desc[UR4][R2.64] ;\n        /*0028*/  LDG.E R1, desc[UR4][R2.64]"
    assert _faults(tool, copies) == []


def test_a_product_without_tensor_cores_is_a_fault(tool):
    for instruction, found in (
        ("FFMA R1, R2, R3, R4", ["no matrix product on the tensor cores in a loop"]),
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24", []),
        ("HMMA.16816.F32 R4, R8, R10, R4", []),
    ):
        report = tool.read_report(USAGE.format(stack=0), SASS.format(inside=instruction))
        assert tool.faults(tool.configurations()[0]._replace(tensor_cores=True), report) == found


def test_every_kernel_takes_part(tool):
    names = {configuration.kernel.fn.__name__ for configuration in tool.configurations()}
    assert {"row_losses_kernel", "row_gradient_kernel", "row_losses_and_gradient_kernel"} <= names


def test_the_gradient_kernel_passes_on_sm_90(tool):
    if not (tool.TOOLS / "nvdisasm").exists():
        pytest.skip("this triton ships no CUDA tools")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TOOL.parents[1]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(TOOL), "--kernel", "row_gradient", "--arch", "90"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "18 compilations" in result.stdout
