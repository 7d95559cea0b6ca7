// Packs weights while a model is loaded: plain ones as fast as memory goes, others rounded on the way, one panel of 16
// outputs after the other and several at once. Nothing but the panels is written.
//
// The rounding is defined by kernels/rounding.py and gives its very bits on every level: a group's sum is taken in SUM_LANES
// lanes, each in ascending order, and the lanes are added by halves.
#include "packing.h"

#include <algorithm>

#include "integers.h"
#include "threads.h"
#include "tile.h"

namespace quire {
namespace {

constexpr int SUM_LANES = 16;
constexpr float SMALLEST = 1e-30f;
constexpr float MIDDLE = 8;
constexpr float DIVISORS[] = {8.0f, 7.5f, 8.6f, 9.3f};
constexpr double SHRINKS[] = {1.0, 0.92, 0.84};

struct Parts {
    const QuirePart* parts;
    int64_t count;
    long rows() const {
        long sum = 0;
        for (int64_t i = 0; i < count; i++) sum += parts[i].n;
        return sum;
    }
    const void* row(long index, size_t element) const {
        const QuirePart* part = parts;
        while (index >= part->n) index -= (part++)->n;
        return static_cast<const char*>(part->rows) + size_t(index) * size_t(part->stride) * element;
    }
};

// ---- plain panels: words of 4 bytes (one float, two bf16), word after word of all 16 rows

constexpr long WORDS = 16;  // words of a row that are turned at a time: a line of memory

void pack_panel(const char* const* rows, long columns, long bytes, char* out) {
    const long words = bytes / 4;
    uint32_t lines[PANEL][WORDS] = {};
    for (long first = 0; first < words; first += WORDS) {
        const long count = std::min(WORDS, words - first);
        for (long j = 0; j < columns; j++) std::memcpy(lines[j], rows[j] + first * 4, size_t(count) * 4);
        uint32_t turned[WORDS][PANEL];
        for (long s = 0; s < WORDS; s++)
            for (long j = 0; j < PANEL; j++) turned[s][j] = lines[j][s];
        std::memcpy(out + first * PANEL * 4, turned, size_t(count) * PANEL * 4);
    }
    if (bytes % 4 == 0) return;
    char* last = out + words * PANEL * 4;  // a single bf16, and nothing after it
    std::memset(last, 0, PANEL * 4);
    for (long j = 0; j < columns; j++) std::memcpy(last + j * 4, rows[j] + words * 4, 2);
}

void pack(const Parts& parts, size_t element, long k, char* packed) {
    const long n = parts.rows(), bytes = k * long(element), panel = ceil_div(bytes, 4) * 4 * PANEL;
    for_each_item(ceil_div(n, PANEL), n * k > 1 << 16, [&](long p) {
        const char* rows[PANEL];
        const long columns = std::min<long>(PANEL, n - p * PANEL);
        for (long j = 0; j < columns; j++) rows[j] = static_cast<const char*>(parts.row(p * PANEL + j, element));
        pack_panel(rows, columns, bytes, packed + p * panel);
    });
}

// ---- rounding

// Rounds a row of k floats to 8 bits with its largest value at 127; returns the scale.
float round_to_bytes(const float* x, long k, int8_t* values) {
    F most = zero(), bad = zero();
    auto look = [&](F v) {
        most = max(most, max(v, neg(v)));
        bad = add(bad, mul(v, zero()));
    };
    long at = 0;
    for (; at + W <= k; at += W) look(load(x + at));
    if (at < k) look(load_some(x + at, k - at));
    if (reduce_add(bad) != 0) {
        std::memset(values, 0, size_t(k));
        return NAN;
    }
    const float scale = reduce_max(most) / 127.0f;
    const F divisor = set1(scale > 0 ? scale : 1.0f);
    for (at = 0; at + W <= k; at += W) store_bytes(values + at, div(load(x + at), divisor));
    if (at < k) {
        int8_t rest[W];
        store_bytes(rest, div(load_some(x + at, k - at), divisor));
        std::memcpy(values + at, rest, size_t(k - at));
    }
    return scale;
}

float safe(float scale) { return std::fabs(scale) > SMALLEST ? scale : 1.0f; }

// What the values of a group are rounded to: (0..15 less the zero point) times the scale.
struct Grid {
    float scale, zero;
};

// The numbers -zero..15 - zero nearest to x / scale.
struct Nearest {
    F inverse, low, high;
    explicit Nearest(const Grid& grid)
        : inverse(set1(1.0f / safe(grid.scale))), low(set1(-grid.zero)), high(set1(15 - grid.zero)) {}
    F operator()(F x) const { return round_whole(min(max(mul(x, inverse), low), high)); }
};

float sum_of_lanes(const F* sums) {
    float lanes[SUM_LANES];
    for (int v = 0; v < SUM_LANES / W; v++) store(lanes + v * W, sums[v]);
    for (int half = SUM_LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

// The best of the tries for one group.
Grid best_grid(const float* x, long group, bool zero_points) {
    F lows = zero(), highs = zero();
    for (long at = 0; at < group; at += W) lows = min(lows, load(x + at)), highs = max(highs, load(x + at));
    const float low = -reduce_max(neg(lows)), high = reduce_max(highs), largest = high >= -low ? high : low;
    Grid best{0, MIDDLE};
    float least = 0;
    for (int trial = 0; trial < (zero_points ? 3 : 4); trial++) {
        Grid grid{0, MIDDLE};
        if (zero_points) {
            grid.scale = (high - low) * float(SHRINKS[trial] / 15.0);
            grid.zero = std::min(15.0f, std::max(0.0f, std::nearbyint(low * float(-SHRINKS[trial]) / safe(grid.scale))));
        } else {
            grid.scale = largest / -DIVISORS[trial];
        }
        const Nearest nearest(grid);
        F products[SUM_LANES / W], squares[SUM_LANES / W];
        for (int v = 0; v < SUM_LANES / W; v++) products[v] = squares[v] = zero();
        for (long at = 0; at < group; at += SUM_LANES)
            for (int v = 0; v < SUM_LANES / W; v++) {
                const F value = load(x + at + v * W), whole = nearest(value);
                products[v] = add(products[v], mul(value, whole));
                squares[v] = add(squares[v], mul(whole, whole));
            }
        const float a = sum_of_lanes(products), b = sum_of_lanes(squares);
        const float fitted = to_float(from_float<bf16>(a / std::max(b, 1.0f)));
        const float loss = fitted * (fitted * b - 2 * a);
        if (loss < least) best = Grid{fitted, grid.zero}, least = loss;
    }
    return best;
}

// Rounds a row, filled up with zeros to whole groups, to 4 bits.
void round_to_nibbles(const float* x, const QuireQuantized& w, int8_t* values, float* scales, uint8_t* zeros) {
    for (long g = 0, at = 0; at < w.k; g++, at += w.group) {
        const Grid grid = best_grid(x + at, w.group, w.zero_points != 0);
        const Nearest nearest(grid);
        for (long i = 0; i < w.group; i += W) store_bytes(values + at + i, add(nearest(load(x + at + i)), set1(grid.zero)));
        scales[g] = grid.scale;
        if (w.zero_points) zeros[g] = uint8_t(grid.zero);
    }
}

template <class T>
void widen_row(const T* row, long k, long padded, float* out) {
    long at = 0;
    for (; at + W <= k; at += W) store(out + at, load(row + at));
    for (; at < k; at++) out[at] = to_float(row[at]);
    std::fill(out + k, out + padded, 0.0f);
}

template <class T>
void round_parts(const QuireQuantized& w, const Parts& parts, char* packed) {
    const bool nibbles = w.bits == 4;
    const long groups = nibbles ? ceil_div(w.k, w.group) : 1, padded = nibbles ? groups * w.group : w.k;
    QuireQuantized panel = w;
    panel.n = PANEL;
    const long panel_bytes = quire_quantized_size(&panel);
    for_each_item(ceil_div(w.n, PANEL), w.n * w.k > 1 << 14, [&](long p) {
        struct Row;
        struct Values;
        struct Scales;
        struct Zeros;
        auto* x = static_cast<float*>(scratch<Row>(padded * 4));
        auto* values = static_cast<int8_t*>(scratch<Values>(PANEL * w.k + padded));  // a row may end in a part of a group
        auto* scales = static_cast<float*>(scratch<Scales>(PANEL * groups * 4));
        auto* zeros = static_cast<uint8_t*>(scratch<Zeros>(PANEL * groups));
        QuireQuantized rows = w;
        rows.n = std::min<long>(PANEL, w.n - p * PANEL);
        for (long j = 0; j < rows.n; j++) {
            widen_row(static_cast<const T*>(parts.row(p * PANEL + j, sizeof(T))), w.k, padded, x);
            if (nibbles)
                round_to_nibbles(x, w, values + j * w.k, scales + j * groups, zeros + j * groups);
            else
                scales[j] = round_to_bytes(x, w.k, values + j * w.k);
        }
        quire_pack_quantized(&rows, values, scales, zeros, packed + p * panel_bytes);
    });
}

// ---- checksums: eight lanes of 64 bits, each word mixed with its place

constexpr uint64_t MIX = 0x9e3779b97f4a7c15, MULTIPLIER = 0xbf58476d1ce4e5b9;
constexpr long STRIPE = 64, BLOCK = 1 << 20;

uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * MULTIPLIER;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

void add_stripe(uint64_t* lanes, const uint8_t* data, uint64_t place) {
    uint64_t words[8];
    std::memcpy(words, data, STRIPE);
    for (int i = 0; i < 8; i++) {
        const uint64_t keyed = words[i] ^ (place + uint64_t(i) * MULTIPLIER);
        lanes[i] += uint64_t(uint32_t(keyed)) * (keyed >> 32) + (words[i] << 32 | words[i] >> 32);
    }
}

uint64_t checksum_of_block(const uint8_t* data, long bytes) {
    uint64_t lanes[8] = {1, 2, 3, 4, 5, 6, 7, 8}, place = MIX;
    long at = 0;
    for (; at + STRIPE <= bytes; at += STRIPE, place += MIX) add_stripe(lanes, data + at, place);
    if (at < bytes) {
        uint8_t rest[STRIPE] = {};
        std::memcpy(rest, data + at, size_t(bytes - at));
        add_stripe(lanes, rest, place);
    }
    uint64_t sum = uint64_t(bytes);
    for (uint64_t lane : lanes) sum = mix(sum + MIX + lane);
    return sum;
}

uint64_t checksum(const uint8_t* data, long bytes) {
    const long blocks = ceil_div(bytes, BLOCK);
    struct Sums;
    auto* sums = static_cast<uint64_t*>(scratch<Sums>((blocks + 1) * 8));
    for_each_item(blocks, blocks > 1, [&](long block) {
        const long first = block * BLOCK;
        sums[block] = checksum_of_block(data + first, std::min(BLOCK, bytes - first));
    });
    uint64_t sum = mix(uint64_t(bytes) + MIX);
    for (long block = 0; block < blocks; block++) sum = mix((sum + MIX) ^ sums[block]);
    return sum;
}

}  // namespace
}  // namespace quire

using namespace quire;

void quire_pack_parts(int32_t dtype, const QuirePart* parts, int64_t count, int64_t k, void* packed) {
    pack(Parts{parts, count}, dtype == QUIRE_BFLOAT16 ? 2 : 4, k, static_cast<char*>(packed));
}

void quire_round_parts(const QuireQuantized* weight, int32_t dtype, const QuirePart* parts, int64_t count, void* packed) {
    if (dtype == QUIRE_BFLOAT16)
        round_parts<bf16>(*weight, Parts{parts, count}, static_cast<char*>(packed));
    else
        round_parts<float>(*weight, Parts{parts, count}, static_cast<char*>(packed));
}

uint64_t quire_checksum(const void* data, int64_t bytes) { return checksum(static_cast<const uint8_t*>(data), bytes); }
