// Causal attention over paged keys and values, decode and prefill rows in one family.
//
// A task is a few query rows of one sequence for one kv head: all query heads of that kv head by a few positions, so that
// every key that is read serves them all. Over its context a task walks in
//
//     splits of 512 positions    each with a softmax of its own (largest score, sum, weighted values), begun anew
//       steps of 64              scores S = Q K, softmax, O += P V; S and O in blocks that stay near
//         groups of 16           one panel of keys, one panel of steps of values: the products of tile.h
//
// In a cache of int8 the integers take part in the products as they are; the scale of a position is multiplied to its
// scores and to its weights.
//
// Splits and steps lie at fixed positions of the sequence, and splits are merged in ascending order. So the bits of a row
// do not depend on the batch, on how the prompt was cut, or on whether the splits of a task were done by one thread or by
// several. Scores are kept in base 2.
#include <cmath>
#include <limits>
#include <vector>

#include "groups.h"
#include "threads.h"

namespace quire {
namespace {

constexpr long SPLIT = 512;
constexpr long WORTH = 1 << 18;  // multiplications from which the team is woken
constexpr long TASK_ROWS = 32;
constexpr long SHARED_TASK_ROWS = 64;  // where values are made from keys, for all rows of a task at once
constexpr float LOG2_E = 1.44269504f;
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// Weights of one step: 64 per row, in the form of A of tile.h with the rows STEP_WEIGHTS apart.
template <class T>
constexpr int STEP_WEIGHTS = int(STEP / Dot<T>::DEPTH * Dot<T>::STEP_A);

// O[rows][panels * 16] += P[rows][groups * 16] * values, the values of group g being at values[g]. Meanwhile fetches the
// lines from next[g] on, `line` bytes apart.
template <class T, int ROWS, int PANELS>
struct AddValues {
    static void run(const typename Dot<T>::A* weights, const T* const* values, long groups, float* out, long stride,
                    const char* const* next, long line) {
        constexpr long PER_GROUP = PANEL / Dot<T>::DEPTH;
        Tile<T, ROWS, PANELS> tile;
        tile.read(out, stride);
        for (long g = 0; g < groups; g++) {
            const T* panels[PANELS];
            for (int p = 0; p < PANELS; p++) panels[p] = values[g] + p * Pages<T>::VALUE_PANEL;
            const auto* part = weights + g * PER_GROUP * Dot<T>::STEP_A;
            const char* fetch = next[g];
            for (long s = 0; s < PER_GROUP; s++) {
                for (int p = 0; p < PANELS; p++) prefetch(fetch + (p * PER_GROUP + s) * line);
                tile.template add_step<STEP_WEIGHTS<T>, 1>(part, panels, s);
            }
        }
        tile.write(out, stride);
    }
};

struct Task {
    int32_t sequence;
    int32_t first, count;           // positions among the new rows of the sequence
    int32_t head, heads;            // query heads among those of the kv head
    int32_t split_low, split_high;  // the splits to walk
    int32_t parts;                  // 1: write the result; else one of so many tasks that share a result
    int32_t part;                   // index of this task's first partial result
    int32_t counter;                // index of the counter that tells the last of them
    long rows() const { return long(count) * heads; }
};

// The softmax of some rows over some positions: out is not yet divided by sum.
struct State {
    float *out, *largest, *sum;
    long rows, columns;
    static long floats(long rows, long columns) { return rows * (columns + 2); }
    State(float* memory, long rows, long columns)
        : out(memory), largest(memory + rows * columns), sum(largest + rows), rows(rows), columns(columns) {}
    void clear() const {
        std::memset(out, 0, size_t(rows * columns) * sizeof(float));
        for (long r = 0; r < rows; r++) largest[r] = LOWEST, sum[r] = 0;
    }
};

float exp2_of(float x) {
    float lanes[W];
    store(lanes, exp2(set1(x)));
    return lanes[0];
}

void merge(const State& total, const State& part) {
    for (long r = 0; r < total.rows; r++) {
        if (part.largest[r] == LOWEST) continue;  // the row saw nothing there
        const float largest = std::max(total.largest[r], part.largest[r]);
        const float a = exp2_of(total.largest[r] - largest), b = exp2_of(part.largest[r] - largest);
        total.largest[r] = largest;
        total.sum[r] = total.sum[r] * a + part.sum[r] * b;
        float *out = total.out + r * total.columns, *more = part.out + r * total.columns;
        for (long i = 0; i < total.columns; i += W)
            store(out + i, fma(load(more + i), set1(b), mul(load(out + i), set1(a))));
    }
}

// Q: the dtype of queries and results. S: that of the cache. T: what the products are made of.
template <class Q, class S>
class Attention {
public:
    using T = WorkOf<S>;
    using A = typename Dot<T>::A;

