// Linear layers: out = x * weight^T + bias with weights that were packed once into panels of 16 outputs.
//
//   weight [N][K]                 packed [N / 16 panels][K steps]; a step is 64 bytes, see tile.h
//
//     n ->   0   15 16  31           panel 0: k = 0 | 1 | 2 | ...     one stream that is read from start to end
//   row 0  +------+------+           panel 1: k = 0 | 1 | 2 | ...
//   ...    |panel0|panel1|           N is filled up with zero outputs, K (bf16: to an even number) with zero values
//
// For many rows the product is cut so that what is used again stays near: a block of up to BLOCK_ROWS rows of x is packed
// (tile by tile, k after k), and for each group of GROUP panels
//
//     for a block of k                                       x: the block of all rows stays in L2
//         for one, two or four panels of the group           weights: up to BLOCK_BYTES stay in L1
//             for each tile of rows:  C += x tile * panels   C: rows * 64 floats, between the blocks in L2
//
// and while the tiles pass a block of weights each fetches its share of the next one. A lone tile has nothing to wait for:
// it streams through k and fetches a little ahead.
//
// Where the machine has no bf16 dot product, many rows share the widening of a block of weights: it is written out as
// floats once, in L1, and the tiles are those of float. The sums are the same, in the same order.
#include <algorithm>
#include <climits>

#include "quire.h"
#include "threads.h"
#include "tile.h"

