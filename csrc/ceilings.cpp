// What this machine can do at best, for benchmarks and for predictions: reading memory, and multiplying from registers.
#include "quire.h"
#include "simd.h"
#include "threads.h"

namespace quire {
namespace {

constexpr long CHUNK = 1 << 16;  // floats of one item
constexpr int CHAINS = 12;       // products in flight, enough for any level

float read_chunk(const float* p) {
    F sums[8] = {zero(), zero(), zero(), zero(), zero(), zero(), zero(), zero()};
    for (long i = 0; i < CHUNK; i += 8 * W)
        for (int j = 0; j < 8; j++) sums[j] = add(sums[j], load(p + i + j * W));
    for (int j = 1; j < 8; j++) sums[0] = add(sums[0], sums[j]);
    return reduce_add(sums[0]);
}

}  // namespace
}  // namespace quire

using namespace quire;

// Reads `floats` (whole chunks of 65536) from memory on the whole team; the sum keeps the reading from being left out.
float quire_read_memory(const float* data, int64_t floats) {
    std::atomic<float> total{0};
    for_each_item(floats / CHUNK, true, [&](long i) { total.store(read_chunk(data + i * CHUNK), std::memory_order_relaxed); });
    return total;
}

// `rounds` times 12 vector products per thread, from registers only. Returns the floating-point operations done.
double quire_multiply_registers(int64_t rounds) {
    std::atomic<float> total{0};
    for_each_item(team_size(), true, [&](long) {
        F sums[CHAINS];
        for (int j = 0; j < CHAINS; j++) sums[j] = set1(float(j));
        F factor = set1(0.9999f);
        for (int64_t i = 0; i < rounds; i++)
            for (int j = 0; j < CHAINS; j++) sums[j] = fma(sums[j], factor, factor);
        for (int j = 1; j < CHAINS; j++) sums[0] = add(sums[0], sums[j]);
        total.store(reduce_add(sums[0]), std::memory_order_relaxed);
    });
    return 2.0 * W * CHAINS * double(rounds) * team_size() + 0.0 * total;
}
