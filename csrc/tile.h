// The heart of linear and attention: a tile of a product C += A * B that lives in registers.
//
//   B comes in panels of 16 columns. A panel is a run of steps, each 64 bytes (float) or 64 bytes (two bf16 per column):
//
//       float   step k:   [B[k][0] B[k][1] ... B[k][15]]
//       bf16    step s:   [B[2s][0] B[2s+1][0]  B[2s][1] B[2s+1][1]  ...  B[2s][15] B[2s+1][15]]
//
//   A gives, for each step, one value (float) or two (bf16) per row; the rows of a tile stand `ROW` apart and the values
//   `STEP` apart, in elements of Dot<T>::A. Levels without a bf16 dot product widen A to float once, when it is packed, and
//   B in registers at every step.
//
// One accumulator per element of C, the sum over k always in ascending order: the bits of an element depend neither on
// the shape of the tile nor on where in it the element stands.
#pragma once

#include <array>
#include <type_traits>
#include <utility>

#include "simd.h"

namespace quire {

constexpr int PANEL = 16;
constexpr int PANEL_VECTORS = PANEL / W;

// How many rows a tile of T may have, and how many panels side by side keep enough sums in flight for few rows: a product
// takes four to six cycles and two begin in each. Widening bf16 costs registers.
#if defined(QUIRE_AVX512) || defined(QUIRE_AVX512BF16)
template <class T>
constexpr int MAX_ROWS = 12;
template <class T>
constexpr int panels_for(int rows) {
    return rows <= 6 ? 4 : 2;
}
#elif defined(QUIRE_AVX2)
template <class T>
constexpr int MAX_ROWS = sizeof(T) == 2 ? 4 : 6;
template <class T>
constexpr int panels_for(int rows) {
    return rows == 1 ? 4 : rows == 2 ? 2 : 1;
}
#else
template <class T>
#if defined(__aarch64__)
constexpr int MAX_ROWS = sizeof(T) == 2 ? 4 : 6;
#else
constexpr int MAX_ROWS = sizeof(T) == 2 ? 2 : 3;
#endif
template <class T>
constexpr int panels_for(int rows) {
    return rows == 1 ? 2 : 1;
}
#endif

constexpr int least(int a, int b) { return a < b ? a : b; }
constexpr long ceil_div(long a, long b) { return (a + b - 1) / b; }

// c[i][v] += x(i) * w(v), holding in registers what there is less of: the weights of all vectors or the values of all rows.
template <int ROWS, int VECTORS, class Weights, class Value>
QUIRE_INLINE void add_products(F (&c)[ROWS][VECTORS], const Weights& w, const Value& x) {
    if constexpr (ROWS < VECTORS) {
        F values[ROWS];
        for (int i = 0; i < ROWS; i++) values[i] = x(i);
        for (int v = 0; v < VECTORS; v++) {
            const F weight = w(v);
            for (int i = 0; i < ROWS; i++) c[i][v] = fma(weight, values[i], c[i][v]);
        }
    } else {
        F weights[VECTORS];
        for (int v = 0; v < VECTORS; v++) weights[v] = w(v);
        for (int i = 0; i < ROWS; i++) {
            const F value = x(i);
            for (int v = 0; v < VECTORS; v++) c[i][v] = fma(weights[v], value, c[i][v]);
        }
    }
}

// Dot<T>::step adds one step to a tile. `b` are its panels, `at` the offset of the step in each of them.
template <class T>
struct Dot;

template <>
struct Dot<float> {
    using A = float;
    static constexpr int DEPTH = 1;       // values of k per step
    static constexpr int STEP_A = 1;      // elements of A per row and step
    static constexpr int STEP_B = PANEL;  // elements of B per panel and step
    template <int ROWS, int VECTORS, int ROW, int STEP>
    static QUIRE_INLINE void step(F (&c)[ROWS][VECTORS], const float* a, const float* const* b, long at) {
        add_products(
            c, [&](int v) { return load(b[v / PANEL_VECTORS] + at + v % PANEL_VECTORS * W); },
            [&](int i) { return set1(a[i * ROW]); });
    }
};

template <>
struct Dot<bf16> {
    static constexpr int DEPTH = 2;
    static constexpr int STEP_B = 2 * PANEL;
#if defined(QUIRE_NATIVE_DOT)
    using A = uint32_t;  // a pair of bf16
    static constexpr int STEP_A = 1;
    template <int ROWS, int VECTORS, int ROW, int STEP>
    static QUIRE_INLINE void step(F (&c)[ROWS][VECTORS], const uint32_t* a, const bf16* const* b, long at) {
        I w[VECTORS];
        for (int v = 0; v < VECTORS; v++) w[v] = load_pairs(b[v / PANEL_VECTORS] + at + v % PANEL_VECTORS * 2 * W);
        for (int i = 0; i < ROWS; i++) {
            I x = set1_pair(a[i * ROW]);
            for (int v = 0; v < VECTORS; v++) c[i][v] = dot_pairs(c[i][v], w[v], x);
        }
    }
#else
    using A = float;
    static constexpr int STEP_A = 2;
    template <int ROWS, int VECTORS, int ROW, int STEP>
    static QUIRE_INLINE void step(F (&c)[ROWS][VECTORS], const float* a, const bf16* const* b, long at) {
        auto pairs = [&](int v) { return b[v / PANEL_VECTORS] + at + v % PANEL_VECTORS * 2 * W; };
        add_products(c, [&](int v) { return even(pairs(v)); }, [&](int i) { return set1(a[i * ROW]); });
        a = after(c[ROWS - 1][VECTORS - 1], a);
        add_products(c, [&](int v) { return odd(pairs(v)); }, [&](int i) { return set1(a[i * ROW + STEP]); });
    }
#endif
};

template <class T, int ROWS, int PANELS>
struct Tile {
    static constexpr int VECTORS = PANELS * PANEL_VECTORS;
    F c[ROWS][VECTORS];

