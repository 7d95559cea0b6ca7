// Causal attention over paged keys and values, decode and prefill rows in one family.
//
// A block is a few query rows of one sequence for one kv head: all query heads of that kv head by a few positions, so that
// every key that is read serves them all. Over its context a block walks in
//
//     splits of 512 positions    each with a softmax of its own (largest score, sum, weighted values), begun anew
//       steps of 64              scores S = Q K, softmax, O += P V; S and O in blocks that stay near
//         groups of 16           one panel of keys, one panel of steps of values: the products of tile.h
//
// Splits that several sequences share are walked first, for the rows of all of them at once, and so are the splits of few
// rows, by several threads: see attention_plan.h. In a cache of int8 the integers take part in the products as they are; the
// scale of a position is multiplied to its scores and to its weights. Where the machine has no bf16 dot product, many rows
// share the widening of keys and values; the sums are the same, in the same order.
//
// Splits and steps lie at fixed positions of the sequence, and splits are merged in ascending order. So the bits of a row
// do not depend on the batch, on how the prompt was cut, or on what was walked by whom. Scores are kept in base 2.
#include <cmath>
#include <limits>
#include <vector>

#include "attention_plan.h"
#include "groups.h"
#include "threads.h"

namespace quire {
namespace {

constexpr long WORTH = 1 << 18;  // multiplications from which the team is woken
constexpr long BLOCK_ROWS = 48;
constexpr long SHARED_BLOCK_ROWS = 64;  // where values are made from keys, for all rows of a block at once
constexpr long WIDEN_ROWS = 9;          // rows from which on it is worth widening keys and values first
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

// The softmax of some rows over some positions: out is not yet divided by sum, and sum is still that of each lane.
struct State {
    float *out, *largest, *lanes;
    long rows, columns;
    static long floats(long rows, long columns) { return rows * (columns + 1 + W); }
    State(float* memory, long rows, long columns)
        : out(memory), largest(out + rows * columns), lanes(largest + rows), rows(rows), columns(columns) {}
    State rows_from(long first, long count) const {
        State part = *this;
        part.out += first * columns, part.largest += first, part.lanes += first * W;
        part.rows = count;
        return part;
    }
    void clear() const {
        std::memset(out, 0, size_t(rows * columns) * sizeof(float));
        std::memset(lanes, 0, size_t(rows * W) * sizeof(float));
        for (long r = 0; r < rows; r++) largest[r] = LOWEST;
    }
};

float exp2_of(float x) {
    float lanes[W];
    store(lanes, exp2(set1(x)));
    return lanes[0];
}

// The splits of a row so far.
struct Total {
    State state;
    float* sums;
    void clear() const {
        state.clear();
        for (long r = 0; r < state.rows; r++) sums[r] = 0;
    }
    void add(const State& part) const {
        for (long r = 0; r < part.rows; r++) {
            if (part.largest[r] == LOWEST) continue;  // the row saw nothing there
            const float largest = std::max(state.largest[r], part.largest[r]);
            const float a = exp2_of(state.largest[r] - largest), b = exp2_of(part.largest[r] - largest);
            state.largest[r] = largest;
            sums[r] = sums[r] * a + reduce_add(load(part.lanes + r * W)) * b;
            float *out = state.out + r * state.columns, *more = part.out + r * state.columns;
            for (long i = 0; i < state.columns; i += W) store(out + i, fma(load(more + i), set1(b), mul(load(out + i), set1(a))));
        }
    }
};

// One query row of a head, and the positions [low, position] that it sees.
struct Row {
    int32_t position, low, token, head;
    bool sees(long start) const { return position >= start && low < start + STEP; }
    bool sees_all(long start, long groups) const { return position >= start + groups * PANEL - 1 && low <= start; }
};

// Q: the dtype of queries and results. S: that of the cache. T: what the products are made of.
template <class Q, class S>
class Attention {
public:
    using T = WorkOf<S>;
    using A = typename Dot<T>::A;
#if defined(QUIRE_NATIVE_DOT)
    using Wide = T;  // what those of many rows are made of
#else
    using Wide = float;
#endif

    explicit Attention(const QuireAttention& call)
        : call_(call),
          pages_(*call.cache),
          heads_(call.heads / pages_.kv_heads),
          columns_(pages_.value_panels() * PANEL),
          most_rows_(pages_.shared ? SHARED_BLOCK_ROWS : BLOCK_ROWS),
          plan_(call, most_rows_) {}

