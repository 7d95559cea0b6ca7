// What works on one row at a time: norms and gated activations. Rounding to bf16 happens where the separate PyTorch
// operations round; see kernels/reference.py.
#include <algorithm>
#include <cmath>

#include "quire.h"
#include "simd.h"
#include "threads.h"

namespace quire {
namespace {

constexpr long WORTH = 1 << 15;  // elements from which the team is woken

// fn(i, n) for each vector of a row: n >= W is a whole one, else the last n elements.
template <class Fn>
QUIRE_INLINE void for_each_vector(long dim, const Fn& fn) {
    long i = 0;
    for (; i + W <= dim; i += W) fn(i, long(W));
    if (i < dim) fn(i, dim - i);
}
template <class T>
QUIRE_INLINE F get(const T* p, long n) {
    return n >= W ? load(p) : load_some(p, n);
}
template <class T>
QUIRE_INLINE void put(T* p, F x, long n) {
    n >= W ? store(p, x) : store_some(p, x, n);
}

// fn(row) over all rows, a few rows per item.
template <class Fn>
void for_each_row(long rows, long dim, const Fn& fn) {
    const long block = std::max<long>(1, WORTH / 8 / std::max<long>(1, dim));
    for_each_item((rows + block - 1) / block, rows * dim > WORTH, [&](long item) {
        for (long row = item * block; row < std::min(rows, (item + 1) * block); row++) fn(row);
    });
}

// Sum of term(i, n) over the vectors of a row, with four sums in flight.
template <class Term>
QUIRE_INLINE float sum_row(long dim, const Term& term) {
    F sums[4] = {zero(), zero(), zero(), zero()};
    for_each_vector(dim, [&](long i, long n) {
        F& sum = sums[i / W % 4];
        sum = add(sum, term(i, n));
    });
    return reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

enum NormStyle { DOWN_THEN_SCALE, SCALE_THEN_DOWN, PLUS_ONE, NO_WEIGHT };

template <class T>
void rms_norm(const T* x, long stride, const T* residual, const T* weight, T* out, T* total, long rows, long dim,
              float eps, int style) {
    for_each_row(rows, dim, [&](long row) {
        const T* in = x + row * stride;
        T* to = out + row * dim;
        if (residual != nullptr) {
            T* sum = total + row * dim;
            for_each_vector(dim, [&](long i, long n) {
                put(sum + i, add(get(in + i, n), get(residual + row * dim + i, n)), n);
            });
            in = sum;
        }
        const float squares = sum_row(dim, [&](long i, long n) {
            const F v = get(in + i, n);
            return mul(v, v);
        });
        const F scale = set1(1.0f / std::sqrt(squares / float(dim) + eps));
        for_each_vector(dim, [&](long i, long n) {
            F v = mul(get(in + i, n), scale);
            if (style == DOWN_THEN_SCALE)
                v = mul(get(weight + i, n), rounded<T>(v));
            else if (style == SCALE_THEN_DOWN)
                v = mul(get(weight + i, n), v);
            else if (style == PLUS_ONE)
                v = mul(add(set1(1.0f), get(weight + i, n)), v);
            put(to + i, v, n);
        });
    });
}

template <class T>
void layer_norm(const T* x, long stride, const T* weight, const T* bias, T* out, long rows, long dim, float eps) {
    for_each_row(rows, dim, [&](long row) {
        const T* in = x + row * stride;
        T* to = out + row * dim;
        const F mean = set1(sum_row(dim, [&](long i, long n) { return get(in + i, n); }) / float(dim));
        const float squares = sum_row(dim, [&](long i, long n) {
            F v = sub(get(in + i, n), mean);
            if (n < W) v = keep_range(v, 0, 0, int(n), zero());
            return mul(v, v);
        });
        const F scale = set1(1.0f / std::sqrt(squares / float(dim) + eps));
        for_each_vector(dim, [&](long i, long n) {
            F v = mul(sub(get(in + i, n), mean), scale);
            if (weight != nullptr) v = mul(v, get(weight + i, n));
            if (bias != nullptr) v = add(v, get(bias + i, n));
            put(to + i, v, n);
        });
    });
}

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

template <class T, int ACTIVATION>
void gated(const T* gate, const T* up, long stride, T* out, long rows, long dim) {
    for_each_row(rows, dim, [&](long row) {
        for_each_vector(dim, [&](long i, long n) {
            const F g = rounded<T>(activate<ACTIVATION>(get(gate + row * stride + i, n)));
            put(out + row * dim + i, mul(g, get(up + row * stride + i, n)), n);
        });
    });
}

template <class T>
void gated_by(int activation, const T* gate, const T* up, long stride, T* out, long rows, long dim) {
    switch (activation) {
        case SILU: return gated<T, SILU>(gate, up, stride, out, rows, dim);
        case GELU: return gated<T, GELU>(gate, up, stride, out, rows, dim);
        case GELU_TANH: return gated<T, GELU_TANH>(gate, up, stride, out, rows, dim);
        case RELU: return gated<T, RELU>(gate, up, stride, out, rows, dim);
        case RELU2: return gated<T, RELU2>(gate, up, stride, out, rows, dim);
        case SIGMOID: return gated<T, SIGMOID>(gate, up, stride, out, rows, dim);
        case QUICK_GELU: return gated<T, QUICK_GELU>(gate, up, stride, out, rows, dim);
    }
}

}  // namespace
}  // namespace quire

using namespace quire;

void quire_rms_norm(int32_t dtype, const void* x, int64_t stride, const void* residual, const void* weight, void* out,
                    void* total, int64_t rows, int64_t dim, float eps, int32_t style) {
    auto run = [&](auto zero) {
        using T = decltype(zero);
        rms_norm(static_cast<const T*>(x), stride, static_cast<const T*>(residual), static_cast<const T*>(weight),
                 static_cast<T*>(out), static_cast<T*>(total), rows, dim, eps, style);
    };
    dtype == QUIRE_BFLOAT16 ? run(bf16{}) : run(0.0f);
}

void quire_layer_norm(int32_t dtype, const void* x, int64_t stride, const void* weight, const void* bias, void* out,
                      int64_t rows, int64_t dim, float eps) {
    auto run = [&](auto zero) {
        using T = decltype(zero);
        layer_norm(static_cast<const T*>(x), stride, static_cast<const T*>(weight), static_cast<const T*>(bias),
                   static_cast<T*>(out), rows, dim, eps);
    };
    dtype == QUIRE_BFLOAT16 ? run(bf16{}) : run(0.0f);
}

void quire_gated(int32_t dtype, const void* gate, const void* up, int64_t stride, void* out, int64_t rows, int64_t dim,
                 int32_t activation) {
    auto run = [&](auto zero) {
        using T = decltype(zero);
        gated_by(activation, static_cast<const T*>(gate), static_cast<const T*>(up), stride, static_cast<T*>(out), rows,
                 dim);
    };
    dtype == QUIRE_BFLOAT16 ? run(bf16{}) : run(0.0f);
}