namespace quire {
namespace {

constexpr long GROUP = BLOCK_COLUMNS / PANEL;
constexpr long ITEM_ROWS = 96;   // rows of one item
constexpr long BLOCK_ROWS = 384;  // rows that are packed at a time
#if defined(QUIRE_NATIVE_DOT)
constexpr long WIDEN_ROWS = LONG_MAX;
constexpr long BLOCK_BYTES = 32 << 10;  // of the panels of a block
constexpr long LONE_ROWS = 6;  // one tile of more rows would hold up the stream: two tiles fetch a whole block ahead
#else
constexpr long WIDEN_ROWS = 13;  // rows from which on weights are widened
constexpr long BLOCK_BYTES = 24 << 10;
constexpr long LONE_ROWS = LONG_MAX;
#endif
constexpr long BLOCK_VALUES = 384;  // values of k in a block of weights that are widened

template <class T>
long panel_elements(long k) {
    return ceil_div(k, Dot<T>::DEPTH) * Dot<T>::STEP_B;
}

template <class T>
void unpack(const T* packed, long n, long k, T* weight) {
    const long panel = panel_elements<T>(k), depth = Dot<T>::DEPTH;
    for_each_item(n, n * k > 1 << 16, [&](long row) {
        const T* in = packed + row / PANEL * panel;
        for (long j = 0; j < k; j++)
            weight[row * k + j] = in[(j / depth * PANEL + row % PANEL) * depth + j % depth];
    });
}

// ---- a block of rows

template <class T>
struct Call {
    const typename Dot<T>::A* a;  // packed rows: [block of k][tile][k of the block][rows of the tile]
    const T* packed;
    const T* bias;
    T* out;
    long m, n, k;
    bool widen;
    long tiles;  // the m rows are cut evenly into this many tiles
    long width;  // panels side by side
    long block;  // steps of a block of k
    long first_row(long tile) const { return m * tile / tiles; }
    long steps() const { return ceil_div(k, Dot<T>::DEPTH); }
    long steps_of_block(long step) const { return std::min(block, steps() - step); }
    long tile_at(long row, long step) const { return (m * step + row * steps_of_block(step)) * Dot<T>::STEP_A; }
};

template <class T>
void write_out(const Call<T>& call, const float* c, long row0, long row1, long column0, long column1) {
    for (long row = row0; row < row1; row++, c += BLOCK_COLUMNS) {
        T* out = call.out + row * call.n;
        for (long j = column0; j < column1; j += W) {
            const long rest = column1 - j;
            F sum = load(c + j - column0);
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

template <class T>
constexpr long LINE = Dot<T>::STEP_B * long(sizeof(T));  // bytes of one step of a panel

// A block of k for some panels side by side: what multiply_group hands to multiply_panels.
template <class T>
struct Block {
    const T* weights;  // step `step` of the first panel
    const T* next;     // the block that comes next
    long width, step, steps;
};

// What tile number `index` of `count` fetches: its share of the next block, or what follows in a lone tile's own stream.
template <class T>
Ahead ahead_of(const Call<T>& call, const Block<T>& block, long index, long count) {
    const bool stream = count == 1 && block.step + block.steps < call.steps();
    const char* from = stream ? reinterpret_cast<const char*>(block.weights) + FETCH_STEPS * LINE<T>
                              : reinterpret_cast<const char*>(block.next) + block.steps * LINE<T> * index / count;
    Ahead ahead{{}, stream ? LINE<T> : LINE<T> / count};
    for (int p = 0; p < MAX_PANELS; p++) ahead.from[p] = from + p * panel_elements<T>(call.k) * long(sizeof(T));
    return ahead;
}

// All tiles of rows [tile0, tile1) on one block.
template <class T>
void multiply_panels(const Call<T>& call, long tile0, long tile1, const Block<T>& block, float* c) {
    const long panel = panel_elements<T>(call.k), row0 = call.first_row(tile0);
    const T* panels[GROUP];
    for (long i = 0; i < block.width; i++) panels[i] = block.weights + i * panel;
    const float* wides[1] = {nullptr};
#if !defined(QUIRE_NATIVE_DOT)
    if constexpr (Dot<T>::DEPTH == 2) {
        if (call.widen) {
            struct Wide;
            float* wide = static_cast<float*>(scratch<Wide>(BLOCK_VALUES * PANEL * long(sizeof(float))));
            widen(block.weights, block.steps, wide);
            wides[0] = wide;
        }
    }
#endif
    for (long t = tile0; t < tile1; t++) {
        const long row = call.first_row(t), rows = call.first_row(t + 1) - row;
        const auto* a = call.a + call.tile_at(row, block.step);
        float* corner = c + (row - row0) * BLOCK_COLUMNS;
        Ahead ahead = ahead_of(call, block, t - tile0, tile1 - tile0);
        if constexpr (Dot<T>::STEP_A == Dot<T>::DEPTH) {
            if (wides[0] != nullptr) {
                ahead.step /= 2;
                kernel_for<Multiply, float>(rows, 1)(a, wides, 2 * block.steps, corner, block.step == 0, ahead);
                continue;
            }
        }
        kernel_for<Multiply, T>(rows, block.width)(a, panels, block.steps, corner, block.step == 0, ahead);
    }
}

// Tiles [tile0, tile1) of rows by the panels of one group.
template <class T>
void multiply_group(const Call<T>& call, long tile0, long tile1, long group) {
    float* c = static_cast<float*>(scratch<Call<T>>(ITEM_ROWS * BLOCK_COLUMNS * long(sizeof(float))));
    const long panel0 = group * GROUP, panel1 = std::min(ceil_div(call.n, PANEL), panel0 + GROUP);
    const long panel = panel_elements<T>(call.k), steps = call.steps();
    for (long s = 0; s < steps; s += call.block)
        for (long p = panel0, width; p < panel1; p += width) {
            width = call.width;
            while (width > panel1 - p) width /= 2;
            const T* weights = call.packed + p * panel + s * Dot<T>::STEP_B;
            const T* next = weights + width * panel;
            if (p + width == panel1)
                next = s + call.block < steps ? call.packed + panel0 * panel + (s + call.block) * Dot<T>::STEP_B
                                              : call.packed + panel1 * panel;
            multiply_panels(call, tile0, tile1, Block<T>{weights, next, width, s, call.steps_of_block(s)},
                            c + (p - panel0) * PANEL);
        }
    write_out(call, c, call.first_row(tile0), call.first_row(tile1), panel0 * PANEL, std::min(call.n, panel1 * PANEL));
}

// How the rows are cut into tiles and k into blocks.
template <class T>
void choose_cuts(Call<T>& call) {
    call.widen = Dot<T>::DEPTH == 2 && call.m >= WIDEN_ROWS;
    call.tiles = ceil_div(call.m, call.widen ? MAX_ROWS<float> : MAX_ROWS<T>);
    if (call.m > LONE_ROWS) call.tiles = std::max<long>(2, call.tiles);
    call.width = call.widen ? 1 : panels_for<T>(int(ceil_div(call.m, call.tiles)));
    if (call.widen)
        call.block = BLOCK_VALUES / Dot<T>::DEPTH;
    else if (call.tiles > 1)
        call.block = BLOCK_BYTES / call.width / LINE<T>;
    else  // the last steps fetch the next group
        call.block = call.steps() > 2 * FETCH_STEPS ? call.steps() - FETCH_STEPS : call.steps();
}

template <class T>
void linear_block(const T* x, long x_stride, Call<T> call) {
    struct Rows;
    auto* a = static_cast<typename Dot<T>::A*>(scratch<Rows>(call.m * packed_row<T>(call.k) * 4));
    call.a = a;
    choose_cuts(call);
    for_each_item(call.tiles, call.m * call.k > 1 << 15, [&](long t) {
        const long row = call.first_row(t), rows = call.first_row(t + 1) - row;
        for (long s = 0; s < call.steps(); s += call.block) {
            const long first = s * Dot<T>::DEPTH, values = std::min(call.block * Dot<T>::DEPTH, call.k - first);
            pack_rows<T>([&](int i) { return x + (row + i) * x_stride + first; }, int(rows), values, a + call.tile_at(row, s));
        }
    });
    const long groups = ceil_div(call.n, BLOCK_COLUMNS), blocks = ceil_div(call.m, ITEM_ROWS);
    for_each_run(groups * blocks, call.m * call.n * call.k > 1 << 17, [&](long first, long end) {
        for (long item = first; item < end; item++) {
            const long block = item / groups;
            multiply_group(call, call.tiles * block / blocks, call.tiles * (block + 1) / blocks, item % groups);
        }
    });
}

template <class T>
void linear(const T* x, long x_stride, const T* packed, const T* bias, T* out, long m, long n, long k) {
    for (long row = 0; row < m; row += BLOCK_ROWS) {
        const long rows = std::min(BLOCK_ROWS, m - row);
        linear_block(x + row * x_stride, x_stride, Call<T>{nullptr, packed, bias, out + row * n, rows, n, k, false, 0, 0, 0});
    }
}

}  // namespace
}  // namespace quire

using namespace quire;

int64_t quire_packed_size(int32_t dtype, int64_t n, int64_t k) {
    return ceil_div(n, PANEL) * (dtype == QUIRE_BFLOAT16 ? panel_elements<bf16>(k) : panel_elements<float>(k));
}

void quire_unpack_linear(int32_t dtype, const void* packed, int64_t n, int64_t k, void* weight) {
    if (dtype == QUIRE_BFLOAT16)
        unpack(static_cast<const bf16*>(packed), n, k, static_cast<bf16*>(weight));
    else
        unpack(static_cast<const float*>(packed), n, k, static_cast<float*>(weight));
}

void quire_linear(int32_t dtype, const void* x, int64_t x_stride, const void* packed, const void* bias, void* out,
                  int64_t m, int64_t n, int64_t k) {
    if (dtype == QUIRE_BFLOAT16)
        linear(static_cast<const bf16*>(x), x_stride, static_cast<const bf16*>(packed),
               static_cast<const bf16*>(bias), static_cast<bf16*>(out), m, n, k);
    else
        linear(static_cast<const float*>(x), x_stride, static_cast<const float*>(packed),
               static_cast<const float*>(bias), static_cast<float*>(out), m, n, k);
}