    void run() {
        struct States;
        states_ = static_cast<float*>(scratch<States>(State::floats(plan_.state_rows * pages_.kv_heads, columns_) * 4));
        for_each(plan_.pieces, plan_.piece_work, [&](const Piece& piece, long head) { walk_piece(piece, head); });
        for_each(plan_.blocks, plan_.block_work, [&](const Block& block, long head) { walk_block(block, head); });
    }

private:
    static constexpr bool BYTES = Pages<S>::BYTES;
    template <class K>
    static constexpr long LINE = Dot<K>::STEP_B * long(sizeof(S));  // of one step of a panel, as stored

    // fn(part, kv head) for all of them.
    template <class Part, class Fn>
    void for_each(const std::vector<Part>& parts, long work, const Fn& fn) const {
        const long heads = pages_.kv_heads;
        for_each_item(long(parts.size()) * heads, work * heads * (pages_.key_dim + pages_.value_dim) > WORTH,
                      [&](long item) { fn(parts[size_t(item / heads)], item % heads); });
    }

    // ---- the working memory of a thread; see `allot`
    struct Memory {
        Row* rows;
        A *query, *weights;
        float *scores, *split, *total, *sums;
        void* spare;  // of the GroupReader
    };

    Memory allot() const {
        struct Use;
        const long rows = most_rows_, query = rows * packed_row<T>(pages_.key_dim), state = State::floats(rows, columns_);
        const long floats = rows * 4 + query + rows * STEP_WEIGHTS<T> + rows * STEP + rows + 2 * state;
        float* p = static_cast<float*>(scratch<Use>((floats + 112) * 4 + GroupReader<S, Wide>::bytes(pages_)));
        auto take = [&p](long count) {
            float* taken = p;
            p += ceil_div(count, 16) * 16;
            return taken;
        };
        static_assert(sizeof(Row) == 4 * sizeof(float) && sizeof(A) == sizeof(float));
        Memory m;
        m.rows = reinterpret_cast<Row*>(take(rows * 4));
        m.query = reinterpret_cast<A*>(take(query));
        m.weights = reinterpret_cast<A*>(take(rows * STEP_WEIGHTS<T>));
        m.scores = take(rows * STEP);
        m.split = take(state);
        m.total = take(state);
        m.sums = take(rows);
        m.spare = p;
        return m;
    }

    State state_of(const Piece& piece, long head) const {
        const long before = plan_.state_rows * head + piece.state;
        return State(states_ + State::floats(before, columns_), piece.rows, columns_);
    }

    void walk_piece(const Piece& piece, long head) const {
        const Memory m = allot();
        const int32_t* members = &plan_.members[size_t(piece.first)];
        for (long i = 0, row = 0; i < piece.count; i++) row += put_rows(plan_.blocks[size_t(members[i])], head, m.rows + row);
        pack_query(m, piece.rows);
        const State state = state_of(piece, head);
        state.clear();
        walk(plan_.blocks[size_t(members[0])].sequence, head, piece.split * SPLIT, piece.to, m, state);
    }

    void walk_block(const Block& b, long head) const {
        const Memory m = allot();
        const long rows = put_rows(b, head, m.rows), last = m.rows[rows - 1].position;
        const Total total{State(m.total, rows, columns_), m.sums};
        total.clear();
        bool packed = false;
        for (long split = b.split_low; split < b.split_high; split++) {
            const Stored& done = plan_.stored[size_t(b.stored + split - b.split_low)];
            const long from = std::max(done.to, split * SPLIT), end = std::min(last + 1, (split + 1) * SPLIT);
            State state(m.split, rows, columns_);
            if (done.to > 0)
                state = state_of(plan_.pieces[size_t(done.piece)], head).rows_from(done.row, rows);
            else
                state.clear();
            if (from < end) {
                if (!packed) pack_query(m, rows);
                packed = true;
                walk(b.sequence, head, from, end, m, state);
            }
            total.add(state);
        }
        finish(m.rows, total);
    }

    long put_rows(const Block& b, long head, Row* rows) const {
        for (int32_t i = 0; i < b.count; i++) {
            const long position = plan_.position(b, i * b.heads), low = plan_.low(position);
            for (int32_t h = 0; h < b.heads; h++)
                *rows++ = Row{int32_t(position), int32_t(low), call_.starts[b.sequence] + b.first + i,
                              int32_t(head * heads_ + b.head + h)};
        }
        return b.rows();
    }

