// Which table runs: the best one that this processor has, or the one that GPTOSS_EXPORT_ISA names.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "tables.h"

#if defined(GPTOSS_X86) && !defined(__GNUC__)
#error "x86 kernels are chosen with the CPU model of GCC and Clang"
#endif
#if defined(GPTOSS_NEON) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#if defined(GPTOSS_X86)
#include <cpuid.h>
#endif

namespace gptoss {
namespace {

bool always() { return true; }

#if defined(GPTOSS_X86)
// The compiler's model also asks whether the operating system saves the wide registers.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avxvnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#endif

#if defined(GPTOSS_NEON)
bool has_neon_dot() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return true;  // every Apple processor of this architecture has it
#endif
}
#endif

struct Choice {
  const Kernels* kernels;
  bool (*runs_here)();
};

// Best first.
const Choice kChoices[] = {
#if defined(GPTOSS_X86)
    {&kAvx512VnniKernels, has_avx512vnni}, {&kAvxVnniKernels, has_avxvnni},
    {&kAvx512Kernels, has_avx512},         {&kAvx2Kernels, has_avx2},
#endif
#if defined(GPTOSS_NEON)
    {&kNeonKernels, has_neon_dot},
#endif
    {&kScalarKernels, always},
};

const Kernels& choose() {
  const char* wanted = std::getenv("GPTOSS_EXPORT_ISA");
  if (wanted != nullptr && *wanted != '\0') {
    if (const Kernels* kernels = find(wanted)) return *kernels;
    std::fprintf(stderr, "gptoss-export: GPTOSS_EXPORT_ISA=%s cannot run on this processor and is ignored\n", wanted);
  }
  for (const Choice& choice : kChoices)
    if (choice.runs_here()) return *choice.kernels;
  return kScalarKernels;
}

}  // namespace

const Kernels* find(const char* name) {
  for (const Choice& choice : kChoices)
    if (std::strcmp(choice.kernels->name, name) == 0 && choice.runs_here()) return choice.kernels;
  return nullptr;
}

const Kernels& select() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace gptoss
