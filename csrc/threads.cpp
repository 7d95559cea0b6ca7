// The team: either the OpenMP team that PyTorch already has (its libgomp hands us GOMP_parallel), so that two teams never
// fight over the cores, or threads of our own where there is no libgomp.
#include "threads.h"

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "quire.h"

namespace quire {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Own threads: they look for work for a moment, then sleep. One job at a time; a second caller works alone.
class Pool {
public:
    explicit Pool(int size) {
        for (int i = 1; i < size; i++) threads_.emplace_back([this] { serve(); });
    }
    ~Pool() {
        {
            std::lock_guard<std::mutex> hold(mutex_);
            stopping_ = true;
            generation_.fetch_add(1);
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
    }
    void run(void (*body)(void*), void* context) {
        std::unique_lock<std::mutex> turn(callers_, std::try_to_lock);
        if (!turn.owns_lock()) return body(context);
        body_ = body;
        context_ = context;
        working_.store(int(threads_.size()), std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> hold(mutex_);
            generation_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        body(context);
        while (working_.load(std::memory_order_acquire) != 0) std::this_thread::yield();
    }

private:
    void serve() {
        uint64_t seen = 0;
        for (;;) {
            for (int spin = 0; spin < 2000 && generation_.load(std::memory_order_acquire) == seen; spin++) {
            }
            if (generation_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> hold(mutex_);
                wake_.wait(hold, [&] { return generation_.load() != seen; });
            }
            seen = generation_.load(std::memory_order_acquire);
            if (stopping_) return;
            body_(context_);
            working_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::vector<std::thread> threads_;
    std::mutex callers_, mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> generation_{0};
    std::atomic<int> working_{0};
    void (*body_)(void*) = nullptr;
    void* context_ = nullptr;
    bool stopping_ = false;
};

struct Team {
    int size = 1;
    GompParallel gomp = nullptr;
    Pool* pool = nullptr;
};
Team team;

}  // namespace

int team_size() { return team.size; }

void run_on_team(void (*body)(void*), void* context) {
    if (team.gomp != nullptr)
        team.gomp(body, context, unsigned(team.size), 0);
    else if (team.pool != nullptr)
        team.pool->run(body, context);
    else
        body(context);
}

}  // namespace quire

extern "C" void quire_set_threads(int32_t size, void* gomp_parallel) {
    using namespace quire;
    delete team.pool;
    team = Team{size, reinterpret_cast<GompParallel>(gomp_parallel), nullptr};
    if (gomp_parallel == nullptr && size > 1) team.pool = new Pool(size);
}

extern "C" void quire_fork_join(void) {
    quire::run_on_team([](void*) {}, nullptr);
}