    // Not where values are made from long keys: a step of both as floats would fill half of L2.
    bool widens(long rows) const { return rows >= WIDEN_ROWS && !pages_.shared; }

    // Rows go through the products in tiles of at most MAX_ROWS.
    struct Tiles {
        long count;
        int edges[SHARED_BLOCK_ROWS + 1];
        Tiles(long rows, long most) : count(ceil_div(rows, most)) {
            for (long i = 0; i <= count; i++) edges[i] = int(rows * i / count);
        }
        int most_rows() const { return edges[count] - edges[count - 1]; }
    };

    void pack_query(const Memory& m, long rows) const {
        const Tiles tiles(rows, widens(rows) ? MAX_ROWS<Wide> : MAX_ROWS<T>);
        for (long i = 0; i < tiles.count; i++) {
            const long r0 = tiles.edges[i], r1 = tiles.edges[i + 1];
            auto query_of = [&](int row) {
                const Row& r = m.rows[r0 + row];
                return static_cast<const Q*>(call_.query) + r.token * call_.query_stride + r.head * pages_.key_dim;
            };
            pack_rows<T>(query_of, int(r1 - r0), pages_.key_dim, m.query + r0 * packed_row<T>(pages_.key_dim));
        }
    }

    // The positions [start, end) of a split, with the pages of a sequence.
    void walk(long sequence, long head, long start, long end, const Memory& m, const State& state) const {
        if (widens(state.rows))
            walk_steps<Wide>(sequence, head, start, end, m, state);
        else
            walk_steps<T>(sequence, head, start, end, m, state);
    }

    template <class K>
    void walk_steps(long sequence, long head, long start, long end, const Memory& m, const State& state) const {
        long from = end, to = 0;
        for (long r = 0; r < state.rows; r++) {
            from = std::min<long>(from, m.rows[r].low);
            to = std::max<long>(to, m.rows[r].position + 1);
        }
        const Tiles tiles(state.rows, MAX_ROWS<K>);
        const GroupReader<S, K> reader(pages_, call_.tables + sequence * call_.table_stride, head, m.spare);
        for (start = std::max(start, from / STEP * STEP); start < end; start += STEP) {
            const Groups<K> g = reader.read(start, from, to);
            auto sees = [start](const Row& row) { return row.sees(start); };
            const bool all = std::all_of(m.rows, m.rows + state.rows, sees);
            auto for_each_seeing = [&](const auto& fn) {
                for (long i = 0; i < tiles.count; i++) {
                    const int *edge = tiles.edges + i;
                    if (all || std::any_of(m.rows + edge[0], m.rows + edge[1], sees)) fn(edge[0], edge[1]);
                }
            };
            score(g, panels_for<K>(tiles.most_rows()), for_each_seeing, m);
            for (long r = 0; r < state.rows; r++)
                call_.softcap != 0 ? raise<true>(r, start, g, m, state) : raise<false>(r, start, g, m, state);
            for (long r = 0; r < state.rows; r++) weigh(r, start, g, m, state);
            add_values(g, panels_for<K>(tiles.most_rows()), for_each_seeing, m, state);
        }
    }

    // Both products take some panels through all tiles, and the first tile fetches those of the next step.
    template <class K, class ForEach>
    void score(const Groups<K>& g, long usual, const ForEach& for_each_seeing, const Memory& m) const {
        const long steps = pages_.key_steps() * Dot<T>::DEPTH / Dot<K>::DEPTH;
        for (long i = 0, width; i < g.count; i += width) {
            width = usual;
            while (width > g.count - i) width /= 2;
            for_each_seeing([&](long r0, long r1) {
                Ahead ahead{{}, r0 == 0 ? LINE<K> : 0};
                for (long p = 0; p < width; p++) ahead.from[p] = g.next[i + p];
                kernel_for<Multiply, K>(r1 - r0, width)(m.query + r0 * packed_row<T>(pages_.key_dim), g.keys + i, steps,
                                                        m.scores + r0 * STEP + i * PANEL, true, ahead);
            });
        }
    }

