// Scores: a copy of logits in float32, and what is done to it before a token is chosen: tokens that a grammar forbids, and
// penalties for what was said. The rules are those of kernels/choosing.py.
#include <algorithm>
#include <limits>
#include <vector>

#include "quire.h"
#include "simd.h"
#include "threads.h"

namespace quire {
namespace {

constexpr long PART = 1 << 13;   // tokens of a row that are one item
constexpr long WORTH = 1 << 15;  // tokens from which the team is woken
constexpr int WORD = 32;         // tokens of a word of a mask

// fn(row, first, end) for the parts of all rows.
template <class Fn>
void for_each_part(long rows, long vocab, const Fn& fn) {
    const long parts = (vocab + PART - 1) / PART;
    for_each_item(rows * parts, rows * vocab > WORTH, [&](long item) {
        const long first = item % parts * PART;
        fn(item / parts, first, std::min(vocab, first + PART));
    });
}

template <class T>
void copy_scores(const T* logits, long stride, float* out, long rows, long vocab) {
    for_each_part(rows, vocab, [=](long row, long first, long end) {
        const T* from = logits + row * stride;
        float* to = out + row * vocab;
        long i = first;
        for (; i + W <= end; i += W) store(to + i, load(from + i));
        if (i < end) store_some(to + i, load_some(from + i, end - i), end - i);
    });
}

// Tokens [first, end) of a row; `first` is the beginning of a word.
void forbid(float* x, const int32_t* allowed, long first, long end) {
    const F never = set1(-std::numeric_limits<float>::infinity());
    for (long i = first; i < end; i += W) {
        const F bias = select_bits(uint32_t(allowed[i / WORD]) >> i % WORD, zero(), never);
        const long n = end - i;
        n >= W ? store(x + i, add(load(x + i), bias)) : store_some(x + i, add(load_some(x + i, n), bias), n);
    }
}

// Lowers what one row said before. `counts` is zero for every token, before and after.
void penalize(const QuirePenalties& call, long i, int32_t* counts) {
    float* x = call.logits + call.rows[i] * call.vocab;
    const int32_t* said = call.tokens + call.slots[i] * call.width;
    const long first = call.firsts[i], end = call.ends[i];
    auto valid = [&](long at) { return said[at] >= 0 && said[at] < call.vocab; };
    const float repetition = call.repetition[i], presence = call.presence[i], frequency = call.frequency[i];
    if (repetition != 1) {
        for (long at = 0; at < end; at++) {
            if (!valid(at) || counts[said[at]]++ != 0) continue;
            float& score = x[said[at]];
            score = score > 0 ? score / repetition : score * repetition;
        }
        for (long at = 0; at < end; at++)
            if (valid(at)) counts[said[at]] = 0;
    }
    if (presence == 0 && frequency == 0) return;
    for (long at = first; at < end; at++)
        if (valid(at)) counts[said[at]]++;
    for (long at = first; at < end; at++) {
        if (!valid(at) || counts[said[at]] == 0) continue;
        x[said[at]] -= presence + frequency * float(counts[said[at]]);
        counts[said[at]] = 0;
    }
}

}  // namespace
}  // namespace quire

using namespace quire;

void quire_scores(int32_t dtype, const void* logits, int64_t stride, float* out, int64_t rows, int64_t vocab) {
    dtype == QUIRE_BFLOAT16 ? copy_scores(static_cast<const bf16*>(logits), stride, out, rows, vocab)
                            : copy_scores(static_cast<const float*>(logits), stride, out, rows, vocab);
}

void quire_forbid(float* scores, const int32_t* allowed, int64_t words, const int64_t* rows, int64_t count, int64_t vocab) {
    for_each_part(count, vocab, [=](long i, long first, long end) {
        forbid(scores + rows[i] * vocab, allowed + i * words, first, end);
    });
}

void quire_penalize(const QuirePenalties* call) {
    int64_t work = 0;
    for (int64_t i = 0; i < call->count; i++) work += call->ends[i];
    for_each_item(call->count, work > 1 << 14, [&](long i) {
        static thread_local std::vector<int32_t> counts;
        if (long(counts.size()) < call->vocab) counts.resize(size_t(call->vocab));
        penalize(*call, i, counts.data());
    });
}
