// Linear layers with weights of 8 or 4 bits: each row of x is rounded to int8, the products are summed as integers, and the
// sums are scaled back. kernels/reference.py says exactly how; every level gives its very bits, for any number of rows.
//
//   packed: one panel after the other, 16 outputs each
//
//       8 bits   [k / BYTE_DEPTH][16 outputs][BYTE_DEPTH]            16 float scales
//       4 bits   [groups][group / 8][16 outputs][4 bytes]            [groups][16] bf16 scales   [groups][16] zero points
//                a byte holds k = 8 j + i in its low half and k = 8 j + 4 + i in its high half, i < 4
//
// N is filled up with zero outputs, K with zero values of x. Rows of x may be those of a norm or of a gated activation,
// which are made just before they are rounded and are kept by nobody. A tile of rows runs over the whole of K in registers:
// sums of integers are exact, and those of groups, scaled, are added in ascending order. A panel of bytes lies in L1 or L2
// while all tiles of an item pass it, each fetching its share of the next one.
#include <algorithm>
#include <climits>
#include <cmath>

#include "integers.h"
#include "quire.h"
#include "rows.h"
#include "threads.h"
#include "tile.h"

// Sums stay in registers only where the loops over a tile are unrolled before the compiler places arrays in memory.
#define QUIRE_UNROLL _Pragma("GCC unroll 16")

namespace quire {

struct nibble;  // the tag of kernels for weights of 4 bits, as int8_t is of those for 8
#if defined(QUIRE_AVX512) || defined(QUIRE_AVX512BF16)
template <>
constexpr int MAX_ROWS<nibble> = 6;
template <>
constexpr int panels_for<nibble>(int rows) {
    return rows <= 3 ? 4 : 2;  // sums of integers and of floats
}
#elif defined(QUIRE_AVX2)
template <>
constexpr int MAX_ROWS<nibble> = 4;
#else
template <>
constexpr int MAX_ROWS<nibble> = 2;
#endif

namespace {

constexpr long ITEM_PANELS = BLOCK_COLUMNS / PANEL;
constexpr long ITEM_ROWS = 96;
constexpr long BLOCK_ROWS = 384;  // rows of x that are rounded and packed at a time
constexpr long FETCH_BYTES = 64 * FETCH_STEPS;
#if defined(QUIRE_AVX512BF16)
constexpr long LONE_ROWS = 6;  // one tile of more rows would hold up the stream: two tiles fetch whole panels ahead
#else
constexpr long LONE_ROWS = LONG_MAX;
#endif
constexpr int DEFAULT_ZERO = 8;  // of weights without zero points

// How the weights of one linear lie in memory.
struct Layout {
    bool nibbles, zeros;
    long n, k, group, groups, data, panel, panels;

