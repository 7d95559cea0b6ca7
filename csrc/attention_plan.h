// Which rows of a call of attention are computed together, and which splits of the context apart from the others.
//
//   block   some new positions of one sequence, by the query heads of a kv head. It walks its splits one after the other,
//           but for those that a piece has walked before
//   piece   one split, or the beginning of one, for the rows of some blocks; the states of their softmax are kept for them.
//           Either several blocks whose page tables agree there, so that one reading of the pages serves the rows of all;
//           or one block, where there are too few blocks for the team
//
// A piece makes the steps that each of its blocks would make there by itself, in the same order: no bit depends on the plan.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "pages.h"
#include "quire.h"
#include "threads.h"

namespace quire {

constexpr long SPLIT = 512;          // positions that have a softmax of their own
constexpr long STEP = BLOCK_COLUMNS;  // positions that are scored together

struct Block {
    int32_t sequence;
    int32_t first, count;           // positions among the new rows of the sequence
    int32_t head, heads;            // query heads among those of the kv head
    int32_t split_low, split_high;  // the splits that it sees
    long stored;                    // its first Stored, one for each of these splits
    long rows() const { return long(count) * heads; }
};

struct Piece {
    long split, to;     // walks [split * SPLIT, to)
    long first, count;  // its blocks among the members of all pieces
    long rows;          // of all of them
    long state;         // rows of pieces before it
};

// What a block finds done of one of its splits: everything up to `to`, by rows of the piece from `row` on.
struct Stored {
    int32_t piece, row;
    long to;  // 0: nothing
};

class Plan {
public:
    std::vector<Block> blocks;
    std::vector<Piece> pieces;
    std::vector<int32_t> members;
    std::vector<Stored> stored;
    long state_rows = 0;                 // of all pieces
    long block_work = 0, piece_work = 0;  // rows times positions, for one kv head

    Plan(const QuireAttention& call, long most_rows)
        : call_(call), kv_heads_(call.cache->kv_heads), heads_(call.heads / kv_heads_), most_rows_(most_rows) {
        for (int32_t s = 0; s < call.sequences; s++) cut_rows(s);
        if (call.sequences > 1) share();
        if (long(blocks.size()) * kv_heads_ < FEW * team_size()) cut_splits();
    }

    // Row r of a block: the position it stands at, and the positions [low, position] that it sees.
    long position(const Block& b, long r) const {
        return call_.lengths[b.sequence] - new_rows(b.sequence) + b.first + r / b.heads;
    }
    long low(long position) const {
        long low = 0;
        if (call_.window) low = std::max<long>(0, position + 1 - call_.window);
        if (call_.chunk) low = std::max<long>(low, position / call_.chunk * call_.chunk);
        return low;
    }

private:
    static constexpr long FEW = 8;              // items for each thread
    static constexpr long LEAST = 4 * STEP;     // positions from which on a shared piece pays for keeping its states
    static constexpr long MOST_SUMS = 1 << 23;  // that shared pieces may keep

    long new_rows(long sequence) const { return call_.starts[sequence + 1] - call_.starts[sequence]; }

    // A block has some positions with all their heads, or if these are too many, one position with some of them.
    void cut_rows(int32_t sequence) {
        const long rows = new_rows(sequence), per_block = std::max<long>(1, most_rows_ / heads_);
        const long head_cuts = ceil_div(heads_, most_rows_);
        for (long tile = ceil_div(rows, per_block); tile-- > 0;)  // the longest first
            for (long cut = 0; cut < head_cuts; cut++) {
                const long first = tile * per_block, head = heads_ * cut / head_cuts;
                Block b{sequence, int32_t(first), int32_t(std::min(per_block, rows - first)), int32_t(head),
                        int32_t(heads_ * (cut + 1) / head_cuts - head), 0, 0, long(stored.size())};
                b.split_low = int32_t(low(position(b, 0)) / SPLIT);
                b.split_high = int32_t(position(b, b.rows() - 1) / SPLIT + 1);
                block_work += (b.split_high - b.split_low) * SPLIT * b.rows();
                stored.resize(stored.size() + size_t(b.split_high - b.split_low));
                blocks.push_back(b);
            }
    }

    void begin_piece(long split, long to) {
        pieces.push_back(Piece{split, to, long(members.size()), 0, 0, state_rows});
    }
    void join_piece(int32_t index) {
        const Block& b = blocks[size_t(index)];
        Piece& p = pieces.back();
        stored[size_t(b.stored + p.split - b.split_low)] = Stored{int32_t(pieces.size() - 1), int32_t(p.rows), p.to};
        members.push_back(index);
        p.count++;
        p.rows += b.rows();
        state_rows += b.rows();
        const long work = b.rows() * (p.to - p.split * SPLIT);
        piece_work += work;
        block_work -= work;
    }

