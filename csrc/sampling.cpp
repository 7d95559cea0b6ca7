// Choosing tokens: arg-max, counter-based random numbers, penalties, log-probabilities, and top-k / top-p / min-p sampling
// without sorting the vocabulary. The rules are those of kernels/reference.py.
//
// A row is looked at in full only by passes over vectors: the largest logit, then a bound that no kept token is below.
//
//     top-k      the k-th largest of the maxima of chunks of 64 logits is a lower bound of the k-th largest logit
//     top-p      the mass of the weights above a few fixed levels is summed beside the total; the first level whose mass
//                suffices is the bound
//     neither    weights are summed in blocks, and only the block in which the draw falls is searched
//
// The few candidates above the bound are then treated exactly.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "quire.h"
#include "simd.h"
#include "threads.h"

namespace quire {
namespace {

constexpr long CHUNK = 64;
constexpr long BLOCK = 1024;
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

template <class T>
QUIRE_INLINE F get(const T* p, long n) {
    return n >= W ? load(p) : keep_range(load_some(p, n), 0, 0, int(n), set1(LOWEST));
}

template <class T>
float largest_of(const T* x, long n) {
    F most[4] = {set1(LOWEST), set1(LOWEST), set1(LOWEST), set1(LOWEST)};
    for (long i = 0; i < n; i += W) most[i / W % 4] = max(get(x + i, n - i), most[i / W % 4]);
    return reduce_max(max(max(most[0], most[1]), max(most[2], most[3])));
}

// fn(i) for every x[i] >= bound, ascending, until fn returns true.
template <class T, class Fn>
void for_each_at_least(const T* x, long n, float bound, const Fn& fn) {
    for (long i = 0; i < n; i += W)
        for (unsigned mask = mask_ge(get(x + i, n - i), set1(bound)); mask != 0; mask &= mask - 1) {
            const long at = i + __builtin_ctz(mask);
            if (at < n && fn(at)) return;
        }
}

template <class T>
int64_t first_largest(const T* x, long n) {
    int64_t found = 0;
    for_each_at_least(x, n, largest_of(x, n), [&](long i) {
        found = i;
        return true;
    });
    return found;
}

struct Rule {
    float temperature;
    int64_t top_k;
    float top_p, min_p;
    double uniform;
};

// One row: `weigh` turns logits into weights, 1 for the largest, and 0 below min_p of it.
template <class T>
class Draw {
public:
    Draw(const T* logits, long vocab, const Rule& rule) : x_(logits), n_(vocab), rule_(rule) {
        largest_ = largest_of(logits, vocab);
    }

    int64_t run() {
        const bool few = rule_.top_k > 0 && rule_.top_k < n_, share = rule_.top_p < 1;
        if (!few && !share) return draw_from_all();
        double total = 0;
        collect(few ? bound_of_top_k() : bound_of_top_p(total));
        if (few) {
            keep_top_k();
            for (float w : weights_) total += w;
        }
        if (share) keep_top_p(rule_.top_p * total);
        return draw_from_candidates();
    }

private:
    F weigh(F logits) const {
        const F scaled = div(sub(logits, set1(largest_)), set1(rule_.temperature));
        const F w = select_lt(scaled, set1(-87.0f), zero(), exp(scaled));
        return select_lt(w, set1(rule_.min_p), zero(), w);
    }

    // ---- bounds

    float bound_of_top_k() const {
        const long chunks = (n_ + CHUNK - 1) / CHUNK;
        if (rule_.top_k >= chunks) return LOWEST;
        static thread_local std::vector<float> most;
        most.resize(size_t(chunks));
        for (long c = 0; c < chunks; c++) most[size_t(c)] = largest_of(x_ + c * CHUNK, std::min(CHUNK, n_ - c * CHUNK));
        std::nth_element(most.begin(), most.begin() + (rule_.top_k - 1), most.end(), std::greater<float>());
        return most[size_t(rule_.top_k - 1)];
    }