    explicit Layout(const QuireQuantized& w) {
        nibbles = w.bits == 4;
        zeros = w.zero_points != 0;
        n = w.n, k = w.k;
        group = nibbles ? w.group : ceil_div(w.k, 4) * 4;
        groups = nibbles ? ceil_div(k, group) : 1;
        data = nibbles ? groups * group * PANEL / 2 : ceil_div(k, BYTE_DEPTH) * BYTE_DEPTH * PANEL;
        const long scales = nibbles ? groups * PANEL * 2 : PANEL * 4;
        panel = ceil_div(data + scales + (zeros ? groups * PANEL : 0), 64) * 64;
        panels = ceil_div(n, PANEL);
    }
    long padded_k() const { return groups * group; }
    long words() const { return padded_k() / (nibbles ? 4 : BYTE_DEPTH); }  // of one row of packed x
    uint8_t* byte_at(uint8_t* start, long column, long at) const {
        return nibbles ? start + at / 8 * PANEL * 4 + column * 4 + at % 4
                       : start + (at / BYTE_DEPTH * PANEL + column) * BYTE_DEPTH + at % BYTE_DEPTH;
    }
    int shift(long at) const { return at / 4 % 2 * 4; }
};

// One row's values into its column of a panel, whose bytes are set already where the row ends early.
void pack_nibbles(const int8_t* values, long k, uint8_t* column) {
    for (long at = 0; at < k; at += 8, column += PANEL * 4) {
        uint64_t eight = 0;
        std::memcpy(&eight, values + at, size_t(std::min<long>(8, k - at)));
        const uint32_t four = uint32_t(eight) | uint32_t(eight >> 32) << 4;  // a value is below 16
        std::memcpy(column, &four, 4);
    }
}

void pack_bytes(const int8_t* values, long k, uint8_t* column) {
    for (long at = 0; at < k; at += BYTE_DEPTH, column += PANEL * BYTE_DEPTH)
        for (long i = 0; i < std::min<long>(BYTE_DEPTH, k - at); i++) column[i] = uint8_t(values[at + i] + BYTE_OFFSET);
}

void pack(const Layout& w, const int8_t* values, const float* scales, const uint8_t* zeros, uint8_t* packed) {
    for_each_item(w.panels, w.n * w.k > 1 << 16, [&](long p) {
        uint8_t* panel = packed + p * w.panel;
        std::memset(panel, w.nibbles ? 0 : BYTE_OFFSET, size_t(w.data));
        std::memset(panel + w.data, 0, size_t(w.panel - w.data));
        for (long column = 0; column < std::min<long>(PANEL, w.n - p * PANEL); column++) {
            const long row = p * PANEL + column;
            w.nibbles ? pack_nibbles(values + row * w.k, w.k, panel + column * 4)
                      : pack_bytes(values + row * w.k, w.k, panel + column * BYTE_DEPTH);
            for (long g = 0; g < w.groups; g++) {
                const long at = g * PANEL + column;
                const float scale = scales[row * w.groups + g];
                if (w.nibbles)
                    reinterpret_cast<bf16*>(panel + w.data)[at] = from_float<bf16>(scale);
                else
                    reinterpret_cast<float*>(panel + w.data)[at] = scale;
                if (w.zeros) panel[w.data + w.groups * PANEL * 2 + at] = zeros[row * w.groups + g];
            }
        }
    });
}

void unpack(const Layout& w, uint8_t* packed, int8_t* values, float* scales, uint8_t* zeros) {
    for_each_item(w.n, w.n * w.k > 1 << 16, [&](long row) {
        uint8_t* panel = packed + row / PANEL * w.panel;
        const long column = row % PANEL;
        for (long at = 0; at < w.k; at++) {
            const uint8_t byte = *w.byte_at(panel, column, at);
            values[row * w.k + at] = int8_t(w.nibbles ? byte >> w.shift(at) & 15 : byte - BYTE_OFFSET);
        }
        for (long g = 0; g < w.groups; g++) {
            const long at = g * PANEL + column;
            scales[row * w.groups + g] = w.nibbles ? to_float(reinterpret_cast<bf16*>(panel + w.data)[at])
                                                   : reinterpret_cast<float*>(panel + w.data)[at];
            if (w.zeros) zeros[row * w.groups + g] = panel[w.data + w.groups * PANEL * 2 + at];
        }
    });
}

// ---- rows of x

// A block of rows, rounded and packed tile by tile: [words][rows of the tile]; scales and sums are [row][groups].
template <class T>
struct Call {
    const Layout& w;
    const uint8_t* packed;
    const T* bias;
    T* out;
    long m, tiles;
    uint32_t* a;
    float* scales;
    int32_t* sums;

    long first_row(long tile) const { return m * tile / tiles; }

