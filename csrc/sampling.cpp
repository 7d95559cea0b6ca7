// Choosing tokens: arg-max, counter-based random numbers, log-probabilities, and top-k / top-p / min-p sampling
// without sorting the vocabulary. The rules are those of kernels/reference.py.
//
// A row is looked at in full only by passes over vectors: the largest logit, then a bound that no kept token is below.
//
//     top-k      the k-th largest of the maxima of chunks of 64 logits is a lower bound of the k-th largest logit
//     top-p      the mass of the weights above a few fixed levels is summed beside the total; the first level whose mass
//                suffices is the bound
//     neither    weights are summed in blocks, and only the block in which the draw falls is searched
//
// The few candidates above the bound are then treated exactly. Several rows are shared out among the team, one by one; of
// fewer rows than threads the passes are, part by part. What a block holds is summed alone and the blocks in their order,
// so that either way gives the same bits.
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
constexpr long PART = 16 * BLOCK;  // of a row, for one thread
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

template <class T>
QUIRE_INLINE F get(const T* p, long n) {
    return n >= W ? load(p) : keep_range(load_some(p, n), 0, 0, int(n), set1(LOWEST));
}

// fn(first, end) for all parts of a row.
template <class Fn>
void for_each_part(long n, bool team, const Fn& fn) {
    for_each_item((n + PART - 1) / PART, team, [&](long part) { fn(part * PART, std::min(n, (part + 1) * PART)); });
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

// The largest logit of a row or of a part of it: of equals the first.
struct Peak {
    float largest = LOWEST;
    long at = 0;
    bool numbers = true;  // none is NaN

    // Nothing can be chosen from a row with NaN or +inf in it, nor from one that is -inf throughout.
    bool usable() const { return numbers && largest > LOWEST && largest < -LOWEST; }
};

template <class T>
Peak peak_of(const T* x, long first, long end) {
    constexpr unsigned ALL = (1u << W) - 1;
    constexpr int CHAINS = 4;
    Peak peak;
    unsigned numbers = ALL;
    long found = first;
    for (long block = first; block < end; block += BLOCK) {
        F most[CHAINS] = {set1(LOWEST), set1(LOWEST), set1(LOWEST), set1(LOWEST)};
        auto look = [&](F v, F& chain) {
            numbers &= mask_ge(v, v);
            chain = max(v, chain);
        };
        const long block_end = std::min(end, block + BLOCK);
        long i = block;
        for (; i + CHAINS * W <= block_end; i += CHAINS * W)
            for (int j = 0; j < CHAINS; j++) look(load(x + i + j * W), most[j]);
        for (; i < block_end; i += W) look(get(x + i, block_end - i), most[0]);
        const float largest = reduce_max(max(max(most[0], most[1]), max(most[2], most[3])));
        if (largest > peak.largest) peak.largest = largest, found = block;
    }
    peak.numbers = numbers == ALL;
    for_each_at_least(x + found, std::min(BLOCK, end - found), peak.largest, [&](long i) {
        peak.at = found + i;
        return true;
    });
    return peak;
}

// Of a whole row, on the team where the row is alone.
template <class T>
Peak peak_of_row(const T* x, long n, bool team) {
    if (!team) return peak_of(x, 0, n);
    static thread_local std::vector<Peak> peaks;
    peaks.resize(size_t((n + PART - 1) / PART));
    Peak* parts = peaks.data();
    for_each_part(n, team, [&](long first, long end) { parts[first / PART] = peak_of(x, first, end); });
    Peak best = parts[0];
    for (const Peak& part : peaks) {
        if (part.largest > best.largest) best.largest = part.largest, best.at = part.at;
        best.numbers = best.numbers && part.numbers;
    }
    return best;
}

struct Rule {
    float temperature;
    int64_t top_k;
    float top_p, min_p;
    double uniform;
};

// One row: `weigh` turns logits into weights, 1 for the largest, and 0 below min_p of it. `team`: the row has it to itself.
template <class T>
class Draw {
public:
    Draw(const T* logits, long vocab, const Rule& rule, bool team)
        : x_(logits), n_(vocab), rule_(rule), team_(team), peak_(peak_of_row(logits, vocab, team)), largest_(peak_.largest) {}

    // The chosen id, or -1 where nothing can be chosen.
    int64_t run() {
        if (!peak_.usable()) return -1;
        if (rule_.temperature == 0) return peak_.at;
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

    float bound_of_top_k() {
        const long chunks = (n_ + CHUNK - 1) / CHUNK;
        if (rule_.top_k >= chunks) return LOWEST;
        maxima_.resize(size_t(chunks));
        float* most = maxima_.data();
        for_each_part(n_, team_, [&](long first, long end) {
            for (long i = first; i < end; i += CHUNK) most[i / CHUNK] = largest_of(x_ + i, std::min(CHUNK, end - i));
        });
        static thread_local std::vector<float> order;
        order = maxima_;
        std::nth_element(order.begin(), order.begin() + (rule_.top_k - 1), order.end(), std::greater<float>());
        return order[size_t(rule_.top_k - 1)];
    }

    float bound_of_top_p(double& total) const {
        constexpr int LEVELS = 3;
        constexpr float level[LEVELS] = {1.0f / 32, 1.0f / 1024, 1.0f / 65536};
        struct Mass {
            float all, above[LEVELS];
        };
        static thread_local std::vector<Mass> masses;  // of each block
        masses.resize(size_t((n_ + BLOCK - 1) / BLOCK));
        Mass* of_block = masses.data();
        for_each_part(n_, team_, [&](long first, long part_end) {
            for (long block = first; block < part_end; block += BLOCK) {
                F all = zero(), above[LEVELS] = {zero(), zero(), zero()};
                const long end = std::min(part_end, block + BLOCK);
                for (long i = block; i < end; i += W) {
                    const F w = weigh(get(x_ + i, end - i));
                    all = add(all, w);
                    for (int j = 0; j < LEVELS; j++) above[j] = add(above[j], select_lt(w, set1(level[j]), zero(), w));
                }
                Mass& mass = of_block[block / BLOCK];
                mass.all = reduce_add(all);
                for (int j = 0; j < LEVELS; j++) mass.above[j] = reduce_add(above[j]);
            }
        });
        double mass[LEVELS] = {};
        total = 0;
        for (const Mass& block : masses) {
            total += block.all;
            for (int j = 0; j < LEVELS; j++) mass[j] += block.above[j];
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
            if (!maxima_.empty() && maxima_[size_t(c / CHUNK)] < bound) continue;
            for_each_at_least(x_ + c, std::min(CHUNK, n_ - c), bound, [&](long i) {
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

    // Keep the largest until they hold `wanted`. The cut falls into one of many ranges of logits, and only those in it
    // are sorted.
    void keep_top_p(double wanted) {
        static thread_local std::vector<int32_t> order;  // of those in the range of the cut
        double mass[RANGES] = {};
        const long count = long(ids_.size());
        for (long i = 0; i < count; i++) mass[range_of(logits_[size_t(i)])] += weights_[size_t(i)];
        long range = 0;
        double before = 0;  // of what stands before the range
        while (range < RANGES - 1 && before + mass[range] < wanted) before += mass[range++];
        order.clear();
        for (long i = 0; i < count; i++) {
            const long found = range_of(logits_[size_t(i)]);
            if (found == range) order.push_back(int32_t(i));
            if (found > range) weights_[size_t(i)] = 0;
        }
        std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
            return logits_[size_t(a)] != logits_[size_t(b)] ? logits_[size_t(a)] > logits_[size_t(b)] : a < b;
        });
        size_t cut = 0;
        while (cut < order.size() && ((cut == 0 && range == 0) || before < wanted))
            before += weights_[size_t(order[cut++])];
        for (size_t i = cut; i < order.size(); i++) weights_[size_t(order[i])] = 0;
    }

    // Ranges in which a weight falls by e^(1/32), from the largest logit on; the last one takes all that are below.
    static constexpr long RANGES = 512;
    long range_of(float logit) const {
        const float steps = (largest_ - logit) * (32.0f / std::max(rule_.temperature, 1e-30f));
        return steps < float(RANGES - 1) ? long(steps) : RANGES - 1;
    }

    // ---- draws: the first id whose running sum exceeds uniform * sum

    int64_t draw_from_candidates() const {
        double total = 0, sum = 0;
        for (float w : weights_) total += w;
        for (size_t i = 0; i < ids_.size(); i++)
            if ((sum += weights_[i]) > rule_.uniform * total) return ids_[i];
        return peak_.at;  // a number that is not below 1
    }

    int64_t draw_from_all() const {
        static thread_local std::vector<double> sums;  // up to and with each block
        sums.resize(size_t((n_ + BLOCK - 1) / BLOCK));
        double* of_block = sums.data();
        for_each_part(n_, team_, [&](long first, long part_end) {
            for (long block = first; block < part_end; block += BLOCK) {
                F all = zero();
                const long end = std::min(part_end, block + BLOCK);
                for (long i = block; i < end; i += W) all = add(all, weigh(get(x_ + i, end - i)));
                of_block[block / BLOCK] = reduce_add(all);
            }
        });
        double sum = 0;
        for (double& block : sums) block = sum += block;
        const double wanted = rule_.uniform * sum;
        const size_t found = size_t(std::upper_bound(sums.begin(), sums.end(), wanted) - sums.begin());
        if (found == sums.size()) return peak_.at;  // a number that is not below 1
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
    const bool team_;
    const Peak peak_;
    const float largest_;
    std::vector<int32_t> ids_;
    std::vector<float> logits_, weights_;
    std::vector<float> maxima_;  // of chunks, where the bound of top-k looked at them
};

// out[r] = choose(r, team) for all rows: one after the other with the team, or one for each of its threads.
template <class Choose>
void for_each_choice(long rows, long vocab, int64_t* out, const Choose& choose) {
    const bool worth = rows * vocab > 1 << 14, alone = rows < team_size();
    for_each_item(rows, worth && !alone, [&](long r) { out[r] = choose(r, worth && alone); });
}

template <class T>
void argmax(const T* logits, long stride, int64_t* out, long rows, long vocab) {
    for_each_choice(rows, vocab, out, [&](long r, bool team) {
        const Peak peak = peak_of_row(logits + r * stride, vocab, team);
        return peak.usable() ? int64_t(peak.at) : -1;
    });
}

template <class T>
void sample(const T* logits, long stride, int64_t* out, long rows, long vocab, const Rule* rules) {
    for_each_choice(rows, vocab, out, [&](long r, bool team) {
        return Draw<T>(logits + r * stride, vocab, rules[r], team).run();
    });
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
    static thread_local std::vector<Rule> rules;
    rules.clear();
    for (int64_t r = 0; r < rows; r++) rules.push_back({temperature[r], top_k[r], top_p[r], min_p[r], uniform[r]});
    dtype == QUIRE_BFLOAT16 ? sample(static_cast<const bf16*>(logits), stride, out, rows, vocab, rules.data())
                            : sample(static_cast<const float*>(logits), stride, out, rows, vocab, rules.data());
}

void quire_rank(const QuireRank* call) { call->dtype == QUIRE_BFLOAT16 ? rank<bf16>(*call) : rank<float>(*call); }
