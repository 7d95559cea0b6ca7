// The team: threads of our own that join a job while it lasts, and are never waited for before they have come.
//
// On a machine that others use too, a thread of the team may be without a core for milliseconds. A barrier would make
// every job wait for it; here the caller takes items itself, closes the job when none is left, and waits only for the
// threads that have one in hand. A thread that comes late finds the job closed and goes on looking for the next.
#include "threads.h"

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "quire.h"

namespace quire {
namespace {

// How often a thread without work looks again before it sleeps, and the caller before it offers its core: some tens of
// microseconds, longer than the time between two kernels of a step.
constexpr int LOOKS = 2000;

void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// One job at a time; a second caller works alone. `state_` is the number of the job, whether it is open, and how many
// threads besides the caller are at it: one word, so that joining and closing cannot cross.
class Pool {
public:
    explicit Pool(int size) {
        for (int i = 1; i < size; i++) threads_.emplace_back([this] { serve(); });
    }
    ~Pool() {
        stopping_.store(true);
        publish(0);
        for (auto& thread : threads_) thread.join();
    }
    void run(void (*body)(void*), void* context) {
        std::unique_lock<std::mutex> turn(callers_, std::try_to_lock);
        if (!turn.owns_lock()) return body(context);
        body_ = body;
        context_ = context;
        publish(OPEN);
        body(context);
        state_.fetch_and(~OPEN, std::memory_order_acq_rel);
        for (int look = 0; state_.load(std::memory_order_acquire) & AT_IT; look++)
            look < LOOKS ? relax() : std::this_thread::yield();
    }

private:
    static constexpr uint64_t AT_IT = 0x7FFF, OPEN = 0x8000, JOB = 0x10000;

    // Starts the next job. Nobody is at the one before, so the word may be written as a whole.
    void publish(uint64_t flags) {
        state_.store((state_.load() & ~(JOB - 1)) + JOB + flags);
        if (sleeping_.load() == 0) return;
        { std::lock_guard<std::mutex> hold(mutex_); }
        wake_.notify_all();
    }
    void serve() {
        for (uint64_t seen = 0;;) {
            uint64_t state = state_.load(std::memory_order_acquire);
            for (int look = 0; state / JOB == seen && look < LOOKS; look++) {
                relax();
                state = state_.load(std::memory_order_acquire);
            }
            if (state / JOB == seen) state = sleep(seen);
            if (stopping_.load()) return;
            seen = state / JOB;
            while (state / JOB == seen && (state & OPEN)) {
                if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) continue;
                body_(context_);
                state_.fetch_sub(1, std::memory_order_release);
                break;
            }
        }
    }
    uint64_t sleep(uint64_t seen) {
        std::unique_lock<std::mutex> hold(mutex_);
        sleeping_.fetch_add(1);
        wake_.wait(hold, [&] { return state_.load() / JOB != seen; });
        sleeping_.fetch_sub(1);
        return state_.load(std::memory_order_acquire);
    }

    std::vector<std::thread> threads_;
    std::mutex callers_, mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> state_{0};
    std::atomic<int> sleeping_{0};
    std::atomic<bool> stopping_{false};
    void (*body_)(void*) = nullptr;
    void* context_ = nullptr;
};

struct Team {
    int size = 1;
    Pool* pool = nullptr;
};
Team team;

}  // namespace

int team_size() { return team.size; }

void run_on_team(void (*body)(void*), void* context) {
    if (team.pool != nullptr)
        team.pool->run(body, context);
    else
        body(context);
}

}  // namespace quire

extern "C" void quire_set_threads(int32_t size) {
    using namespace quire;
    delete team.pool;
    team = Team{size, size > 1 ? new Pool(size) : nullptr};
}