    // What is at p, or zeros; without a branch, for which the compiler would put the tile into memory.
    QUIRE_INLINE void read(const float* p, long stride, bool keep = true) {
        for (int i = 0; i < ROWS; i++)
            for (int v = 0; v < VECTORS; v++) c[i][v] = zero_unless(keep, load(p + i * stride + v * W));
    }
    QUIRE_INLINE void write(float* p, long stride) const {
        for (int i = 0; i < ROWS; i++)
            for (int v = 0; v < VECTORS; v++) store(p + i * stride + v * W, c[i][v]);
    }
    template <int ROW, int STEP>
    QUIRE_INLINE void add_step(const typename Dot<T>::A* a, const T* const* b, long s) {
        Dot<T>::template step<ROWS, VECTORS, ROW, STEP>(c, a + s * STEP * Dot<T>::STEP_A, b, s * Dot<T>::STEP_B);
    }
};

// One row alone: its values in their order, filled up with zeros. No weight is read meanwhile, so it is quick.
template <class T, class Value>
inline void pack_row(const Value* row, long k, long whole, typename Dot<T>::A* out) {
    auto* values = reinterpret_cast<std::conditional_t<Dot<T>::DEPTH == Dot<T>::STEP_A, float, T>*>(out);
    long j = 0;
    for (; j + W <= k; j += W) store(values + j, load(row + j));
    if (j < whole) store_some(values + j, load_some(row + j, k - j), whole - j);
}

// Rows of A packed for one tile: all rows of a value of k (or of a pair) side by side, k after k.
//     row_at(i)[k], i < rows  ->  [k rounded up to DEPTH][rows], missing values 0
template <class T, class RowAt>
inline void pack_rows(const RowAt& row_at, int rows, long k, typename Dot<T>::A* out) {
    const long whole = (k + Dot<T>::DEPTH - 1) / Dot<T>::DEPTH * Dot<T>::DEPTH;
    if (rows == 1) return pack_row<T>(row_at(0), k, whole, out);
    for (int i = 0; i < rows; i++) {
        const auto* row = row_at(i);
        if constexpr (Dot<T>::DEPTH == Dot<T>::STEP_A) {  // A is float
            for (long j = 0; j < k; j++) out[j * rows + i] = to_float(row[j]);
            for (long j = k; j < whole; j++) out[j * rows + i] = 0;
        } else {
            auto narrow = [&](long j) { return uint32_t(j < k ? from_float<T>(to_float(row[j])).bits : 0); };
            long j = 0;
            if constexpr (sizeof(*row) == sizeof(T))
                for (; j + 1 < k; j += 2) std::memcpy(&out[j / 2 * rows + i], row + j, 4);
            for (; j < k; j += 2) out[j / 2 * rows + i] = narrow(j + 1) << 16 | narrow(j);
        }
    }
}

// Values of A that one row of k takes, as pack_rows lays them out.
template <class T>
constexpr long packed_row(long k) {
    return (k + Dot<T>::DEPTH - 1) / Dot<T>::DEPTH * Dot<T>::STEP_A;
}

#if !defined(QUIRE_NATIVE_DOT)
// `steps` steps of a panel of bf16 as 2 * steps of a panel of float: the same sums, in the same order.
inline void widen(const bf16* panel, long steps, float* out) {
    for (long s = 0; s < steps; s++, panel += Dot<bf16>::STEP_B, out += 2 * PANEL)
        for (int v = 0; v < PANEL; v += W) {
            store(out + v, even(panel + 2 * v));
            store(out + PANEL + v, odd(panel + 2 * v));
        }
}
#endif

// Every kernel keeps C in a small block of rows of 64 columns, wherever it goes in the end.
constexpr long BLOCK_COLUMNS = 64;

// How many lines ahead a stream of weights is fetched that nothing else fetches: over the edges of pages, where the machine's
// own prefetcher begins anew. Further ahead there are more of them on their way than a core has room for.
constexpr long FETCH_STEPS = 4;

// What to fetch into the cache meanwhile: at step s the line at from[p] + s * step (bytes) for each panel p.
constexpr int MAX_PANELS = 4;
struct Ahead {
    const char* from[MAX_PANELS];
    long step;
};

// C = or += (packed rows of A) * (1, 2 or 4 panels side by side).
template <class T, int ROWS, int PANELS>
struct Multiply {
    static void run(const typename Dot<T>::A* a, const T* const* b, long steps, float* c, bool first, const Ahead& ahead) {
        Tile<T, ROWS, PANELS> tile;
        tile.read(c, BLOCK_COLUMNS, !first);
        const T* panels[PANELS];
        const char* fetch[PANELS];
        for (int p = 0; p < PANELS; p++) panels[p] = b[p], fetch[p] = ahead.from[p];
        const long step = ahead.step;
        long s = 0;
        do {  // there is at least one step
            for (int p = 0; p < PANELS; p++) prefetch(fetch[p] + s * step);
            tile.template add_step<1, ROWS>(a, panels, s);
        } while (++s < steps);
        tile.write(c, BLOCK_COLUMNS);
    }
};

// A table of Kernel<T, rows, panels>::run by the number of rows; null where so many panels are never used.
template <template <class, int, int> class Kernel, class T, int PANELS, int... ROW>
constexpr auto table_of(std::integer_sequence<int, ROW...>) {
    using Function = decltype(&Kernel<T, 1, 1>::run);
    std::array<Function, MAX_ROWS<T> + 1> table{};
    ((PANELS <= panels_for<T>(ROW + 1)
          ? void(table[ROW + 1] = &Kernel<T, ROW + 1, least(PANELS, panels_for<T>(ROW + 1))>::run)
          : void()),
     ...);
    return table;
}

template <template <class, int, int> class Kernel, class T>
auto kernel_for(long rows, long panels) {
    using Rows = std::make_integer_sequence<int, MAX_ROWS<T>>;
    static constexpr auto one = table_of<Kernel, T, 1>(Rows{}), two = table_of<Kernel, T, 2>(Rows{}),
                          four = table_of<Kernel, T, 4>(Rows{});
    return panels == 4 ? four[rows] : panels == 2 ? two[rows] : one[rows];
}

}  // namespace quire
