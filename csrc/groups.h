// Reading a cache for attention: where the keys and values of one step can be read as panels. What lies in pages as the
// products want it is read in its place; the rest is put together in memory of the thread: positions of pages that hold no
// whole groups, int8, bf16 that many rows want widened, values that are a part of the keys, and groups of which a part was
// never written.
#pragma once

#include "attention_plan.h"
#include "pages.h"

namespace quire {

constexpr long STEP_GROUPS = STEP / PANEL;

template <class K>
struct Groups {
    const K *keys[STEP_GROUPS], *values[STEP_GROUPS];
    const float *key_scales[STEP_GROUPS], *value_scales[STEP_GROUPS];  // only of int8
    const char* next[STEP_GROUPS];  // the groups of the next step as stored, to be fetched meanwhile
    long count = 0;
};

typedef int32_t Eight __attribute__((vector_size(32)));

// out[j][i] = in[i][j] for 8 by 8 words.
inline void transpose_eight(const int32_t* in, long in_stride, int32_t* out, long out_stride) {
    Eight a[8], b[8];
    for (int i = 0; i < 8; i++) std::memcpy(&a[i], in + i * in_stride, sizeof(Eight));
    for (int i = 0; i < 8; i += 2) {
        b[i] = QUIRE_SHUFFLE(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        b[i + 1] = QUIRE_SHUFFLE(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = QUIRE_SHUFFLE(b[i + j], b[i + 2 + j], 0, 1, 8, 9, 4, 5, 12, 13);
            a[i + 2 * j + 1] = QUIRE_SHUFFLE(b[i + j], b[i + 2 + j], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int j = 0; j < 4; j++) {
        b[j] = QUIRE_SHUFFLE(a[j], a[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        b[j + 4] = QUIRE_SHUFFLE(a[j], a[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int j = 0; j < 8; j++) std::memcpy(out + j * out_stride, &b[j], sizeof(Eight));
}

// S: the dtype of the cache. K: what the panels are made of, the work dtype of S or float.
template <class S, class K>
class GroupReader {
public:
    // Bytes that a reader needs as `memory`.
    static long bytes(const Pages<S>& pages) {
        return STEP_GROUPS * (padded(work_elements(pages) * long(sizeof(K))) + padded(pages.group_elements() * long(sizeof(S))));
    }

    GroupReader(const Pages<S>& pages, const int32_t* table, long head, void* memory)
        : pages_(pages), table_(table), head_(head), memory_(static_cast<char*>(memory)) {}

    // The step that begins at `start`, of which positions [from, to) are seen.
    Groups<K> read(long start, long from, long to) const {
        Groups<K> g;
        for (long p = start; p < std::min(to, start + STEP); p += PANEL, g.count++) {
            const long i = g.count, low = std::max(from - p, 0l), high = std::min<long>(to - p, PANEL);
            const bool whole = pages_.page_size % PANEL == 0 && high > low;
            const S* stored = whole ? in_place(p) : gather(p, low, high, i);
            K* work = reinterpret_cast<K*>(memory_ + i * padded(work_elements(pages_) * long(sizeof(K))));
            g.keys[i] = as_work(stored, pages_.key_elements(), work);
            g.values[i] = work += pages_.key_elements();
            if (pages_.shared) {
                transpose(g.keys[i], low, high, work);
            } else if (const S* values = stored + pages_.key_elements(); high - low < PANEL && whole) {
                copy_values(as_work(values, pages_.value_elements(), work), low, high, work);
            } else {
                g.values[i] = as_work(values, pages_.value_elements(), work);
            }
            if constexpr (Pages<S>::BYTES) {
                g.key_scales[i] = pages_.scales(stored);
                g.value_scales[i] = g.key_scales[i] + (pages_.shared ? 0 : PANEL);
            }
        }
        for (long i = 0; i < g.count; i++) {
            const long p = start + STEP + i * PANEL;
            const bool there = p < to && pages_.page_size % PANEL == 0;
            g.next[i] = there ? reinterpret_cast<const char*>(in_place(p)) : reinterpret_cast<const char*>(g.keys[i]);
        }
        return g;
    }

private:
    static long padded(long bytes) { return ceil_div(bytes, 64) * 64; }
    static long work_elements(const Pages<S>& pages) {
        return pages.key_elements() + pages.value_panels() * Pages<S>::VALUE_PANEL;
    }

    const S* in_place(long p) const { return pages_.group(table_[p / pages_.page_size], head_, p % pages_.page_size); }

    // Puts positions [low, high) of the group at p together, zeros elsewhere.
    const S* gather(long p, long low, long high, long index) const {
        char* memory = memory_ + STEP_GROUPS * padded(work_elements(pages_) * long(sizeof(K)));
        S* out = reinterpret_cast<S*>(memory + index * padded(pages_.group_elements() * long(sizeof(S))));
        std::memset(static_cast<void*>(out), 0, size_t(pages_.group_elements()) * sizeof(S));
        for (long q = low; q < high; q++) {
            const long offset = (p + q) % pages_.page_size, j = offset % PANEL;
            const S* in = pages_.group(table_[(p + q) / pages_.page_size], head_, offset);
            for (long d = 0; d < pages_.key_dim; d++) out[pages_.key_at(q, d)] = in[pages_.key_at(j, d)];
            const S* values = in + pages_.key_elements();
            for (long d = 0; d < (pages_.shared ? 0 : pages_.value_dim); d++)
                out[pages_.key_elements() + pages_.value_at(q, d)] = values[pages_.value_at(j, d)];
            if constexpr (Pages<S>::BYTES)
                for (long i : {0l, long(PANEL)}) pages_.scales(out)[i + q] = pages_.scales(in)[i + j];
        }
        return out;
    }

    // `count` stored elements as the products take them: where they are, or made at `out`.
    static const K* as_work(const S* stored, long count, K* out) {
        if constexpr (std::is_same_v<S, K>) {
            return stored;
        } else if constexpr (Pages<S>::BYTES) {
            for (long i = 0; i < count; i += W) store_narrow(out + i, load(stored + i));  // count is a multiple of 32
            return out;
        } else {
            widen(stored, count / Pages<S>::STEP_B, out);
            return out;
        }
    }

    // What a position outside [low, high) holds is unknown, and 0 * NaN is not 0: there shall be zeros. `values` may be at
    // `out` already.
    void copy_values(const K* values, long low, long high, K* out) const {
        constexpr long DEPTH = Dot<K>::DEPTH, STEP_B = Dot<K>::STEP_B;
        for (long e = 0; e < pages_.value_panels(); e++)
            for (long j = 0; j < PANEL; j += DEPTH, values += STEP_B, out += STEP_B) {
                if (j + DEPTH <= low || j >= high) {
                    std::memset(static_cast<void*>(out), 0, STEP_B * sizeof(K));
                    continue;
                }
                if (values != out) std::memcpy(static_cast<void*>(out), values, STEP_B * sizeof(K));
                for (long q = j; q < j + DEPTH; q++)
                    for (long d = q - j; d < STEP_B && (q < low || q >= high); d += DEPTH) out[d] = K{};
            }
    }

    // Values from the keys whose first part they are; zeros for positions outside [low, high).
    void transpose(const K* keys, long low, long high, K* out) const {
        constexpr long STEPS = PANEL / Dot<K>::DEPTH;  // of 16 dimensions
        alignas(64) int32_t rows[PANEL][STEPS];        // [position][words of 16 dimensions]
        for (long e = 0; e < pages_.value_panels(); e++, out += Pages<S>::VALUE_PANEL) {
            const auto* in = reinterpret_cast<const int32_t*>(keys + e * STEPS * Dot<K>::STEP_B);
            const long steps = std::min(STEPS, pages_.key_elements() / Dot<K>::STEP_B - e * STEPS);
            if (steps == STEPS) {
                for (long s = 0; s < STEPS; s += 8)
                    for (long j = 0; j < PANEL; j += 8) transpose_eight(in + s * PANEL + j, PANEL, &rows[j][s], STEPS);
            } else {
                for (long s = 0; s < STEPS; s++)
                    for (long j = 0; j < PANEL; j++) rows[j][s] = s < steps ? in[s * PANEL + j] : 0;
            }
            for (long j = 0; j < PANEL; j++)
                if (j < low || j >= high) std::memset(rows[j], 0, sizeof rows[j]);
            if constexpr (Dot<K>::DEPTH == 1) {
                std::memcpy(static_cast<void*>(out), rows, sizeof rows);
            } else {
                auto* words = reinterpret_cast<uint32_t*>(out);
                for (long j = 0; j < PANEL; j += 2, words += PANEL) {
                    uint16_t pair[2][PANEL];
                    std::memcpy(pair, rows[j], sizeof pair);
                    for (long d = 0; d < PANEL; d++) words[d] = uint32_t(pair[1][d]) << 16 | pair[0][d];
                }
            }
        }
    }

    const Pages<S>& pages_;
    const int32_t* table_;
    const long head_;
    char* const memory_;
};

}  // namespace quire
