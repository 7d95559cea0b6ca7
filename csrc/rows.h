// One row of a norm or of a gated activation: for rows.cpp, and for linear layers that make their rows on the way in.
// Rounding to bf16 happens where the separate PyTorch operations round; see kernels/reference.py.
//
// Loops work on copies of what they need: a store could change anything that lies in memory.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"
#include "threads.h"

namespace quire {

constexpr long ROW_PART = 2048;        // elements of one item
constexpr long ROWS_WORTH = 1 << 12;  // elements from which the team is woken

// fn(i, n) for each vector of [first, end): n >= W is a whole one, else the last n elements.
template <class Fn>
QUIRE_INLINE void for_each_vector(long first, long end, const Fn& fn) {
    long i = first;
    for (; i + W <= end; i += W) fn(i, long(W));
    if (i < end) fn(i, end - i);
}
template <class T>
QUIRE_INLINE F get(const T* p, long n) {
    return n >= W ? load(p) : load_some(p, n);
}
template <class T>
QUIRE_INLINE void put(T* p, F x, long n) {
    n >= W ? store(p, x) : store_some(p, x, n);
}

// Sum of term(i, n) over the vectors of a row, with four sums in flight.
template <class Term>
QUIRE_INLINE float sum_row(long dim, const Term& term) {
    F sums[4] = {zero(), zero(), zero(), zero()};
    long i = 0;
    for (; i + 4 * W <= dim; i += 4 * W)
        for (int j = 0; j < 4; j++) sums[j] = add(sums[j], term(i + j * W, long(W)));
    for (int j = 0; i < dim; j++, i += W) sums[j] = add(sums[j], term(i, dim - i));
    return reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

enum NormStyle { DOWN_THEN_SCALE, SCALE_THEN_DOWN, PLUS_ONE, NO_WEIGHT };

template <class T, int STYLE>
QUIRE_INLINE F scaled(F v, const T* weight, long i, long n) {
    if (STYLE == DOWN_THEN_SCALE) return mul(get(weight + i, n), rounded<T>(v));
    if (STYLE == SCALE_THEN_DOWN) return mul(get(weight + i, n), v);
    if (STYLE == PLUS_ONE) return mul(add(set1(1.0f), get(weight + i, n)), v);
    return v;
}

// residual: null, or added to x first, the sum going to total.
template <class T>
struct RmsNorm {
    const T *x, *residual, *weight;
    T* total;
    long stride, dim;
    float eps;
    int style;

    void row(long row, T* to) const {
        switch (style) {
            case DOWN_THEN_SCALE: return make<DOWN_THEN_SCALE>(row, to);
            case SCALE_THEN_DOWN: return make<SCALE_THEN_DOWN>(row, to);
            case PLUS_ONE: return make<PLUS_ONE>(row, to);
            default: return make<NO_WEIGHT>(row, to);
        }
    }

private:
    template <int STYLE>
    void make(long row, T* to) const {
        const long n = dim;
        const T *in = x + row * stride, *w = weight;
        if (residual != nullptr) {
            const T *a = in, *b = residual + row * n;
            T* sum = total + row * n;
            for_each_vector(0, n, [=](long i, long n) { put(sum + i, add(get(a + i, n), get(b + i, n)), n); });
            in = sum;
        }
        const float squares = sum_row(n, [=](long i, long n) {
            const F v = get(in + i, n);
            return mul(v, v);
        });
        const F scale = set1(1.0f / std::sqrt(squares / float(n) + eps));
        for_each_vector(0, n, [=](long i, long n) {
            put(to + i, scaled<T, STYLE>(mul(get(in + i, n), scale), w, i, n), n);
        });
    }
};

template <class T>
struct LayerNorm {
    const T *x, *weight, *bias;
    long stride, dim;
    float eps;

    void row(long row, T* to) const {
        const T *in = x + row * stride, *w = weight, *b = bias;
        const F mean = set1(sum_row(dim, [=](long i, long n) { return get(in + i, n); }) / float(dim));
        const float squares = sum_row(dim, [=](long i, long n) {
            F v = sub(get(in + i, n), mean);
            if (n < W) v = keep_range(v, 0, 0, int(n), zero());
            return mul(v, v);
        });
        const F scale = set1(1.0f / std::sqrt(squares / float(dim) + eps));
        for_each_vector(0, dim, [=](long i, long n) {
            F v = mul(sub(get(in + i, n), mean), scale);
            if (w != nullptr) v = mul(v, get(w + i, n));
            if (b != nullptr) v = add(v, get(b + i, n));
            put(to + i, v, n);
        });
    }
};

// ---- activations

enum Activation { SILU, GELU, GELU_TANH, RELU, RELU2, SIGMOID, QUICK_GELU };

QUIRE_INLINE F one_plus_exp_neg(F x) { return add(set1(1.0f), exp(neg(x))); }

// erfc(z) / 2 for z >= 0 with a relative error of about 1e-7 everywhere: t e^(-z^2 + polynomial(t)), t = 1 / (1 + z / 2).
QUIRE_INLINE F half_erfc(F z) {
    const F t = div(set1(1.0f), fma(z, set1(0.5f), set1(1.0f)));
    F p = fma(t, set1(0.17087277f), set1(-0.82215223f));
    for (float c : {1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f, 0.09678418f, 0.37409196f, 1.00002368f,
                    -1.26551223f})
        p = fma(p, t, set1(c));
    return mul(mul(set1(0.5f), t), exp(sub(p, mul(z, z))));
}

template <int ACTIVATION>
QUIRE_INLINE F activate(F x) {
    if (ACTIVATION == SILU) return div(x, one_plus_exp_neg(x));
    if (ACTIVATION == GELU) {
        const F tail = mul(x, half_erfc(mul(max(x, neg(x)), set1(0.707106781f))));
        return select_lt(x, zero(), tail, sub(x, tail));
    }
    if (ACTIVATION == GELU_TANH) {  // x / 2 (1 + tanh(u)) = x / (1 + e^(-2u))
        const F u = mul(mul(x, set1(0.797884561f)), fma(mul(x, x), set1(0.044715f), set1(1.0f)));
        return div(x, one_plus_exp_neg(add(u, u)));
    }
    if (ACTIVATION == RELU) return max(zero(), x);
    if (ACTIVATION == RELU2) {
        const F positive = max(zero(), x);
        return mul(positive, positive);
    }
    if (ACTIVATION == SIGMOID) return div(set1(1.0f), one_plus_exp_neg(x));
    return div(x, one_plus_exp_neg(mul(x, set1(1.702f))));
}

// activation(gate) * up
template <class T>
struct Gated {
    const T *gate, *up;
    long stride, dim;
    int activation;

    // Elements [first, end) of a row, to to[0 .. end - first).
    void part(long row, long first, long end, T* to) const {
        const T *g = gate + row * stride + first, *u = up + row * stride + first;
        switch (activation) {
            case SILU: return make<SILU>(g, u, end - first, to);
            case GELU: return make<GELU>(g, u, end - first, to);
            case GELU_TANH: return make<GELU_TANH>(g, u, end - first, to);
            case RELU: return make<RELU>(g, u, end - first, to);
            case RELU2: return make<RELU2>(g, u, end - first, to);
            case SIGMOID: return make<SIGMOID>(g, u, end - first, to);
            case QUICK_GELU: return make<QUICK_GELU>(g, u, end - first, to);
        }
    }

private:
    template <int ACTIVATION>
    static void make(const T* g, const T* u, long count, T* to) {
        for_each_vector(0, count, [=](long i, long n) {
            put(to + i, mul(rounded<T>(activate<ACTIVATION>(get(g + i, n))), get(u + i, n)), n);
        });
    }
};

template <class T>
void gated_rows(const Gated<T>& gated, T* out, long rows) {
    const long dim = gated.dim, parts = std::max<long>(1, (dim + ROW_PART - 1) / ROW_PART);
    for_each_item(rows * parts, rows * dim > ROWS_WORTH, [&](long item) {
        const long row = item / parts, first = item % parts * ROW_PART;
        gated.part(row, first, std::min(dim, first + ROW_PART), out + row * dim + first);
    });
}

}  // namespace quire
