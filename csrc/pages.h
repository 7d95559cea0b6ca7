// Where the keys and values of a layer lie. The unit is a group: 16 positions of one kv head, the keys as one panel of
// tile.h (positions are its columns), the values as panels of 16 value dimensions (positions are its steps):
//
//   page      [kv head][group of 16 positions]            a page is as many groups as page_size needs
//   group     [ keys: key_dim steps of 16 positions | values: panel 0 | panel 1 | ... ]
//
//   float     keys    step d:   K[d] of position 0 .. 15            values  panel e, step j:  V[16e .. 16e+15] of position j
//   bf16      keys    step d/2: K[d],K[d+1] of position 0, 1, ..    values  panel e, step j/2: for each of 16 dimensions
//                                                                           position j, position j+1
//   int8      as that of the two in which the level computes, followed by 16 float scales of keys and 16 of values
//
// key_dim is filled up to an even number for bf16 with zeros, value_dim to 16 with columns that nobody reads. With
// `shared` the values are the first value_dim elements of the keys and are not stored again.
#pragma once

#include <algorithm>
#include <type_traits>

#include "integers.h"
#include "quire.h"
#include "threads.h"
#include "tile.h"

namespace quire {

// What products with a cache of S are made of. Integers up to 127 are exact in either.
#if defined(QUIRE_NATIVE_DOT)
using WorkOfBytes = bf16;
#else
using WorkOfBytes = float;
#endif
template <class S>
using WorkOf = std::conditional_t<std::is_same_v<S, int8_t>, WorkOfBytes, S>;

template <class S>
struct Pages {
    using Work = WorkOf<S>;
    static constexpr bool BYTES = std::is_same_v<S, int8_t>;
    static constexpr long DEPTH = Dot<Work>::DEPTH, STEP_B = Dot<Work>::STEP_B;
    static constexpr long VALUE_PANEL = PANEL * PANEL;  // elements of one panel of values
    static constexpr long SCALES = BYTES ? 2 * PANEL * long(sizeof(float)) : 0;

    S* data;
    long page_size, kv_heads, key_dim, value_dim;
    bool shared;

    explicit Pages(const QuireCache& c)
        : data(static_cast<S*>(c.data)),
          page_size(c.page_size),
          kv_heads(c.kv_heads),
          key_dim(c.key_dim),
          value_dim(c.value_dim),
          shared(c.shared != 0) {}

    long key_steps() const { return ceil_div(key_dim, DEPTH); }
    long key_elements() const { return key_steps() * STEP_B; }
    long value_panels() const { return ceil_div(value_dim, PANEL); }
    long value_elements() const { return shared ? 0 : value_panels() * VALUE_PANEL; }
    long group_elements() const { return key_elements() + value_elements() + SCALES; }
    long head_groups() const { return ceil_div(page_size, PANEL); }
    long page_elements() const { return kv_heads * head_groups() * group_elements(); }

    // The group that holds `offset` of `page`.
    S* group(long page, long head, long offset) const {
        return data + page * page_elements() + (head * head_groups() + offset / PANEL) * group_elements();
    }
    // The scales of the keys of a group; those of the values follow.
    template <class P>
    auto* scales(P* group) const {
        using Float = std::conditional_t<std::is_const_v<P>, const float, float>;
        return reinterpret_cast<Float*>(group + key_elements() + value_elements());
    }

    // Inside a group: position j < 16, dimension d.
    static long key_at(long j, long d) { return d / DEPTH * STEP_B + j * DEPTH + d % DEPTH; }
    static long value_at(long j, long d) {
        return d / PANEL * VALUE_PANEL + j / DEPTH * STEP_B + d % PANEL * DEPTH + j % DEPTH;
    }

    // T is S, or any dtype where S is int8: then a key and a value are rounded, with a scale each.
    template <class T>
    void write(long slot, long head, const T* key, const T* value) const {
        const long offset = slot % page_size, j = offset % PANEL;
        S* to = group(slot / page_size, head, offset);
        if constexpr (BYTES) {
            struct Rounded;
            int8_t* q = static_cast<int8_t*>(scratch<Rounded>(std::max(key_dim, value_dim)));
            round_values(key, key_dim, q, scales(to) + j);
            put_key(to, j, q);
            if (shared) return;
            round_values(value, value_dim, q, scales(to) + PANEL + j);
            put_value(to + key_elements(), j, q);
        } else {
            put_key(to, j, key);
            if (!shared) put_value(to + key_elements(), j, value);
        }
    }

private:
    void put_key(S* keys, long j, const S* key) const {
        if (key_dim % DEPTH) keys[key_at(j, key_dim)] = S{};
        for (long s = 0; s < key_dim / DEPTH; s++)
            std::memcpy(keys + key_at(j, s * DEPTH), key + s * DEPTH, DEPTH * sizeof(S));
        if (key_dim % DEPTH) keys[key_at(j, key_dim - 1)] = key[key_dim - 1];
    }
    void put_value(S* values, long j, const S* value) const {
        for (long e = 0; e < value_dim; e += PANEL) {
            S* column = values + value_at(j, e);
            const long columns = std::min<long>(PANEL, value_dim - e);
            for (long d = 0; d < columns; d++) column[d * DEPTH] = value[e + d];
        }
    }
};

// Calls fn with the Pages of the cache's own dtype.
template <class Fn>
void with_pages(const QuireCache& cache, const Fn& fn) {
    if (cache.dtype == QUIRE_BFLOAT16)
        fn(Pages<bf16>(cache));
    else if (cache.dtype == QUIRE_INT8)
        fn(Pages<int8_t>(cache));
    else
        fn(Pages<float>(cache));
}

}  // namespace quire