    float bound_of_top_p(double& total) const {
        constexpr int LEVELS = 3;
        constexpr float level[LEVELS] = {1.0f / 32, 1.0f / 1024, 1.0f / 65536};
        double mass[LEVELS] = {};
        total = 0;
        for (long block = 0; block < n_; block += BLOCK) {
            F all = zero(), above[LEVELS] = {zero(), zero(), zero()};
            const long end = std::min(n_, block + BLOCK);
            for (long i = block; i < end; i += W) {
                const F w = weigh(get(x_ + i, end - i));
                all = add(all, w);
                for (int j = 0; j < LEVELS; j++) above[j] = add(above[j], select_lt(w, set1(level[j]), zero(), w));
            }
            total += reduce_add(all);
            for (int j = 0; j < LEVELS; j++) mass[j] += reduce_add(above[j]);
        }
        // The margins keep what rounding could move on the safe side: too many candidates are never wrong.
        for (int j = 0; j < LEVELS; j++)
            if (mass[j] >= rule_.top_p * total * 1.0001) return largest_ + rule_.temperature * std::log(level[j] * 0.99f);
        return LOWEST;
    }

    // ---- candidates: ids ascending, their logits and weights

    void collect(float bound) {
        ids_.clear();
        logits_.clear();
        for (long c = 0; c < n_; c += CHUNK) {
            const long end = std::min(CHUNK, n_ - c);
            for_each_at_least(x_ + c, end, bound, [&](long i) {
                ids_.push_back(int32_t(c + i));
                logits_.push_back(to_float(x_[c + i]));
                return false;
            });
        }
        const long count = long(ids_.size());
        weights_.resize(size_t(count));
        for (long i = 0; i < count; i += W) {
            const F w = weigh(get(logits_.data() + i, count - i));
            count - i >= W ? store(&weights_[size_t(i)], w) : store_some(&weights_[size_t(i)], w, count - i);
        }
    }

    void keep_top_k() {
        if (rule_.top_k >= long(ids_.size())) return;
        static thread_local std::vector<float> order;
        order = logits_;
        std::nth_element(order.begin(), order.begin() + (rule_.top_k - 1), order.end(), std::greater<float>());
        const float least = order[size_t(rule_.top_k - 1)];
        for (size_t i = 0; i < ids_.size(); i++)
            if (logits_[i] < least) weights_[i] = 0;
    }

    // Keep the largest until they hold `wanted`; halving the range in which the cut lies costs two passes in all.
    void keep_top_p(double wanted) {
        static thread_local std::vector<int32_t> order;
        order.resize(ids_.size());
        for (size_t i = 0; i < order.size(); i++) order[i] = int32_t(i);
        auto before = [&](int32_t a, int32_t b) {
            return logits_[size_t(a)] != logits_[size_t(b)] ? logits_[size_t(a)] > logits_[size_t(b)] : a < b;
        };
        long low = 0, high = long(order.size());
        double mass = 0;  // of what stands before `low`
        while (high - low > 32) {
            const long middle = (low + high) / 2;
            std::nth_element(order.begin() + low, order.begin() + middle, order.begin() + high, before);
            double half = 0;
            for (long i = low; i < middle; i++) half += weights_[size_t(order[size_t(i)])];
            if (mass + half >= wanted) {
                high = middle;
            } else {
                mass += half;
                low = middle;
            }
        }
        std::sort(order.begin() + low, order.begin() + high, before);
        long cut = low;
        while (cut < high && (cut == 0 || mass < wanted)) mass += weights_[size_t(order[size_t(cut++)])];
        for (size_t i = size_t(cut); i < order.size(); i++) weights_[size_t(order[i])] = 0;
    }

    // ---- draws: the first id whose running sum exceeds uniform * sum

