// The tables that dispatch.cc chooses from; CMakeLists.txt says which ones this build has.
#pragma once

#include "kernels.h"

namespace gptoss {

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvxVnniKernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512VnniKernels;
extern const Kernels kNeonKernels;

}  // namespace gptoss
