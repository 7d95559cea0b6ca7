// A matrix of its own for each head: what stands before and behind attention over latents, where it takes the place of
// writing out the keys and values of every head.
//
// An item is one head by some rows. Its rows are packed once, tile by tile; then each group of panels of the head's matrix
// goes through all tiles. k is small enough for a row to be summed in one go, in ascending order of k, whatever the number
// of rows: see tile.h.
#include <algorithm>

#include "quire.h"
#include "threads.h"
#include "tile.h"

namespace quire {
namespace {

constexpr long ITEM_ROWS = 48;
#if !defined(QUIRE_NATIVE_DOT)
constexpr long WIDEN_ROWS = 13;  // rows from which on it is worth widening a panel first
#endif

template <class T>
class Heads {
public:
    explicit Heads(const QuireHeads& call) : call_(call), steps_(ceil_div(call.k, Dot<T>::DEPTH)) {}

    void run() {
        const long blocks = ceil_div(call_.rows, ITEM_ROWS);
        for_each_item(call_.heads * blocks, call_.rows * call_.heads * call_.n * call_.k > 1 << 17, [&](long item) {
            const long head = item / blocks, block = item % blocks;
            multiply(head, call_.rows * block / blocks, call_.rows * (block + 1) / blocks);
        });
    }

private:
    using A = typename Dot<T>::A;
    static constexpr long LINE = Dot<T>::STEP_B * long(sizeof(T));

    void multiply(long head, long row0, long row1) const {
        const long rows = row1 - row0;
        const bool wide = widens(rows);
        const long most = wide ? MAX_ROWS<float> : MAX_ROWS<T>, tiles = ceil_div(rows, most);
        struct Rows;
        A* packed = static_cast<A*>(scratch<Rows>(rows * packed_row<T>(call_.k) * long(sizeof(A))));
        for (long t = 0; t < tiles; t++) {
            const long first = rows * t / tiles, count = rows * (t + 1) / tiles - first;
            pack_rows<T>([&](int i) { return x_at(head, row0 + first + i); }, int(count), call_.k,
                         packed + first * packed_row<T>(call_.k));
        }
        const T* panels = static_cast<const T*>(call_.packed) + head * call_.n / PANEL * steps_ * Dot<T>::STEP_B;
        const long count = ceil_div(call_.width, PANEL), usual = wide ? 1 : panels_for<T>(int(ceil_div(rows, tiles)));
        for (long p = 0, width; p < count; p += width) {
            width = usual;
            while (width > count - p) width /= 2;
            multiply_panels(panels + p * steps_ * Dot<T>::STEP_B, width, wide, packed, rows, tiles, [&](long row, const float* c) {
                write_out(head, row0 + row, p * PANEL, std::min(call_.width - p * PANEL, width * PANEL), c);
            });
        }
    }

    // `width` panels side by side with all tiles; fn(row, its results) for every row.
    template <class Fn>
    void multiply_panels(const T* first, long width, bool wide, const A* packed, long rows, long tiles, const Fn& fn) const {
        alignas(64) float c[MAX_ROWS<float> * BLOCK_COLUMNS];
        const T* panels[MAX_PANELS];
        Ahead ahead{{}, LINE};
        for (long p = 0; p < width; p++) {
            panels[p] = first + p * steps_ * Dot<T>::STEP_B;
            ahead.from[p] = reinterpret_cast<const char*>(panels[p]) + FETCH_STEPS * LINE;
        }
        const float* floats = widened(panels[0], wide);
        for (long t = 0; t < tiles; t++) {
            const long row = rows * t / tiles, count = rows * (t + 1) / tiles - row;
            const A* a = packed + row * packed_row<T>(call_.k);
            if (floats != nullptr)
                kernel_for<Multiply, float>(count, 1)(reinterpret_cast<const float*>(a), &floats, 2 * steps_, c, true,
                                                      Ahead{{reinterpret_cast<const char*>(floats)}, 0});
            else
                kernel_for<Multiply, T>(count, width)(a, panels, steps_, c, true, ahead);
            for (long i = 0; i < count; i++) fn(row + i, c + i * BLOCK_COLUMNS);
        }
    }

    static bool widens([[maybe_unused]] long rows) {
#if defined(QUIRE_NATIVE_DOT)
        return false;
#else
        return Dot<T>::DEPTH == 2 && rows >= WIDEN_ROWS;
#endif
    }

    // The panel as floats, in memory of this thread; null where it is read as it is.
    const float* widened([[maybe_unused]] const T* panel, [[maybe_unused]] bool wide) const {
#if !defined(QUIRE_NATIVE_DOT)
        if constexpr (Dot<T>::DEPTH == 2) {
            if (wide) {
                struct Wide;
                float* out = static_cast<float*>(scratch<Wide>(2 * steps_ * PANEL * long(sizeof(float))));
                widen(panel, steps_, out);
                return out;
            }
        }
#endif
        return nullptr;
    }

    const T* x_at(long head, long row) const {
        return static_cast<const T*>(call_.x) + row * call_.x_row + head * call_.x_head;
    }

    void write_out(long head, long row, long column, long count, const float* c) const {
        T* out = static_cast<T*>(call_.out) + row * call_.out_row + head * call_.out_head + column;
        for (long i = 0; i < count; i += W) {
            const long rest = count - i;
            rest >= W ? store(out + i, load(c + i)) : store_some(out + i, load(c + i), rest);
        }
    }

    const QuireHeads& call_;
    const long steps_;
};

}  // namespace
}  // namespace quire

void quire_heads_linear(const QuireHeads* call) {
    if (call->dtype == QUIRE_BFLOAT16)
        quire::Heads<quire::bf16>(*call).run();
    else
        quire::Heads<float>(*call).run();
}