    template <class RowAt>
    void round_tile(long tile, const RowAt& row_at) const {
        const long row0 = first_row(tile), rows = first_row(tile + 1) - row0, words = w.words();
        struct Bytes;
        auto* q = static_cast<int8_t*>(scratch<Bytes>(w.padded_k()));
        std::memset(q + w.k, 0, size_t(w.padded_k() - w.k));
        uint32_t* to = a + row0 * words;
        for (long i = 0; i < rows; i++) {
            const long row = row0 + i;
            const T* x = row_at(row);
            for (long g = 0; g < w.groups; g++) {
                const long from = g * w.group, count = std::min(w.group, w.k - from), at = row * w.groups + g;
                sums[at] = round_values(x + from, count, q + from, scales + at);
            }
            if (w.nibbles)
                for (long j = 0; j < words; j++) std::memcpy(to + j * rows + i, q + 4 * j, 4);
            else
                for (long j = 0; j < words; j++) to[j * rows + i] = byte_word(q + BYTE_DEPTH * j);
        }
    }
};

// ---- products: a tile of rows times some panels side by side, into a block of floats

struct Piece {
    const Layout& w;
    const uint8_t* panels;
    const uint32_t* a;
    const float* scales;
    const int32_t* sums;
    float* block;
    const uint8_t* fetch;  // what to have in the cache next ...
    long fetch_step;       // ... and how far to go on at every 64 bytes of a panel
};

template <class, int ROWS, int PANELS>
struct MultiplyBytes {
    static void run(const Piece& piece) {
        constexpr int VECTORS = PANELS * PANEL_VECTORS, STEP = PANEL * BYTE_DEPTH;
        const Layout& w = piece.w;
        const long panel = w.panel, steps = w.data / STEP;
        const uint8_t *panels = piece.panels, *fetch = piece.fetch;
        const uint32_t* a = piece.a;
        I c[ROWS][VECTORS];
        QUIRE_UNROLL for (int i = 0; i < ROWS; i++)
            QUIRE_UNROLL for (int v = 0; v < VECTORS; v++) c[i][v] = set1_int(-BYTE_OFFSET * piece.sums[i]);
        for (long s = 0; s < steps; s++, a += ROWS, panels += STEP) {
            for (int p = 0; p < PANELS; p++) prefetch(fetch + p * panel);
            fetch += piece.fetch_step * STEP / 64;
            auto weights = [&](int v) {
                return byte_weights(panels + v / PANEL_VECTORS * panel + v % PANEL_VECTORS * W * BYTE_DEPTH);
            };
            if constexpr (ROWS < VECTORS) {
                I x[ROWS];
                QUIRE_UNROLL for (int i = 0; i < ROWS; i++) x[i] = set1_int(int32_t(a[i]));
                QUIRE_UNROLL for (int v = 0; v < VECTORS; v++) {
                    const I weight = weights(v);
                    QUIRE_UNROLL for (int i = 0; i < ROWS; i++) c[i][v] = byte_dot(c[i][v], weight, x[i]);
                }
            } else {
                I weight[VECTORS];
                QUIRE_UNROLL for (int v = 0; v < VECTORS; v++) weight[v] = weights(v);
                QUIRE_UNROLL for (int i = 0; i < ROWS; i++) {
                    const I x = set1_int(int32_t(a[i]));
                    QUIRE_UNROLL for (int v = 0; v < VECTORS; v++) c[i][v] = byte_dot(c[i][v], weight[v], x);
                    a = after(c[i][VECTORS - 1], a);
                }
            }
        }
        QUIRE_UNROLL for (int v = 0; v < VECTORS; v++) {
            const uint8_t* scales = piece.panels + v / PANEL_VECTORS * panel + w.data;
            const F scale = load(reinterpret_cast<const float*>(scales) + v % PANEL_VECTORS * W);
            QUIRE_UNROLL for (int i = 0; i < ROWS; i++) {
                const F sum = mul(mul(float_of(c[i][v]), set1(piece.scales[i])), scale);
                store(piece.block + i * BLOCK_COLUMNS + v * W, sum);
            }
        }
    }
};

template <class, int ROWS, int PANELS>
struct MultiplyNibbles {
    static constexpr int VECTORS = PANELS * PANEL_VECTORS;

    // part += the products of NIBBLE_CHUNK values of k, holding in registers what there is less of.
    static QUIRE_INLINE void add_products(I (&part)[ROWS][VECTORS], const uint32_t* a, const uint8_t* panels, long panel) {
        QUIRE_UNROLL for (int j = 0; j < NIBBLE_CHUNK / 8; j++, a += 2 * ROWS, panels += PANEL * 4) {
            auto both = [&](int v) { return load_nibbles(panels + v / PANEL_VECTORS * panel + v % PANEL_VECTORS * W * 4); };
            if constexpr (ROWS < VECTORS || !NIBBLE_WIDE) {
                QUIRE_UNROLL for (int v = 0; v < VECTORS; v++) {
                    const I low = low_nibbles(both(v)), high = high_nibbles(both(v));
                    QUIRE_UNROLL for (int i = 0; i < ROWS; i++) {
                        part[i][v] = nibble_dot(part[i][v], low, set1_int(int32_t(a[i])));
                        part[i][v] = nibble_dot(part[i][v], high, set1_int(int32_t(a[ROWS + i])));
                        if (ROWS > 2) a = after(part[i][v], a);
                    }
                }
            } else {
                I low[VECTORS], high[VECTORS];
                QUIRE_UNROLL for (int v = 0; v < VECTORS; v++) low[v] = low_nibbles(both(v)), high[v] = high_nibbles(both(v));
                QUIRE_UNROLL for (int i = 0; i < ROWS; i++) {
                    const I first = set1_int(int32_t(a[i])), second = set1_int(int32_t(a[ROWS + i]));
                    QUIRE_UNROLL for (int v = 0; v < VECTORS; v++) part[i][v] = nibble_dot(part[i][v], low[v], first);
                    QUIRE_UNROLL for (int v = 0; v < VECTORS; v++) part[i][v] = nibble_dot(part[i][v], high[v], second);
                }
            }
        }
    }