    int64_t draw_from_candidates() const {
        double total = 0, sum = 0;
        for (float w : weights_) total += w;
        for (size_t i = 0; i < ids_.size(); i++)
            if ((sum += weights_[i]) > rule_.uniform * total) return ids_[i];
        return first_largest(x_, n_);  // only where the logits are not numbers
    }

    int64_t draw_from_all() const {
        static thread_local std::vector<double> sums;  // up to and with each block
        sums.clear();
        double sum = 0;
        for (long block = 0; block < n_; block += BLOCK) {
            F all = zero();
            const long end = std::min(n_, block + BLOCK);
            for (long i = block; i < end; i += W) all = add(all, weigh(get(x_ + i, end - i)));
            sums.push_back(sum += reduce_add(all));
        }
        const double wanted = rule_.uniform * sum;
        const size_t found = size_t(std::upper_bound(sums.begin(), sums.end(), wanted) - sums.begin());
        if (found == sums.size()) return first_largest(x_, n_);  // only where the logits are not numbers
        sum = found == 0 ? 0 : sums[found - 1];
        int64_t last = 0;
        const long block = long(found) * BLOCK, end = std::min(n_, block + BLOCK);
        for (long i = block; i < end; i += W) {
            float lanes[W];
            store(lanes, weigh(get(x_ + i, end - i)));
            for (long j = 0; j < std::min<long>(W, end - i); j++) {
                if (lanes[j] > 0) last = i + j;
                if ((sum += lanes[j]) > wanted) return i + j;
            }
        }
        return last;  // the sum of the block was rounded otherwise than its terms one by one
    }

