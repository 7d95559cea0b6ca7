// What this machine can run: the instructions that the processor has and the registers that the system saves.
#include "quire.h"

#if defined(__x86_64__)
#include <cpuid.h>

namespace {

struct Registers {
    unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned sub) {
    Registers r;
    if (__get_cpuid_max(0, nullptr) >= leaf) __cpuid_count(leaf, sub, r.a, r.b, r.c, r.d);
    return r;
}

uint64_t saved_registers() {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t(high) << 32 | low;
}

bool all(unsigned word, unsigned bits) { return (word & bits) == bits; }

}  // namespace

int32_t quire_best_level(void) {
    const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_more = cpuid(7, 1);
    const bool osxsave = one.c >> 27 & 1;
    if (!osxsave) return 0;
    const uint64_t saved = saved_registers();
    const bool avx2 = all(one.c, 1u << 28 | 1u << 12 | 1u << 29) && all(seven.b, 1u << 5) && (saved & 0x6) == 0x6;
    if (!avx2) return 0;
    const unsigned foundation_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    const bool avx512 = all(seven.b, foundation_dq_bw_vl) && (saved & 0xe6) == 0xe6;
    if (!avx512) return 1;
    const bool vnni = seven.c >> 11 & 1, bf16 = seven_more.a >> 5 & 1;
    return vnni && bf16 ? 3 : 2;
}

#else

int32_t quire_best_level(void) { return 0; }

#endif
