// What works on one row at a time: norms and gated activations; rows.h has the rows themselves.
#include "rows.h"

#include "quire.h"

namespace quire {
namespace {

template <class Norm, class T>
void norm_rows(const Norm& norm, T* out, long rows) {
    const long block = std::max<long>(1, ROW_PART / std::max<long>(1, norm.dim));
    for_each_item((rows + block - 1) / block, rows * norm.dim > ROWS_WORTH, [&](long item) {
        for (long row = item * block; row < std::min(rows, (item + 1) * block); row++)
            norm.row(row, out + row * norm.dim);
    });
}

}  // namespace
}  // namespace quire

using namespace quire;

void quire_rms_norm(int32_t dtype, const void* x, int64_t stride, const void* residual, const void* weight, void* out,
                    void* total, int64_t rows, int64_t dim, float eps, int32_t style) {
    auto run = [&](auto zero) {
        using T = decltype(zero);
        const RmsNorm<T> norm{static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<const T*>(weight),
                              static_cast<T*>(total), stride, dim, eps, style};
        norm_rows(norm, static_cast<T*>(out), rows);
    };
    dtype == QUIRE_BFLOAT16 ? run(bf16{}) : run(0.0f);
}

void quire_layer_norm(int32_t dtype, const void* x, int64_t stride, const void* weight, const void* bias, void* out,
                      int64_t rows, int64_t dim, float eps) {
    auto run = [&](auto zero) {
        using T = decltype(zero);
        const LayerNorm<T> norm{static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<const T*>(bias),
                                stride, dim, eps};
        norm_rows(norm, static_cast<T*>(out), rows);
    };
    dtype == QUIRE_BFLOAT16 ? run(bf16{}) : run(0.0f);
}

void quire_gated(int32_t dtype, const void* gate, const void* up, int64_t stride, void* out, int64_t rows, int64_t dim,
                 int32_t activation) {
    auto run = [&](auto zero) {
        using T = decltype(zero);
        gated_rows(Gated<T>{static_cast<const T*>(gate), static_cast<const T*>(up), stride, dim, activation},
                   static_cast<T*>(out), rows);
    };
    dtype == QUIRE_BFLOAT16 ? run(bf16{}) : run(0.0f);
}