    // sum += the products of NIBBLE_CHUNK values of k
    static QUIRE_INLINE void add_chunk(I (&sum)[ROWS][VECTORS], const uint32_t* a, const uint8_t* panels, long panel) {
        if constexpr (NIBBLE_WIDE) return add_products(sum, a, panels, panel);
        I part[ROWS][VECTORS];
        QUIRE_UNROLL for (int i = 0; i < ROWS; i++)
            QUIRE_UNROLL for (int v = 0; v < VECTORS; v++) part[i][v] = set1_int(0);
        add_products(part, a, panels, panel);
        QUIRE_UNROLL for (int i = 0; i < ROWS; i++)
            QUIRE_UNROLL for (int v = 0; v < VECTORS; v++) sum[i][v] = nibble_sum(sum[i][v], part[i][v]);
    }

    static void run(const Piece& piece) {
        const Layout& w = piece.w;
        const long panel = w.panel, groups = w.groups;
        const uint8_t *panels = piece.panels, *fetch = piece.fetch;
        const uint32_t* a = piece.a;
        F total[ROWS][VECTORS];
        QUIRE_UNROLL for (int i = 0; i < ROWS; i++)
            QUIRE_UNROLL for (int v = 0; v < VECTORS; v++) total[i][v] = set1(0);
        for (long g = 0; g < groups; g++) {
            const uint8_t* extras = piece.panels + w.data + g * PANEL * 2;
            const uint8_t* zeros = piece.panels + w.data + (groups * 2 + g) * PANEL;
            for (int p = 0; p < PANELS; p++) {  // those of the panels that are next
                prefetch(extras + (PANELS + p) * panel);
                if (w.zeros) prefetch(zeros + (PANELS + p) * panel);
            }
            I sum[ROWS][VECTORS];
            QUIRE_UNROLL for (int v = 0; v < VECTORS; v++) {
                const long at = v / PANEL_VECTORS * panel + v % PANEL_VECTORS * W;
                const I zero = w.zeros ? widen_bytes(zeros + at) : set1_int(DEFAULT_ZERO);
                QUIRE_UNROLL for (int i = 0; i < ROWS; i++) sum[i][v] = mul_ints(zero, set1_int(-piece.sums[i * groups + g]));
            }
            for (long chunk = 0; chunk < w.group; chunk += NIBBLE_CHUNK) {
                constexpr long BYTES = NIBBLE_CHUNK * PANEL / 2;
                for (int p = 0; p < PANELS; p++)
                    for (long line = 0; line < BYTES / 64; line++) prefetch(fetch + p * panel + line * piece.fetch_step);
                fetch += piece.fetch_step * BYTES / 64;
                add_chunk(sum, a, panels, panel);
                a += NIBBLE_CHUNK / 4 * ROWS;
                panels += BYTES;
            }
            QUIRE_UNROLL for (int v = 0; v < VECTORS; v++) {
                const auto* scales = reinterpret_cast<const bf16*>(extras + v / PANEL_VECTORS * panel);
                const F scale = load(scales + v % PANEL_VECTORS * W);
                QUIRE_UNROLL for (int i = 0; i < ROWS; i++) {
                    const F part = mul(mul(float_of(sum[i][v]), set1(piece.scales[i * groups + g])), scale);
                    total[i][v] = add(total[i][v], part);
                }
            }
        }
        QUIRE_UNROLL for (int i = 0; i < ROWS; i++)
            QUIRE_UNROLL for (int v = 0; v < VECTORS; v++) store(piece.block + i * BLOCK_COLUMNS + v * W, total[i][v]);
    }
};

template <class T>
void write_out(const Call<T>& call, const float* block, long row0, long rows, long column0, long column1) {
    for (long i = 0; i < rows; i++, block += BLOCK_COLUMNS) {
        T* out = call.out + (row0 + i) * call.w.n;
        for (long j = column0; j < column1; j += W) {
            const long rest = column1 - j;
            F sum = load(block + j - column0);
            if (rest >= W) {
                if (call.bias) sum = add(sum, load(call.bias + j));
                store(out + j, sum);
            } else {
                if (call.bias) sum = add(sum, load_some(call.bias + j, rest));
                store_some(out + j, sum, rest);
            }
        }
    }
}

// Tiles [tile0, tile1) of rows by panels [panel0, panel1).
template <class T>
void multiply_item(const Call<T>& call, long tile0, long tile1, long panel0, long panel1) {
    const Layout& w = call.w;
    alignas(64) float block[std::max(MAX_ROWS<int8_t>, MAX_ROWS<nibble>) * BLOCK_COLUMNS];
    const bool lone = tile1 - tile0 == 1;
    for (long p = panel0, width; p < panel1; p += width) {
        const int rows_of_tile = int(ceil_div(call.m, call.tiles));
        width = w.nibbles ? panels_for<nibble>(rows_of_tile) : panels_for<int8_t>(rows_of_tile);
        while (width > panel1 - p) width /= 2;
        const uint8_t* panels = call.packed + p * w.panel;
        const uint8_t* next = p + width < w.panels ? panels + width * w.panel : panels;
        for (long t = tile0; t < tile1; t++) {
            const long row = call.first_row(t), rows = call.first_row(t + 1) - row, share = tile1 - tile0;
            const uint8_t* fetch = lone ? panels + FETCH_BYTES : next + (t - tile0) * w.panel / share;
            const Piece piece{w,
                              panels,
                              call.a + row * w.words(),
                              call.scales + row * w.groups,
                              call.sums + row * w.groups,
                              block,
                              fetch,
                              lone ? 64 : 64 / share};
            // Tiles are cut evenly, so some may have a row less than the others: fewer panels at once always exist.
            if (w.nibbles)
                kernel_for<MultiplyNibbles, nibble>(rows, width)(piece);
            else
                kernel_for<MultiplyBytes, int8_t>(rows, width)(piece);
            write_out(call, block, row, rows, p * PANEL, std::min(w.n, (p + width) * PANEL));
        }
    }
}

template <class T, class RowAt>
void linear_block(Call<T> call, const RowAt& row_at) {
    const Layout& w = call.w;
    struct Rows;
    struct Scales;
    struct Sums;
    call.a = static_cast<uint32_t*>(scratch<Rows>(call.m * w.words() * 4));
    call.scales = static_cast<float*>(scratch<Scales>(call.m * w.groups * 4));
    call.sums = static_cast<int32_t*>(scratch<Sums>(call.m * w.groups * 4));
    const long most_rows = w.nibbles ? MAX_ROWS<nibble> : MAX_ROWS<int8_t>;
    call.tiles = ceil_div(call.m, most_rows);
    if (call.m > LONE_ROWS) call.tiles = std::max<long>(2, call.tiles);
    for_each_item(call.tiles, call.m * w.k > 1 << 15, [&](long tile) { call.round_tile(tile, row_at); });
    const long groups = ceil_div(w.panels, ITEM_PANELS), blocks = ceil_div(call.tiles, ITEM_ROWS / most_rows);
    for_each_run(groups * blocks, call.m * w.n * w.k > 1 << 17, [&](long first, long end) {
        for (long item = first; item < end; item++) {
            const long block = item / groups, group = item % groups;
            multiply_item(call, call.tiles * block / blocks, call.tiles * (block + 1) / blocks, group * ITEM_PANELS,
                          std::min(w.panels, (group + 1) * ITEM_PANELS));
        }
    });
}

// row_at(row) gives the elements of a row of x, which need to stay only until it is called again.
template <class T, class RowAt>
void linear(const QuireQuantized& weight, const void* packed, const void* bias, void* out, long m, const RowAt& row_at) {
    const Layout w(weight);
    for (long row = 0; row < m; row += BLOCK_ROWS)
        linear_block(Call<T>{w, static_cast<const uint8_t*>(packed), static_cast<const T*>(bias),
                             static_cast<T*>(out) + row * w.n, std::min(BLOCK_ROWS, m - row), 0, nullptr, nullptr, nullptr},
                     [&](long i) { return row_at(row + i); });
}

// Each row of the norm goes to `normed`, or where that is null into a thread's own memory, just before it is rounded.
template <class T, class Norm>
void linear_of_norm(const Norm& norm, void* normed, const QuireQuantized& weight, const void* packed, const void* bias,
                    void* out, long m) {
    struct Row;
    T* kept = static_cast<T*>(normed);
    linear<T>(weight, packed, bias, out, m, [&](long row) {
        T* to = kept ? kept + row * norm.dim : static_cast<T*>(scratch<Row>(norm.dim * long(sizeof(T))));
        norm.row(row, to);
        return to;
    });
}

// fn(zero) with a zero of the dtype.
template <class Fn>
void with_dtype(int32_t dtype, const Fn& fn) {
    dtype == QUIRE_BFLOAT16 ? fn(bf16{}) : fn(0.0f);
}

}  // namespace
}  // namespace quire

