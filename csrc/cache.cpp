// Writing keys and values into their pages, and rotary embedding, which on its way to the pages saves a trip to memory.
#include "pages.h"
#include "threads.h"

namespace quire {
namespace {

constexpr long WORTH = 1 << 15;  // elements from which the team is woken

template <class S, class T>
void write_cache(const Pages<S>& pages, const T* key, long key_stride, const T* value, long value_stride,
                 const int64_t* slots, long tokens) {
    const long size = pages.kv_heads * (pages.key_dim + pages.value_dim);
    for_each_item(ceil_div(tokens, PANEL), tokens * size > WORTH, [&](long block) {
        for (long h = 0; h < pages.kv_heads; h++)
            for (long t = block * PANEL; t < std::min<long>(tokens, (block + 1) * PANEL); t++)
                pages.write(slots[t], h, key + t * key_stride + h * pages.key_dim,
                            value + t * value_stride + h * pages.value_dim);
    });
}

// One product and sum of a rotation, rounded where the separate operations on `Work` values would round.
template <class Work>
QUIRE_INLINE F turn(F x, F cos, F y, F sin) {
    return rounded<Work>(add(rounded<Work>(mul(x, cos)), rounded<Work>(mul(y, sin))));
}

// x [dim] of one head -> out [dim]. Work is bf16 where both x and the angles are, else float.
template <class T, class A, class Work>
void rotate_halves(const T* x, const A* cos, const A* sin, long rotated, T* out) {
    const long half = rotated / 2;
    for (long i = 0; i < half; i += W) {
        const long n = half - i;
        auto get = [n](const auto* p) { return n >= W ? load(p) : load_some(p, n); };
        const F a = get(x + i), b = get(x + half + i);
        const F low = turn<Work>(a, get(cos + i), neg(b), get(sin + i));
        const F high = turn<Work>(b, get(cos + half + i), a, get(sin + half + i));
        if (n >= W) {
            store(out + i, low);
            store(out + half + i, high);
        } else {
            store_some(out + i, low, n);
            store_some(out + half + i, high, n);
        }
    }
}

template <class T, class A, class Work>
void rotate_neighbours(const T* x, const A* cos, const A* sin, long rotated, T* out) {
    auto round = [](float v) { return to_float(from_float<Work>(v)); };
    for (long i = 0; i < rotated; i += 2) {
        const float a = to_float(x[i]), b = to_float(x[i + 1]);
        out[i] = from_float<T>(round(round(a * to_float(cos[i])) + round(-b * to_float(sin[i]))));
        out[i + 1] = from_float<T>(round(round(b * to_float(cos[i + 1])) + round(a * to_float(sin[i + 1]))));
    }
}

template <class T, class A, class Work>
void rotary(const QuireRotary& call) {
    const T *query = static_cast<const T*>(call.query), *key = static_cast<const T*>(call.key);
    const T* value = static_cast<const T*>(call.value);
    const A *cos = static_cast<const A*>(call.cos), *sin = static_cast<const A*>(call.sin);
    T *query_out = static_cast<T*>(call.query_out), *key_out = static_cast<T*>(call.key_out);
    const long dim = call.dim, rotated = call.rotated;
    auto rotate = [&](const T* x, long t, T* out) {
        const A *c = cos + t * rotated, *s = sin + t * rotated;
        call.style == 0 ? rotate_halves<T, A, Work>(x, c, s, rotated, out)
                        : rotate_neighbours<T, A, Work>(x, c, s, rotated, out);
        std::memcpy(out + rotated, x + rotated, size_t(dim - rotated) * sizeof(T));
    };
    const long blocks = ceil_div(call.tokens, PANEL), heads = call.heads + call.kv_heads;
    const long parts = std::min(heads, ceil_div(team_size(), std::max(1l, blocks)));  // of the heads, where blocks are few
    struct Key;
    for_each_item(blocks * parts, call.tokens * heads * dim > WORTH, [&](long item) {
        T* turned = call.cache ? static_cast<T*>(scratch<Key>(dim * long(sizeof(T)))) : nullptr;
        const long block = item / parts, part = item % parts, end = heads * (part + 1) / parts;
        for (long t = block * PANEL; t < std::min<long>(call.tokens, (block + 1) * PANEL); t++) {
            long h = heads * part / parts;
            for (; h < std::min<long>(end, call.heads); h++)
                rotate(query + t * call.query_stride + h * dim, t, query_out + (t * call.heads + h) * dim);
            for (h -= call.heads; h < end - call.heads; h++) {
                const T* x = key + t * call.key_stride + h * dim;
                if (call.cache == nullptr) {
                    rotate(x, t, key_out + (t * call.kv_heads + h) * dim);
                    continue;
                }
                rotate(x, t, turned);
                const T* v = value + t * call.value_stride + h * call.cache->value_dim;
                if (call.cache->dtype == QUIRE_INT8)
                    Pages<int8_t>(*call.cache).write(call.slots[t], h, turned, v);
                else
                    Pages<T>(*call.cache).write(call.slots[t], h, turned, v);
            }
        }
    });
}

}  // namespace
}  // namespace quire

using namespace quire;

int64_t quire_page_size(int32_t dtype, int64_t page_size, int64_t kv_heads, int64_t key_dim, int64_t value_dim) {
    int64_t elements = 0;
    with_pages(QuireCache{nullptr, page_size, kv_heads, key_dim, value_dim, dtype, 0, 0},
               [&](const auto& pages) { elements = pages.page_elements(); });
    return elements;
}

void quire_write_cache(const QuireCache* cache, const void* key, int64_t key_stride, const void* value,
                       int64_t value_stride, const int64_t* slots, int64_t tokens) {
    with_pages(*cache, [&](const auto& pages) {
        using S = std::remove_pointer_t<decltype(pages.data)>;
        auto write = [&](auto zero) {
            using T = decltype(zero);
            write_cache(pages, static_cast<const T*>(key), key_stride, static_cast<const T*>(value), value_stride, slots,
                        tokens);
        };
        if constexpr (std::is_same_v<S, int8_t>)
            cache->rows == QUIRE_BFLOAT16 ? write(bf16{}) : write(0.0f);
        else
            write(S{});
    });
}

void quire_copy_pages(void* data, int64_t page_bytes, const int64_t* pairs, int64_t count) {
    char* pages = static_cast<char*>(data);
    for (int64_t i = 0; i < count; i++)
        if (pairs[2 * i] != pairs[2 * i + 1])
            std::memcpy(pages + pairs[2 * i + 1] * page_bytes, pages + pairs[2 * i] * page_bytes, size_t(page_bytes));
}

void quire_rotary(const QuireRotary* call) {
    const bool narrow = call->dtype == QUIRE_BFLOAT16, narrow_angles = call->angles_dtype == QUIRE_BFLOAT16;
    if (narrow && narrow_angles)
        rotary<bf16, bf16, bf16>(*call);
    else if (narrow)
        rotary<bf16, float, float>(*call);
    else if (narrow_angles)
        rotary<float, bf16, float>(*call);
    else
        rotary<float, float, float>(*call);
}
