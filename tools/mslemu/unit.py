"""The C++ file for clang: shim, MLX's utilities, the author's source with its signature, and an entry point."""

from __future__ import annotations

from .options import Options
from .prepare import prepare
from .text import KernelSpec, Parameter, Signature, Template, template_arguments

# The form in which the runtime passes each thread's position in the grid; runtime/launch.h declares it too.
_THREAD = """\
struct MslThread {
  uint thread_position_in_grid[3], thread_position_in_threadgroup[3], threadgroup_position_in_grid[3];
  uint threadgroups_per_grid[3], threads_per_grid[3], threads_per_threadgroup[3];
  uint dispatch_threads_per_threadgroup[3];
  uint thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
  uint simdgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup;
  uint thread_index_in_quadgroup, quadgroup_index_in_threadgroup, quadgroups_per_threadgroup;
};
#define MSL_UINT3(a) uint3(a[0], a[1], a[2])
#define MSL_UNCHECKED __attribute__((no_sanitize("thread")))
"""

# Symbols of the linker: where threadgroup variables (section msl_tg) and the whole library begin and end.
_RANGES = """\
#if !defined(MSL_AS_CHECK)
#define MSL_LINKER __attribute__((weak, visibility("hidden")))
extern "C" {
extern char __start_msl_tg[] MSL_LINKER;
extern char __stop_msl_tg[] MSL_LINKER;
extern char __ehdr_start[] MSL_LINKER;
extern char _end[] __attribute__((weak));
MSL_UNCHECKED void msl_ranges(char** r) {
  r[0] = __start_msl_tg; r[1] = __stop_msl_tg; r[2] = __ehdr_start; r[3] = _end;
}
}
#endif
"""


def _argument(parameter: Parameter, index: int) -> str:
    pointer = f"(({parameter.space} {parameter.type}*)buffers[{index}])"
    return "*" + pointer if parameter.reference else pointer


def translation_unit(spec: KernelSpec, front: Signature, template: Template, chosen: Options) -> str:
    """The content of the file. `#line` makes messages name the author's lines: name.metal, name.header.metal."""
    instance = front.name + (template_arguments(template) if template else "")
    arguments = [_argument(parameter, index) for index, parameter in enumerate(front.parameters)]
    arguments += [attribute.value for attribute in front.attributes]
    utilities = (
        '#include "mlx/backend/metal/kernels/utils.h"' if chosen.mlx_utils else "using namespace metal;"
    )
    return "\n".join(
        [
            "#include <metal_stdlib>",
            utilities,
            f'#line 1 "{spec.name}.header.metal"',
            prepare(spec.header, f"{spec.name}.header.metal"),
            f'#line 1 "{spec.name}.signature"',
            front.text.rstrip("\n"),
            f'#line 1 "{spec.name}.metal"',
            prepare(spec.source, f"{spec.name}.metal"),
            f'#line 1 "{spec.name}.launch"',
            "}",
            _THREAD,
            'extern "C" MSL_UNCHECKED void msl_entry(void* const* buffers, const MslThread* t) {',
            f"  {instance}({', '.join(arguments)});",
            "}",
            _RANGES,
        ]
    )
