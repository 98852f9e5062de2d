// Metal Shading Language, as seen by clang >= 17 on a CPU.
//
// There are two ways to compile a kernel with these headers:
//   -DMSL_AS_CHECK -fsyntax-only : device, constant and threadgroup are distinct address spaces, so that mixing
//                                  pointers of different spaces is an error.
//   otherwise                    : the address spaces are empty, and the object file runs on ../runtime.
// Names that start with msl or MSL are the emulator's own.
#pragma once

#include "language.h"
// in this order
#include "traits.h"
#include "math.h"
#include "simdgroup.h"
#include "matrix.h"
#include "atomics.h"
#include "builtins.h"
// last, because it makes macros of type names
#include "constructors.h"
