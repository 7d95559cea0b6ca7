// What this machine can do at best, for benchmarks and for predictions: reading memory, and multiplying from registers.
#include "integers.h"
#include "quire.h"
#include "simd.h"
#include "threads.h"

namespace quire {
namespace {

constexpr long CHUNK = 1 << 16;  // floats of one item
constexpr long STREAMS = 4;      // of an item, fetched a little ahead, as the panels of a linear layer are
constexpr long LENGTH = CHUNK / STREAMS;
constexpr long LINE = 16;   // floats
constexpr long AHEAD = 64;  // floats
constexpr int CHAINS = 12;  // products in flight, enough for any level

float read_chunk(const float* p) {
    F sums[STREAMS] = {zero(), zero(), zero(), zero()};
    for (long i = 0; i < LENGTH; i += LINE)
        for (long s = 0; s < STREAMS; s++) {
            const float* line = p + s * LENGTH + i;
            prefetch(line + AHEAD);
            for (long j = 0; j < LINE; j += W) sums[s] = add(sums[s], load(line + j));
        }
    return reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

// What one vector product does: a sum, and how many operations each of its lanes stands for.
struct Floats {
    using Sum = F;
    static constexpr int OPERATIONS = 2;
    static Sum start(int64_t) { return set1(0.0f); }
    static Sum step(Sum sum) { return fma(sum, set1(0.9999f), set1(0.9999f)); }
    static float value(Sum sum) { return reduce_add(sum); }
};

// Where there is no product of pairs of bf16 they are multiplied as floats.
#if defined(QUIRE_NATIVE_DOT)
struct Pairs : Floats {
    static constexpr int OPERATIONS = 4;
    static Sum step(Sum sum) { return dot_pairs(sum, set1_pair(0x3c003c00), set1_pair(0x3c003c00)); }
};
#else
using Pairs = Floats;
#endif

struct Integers {
    using Sum = I;
    static constexpr int OPERATIONS = 2 * BYTE_DEPTH;
    static Sum start(int64_t rounds) { return set1_int(int32_t(rounds >> 62)); }  // 0, but the compiler cannot know
    static Sum step(Sum sum) { return byte_dot(sum, sum, sum); }
    static float value(Sum sum) { return reduce_add(float_of(sum)); }
};

template <class Kind>
double multiply(int64_t rounds) {
    std::atomic<float> total{0};
    for_each_item(team_size(), true, [&](long) {
        typename Kind::Sum sums[CHAINS];
        for (auto& sum : sums) sum = Kind::start(rounds);
        for (int64_t i = 0; i < rounds; i++)
            for (auto& sum : sums) sum = Kind::step(sum);
        float all = 0;
        for (auto& sum : sums) all += Kind::value(sum);
        total.store(all, std::memory_order_relaxed);
    });
    return double(Kind::OPERATIONS) * W * CHAINS * double(rounds) * team_size() + 0.0 * total;
}

}  // namespace
}  // namespace quire

using namespace quire;

// Reads `floats` (whole chunks of 65536) from memory on the whole team; the sum keeps the reading from being left out.
float quire_read_memory(const float* data, int64_t floats) {
    std::atomic<float> total{0};
    for_each_run(floats / CHUNK, true, [&](long first, long end) {
        for (long i = first; i < end; i++) total.store(read_chunk(data + i * CHUNK), std::memory_order_relaxed);
    });
    return total;
}

double quire_multiply_registers(int32_t dtype, int64_t rounds) {
    switch (dtype) {
        case QUIRE_INT8: return multiply<Integers>(rounds);
        case QUIRE_BFLOAT16: return multiply<Pairs>(rounds);
        default: return multiply<Floats>(rounds);
    }
}
