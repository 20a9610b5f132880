// NEON with the dot product instructions (Armv8.2): both sides are signed bytes.
#include "tables.h"
#include "vector_neon.h"
#include "vector_table.h"

namespace gptoss {
namespace {

struct SignedDot {
  using Partial = int32x4_t;
  static constexpr bool kBiased = false;
  static Partial begin(int32x4_t sum) { return sum; }
  static Partial step(Partial part, int32x4_t w, int32x4_t x) {
    return vdotq_s32(part, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x));
  }
  static int32x4_t finish(int32x4_t, Partial part) { return part; }
};

struct NeonDot : Neon {
  using Mxfp4Dot = SignedDot;
  using Int8Dot = SignedDot;
};

}  // namespace

const Kernels kNeonKernels = VectorTable<NeonDot>::named("neon");

}  // namespace gptoss
