"""Reading a TPU's static schedule and Hopper's machine code, and what cannot be compiled."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import analysis
from pallas_kernels.analysis import machine_code, schedule

TABLE = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
"""
LISTING = """= control target key start
LB: loop body
= control target key end

     0   :  { %s0 = sld [smem:[#allocation0]] }
   0x1   :  {} /* Start region 7 */
   0x2 LB: > { %s1 = sadd.s32 1, %s0 } /* End region 7 :: Start region 8 */
   0x3   : > { %1 = sbr.rel (%p1) target = $region9 }
   0x4   : > { %v0 = vmov 0 /* a block that
   multiplies nothing */ }
   0x5   : > { %v1 = vmov 0 }
   0x6 PF: > { %v2 = vmatmul.bf16.gmra.mxu0 %v0 } /* Start/End empty region 9 */
   0x7 LB: >> { %v3 = vmatmul.mubr.bf16.gmra.mxu0 %v0  ;;  %v4 = vmatmul.mubr.bf16.gmra.mxu1 %v0 } /* Start region 11 */
   0x8   : > { %v4 = vmatmul.mubr.f32.gmra.mxu1 %v0 }
   0x9   : >> { %2 = sbr.rel (%p2) target = $region11 }
   0xa   : >> {}
   0xb   : >> {}
   0xc   : >> {}
   0xd   : >> {} /* End region 11 */
   0xe   : > {}
   0xf   : > { %3 = sbr.rel (%p3) target = $region8 }
  0x10   :  {}
  0x11   :  {}
  0x12   :  {}
  0x13   :  {} /* End region 8 */
  0x14   :  {} /* exit bundle */
"""


def table(spills: tuple[int, ...], fills: tuple[int, ...], bundles: int = 21) -> str:
    rows = (f"0 0 0 0 0 0 {int(i in fills)} 0 {int(i in spills)} 0" for i in range(bundles))
    return TABLE + "\n".join(rows) + "\n"


def test_loops_of_a_schedule():
    chip = analysis.chip("v5e")
    inner, grid = schedule.loops(LISTING, table(spills=(5, 8), fills=(8, 9, 20)), chip)
    assert (inner.depth, inner.bundles, inner.matmuls) == (
        2,
        7,
        3,
    )  # 0x7 to 0xd: the hoisted bundle counts where it runs
    assert inner.products == (16 + 16 + 8) * 128 * 128
    assert (inner.spills, inner.fills) == (1, 2)
    assert (grid.depth, grid.bundles, grid.conditional, grid.matmuls) == (
        1,
        9,
        2,
        1,
    )  # without 0x4, 0x5 and the inner loop
    assert (grid.spills, grid.fills) == (0, 0)  # 0x5 is in the block that multiplies nothing
    assert inner.over_ideal(chip) == pytest.approx(7 / 10)  # 40 rows by 128 x 128, on four such units


def test_a_table_of_another_kernel_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        schedule.loops(LISTING, table((), (), bundles=5), analysis.chip("v5e"))


def test_machine_code_of_a_dump(tmp_path):
    (tmp_path / "body_0.ptxas").write_text(
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized\n"
        "    0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 2 barriers, 1 bytes smem\n"
    )
    (tmp_path / "body_0.ptx").write_text("wgmma.mma_async.sync\nwgmma.commit\nwgmma.mma_async.sync\n")
    (code,) = machine_code.read(tmp_path)
    assert (code.kernel, code.registers, code.spill_bytes, code.wgmma, code.hgmma) == ("body_0", 168, 20, 2, None)
    assert len(code.warnings) == 1
    (tmp_path / "body_0.sass_ctrl").write_text("HGMMA.64x128x16.F32.BF16 R24\n")
    assert machine_code.read(tmp_path)[0].hgmma == 1


def test_a_roofline_is_the_slower_of_two():
    v5p = analysis.chip("v5p:4x4x4")
    assert analysis.bound_seconds(v5p, 459e12, 1.0) == 1.0
    assert analysis.bound_seconds(v5p, 1.0, 2 * 2765e9) == 2.0


def test_what_cannot_be_analysed_is_told():
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    with pytest.raises(ValueError, match="unknown chip 'v9'; known: v5e"):
        analysis.tpu(jnp.sin, (x,), "v9")
    with pytest.raises(ValueError, match="importable module"):
        analysis.tpu(lambda x: x, (x,), "v5p")
