"""Compiles the Triton kernels for an NVIDIA architecture (80, 90, …) given on the command line, without a GPU."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lslora.ops import triton as kernels
from lslora.ops import triton_update as update

NUMBERS = {"k_min": "fp32", "k_max": "fp32", "per_spacing": "fp32"}
SPLINE = {"offset_at": "*fp32", "scale_in_at": "*fp32", "scale_out_at": "*fp32"}


def compile_for(target, kernel, types, constants):
    types = types | dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in kernel.arg_names}
    compiled = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants), target=target)
    if not compiled.asm["cubin"]:
        raise RuntimeError(f"no machine code for {kernel} with {constants}")


def main(architecture):
    target = GPUTarget("cuda", architecture, 32)
    for dtype in ("fp32", "bf16", "fp16"):
        z = f"*{dtype}"
        types = NUMBERS | SPLINE | {"z_at": z, "out_at": z, "count": "i64"}
        compile_for(target, kernels._forward, types, {"last": 3, "clamps": True, "size": kernels.TILE})
        types |= {"g_at": z, "grad_z_at": z, "sums_at": "*fp64", "tiles": "i32"}
        for width, clamps in ((8, True), (64, False)):
            constants = {"last": width - 4, "clamps": clamps, "size": kernels.TILE, "width": width}
            compile_for(target, kernels._backward, types, constants)
    for dtype, width_r, size in (("*bf16", 16, 64), ("*fp32", 256, 32)):
        types = NUMBERS | SPLINE | {"scaling": "fp32", "n": "i32", "m": "i32", "r": "i32", "stretch_at": "*fp32"}
        types |= dict.fromkeys(("result_at", "out_at", "g_at", "h_at", "b_at"), dtype)
        types |= {"grad_h_at": "*fp32", "grad_b_at": "*fp32", "sums_at": "*fp64"}
        constants = {"last": 7, "clamps": False, "rows": size, "columns": size, "width_r": width_r}
        compile_for(target, update._forward, types, constants)
        compile_for(target, update._backward_rows, types, constants | {"width": 16})
        compile_for(target, update._backward_columns, types, constants)


if __name__ == "__main__":
    main(int(sys.argv[1]))
