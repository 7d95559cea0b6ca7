// Where the keys and values of a layer lie. The unit is a group: 16 positions of one kv head, the keys as one panel of
// tile.h (positions are its columns), the values as panels of 16 value dimensions (positions are its steps):
//
//   page      [kv head][group of 16 positions]            a page is as many groups as page_size needs
//   group     [ keys: key_dim steps of 16 positions | values: panel 0 | panel 1 | ... ]
//
//   float     keys    step d:   K[d] of position 0 .. 15            values  panel e, step j:  V[16e .. 16e+15] of position j
//   bf16      keys    step d/2: K[d],K[d+1] of position 0, 1, ..    values  panel e, step j/2: for each of 16 dimensions
//                                                                           position j, position j+1
//
// key_dim is filled up to an even number for bf16 with zeros, value_dim to 16 with columns that nobody reads.
#pragma once

#include <algorithm>

#include "quire.h"
#include "tile.h"

namespace quire {

template <class T>
struct Pages {
    T* data;
    long page_size, kv_heads, key_dim, value_dim;

    explicit Pages(const QuireCache& c)
        : data(static_cast<T*>(c.data)),
          page_size(c.page_size),
          kv_heads(c.kv_heads),
          key_dim(c.key_dim),
          value_dim(c.value_dim) {}

    static constexpr long DEPTH = Dot<T>::DEPTH;
    static constexpr long VALUE_PANEL = PANEL * PANEL;  // elements of one panel of values

    long key_steps() const { return ceil_div(key_dim, DEPTH); }
    long key_elements() const { return key_steps() * Dot<T>::STEP_B; }
    long value_panels() const { return ceil_div(value_dim, PANEL); }
    long group_elements() const { return key_elements() + value_panels() * VALUE_PANEL; }
    long head_groups() const { return ceil_div(page_size, PANEL); }
    long page_elements() const { return kv_heads * head_groups() * group_elements(); }

    // The group that holds `offset` of `page`.
    T* group(long page, long head, long offset) const {
        return data + page * page_elements() + (head * head_groups() + offset / PANEL) * group_elements();
    }

    // Inside a group: position j < 16, dimension d.
    static long key_at(long j, long d) { return d / DEPTH * Dot<T>::STEP_B + j * DEPTH + d % DEPTH; }
    static long value_at(long j, long d) {
        return d / PANEL * VALUE_PANEL + j / DEPTH * Dot<T>::STEP_B + d % PANEL * DEPTH + j % DEPTH;
    }

    void write(long slot, long head, const T* key, const T* value) const {
        const long offset = slot % page_size, j = offset % PANEL;
        T* keys = group(slot / page_size, head, offset);
        T* values = keys + key_elements();
        if (key_dim % DEPTH) keys[key_at(j, key_dim)] = T{};
        for (long s = 0; s < key_dim / DEPTH; s++)
            std::memcpy(keys + key_at(j, s * DEPTH), key + s * DEPTH, DEPTH * sizeof(T));
        if (key_dim % DEPTH) keys[key_at(j, key_dim - 1)] = key[key_dim - 1];
        for (long e = 0; e < value_dim; e += PANEL) {
            T* column = values + value_at(j, e);
            const long columns = std::min<long>(PANEL, value_dim - e);
            for (long d = 0; d < columns; d++) column[d * DEPTH] = value[e + d];
        }
    }
};

}  // namespace quire