using namespace quire;

int64_t quire_quantized_size(const QuireQuantized* weight) {
    const Layout w(*weight);
    return w.panels * w.panel;
}

void quire_pack_quantized(const QuireQuantized* weight, const int8_t* values, const float* scales, const uint8_t* zeros,
                          void* packed) {
    pack(Layout(*weight), values, scales, zeros, static_cast<uint8_t*>(packed));
}

void quire_unpack_quantized(const QuireQuantized* weight, void* packed, int8_t* values, float* scales, uint8_t* zeros) {
    unpack(Layout(*weight), static_cast<uint8_t*>(packed), values, scales, zeros);
}

void quire_quantized_linear(const QuireQuantized* weight, int32_t dtype, const void* x, int64_t x_stride,
                            const void* packed, const void* bias, void* out, int64_t m) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const T* rows = static_cast<const T*>(x);
        linear<T>(*weight, packed, bias, out, m, [=](long row) { return rows + row * x_stride; });
    });
}

void quire_rms_norm_quantized_linear(int32_t dtype, const void* x, int64_t stride, const void* residual, const void* scale,
                                     void* normed, void* total, int64_t m, int64_t dim, float eps, int32_t style,
                                     const QuireQuantized* weight, const void* packed, const void* bias, void* out) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const RmsNorm<T> norm{static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<const T*>(scale),
                              static_cast<T*>(total), stride, dim, eps, style};
        linear_of_norm<T>(norm, normed, *weight, packed, bias, out, m);
    });
}

