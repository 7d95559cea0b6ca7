// Experts: many gated blocks of the same shape, of which each row uses a few, in one call.
//
//   rows of x         r0: e2 e5      r1: e5 e0      ...             each row names its experts and their weights
//   by expert         e0: r1         e2: r0         e5: r0 r1       rows of one expert lie side by side
//   blocks            down(activation(gate) * up) of each expert that has rows, as linear layers of their own
//   out               r0 = w0 * (e2 of r0) + w1 * (e5 of r0)        in the order in which the row names them, in float
//
// A row of a linear layer does not depend on its company, so neither does a row here.
#include <vector>

#include "quire.h"
#include "rows.h"
#include "simd.h"
#include "threads.h"

namespace quire {
namespace {

// Where the rows of each expert begin among all that are computed, and where each choice's row is; -1: nowhere.
struct Places {
    std::vector<int64_t> starts, of_choice;

    void find(const QuireExperts& call) {
        const int64_t choices = call.rows * call.choices;
        starts.assign(size_t(call.count) + 1, 0);
        of_choice.resize(size_t(choices));
        auto known = [&](int64_t expert) { return expert >= 0 && expert < call.count; };
        for (int64_t i = 0; i < choices; i++)
            if (known(call.chosen[i])) starts[size_t(call.chosen[i]) + 1]++;
        for (int64_t e = 0; e < call.count; e++) starts[size_t(e) + 1] += starts[size_t(e)];
        static thread_local std::vector<int64_t> next;
        next = starts;
        for (int64_t i = 0; i < choices; i++)
            of_choice[size_t(i)] = known(call.chosen[i]) ? next[size_t(call.chosen[i])]++ : -1;
    }
};

template <class T>
void block(const QuireExperts& call, const QuireExpert& expert, const T* x, int64_t stride, T* hidden, T* out, int64_t m) {
    const int64_t inner = call.inner, n = 2 * inner;
    if (call.up != nullptr) {
        quire_quantized_linear(call.up, call.dtype, x, stride, expert.up, expert.up_bias, hidden, m);
        quire_gated_quantized_linear(call.dtype, hidden, hidden + inner, n, m, inner, call.activation, call.down,
                                     expert.down, expert.down_bias, out);
        return;
    }
    struct Products;
    T* products = static_cast<T*>(scratch<Products>(m * inner * long(sizeof(T))));
    quire_linear(call.dtype, x, stride, expert.up, expert.up_bias, hidden, m, n, call.size);
    gated_rows(Gated<T>{hidden, hidden + inner, n, inner, call.activation}, products, m);
    quire_linear(call.dtype, products, inner, expert.down, expert.down_bias, out, m, call.size, inner);
}

template <class T>
void combine(const QuireExperts& call, const int64_t* places, const T* results) {
    const long size = call.size;
    for_each_item(call.rows, call.rows * call.choices * size > ROWS_WORTH, [&](long row) {
        T* out = static_cast<T*>(call.out) + row * size;
        for_each_vector(0, size, [&](long i, long n) {
            F sum = zero();
            for (long c = row * call.choices; c < (row + 1) * call.choices; c++)
                if (places[c] >= 0) sum = add(sum, mul(get(results + places[c] * size + i, n), set1(call.weights[c])));
            put(out + i, sum, n);
        });
    });
}

template <class T>
void experts(const QuireExperts& call) {
    static thread_local Places found;
    found.find(call);
    const int64_t *starts = found.starts.data(), *places = found.of_choice.data();
    const int64_t total = starts[call.count], size = call.size;
    int64_t most = 0;
    for (int64_t e = 0; e < call.count; e++) most = std::max(most, starts[e + 1] - starts[e]);
    struct Inputs;
    struct Hidden;
    struct Results;
    T* inputs = static_cast<T*>(scratch<Inputs>(total * size * long(sizeof(T))));
    T* hidden = static_cast<T*>(scratch<Hidden>(2 * most * call.inner * long(sizeof(T))));
    T* results = static_cast<T*>(scratch<Results>(total * size * long(sizeof(T))));
    const T* x = static_cast<const T*>(call.x);
    for (int64_t i = 0; i < call.rows * call.choices; i++)
        if (places[i] >= 0)
            std::memcpy(static_cast<void*>(inputs + places[i] * size), x + i / call.choices * call.x_stride,
                        size_t(size) * sizeof(T));
    for (int64_t e = 0; e < call.count; e++)
        if (const int64_t rows = starts[e + 1] - starts[e])
            block(call, call.experts[e], inputs + starts[e] * size, size, hidden, results + starts[e] * size, rows);
    combine(call, places, results);
}

}  // namespace
}  // namespace quire

using namespace quire;

void quire_experts(const QuireExperts* call) {
    call->dtype == QUIRE_BFLOAT16 ? experts<bf16>(*call) : experts<float>(*call);
}