    explicit Attention(const QuireAttention& call)
        : call_(call),
          pages_(*call.cache),
          heads_(call.heads / pages_.kv_heads),
          columns_(pages_.value_panels() * PANEL),
          most_rows_(pages_.shared ? SHARED_TASK_ROWS : TASK_ROWS) {}

    void run() {
        plan();
        std::vector<float> partial(size_t(parts_ * pages_.kv_heads) * size_t(State::floats(most_rows_, columns_)));
        std::vector<std::atomic<int>> finished(size_t(counters_ * pages_.kv_heads));
        for (auto& count : finished) count.store(0, std::memory_order_relaxed);
        const long items = long(tasks_.size()) * pages_.kv_heads;
        const long work = work_ * pages_.kv_heads * (pages_.key_dim + pages_.value_dim);
        for_each_item(items, items > 1 && work > WORTH, [&](long item) {
            const Task& task = tasks_[size_t(item / pages_.kv_heads)];
            const long head = item % pages_.kv_heads;
            if (task.parts == 1) return whole(task, head);
            part(task, head, partial.data(), finished[size_t(task.counter * pages_.kv_heads + head)]);
        });
    }

private:
    static constexpr bool BYTES = Pages<S>::BYTES;
    static constexpr long LINE = Pages<S>::STEP_B * long(sizeof(S));  // of one step of a panel, as stored

    long length(const Task& t) const { return call_.lengths[t.sequence]; }
    long new_rows(const Task& t) const { return call_.starts[t.sequence + 1] - call_.starts[t.sequence]; }
    // Row r of a task: the position it stands at, and the positions [low, position] that it sees.
    long position(const Task& t, long r) const { return length(t) - new_rows(t) + t.first + r / t.heads; }
    long low(long position) const {
        long low = 0;
        if (call_.window) low = std::max<long>(0, position + 1 - call_.window);
        if (call_.chunk) low = std::max<long>(low, position / call_.chunk * call_.chunk);
        return low;
    }

    // A task has some positions with all their heads, or if these are too many, one position with some of them.
    void plan() {
        const long per_task = std::max<long>(1, most_rows_ / heads_), head_cuts = ceil_div(heads_, most_rows_);
        for (int32_t s = 0; s < call_.sequences; s++) {
            const long rows = call_.starts[s + 1] - call_.starts[s];
            for (long tile = ceil_div(rows, per_task); tile-- > 0;)  // the longest first
                for (long cut = 0; cut < head_cuts; cut++) {
                    const long first = tile * per_task, head = heads_ * cut / head_cuts;
                    Task t{s, int32_t(first), int32_t(std::min(per_task, rows - first)), int32_t(head),
                           int32_t(heads_ * (cut + 1) / head_cuts - head), 0, 0, 1, 0, 0};
                    t.split_low = int32_t(low(position(t, 0)) / SPLIT);
                    t.split_high = int32_t(position(t, t.rows() - 1) / SPLIT + 1);
                    work_ += (t.split_high - t.split_low) * SPLIT * t.rows();
                    tasks_.push_back(t);
                }
        }
        if (long(tasks_.size()) * pages_.kv_heads < 8 * team_size()) cut_at_splits();
    }

    // Few tasks: let several threads share one, a split each.
    void cut_at_splits() {
        std::vector<Task> cut;
        for (Task t : tasks_) {
            const int32_t low = t.split_low, high = t.split_high;
            if (high - low > 1) {
                t.parts = high - low;
                t.part = int32_t(parts_);
                t.counter = int32_t(counters_++);
                parts_ += t.parts;
            }
            for (int32_t split = low; split < high; split++) {
                if (t.parts > 1) t.split_low = split, t.split_high = split + 1;
                cut.push_back(t);
                if (t.parts == 1) break;
                t.part++;
            }
        }
        tasks_ = std::move(cut);
    }

    // ---- the working memory of a task; see `allot`
    struct Memory {
        A *query, *weights;
        float *scores, *lanes, *split, *total;
        void* spare;  // of the GroupReader
    };

    Memory allot() const {
        struct Use;
        const long rows = most_rows_, state = State::floats(rows, columns_);
        const long floats = rows * packed_row<T>(pages_.key_dim) + rows * STEP_WEIGHTS<T> + rows * STEP + rows * W + 2 * state;
        float* p = static_cast<float*>(scratch<Use>((floats + 96) * 4 + GroupReader<S>::bytes(pages_)));
        auto take = [&p](long count) {
            float* taken = p;
            p += ceil_div(count, 16) * 16;
            return taken;
        };
        Memory m;
        m.query = reinterpret_cast<A*>(take(rows * packed_row<T>(pages_.key_dim)));
        m.weights = reinterpret_cast<A*>(take(rows * STEP_WEIGHTS<T>));
        m.scores = take(rows * STEP);
        m.lanes = take(rows * W);
        m.split = take(state);
        m.total = take(state);
        m.spare = p;
        return m;
    }