void quire_layer_norm_quantized_linear(int32_t dtype, const void* x, int64_t stride, const void* scale, const void* shift,
                                       void* normed, int64_t m, int64_t dim, float eps, const QuireQuantized* weight,
                                       const void* packed, const void* bias, void* out) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const LayerNorm<T> norm{static_cast<const T*>(x), static_cast<const T*>(scale), static_cast<const T*>(shift), stride,
                                dim, eps};
        linear_of_norm<T>(norm, normed, *weight, packed, bias, out, m);
    });
}

void quire_gated_quantized_linear(int32_t dtype, const void* gate, const void* up, int64_t stride, int64_t m, int64_t dim,
                                  int32_t activation, const QuireQuantized* weight, const void* packed, const void* bias,
                                  void* out) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        struct Rows;
        struct Row;
        const Gated<T> gated{static_cast<const T*>(gate), static_cast<const T*>(up), stride, dim, activation};
        const bool few = m < team_size();  // then each row is made by all
        T* rows = few ? static_cast<T*>(scratch<Rows>(m * dim * long(sizeof(T)))) : nullptr;
        if (few) gated_rows(gated, rows, m);
        linear<T>(*weight, packed, bias, out, m, [&](long row) {
            if (few) return rows + row * dim;
            T* to = static_cast<T*>(scratch<Row>(dim * long(sizeof(T))));
            gated.part(row, 0, dim, to);
            return to;
        });
    });
}