    // Scores of one row and step are scaled; when the largest so far grows, what was summed shrinks.
    template <bool CAPPED, class K>
    void raise(long r, long start, const Groups<K>& g, const Memory& m, const State& state) const {
        const Row row = m.rows[r];
        if (!row.sees(start)) return;
        const bool partial = !row.sees_all(start, g.count);
        const F scale = set1(CAPPED ? call_.scale / call_.softcap : call_.scale * LOG2_E);
        float* scores = m.scores + r * STEP;
        F most = set1(LOWEST);
        for (long i = 0; i < g.count * PANEL; i += W) {
            F x = mul(load(scores + i), scale);
            if constexpr (BYTES) x = mul(x, load(g.key_scales[i / PANEL] + i % PANEL));
            if constexpr (CAPPED) x = mul(set1(call_.softcap * LOG2_E), tanh(x));
            if (partial) x = keep_range(x, int(start + i), row.low, row.position + 1, set1(LOWEST));
            store(scores + i, x);
            most = max(most, x);
        }
        const float largest = reduce_max(most);
        if (!(largest > state.largest[r])) return;
        const F shrink = exp2(set1(state.largest[r] - largest));
        state.largest[r] = largest;
        float *lanes = state.lanes + r * W, *out = state.out + r * columns_;
        store(lanes, mul(load(lanes), shrink));
        for (long i = 0; i < columns_; i += W) store(out + i, mul(load(out + i), shrink));
    }

    // Scores -> weights 2^(score - largest so far).
    template <class K>
    void weigh(long r, long start, const Groups<K>& g, const Memory& m, const State& state) const {
        const Row row = m.rows[r];
        A* weights = m.weights + r * STEP_WEIGHTS<T>;
        if (!row.sees(start)) {
            std::memset(static_cast<void*>(weights), 0, size_t(STEP_WEIGHTS<T>) * sizeof(A));
            return;
        }
        const float* scores = m.scores + r * STEP;
        const F base = set1(state.largest[r]);
        F lanes = load(state.lanes + r * W);
        for (long i = 0; i < g.count * PANEL; i += W) {
            F weight = exp2(sub(load(scores + i), base));
            lanes = add(lanes, weight);
            if constexpr (BYTES) {
                weight = mul(weight, load(g.value_scales[i / PANEL] + i % PANEL));
                // What was never written may have any scale.
                if (!row.sees_all(start, g.count))
                    weight = keep_range(weight, int(start + i), row.low, row.position + 1, zero());
            }
            if constexpr (Dot<T>::STEP_A == Dot<T>::DEPTH)
                store(reinterpret_cast<float*>(weights) + i, weight);
            else
                store_narrow(reinterpret_cast<bf16*>(weights) + i, weight);
        }
        store(state.lanes + r * W, lanes);
    }

    template <class K, class ForEach>
    void add_values(const Groups<K>& g, long usual, const ForEach& for_each_seeing, const Memory& m, const State& state) const {
        for (long p = 0, width; p < pages_.value_panels(); p += width) {
            width = usual;
            while (width > pages_.value_panels() - p) width /= 2;
            const K* values[STEP_GROUPS];
            const char* next[STEP_GROUPS];
            for (long i = 0; i < g.count; i++) {
                values[i] = g.values[i] + p * Pages<S>::VALUE_PANEL;
                next[i] = g.next[i] + (pages_.key_elements() + p * Pages<S>::VALUE_PANEL) * long(sizeof(S));
            }
            for_each_seeing([&](long r0, long r1) {
                const bool fetch = r0 == 0 && !pages_.shared;
                kernel_for<AddValues, K>(r1 - r0, width)(m.weights + r0 * STEP_WEIGHTS<T>, values, g.count,
                                                         state.out + r0 * columns_ + p * PANEL, columns_, next,
                                                         fetch ? LINE<K> : 0);
            });
        }
    }

    // Divide by the sum and write the rows out; a sink is one more score without a value.
    void finish(const Row* rows, const Total& total) const {
        for (long r = 0; r < total.state.rows; r++) {
            const Row& row = rows[r];
            float factor = 1, sum = total.sums[r];
            if (call_.sinks != nullptr) {
                const float sink = call_.sinks[row.head] * LOG2_E, largest = std::max(sink, total.state.largest[r]);
                factor = exp2_of(total.state.largest[r] - largest);
                sum = sum * factor + exp2_of(sink - largest);
            }
            const F scale = set1(factor / sum);
            const float* in = total.state.out + r * columns_;
            Q* out = static_cast<Q*>(call_.out) + (row.token * call_.heads + row.head) * pages_.value_dim;
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
    const Plan plan_;
    float* states_ = nullptr;  // of pieces
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