    const T* x_;
    const long n_;
    const Rule rule_;
    float largest_;
    std::vector<int32_t> ids_;
    std::vector<float> logits_, weights_;
};

template <class T>
void argmax(const T* logits, long stride, int64_t* out, long rows, long vocab) {
    for_each_item(rows, rows * vocab > 1 << 16, [&](long r) { out[r] = first_largest(logits + r * stride, vocab); });
}

// Whether the largest of the logits is a finite number and none is NaN.
template <class T>
bool usable(const T* x, long n) {
    constexpr unsigned ALL = (1u << W) - 1;
    F most = set1(LOWEST);
    for (long i = 0; i < n; i += W) {
        const F v = get(x + i, n - i);
        if (mask_ge(v, v) != ALL) return false;
        most = max(v, most);
    }
    const float largest = reduce_max(most);
    return largest > LOWEST && largest < -LOWEST;
}

// The ids of the `count` largest, the largest first, of equals the lowest id. Zeros where too many are NaN.
template <class T>
void best_of(const T* x, long n, long count, int64_t* out) {
    static thread_local std::vector<float> most;
    static thread_local std::vector<int64_t> found;
    const long chunks = (n + CHUNK - 1) / CHUNK;
    float bound = LOWEST;
    if (count < chunks) {  // no more than `count` chunks hold a logit above the bound, and `count` of them reach it
        most.resize(size_t(chunks));
        for (long c = 0; c < chunks; c++) most[size_t(c)] = largest_of(x + c * CHUNK, std::min(CHUNK, n - c * CHUNK));
        std::nth_element(most.begin(), most.begin() + (count - 1), most.end(), std::greater<float>());
        bound = most[size_t(count - 1)];
    }
    found.clear();
    for_each_at_least(x, n, bound, [&](long i) {
        found.push_back(i);
        return false;
    });
    const long kept = std::min(count, long(found.size()));
    std::partial_sort(found.begin(), found.begin() + kept, found.end(), [x](int64_t a, int64_t b) {
        const float left = to_float(x[a]), right = to_float(x[b]);
        return left != right ? left > right : a < b;
    });
    std::fill(std::copy(found.begin(), found.begin() + kept, out), out + count, 0);
}

template <class T>
double log_sum(const T* x, long n) {
    const F largest = set1(largest_of(x, n));
    double sum = 0;
    for (long block = 0; block < n; block += BLOCK) {
        F all = zero();
        const long end = std::min(n, block + BLOCK);
        for (long i = block; i < end; i += W) all = add(all, exp(sub(get(x + i, end - i), largest)));
        sum += reduce_add(all);
    }
    return double(reduce_max(largest)) + std::log(sum);
}

template <class T>
void rank(const QuireRank& call) {
    for_each_item(call.rows, call.rows * call.vocab > 1 << 14, [&](long r) {
        const T* x = static_cast<const T*>(call.logits) + r * call.stride;
        const F picked = set1(to_float(x[call.chosen[r]]));
        int64_t rank = 0;
        for (long i = 0; i < call.vocab; i += W) {
            const long rest = call.vocab - i;
            const unsigned there = rest >= W ? ~0u : (1u << rest) - 1;
            rank += __builtin_popcount(mask_ge(get(x + i, rest), picked) & there);
        }
        call.ranks[r] = rank;
        call.log_sums[r] = log_sum(x, call.vocab);
        if (call.count > 0) best_of(x, call.vocab, call.count, call.best + r * call.count);
    });
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

uint64_t mix(uint64_t z) {  // the finalizer of splitmix64
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

}  // namespace
}  // namespace quire

using namespace quire;

void quire_argmax(int32_t dtype, const void* logits, int64_t stride, int64_t* out, int64_t rows, int64_t vocab) {
    dtype == QUIRE_BFLOAT16 ? argmax(static_cast<const bf16*>(logits), stride, out, rows, vocab)
                            : argmax(static_cast<const float*>(logits), stride, out, rows, vocab);
}

void quire_uniform(const int64_t* seeds, const int64_t* positions, double* out, int64_t rows) {
    constexpr uint64_t GOLDEN = 0x9e3779b97f4a7c15u;
    for (int64_t r = 0; r < rows; r++) {
        const uint64_t bits = mix(mix(uint64_t(seeds[r]) + GOLDEN) + (uint64_t(positions[r]) + 1) * GOLDEN);
        out[r] = double(bits >> 11) * 0x1p-53;
    }
}

void quire_sample(int32_t dtype, const void* logits, int64_t stride, const float* temperature, const int64_t* top_k,
                  const float* top_p, const float* min_p, const double* uniform, int64_t* out, int64_t rows,
                  int64_t vocab) {
    for_each_item(rows, rows * vocab > 1 << 14, [&](long r) {
        const Rule rule{temperature[r], top_k[r], top_p[r], min_p[r], uniform[r]};
        auto draw = [&](const auto* x) {
            return rule.temperature == 0 ? first_largest(x, vocab) : Draw<std::decay_t<decltype(*x)>>(x, vocab, rule).run();
        };
        out[r] = dtype == QUIRE_BFLOAT16 ? draw(static_cast<const bf16*>(logits) + r * stride)
                                         : draw(static_cast<const float*>(logits) + r * stride);
    });
}

void quire_usable(int32_t dtype, const void* logits, int64_t stride, uint8_t* out, int64_t rows, int64_t vocab) {
    for_each_item(rows, rows * vocab > 1 << 16, [&](long r) {
        out[r] = dtype == QUIRE_BFLOAT16 ? usable(static_cast<const bf16*>(logits) + r * stride, vocab)
                                         : usable(static_cast<const float*>(logits) + r * stride, vocab);
    });
}

void quire_rank(const QuireRank* call) { call->dtype == QUIRE_BFLOAT16 ? rank<bf16>(*call) : rank<float>(*call); }

void quire_penalize(const QuirePenalties* call) {
    int64_t work = 0;
    for (int64_t i = 0; i < call->count; i++) work += call->ends[i];
    for_each_item(call->count, work > 1 << 14, [&](long i) {
        static thread_local std::vector<int32_t> counts;
        if (long(counts.size()) < call->vocab) counts.resize(size_t(call->vocab));
        penalize(*call, i, counts.data());
    });
}
