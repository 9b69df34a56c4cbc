import pytest

from kernels import triton_ptx

INT8 = 'mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 { %r1 };'
INT4 = 'mma.sync.aligned.m16n8k64.row.col.satfinite.s32.s4.s4.s32 { %r1 };'


def test_instructions_of_a_marked_kernel_become_4_bit_and_no_other_text_changes():
    ptx = f'ld.global;\n{INT8}\n{INT8.replace(".satfinite", "")}\nst.global;'
    expected = f'ld.global;\n{INT4}\n{INT4.replace(".satfinite", "")}\nst.global;'
    assert triton_ptx.rewrite(ptx, 'gemm_s4mma', 86) == expected


def test_other_kernels_are_left_alone():
    assert triton_ptx.rewrite(INT8, 'gemm', 86) == INT8
    assert triton_ptx.rewrite(INT8, 'gemm', 90) == INT8


@pytest.mark.parametrize(
    ('ptx', 'capability', 'text'),
    [
        (INT8, 90, 'capability 9.0 does not have'),
        (INT8, 75, 'capability 7.5 does not have'),
        ('ld.global;', 86, 'none found'),
        (f'{INT8}\n{INT8.replace("m16n8k32", "m16n8k16")}', 86, 'others on 8 bits remain'),
    ],
)
def test_what_cannot_be_rewritten_is_an_error_not_a_wrong_result(ptx, capability, text):
    with pytest.raises(RuntimeError, match=text):
        triton_ptx.rewrite(ptx, 'gemm_s4mma', capability)


def test_registers_of_both_instructions_hold_the_same_bytes_of_a_row():
    # PTX ISA, "Matrix Fragments for mma.m16n8k32" (.s8) and "for mma.m16n8k64" (.s4): the column
    # of element i of operand A, for each lane, in elements of 8 and of 4 bits.
    def columns_s8(lane, i):
        return (lane % 4) * 4 + (i & 3) + (16 if i >= 8 else 0)

    def columns_s4(lane, i):
        return (lane % 4) * 8 + (i & 7) + (32 if i >= 16 else 0)

    def rows_s8(lane, i):
        return lane // 4 + (8 if i % 8 >= 4 else 0)

    def rows_s4(lane, i):
        return lane // 4 + (8 if i % 16 >= 8 else 0)

    # Of operand B: the row, k; its column is lane // 4 in both.
    def depth_s8(lane, i):
        return (lane % 4) * 4 + (i & 3) + (16 if i >= 4 else 0)

    def depth_s4(lane, i):
        return (lane % 4) * 8 + (i & 7) + (32 if i >= 8 else 0)

    for lane in range(32):
        assert all(depth_s4(lane, i) // 2 == depth_s8(lane, i // 2) for i in range(16))
        for i in range(32):
            assert columns_s4(lane, i) // 2 == columns_s8(lane, i // 2)
            assert rows_s4(lane, i) == rows_s8(lane, i // 2)
