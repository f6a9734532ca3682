"""The parser of disassemblies, on one whose answers are plain."""

from __future__ import annotations

import pytest

from tests.kernels.sass import instructions, longest_loop, loops, opcode, width

SASS = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   ISETP.GE.AND P0, PT, R2, R3, PT ;
        /*0020*/               @P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0030*/                   LDS.128 R4, [R2] ;
        /*0040*/              @!P1 HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR4], R24 ;
        /*0050*/                   NOP ;
        /*0060*/              @UP0 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0070*/               @P2 BRA `(.L_x_2) ;
        /*0080*/                   FADD R4, R4, R5 ;
.L_x_3:
        /*0090*/                   EXIT ;
.L_x_4:
        /*00a0*/                   BRA `(.L_x_4);
"""


def test_the_longest_loop_is_found() -> None:
    assert [opcode(text) for text in longest_loop(SASS)] == ["LDS", "HGMMA", "UIADD3", "BRA"]
    assert len(instructions(SASS)) == 10


def test_loops_come_in_order() -> None:
    assert [len(body) for body in loops(SASS)] == [4, 1]


def test_a_kernel_without_a_loop_has_no_longest() -> None:
    assert longest_loop("        /*0000*/                   EXIT ;\n") == []


@pytest.mark.parametrize(("text", "bytes_"), [
    ("LDGSTS.E.BYPASS.LTC128B.128 [R2+0x800], desc[UR8][R4.64]", 16),
    ("@P0 LDGSTS.E.LTC128B [R2], desc[UR8][R4.64]", 4),
    ("LDG.E.EF.64 R2, desc[UR8][R4.64]", 8),
    ("LDG.E.U16 R2, desc[UR8][R4.64]", 2),
    ("STS.U8 [R2], R3", 1),
])  # fmt: skip
def test_the_width_of_a_load_is_its_modifier(text: str, bytes_: int) -> None:
    assert width(text) == bytes_
