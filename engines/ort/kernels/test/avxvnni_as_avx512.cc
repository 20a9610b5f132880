// AVX-VNNI has the instructions of 256-bit AVX-512 VNNI in another encoding: its kernels, testable on more processors.
#define GPTOSS_AVXVNNI_AS_AVX512
#include "../kernels_avxvnni.cc"