    void whole(const Task& t, long head) const {
        const Memory m = allot();
        pack_query(t, head, m);
        const State total(m.total, t.rows(), columns_);
        total.clear();
        for (long split = t.split_low; split < t.split_high; split++) {
            const State state(m.split, total.rows, columns_);
            walk(t, head, split, m, state);
            merge(total, state);
        }
        finish(t, head, total);
    }

    void part(const Task& t, long head, float* partial, std::atomic<int>& finished) const {
        const Memory m = allot();
        pack_query(t, head, m);
        const long rows = t.rows(), size = State::floats(most_rows_, columns_);
        auto state_of = [&](long index) { return State(partial + (index * pages_.kv_heads + head) * size, rows, columns_); };
        walk(t, head, t.split_low, m, state_of(t.part));
        if (finished.fetch_add(1, std::memory_order_acq_rel) != t.parts - 1) return;
        const State total(m.total, rows, columns_);
        total.clear();
        const long first_split = low(position(t, 0)) / SPLIT;
        for (long i = 0; i < t.parts; i++) merge(total, state_of(t.part - (t.split_low - first_split) + i));
        finish(t, head, total);
    }

    // The row of queries and results, and the head, of row r of a task.
    long row_of(const Task& t, long r) const { return call_.starts[t.sequence] + t.first + r / t.heads; }
    long head_of(const Task& t, long head, long r) const { return head * heads_ + t.head + r % t.heads; }

    // The rows of a task go through the products in tiles of at most MAX_ROWS<T>.
    template <class Fn>
    void for_each_tile(long rows, const Fn& fn) const {
        const long tiles = ceil_div(rows, MAX_ROWS<T>);
        for (long i = 0; i < tiles; i++) fn(rows * i / tiles, rows * (i + 1) / tiles);
    }

    void pack_query(const Task& t, long head, const Memory& m) const {
        for_each_tile(t.rows(), [&](long r0, long r1) {
            pack_rows<T>(
                [&](int i) {
                    return static_cast<const Q*>(call_.query) + row_of(t, r0 + i) * call_.query_stride +
                           head_of(t, head, r0 + i) * pages_.key_dim;
                },
                int(r1 - r0), pages_.key_dim, m.query + r0 * packed_row<T>(pages_.key_dim));
        });
    }

    // One split of a task.
    void walk(const Task& t, long head, long split, const Memory& m, const State& state) const {
        state.clear();
        const long rows = state.rows;
        for (long i = 0; i < rows * W; i += W) store(m.lanes + i, zero());
        const long from = low(position(t, 0)), to = position(t, rows - 1) + 1;
        const long end = std::min(to, (split + 1) * SPLIT);
        const GroupReader<S> reader(pages_, call_.tables + t.sequence * call_.table_stride, head, m.spare);
        for (long start = std::max(split * SPLIT, from / STEP * STEP); start < end; start += STEP) {
            const Groups<T> g = reader.read(start, from, to);
            for_each_tile(rows, [&](long r0, long r1) {
                if (position(t, r1 - 1) < start || low(position(t, r0)) >= start + STEP) return;
                score(g, m, r0, r1);
                for (long r = r0; r < r1; r++) soften(t, r, start, g, m, state);
                add_values(g, m, r0, r1, state);
            });
        }
        for (long r = 0; r < rows; r++) state.sum[r] = reduce_add(load(m.lanes + r * W));
    }

    // Both products fetch the next step, if they are the first of a task to pass this one.
    void score(const Groups<T>& g, const Memory& m, long r0, long r1) const {
        const A* query = m.query + r0 * packed_row<T>(pages_.key_dim);
        for (long i = 0, width; i < g.count; i += width) {
            width = panels_for<T>(int(r1 - r0));
            while (width > g.count - i) width /= 2;
            Ahead ahead{{}, r0 == 0 ? LINE : 0};
            for (long p = 0; p < width; p++) ahead.from[p] = g.next[i + p];
            kernel_for<Multiply, T>(r1 - r0, width)(query, g.keys + i, pages_.key_steps(), m.scores + r0 * STEP + i * PANEL,
                                                    true, ahead);
        }
    }

