"""A matrix product and a softmax in Triton, compiled to PTX for sm_90 without a GPU: python triton_kernels.py (triton 3.x) writes
triton_product.ptx and triton_softmax.ptx beside this file."""

import re
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(a, b, c, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c [m, n] f32 = a [m, k] f16 times b [k, n] f16."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(0, k, BK):
        inside = first + depth < k
        left = tl.load(a + rows[:, None] * k + (first + depth)[None, :], mask=(rows < m)[:, None] & inside[None, :], other=0.0)
        right = tl.load(b + (first + depth)[:, None] * n + columns[None, :], mask=inside[:, None] & (columns < n)[None, :], other=0.0)
        total = tl.dot(left, right, total)
    tl.store(c + rows[:, None] * n + columns[None, :], total, mask=(rows < m)[:, None] & (columns < n)[None, :])


@triton.jit
def softmax(out, x, columns, BLOCK: tl.constexpr):
    """Each row of out [rows, columns] f32 = softmax of the row of x."""
    row = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    values = tl.load(x + row * columns + index, mask=index < columns, other=-float("inf"))
    values = tl.exp(values - tl.max(values, axis=0))
    tl.store(out + row * columns + index, values / tl.sum(values, axis=0), mask=index < columns)


def write(kernel, signature, constants, warps, stages):
    # Pointers and, as in a usual product, n and k are multiples of 16.
    aligned = {"a", "b", "c", "out", "x", "n", "k"}
    signature = signature | {name: "constexpr" for name in constants}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in aligned}
    source = ASTSource(kernel, signature, {(list(signature).index(name),): value for name, value in constants.items()}, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
    path = Path(__file__).with_name(f"triton_{compiled.metadata.name}.ptx")
    # No paths of this machine in `.file`; debug sections are kept, as the parser must pass over them.
    path.write_text(re.sub(r'(\.file\s+\d+ ").*/', r"\1", compiled.asm["ptx"]))
    print(path.name, "shared bytes:", compiled.metadata.shared)


if __name__ == "__main__":
    pointers = {"a": "*fp16", "b": "*fp16", "c": "*fp32"}
    write(product, pointers | {"m": "i32", "n": "i32", "k": "i32"}, {"BM": 64, "BN": 64, "BK": 32}, 4, 3)
    write(softmax, {"out": "*fp32", "x": "*fp32", "columns": "i32"}, {"BLOCK": 1024}, 4, 1)
