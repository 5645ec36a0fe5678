"""Compiles the Triton kernels for an NVIDIA architecture (80, 90, …) given on the command line, without a GPU."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lslora.ops import triton as kernels
from lslora.ops import triton_update as update

NUMBERS = {"k_min": "fp32", "k_max": "fp32", "per_spacing": "fp32"}
SCALES = {"scale_in_at": "*fp32", "scale_out_at": "*fp32"}
SPLINE = {"offset_at": "*fp32", **SCALES}
GRADIENTS = {f"grad_{name}": "*fp32" for name in SPLINE}
SUMS = {"sums_at": "*fp64", "programs": "i32"}


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
        compile_for(target, kernels._forward, types, {"last": 3, "clamps": True, "side": kernels.SIDE})
        types |= {"g_at": z, "grad_z_at": z, "sums_at": "*fp64", "tiles": "i32"}
        for width, clamps in ((8, True), (16, False)):
            constants = {"last": width - 4, "clamps": clamps, "side": kernels.SIDE, "width": width}
            compile_for(target, kernels._backward, types, constants)
    constants = {"last": 7, "width": 16}
    compile_for(target, kernels._finish, SUMS | SPLINE | GRADIENTS, constants)
    for dtype, width_r, size, scales in (("*bf16", 16, 64, {}), ("*fp32", 64, 32, dict.fromkeys(SCALES))):
        tiles = {"rows": size, "columns": size, "width_r": width_r}
        compile_update(target, dtype, tiles, scales)


def compile_update(target, dtype, tiles, scales):
    """`scales` names addresses that there are none of."""
    types = NUMBERS | SPLINE | {"scaling": "fp32", "n": "i32", "m": "i32", "r": "i32", "stretch_at": "*fp32"}
    types |= dict.fromkeys(("result_at", "out_at", "g_at", "h_at"), dtype)
    types |= dict.fromkeys(("b_at", "grad_h_at", "grad_b_at"), "*fp32") | {"sums_at": "*fp64"}
    constants = {"last": 7, "clamps": False, **tiles, **scales}
    compile_for(target, update._forward, types, constants)
    compile_for(target, update._backward_rows, types, constants | {"width": 16})
    compile_for(target, update._backward_rows, types, constants | {"width": 16, "grad_b_at": None})
    compile_for(target, update._backward_columns, types, constants)
    types = SUMS | SPLINE | GRADIENTS
    types |= {"n": "i32", "m": "i32", "r": "i32"}
    for name in "hb":
        types |= {f"parts_{name}_at": "*fp32", f"parts_{name}": "i32"}
        types |= {f"grad_{name}_at": dtype}
    gone = {f"grad_{name}": None for name in scales}
    gone |= {"scale_out_at": None} if scales else {}
    constants = {"last": 7, "width": 16, **update.SUM}
    compile_for(target, update._finish, types, constants | gone)


if __name__ == "__main__":
    main(int(sys.argv[1]))