    // ---- splits for which several sequences name the same pages

    const int32_t* table(int32_t index) const { return call_.tables + blocks[size_t(index)].sequence * call_.table_stride; }
    long whole_pages(int32_t index) const { return position(blocks[size_t(index)], 0) / call_.cache->page_size; }

    // Only blocks with so few rows that reading is what they wait for, and only where the first page of another is theirs
    // too: mostly none.
    std::vector<int32_t> candidates() const {
        std::vector<std::pair<int32_t, int32_t>> found;  // first page, block
        for (size_t i = 0; i < blocks.size(); i++) {
            const Block& b = blocks[i];
            if (b.count == new_rows(b.sequence) && b.heads == heads_ && 2 * b.rows() <= most_rows_ && position(b, 0) >= LEAST)
                found.emplace_back(*table(int32_t(i)), int32_t(i));
        }
        std::sort(found.begin(), found.end());
        std::vector<int32_t> result;
        for (size_t i = 0; i < found.size(); i++)
            if ((i > 0 && found[i - 1].first == found[i].first) ||
                (i + 1 < found.size() && found[i + 1].first == found[i].first))
                result.push_back(found[i].second);
        return result;
    }

    // In the order of their page tables those that begin alike are neighbours.
    void share() {
        std::vector<int32_t> order = candidates();
        std::sort(order.begin(), order.end(), [this](int32_t a, int32_t b) {
            const long pages = std::min(whole_pages(a), whole_pages(b));
            const int difference = std::memcmp(table(a), table(b), size_t(pages) * sizeof(int32_t));
            return difference != 0 ? difference < 0 : whole_pages(a) < whole_pages(b);
        });
        std::vector<long> alike(order.size());  // the positions of which i and i + 1 have the same pages
        for (size_t i = 0; i + 1 < order.size(); i++) {
            const int32_t *a = table(order[i]), *b = table(order[i + 1]);
            const long pages = std::min(whole_pages(order[i]), whole_pages(order[i + 1]));
            alike[i] = (std::mismatch(a, a + pages, b).first - a) * call_.cache->page_size / STEP * STEP;
        }
        for (long split = 0; share_split(split, order, alike); split++) continue;
    }

    // Runs of neighbours become pieces. False if no two are alike for long enough.
    bool share_split(long split, const std::vector<int32_t>& order, const std::vector<long>& alike) {
        bool any = false;
        for (size_t i = 0, end; i < order.size(); i = end) {
            auto reach = [&](size_t j) {
                const long to = std::min(alike[j], (split + 1) * SPLIT);
                return to - split * SPLIT < LEAST ? 0 : to;
            };
            const long to = reach(i);
            end = i + 1;
            if (to == 0) continue;
            any = true;
            std::vector<int32_t> run;
            long rows = 0, from = to;
            for (end = i; end == i || (end < order.size() && reach(end - 1) >= to); end++) {
                const Block& b = blocks[size_t(order[end])];
                if (b.split_low > split) continue;  // its window begins behind
                run.push_back(order[end]);
                rows += b.rows();
                from = std::min(from, low(position(b, 0)));
            }
            if (run.size() > 1 && to - from >= LEAST && (state_rows + rows) * kv_heads_ * call_.cache->value_dim <= MOST_SUMS)
                cut_run(split, to, run, rows);
        }
        return any;
    }

    // As few pieces as hold the rows, but enough for the team.
    void cut_run(long split, long to, const std::vector<int32_t>& run, long rows) {
        const long wanted = std::min<long>(long(run.size()) / 2, ceil_div(2 * team_size(), kv_heads_));
        const long even = ceil_div(rows, std::max(ceil_div(rows, most_rows_), wanted));
        long left = 0;
        for (int32_t index : run) {
            const long more = blocks[size_t(index)].rows();
            if (left <= 0 || pieces.back().rows + more > most_rows_) {
                begin_piece(split, to);
                left = even;
            }
            join_piece(index);
            left -= more;
        }
    }

    // ---- few blocks: every split that is left becomes a piece of its own

    void cut_splits() {
        for (size_t i = 0; i < blocks.size(); i++) {
            const Block b = blocks[i];
            const long end = position(b, b.rows() - 1) + 1;
            auto left = [&](long split) { return stored[size_t(b.stored + split - b.split_low)].to == 0; };
            long count = 0;
            for (long split = b.split_low; split < b.split_high; split++) count += left(split);
            for (long split = b.split_low; split < b.split_high && count > 1; split++) {
                if (!left(split)) continue;
                begin_piece(split, std::min(end, (split + 1) * SPLIT));
                join_piece(int32_t(i));
            }
        }
    }

    const QuireAttention& call_;
    const long kv_heads_, heads_, most_rows_;
};

}  // namespace quire
