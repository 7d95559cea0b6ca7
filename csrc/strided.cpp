// What a program does between the kernels: sums and products of tensors that lie anyhow, copies, rows by their numbers.
// The bits are those of PyTorch: computed in float32, rounded once.
#include <algorithm>
#include <cstring>

#include "program.h"
#include "simd.h"
#include "threads.h"

namespace quire {
namespace {

constexpr long WORTH = 1 << 15;  // elements from which the team is woken

// fn(i, j, k) for the outer three dimensions, several rows per item.
template <class Fn>
void for_each_line(const int64_t* sizes, const Fn& fn) {
    const long lines = sizes[0] * sizes[1] * sizes[2], length = std::max<int64_t>(1, sizes[3]);
    const long block = std::max<long>(1, WORTH / 8 / length);
    for_each_item((lines + block - 1) / block, lines * length > WORTH, [&](long item) {
        for (long line = item * block; line < std::min(lines, (item + 1) * block); line++)
            fn(line / (sizes[1] * sizes[2]), line / sizes[2] % sizes[1], line % sizes[2]);
    });
}

long offset(const int64_t* strides, long i, long j, long k) { return i * strides[0] + j * strides[1] + k * strides[2]; }

template <class T>
QUIRE_INLINE F get(const T* p, long stride, long n) {
    if (stride == 0) return set1(to_float(*p));
    if (stride == 1) return n >= W ? load(p) : load_some(p, n);
    float values[W] = {};
    for (long i = 0; i < n; i++) values[i] = to_float(p[i * stride]);
    return load(values);
}

template <class T>
QUIRE_INLINE void put(T* p, long stride, F x, long n) {
    if (stride == 1) return n >= W ? store(p, x) : store_some(p, x, n);
    float values[W];
    store(values, x);
    for (long i = 0; i < n; i++) p[i * stride] = from_float<T>(values[i]);
}

template <int KIND>
QUIRE_INLINE F combine(F a, F b) {
    if (KIND == QUIRE_ADD) return add(a, b);
    if (KIND == QUIRE_SUB) return sub(a, b);
    if (KIND == QUIRE_MUL) return mul(a, b);
    return div(a, b);
}

template <int KIND, class A, class B, class O>
void run(const QuireStrided& call) {
    const long size = call.sizes[3], sa = call.a_strides[3], sb = call.b_strides[3], so = call.out_strides[3];
    for_each_line(call.sizes, [&](long i, long j, long k) {
        const A* a = static_cast<const A*>(call.a) + offset(call.a_strides, i, j, k);
        const B* b = KIND == QUIRE_COPY ? nullptr : static_cast<const B*>(call.b) + offset(call.b_strides, i, j, k);
        O* out = static_cast<O*>(call.out) + offset(call.out_strides, i, j, k);
        for (long x = 0; x < size; x += W) {
            const long n = std::min<long>(W, size - x);
            F value = get(a + x * sa, sa, n);
            if (KIND != QUIRE_COPY) value = combine<KIND>(value, get(b + x * sb, sb, n));
            put(out + x * so, so, value, n);
        }
    });
}

template <int KIND, class A, class B>
void by_out(const QuireStrided& call) {
    call.out_dtype == QUIRE_BFLOAT16 ? run<KIND, A, B, bf16>(call) : run<KIND, A, B, float>(call);
}

template <int KIND, class A>
void by_b(const QuireStrided& call) {
    if (KIND == QUIRE_COPY || call.b_dtype != QUIRE_BFLOAT16)
        by_out<KIND, A, float>(call);
    else
        by_out<KIND, A, bf16>(call);
}

template <int KIND>
void by_a(const QuireStrided& call) {
    call.a_dtype == QUIRE_BFLOAT16 ? by_b<KIND, bf16>(call) : by_b<KIND, float>(call);
}

template <class T>
void move(const QuireMove& call) {
    const long size = call.sizes[3], sf = call.from_strides[3], st = call.to_strides[3];
    for_each_line(call.sizes, [&](long i, long j, long k) {
        const T* from = static_cast<const T*>(call.from) + offset(call.from_strides, i, j, k);
        T* to = static_cast<T*>(call.to) + offset(call.to_strides, i, j, k);
        if (sf == 1 && st == 1)
            std::memcpy(to, from, size_t(size) * sizeof(T));
        else
            for (long x = 0; x < size; x++) to[x * st] = from[x * sf];
    });
}

}  // namespace
}  // namespace quire

using namespace quire;

void quire_strided(const QuireStrided* call) {
    switch (call->kind) {
        case QUIRE_COPY: return by_a<QUIRE_COPY>(*call);
        case QUIRE_ADD: return by_a<QUIRE_ADD>(*call);
        case QUIRE_SUB: return by_a<QUIRE_SUB>(*call);
        case QUIRE_MUL: return by_a<QUIRE_MUL>(*call);
        case QUIRE_DIV: return by_a<QUIRE_DIV>(*call);
    }
}

void quire_move(const QuireMove* call) {
    switch (call->bytes) {
        case 1: return move<uint8_t>(*call);
        case 2: return move<uint16_t>(*call);
        case 4: return move<uint32_t>(*call);
        case 8: return move<uint64_t>(*call);
    }
}

int32_t quire_gather_rows(const void* table, int64_t stride, int64_t height, const int64_t* indices, void* out,
                          int64_t rows, int64_t bytes) {
    for (int64_t row = 0; row < rows; row++) {
        if (indices[row] < 0 || indices[row] >= height) return 1;
        std::memcpy(static_cast<char*>(out) + row * bytes, static_cast<const char*>(table) + indices[row] * stride,
                    size_t(bytes));
    }
    return 0;
}