    // Scores of one row and step -> weights 2^(score - largest so far); when the largest grows, what was summed shrinks.
    void soften(const Task& t, long r, long start, const Groups<T>& g, const Memory& m, const State& state) const {
        const long at = position(t, r), lowest = low(at), groups = g.count;
        A* weights = m.weights + r * STEP_WEIGHTS<T>;
        if (at < start || lowest >= start + STEP) {
            std::memset(static_cast<void*>(weights), 0, size_t(STEP_WEIGHTS<T>) * sizeof(A));
            return;
        }
        const bool partial = at < start + groups * PANEL - 1 || lowest > start;
        float* scores = m.scores + r * STEP;
        F most = set1(LOWEST);
        for (long i = 0; i < groups * PANEL; i += W) {
            F x = mul(load(scores + i), set1(call_.scale));
            if constexpr (BYTES) x = mul(x, load(g.key_scales[i / PANEL] + i % PANEL));
            if (call_.softcap != 0) x = mul(set1(call_.softcap), tanh(div(x, set1(call_.softcap))));
            x = mul(x, set1(LOG2_E));
            if (partial) x = keep_range(x, int(start + i), int(lowest), int(at + 1), set1(LOWEST));
            store(scores + i, x);
            most = max(most, x);
        }
        const float largest = reduce_max(most);
        F lanes = load(m.lanes + r * W);
        if (largest > state.largest[r]) {
            const F shrink = exp2(set1(state.largest[r] - largest));
            state.largest[r] = largest;
            lanes = mul(lanes, shrink);
            float* out = state.out + r * columns_;
            for (long i = 0; i < columns_; i += W) store(out + i, mul(load(out + i), shrink));
        }
        const F base = set1(state.largest[r]);
        for (long i = 0; i < groups * PANEL; i += W) {
            F weight = exp2(sub(load(scores + i), base));
            lanes = add(lanes, weight);
            if constexpr (BYTES) {
                weight = mul(weight, load(g.value_scales[i / PANEL] + i % PANEL));
                // What was never written may have any scale.
                if (partial) weight = keep_range(weight, int(start + i), int(lowest), int(at + 1), zero());
            }
            if constexpr (Dot<T>::STEP_A == Dot<T>::DEPTH)
                store(reinterpret_cast<float*>(weights) + i, weight);
            else
                store_narrow(reinterpret_cast<bf16*>(weights) + i, weight);
        }
        store(m.lanes + r * W, lanes);
    }

    void add_values(const Groups<T>& g, const Memory& m, long r0, long r1, const State& state) const {
        const bool fetch = r0 == 0 && !pages_.shared;
        for (long p = 0, width; p < pages_.value_panels(); p += width) {
            width = panels_for<T>(int(r1 - r0));
            while (width > pages_.value_panels() - p) width /= 2;
            const T* values[STEP_GROUPS];
            const char* next[STEP_GROUPS];
            for (long i = 0; i < g.count; i++) {
                values[i] = g.values[i] + p * Pages<S>::VALUE_PANEL;
                next[i] = g.next[i] + (pages_.key_elements() + p * Pages<S>::VALUE_PANEL) * long(sizeof(S));
            }
            kernel_for<AddValues, T>(r1 - r0, width)(m.weights + r0 * STEP_WEIGHTS<T>, values, g.count,
                                                     state.out + r0 * columns_ + p * PANEL, columns_, next, fetch ? LINE : 0);
        }
    }

    // Divide by the sum and write the rows out; a sink is one more score without a value.
    void finish(const Task& t, long head, const State& total) const {
        for (long r = 0; r < total.rows; r++) {
            const long row = row_of(t, r), h = head_of(t, head, r);
            float factor = 1, sum = total.sum[r];
            if (call_.sinks != nullptr) {
                const float sink = call_.sinks[h] * LOG2_E, largest = std::max(sink, total.largest[r]);
                factor = exp2_of(total.largest[r] - largest);
                sum = sum * factor + exp2_of(sink - largest);
            }
            const F scale = set1(factor / sum);
            const float* in = total.out + r * columns_;
            Q* out = static_cast<Q*>(call_.out) + (row * call_.heads + h) * pages_.value_dim;
            for (long i = 0; i < pages_.value_dim; i += W) {
                const long rest = pages_.value_dim - i;
                const F x = mul(load(in + i), scale);
                rest >= W ? store(out + i, x) : store_some(out + i, x, rest);
            }
        }
    }

    const QuireAttention& call_;
    const Pages<S> pages_;
    const long heads_;    // query heads of one kv head
    const long columns_;  // value_dim filled up to whole panels
    const long most_rows_;
    std::vector<Task> tasks_;
    long parts_ = 0, counters_ = 0, work_ = 0;
};

}  // namespace
}  // namespace quire

void quire_attention(const QuireAttention* call) {
    using namespace quire;
    const QuireCache& cache = *call->cache;
    if (cache.dtype == QUIRE_BFLOAT16)
        Attention<bf16, bf16>(*call).run();
    else if (cache.dtype == QUIRE_FLOAT32)
        Attention<float, float>(*call).run();
    else if (cache.rows == QUIRE_BFLOAT16)
        Attention<bf16, int8_t>(*call).run();
    else
        Attention<float, int8_t>(*call).run();
}
