// The team of threads, and how work is handed out: items are taken one after the other from a shared counter, so a thread
// that the system holds up delays only the item it has in hand. Which thread does an item never changes its result.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <new>

namespace quire {

// Runs `body(context)` on this thread and on those of the team that come while it lasts; returns when all have left it.
// A body takes its work item by item, so it does not matter how many come.
void run_on_team(void (*body)(void*), void* context);
int team_size();

constexpr long RUN_SHARES = 4;  // a run is at most this share of what is left for each thread

// fn(item) for every item in [0, items). `worth` tells whether the whole is worth waking the team.
template <class Fn>
void for_each_item(long items, bool worth, const Fn& fn) {
    if (!worth || items <= 1 || team_size() == 1) {
        for (long i = 0; i < items; i++) fn(i);
        return;
    }
    struct Job {
        const Fn& fn;
        long items;
        std::atomic<long> next;
    } job{fn, items, {0}};
    run_on_team(
        [](void* context) {
            Job& job = *static_cast<Job*>(context);
            for (long i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.items;) job.fn(i);
        },
        &job);
}

// fn(first, end) for runs that together cover [0, items): long ones first and single items in the end, so that each thread
// reads long streams and all of them end at about the same time.
template <class Fn>
void for_each_run(long items, bool worth, const Fn& fn) {
    if (!worth || items <= 1 || team_size() == 1) return fn(0l, items);
    struct Job {
        const Fn& fn;
        const long items, shares;
        std::atomic<long> next;
    } job{fn, items, RUN_SHARES * team_size(), {0}};
    run_on_team(
        [](void* context) {
            Job& job = *static_cast<Job*>(context);
            for (long first = 0; first < job.items;) {
                const long end = first + std::max(1l, (job.items - first) / job.shares);
                if (!job.next.compare_exchange_weak(first, end, std::memory_order_relaxed)) continue;
                job.fn(first, end);
                first = job.next.load(std::memory_order_relaxed);
            }
        },
        &job);
}

// Memory of one thread that is kept from call to call and only grows; the content is whatever the last user left.
// Each `Use` is a different buffer, so that functions that call one another do not share one.
template <class Use>
void* scratch(long bytes) {
    struct Buffer {
        void* data = nullptr;
        long size = 0;
        ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
    };
    thread_local Buffer buffer;
    if (buffer.size < bytes) {
        ::operator delete(buffer.data, std::align_val_t(64));
        buffer.data = ::operator new(size_t(bytes), std::align_val_t(64));
        buffer.size = bytes;
    }
    return buffer.data;
}

}  // namespace quire
