// What this machine can do at best, as one JSON object: reading memory, and multiplying from registers in float32,
// bfloat16 and 8-bit integers. Every core that the process may use takes part. Built with -march=native by ceilings.py,
// and deliberately apart from the library that is being measured.
//
//     ceilings [threads] [seconds per measurement]
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
constexpr int CHAINS = 14;  // products in flight: six cycles of latency, two a cycle, and some
constexpr long ROUNDS = 4096;
volatile float sink;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::vector<int> allowed_cores() {
    cpu_set_t set;
    CPU_ZERO(&set);
    sched_getaffinity(0, sizeof set, &set);
    std::vector<int> found;
    for (int core = 0; core < CPU_SETSIZE; core++)
        if (CPU_ISSET(core, &set)) found.push_back(core);
    return found;
}

// Runs `work(thread)` on all threads at once, again and again for `seconds`; returns the time of the fastest pass.
double fastest(const std::vector<int>& cores, int threads, double seconds, const std::function<void(int)>& work) {
    std::atomic<int> arrived{0}, done{0};
    std::atomic<long> go{0};
    std::atomic<bool> stop{false};
    std::vector<std::thread> team;
    for (int i = 0; i < threads; i++)
        team.emplace_back([&, i] {
            cpu_set_t own;
            CPU_ZERO(&own);
            CPU_SET(cores[i % cores.size()], &own);
            pthread_setaffinity_np(pthread_self(), sizeof own, &own);
            long seen = 0;
            arrived++;
            for (;;) {
                while (go.load() == seen) {
                    if (stop) return;
                    std::this_thread::yield();
                }
                seen++;
                work(i);
                done++;
            }
        });
    while (arrived < threads) std::this_thread::yield();
    double best = 1e9;
    auto begin = Clock::now();
    while (since(begin) < seconds) {
        done = 0;
        auto start = Clock::now();
        go++;
        while (done < threads) std::this_thread::yield();
        best = std::min(best, since(start));
    }
    stop = true;
    for (auto& member : team) member.join();
    return best;
}

#if defined(__AVX512F__)
constexpr int BYTES = 64;
using F = __m512;
using I = __m512i;
F broadcast(float x) { return _mm512_set1_ps(x); }
F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
I load_bytes(const char* p) { return _mm512_load_si512(p); }
I mix(I a, I b) { return _mm512_xor_si512(a, b); }
I zero_bytes() { return _mm512_setzero_si512(); }
F as_floats(I a) { return _mm512_castsi512_ps(a); }
float first(F a) { return _mm512_cvtss_f32(a); }
#else
constexpr int BYTES = 32;
using F = __m256;
using I = __m256i;
F broadcast(float x) { return _mm256_set1_ps(x); }
F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
I load_bytes(const char* p) { return _mm256_load_si256((const __m256i*)p); }
I mix(I a, I b) { return _mm256_xor_si256(a, b); }
I zero_bytes() { return _mm256_setzero_si256(); }
F as_floats(I a) { return _mm256_castsi256_ps(a); }
float first(F a) { return _mm256_cvtss_f32(a); }
#endif

#if defined(__AVX512BF16__)
constexpr const char* BF16_UNIT = "avx512-bf16";
constexpr int BF16_PRODUCTS = BYTES / 2;
F bf16_dot(F sum, I a, I b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
#else  // without such an instruction the best is to widen and to use float32
constexpr const char* BF16_UNIT = "float32";
constexpr int BF16_PRODUCTS = BYTES / 4;
F bf16_dot(F sum, I a, I b) { return fma(as_floats(a), as_floats(b), sum); }
#endif

#if defined(__AVX512VNNI__)
constexpr const char* INT8_UNIT = "avx512-vnni";
I int8_dot(I sum, I a, I b) { return _mm512_dpbusd_epi32(sum, a, b); }
#elif defined(__AVXVNNI__)
constexpr const char* INT8_UNIT = "avx-vnni";
I int8_dot(I sum, I a, I b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
#else  // pairs in 16 bits, then in 32
constexpr const char* INT8_UNIT = "avx2";
I int8_dot(I sum, I a, I b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
#endif

void multiply_float() {
    F sums[CHAINS], factor = broadcast(0.9999f);
    for (int j = 0; j < CHAINS; j++) sums[j] = broadcast(float(j));
    for (long i = 0; i < ROUNDS; i++)
        for (int j = 0; j < CHAINS; j++) sums[j] = fma(sums[j], factor, factor);
    for (int j = 0; j < CHAINS; j++) sink = first(sums[j]);
}

void multiply_bf16(I a, I b) {
    F sums[CHAINS];
    for (int j = 0; j < CHAINS; j++) sums[j] = broadcast(float(j));
    for (long i = 0; i < ROUNDS; i++)
        for (int j = 0; j < CHAINS; j++) sums[j] = bf16_dot(sums[j], a, b);
    for (int j = 0; j < CHAINS; j++) sink = first(sums[j]);
}

// The first factor changes with each chain's sum where the compiler might else compute the product once.
void multiply_int8(I a, I b) {
    constexpr int chains = BYTES == 64 ? CHAINS : 10;
    I sums[chains];
    for (int j = 0; j < chains; j++) sums[j] = zero_bytes();
    for (long i = 0; i < ROUNDS; i++) {
        asm volatile("" : "+x"(a));
        for (int j = 0; j < chains; j++) {
            asm volatile("" : "+x"(a));
            sums[j] = int8_dot(sums[j], a, b);
        }
    }
    for (int j = 0; j < chains; j++) sink = first(as_floats(sums[j]));
}

// In so many streams side by side: the prefetchers of some machines keep more of memory busy for several than for one.
template <int STREAMS>
void read_part(const char* begin, long bytes) {
    constexpr int RUN = 8 / STREAMS;
    const long length = bytes / STREAMS;
    I sums[8];
    for (int j = 0; j < 8; j++) sums[j] = zero_bytes();
    for (long i = 0; i < length; i += RUN * BYTES)
        for (int j = 0; j < 8; j++)
            sums[j] = mix(sums[j], load_bytes(begin + j / RUN * length + i + j % RUN * BYTES));
    for (int j = 1; j < 8; j++) sums[0] = mix(sums[0], sums[j]);
    sink = first(as_floats(sums[0]));
}

}  // namespace

int main(int count, char** words) {
    std::vector<int> cores = allowed_cores();
    int threads = count > 1 ? std::atoi(words[1]) : int(cores.size());
    double seconds = count > 2 ? std::atof(words[2]) : 0.25;
    constexpr long PART = 256L << 20;  // of each thread: far beyond its share of any cache
    char* data = (char*)mmap(nullptr, PART * threads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (threads < 1 || data == MAP_FAILED) {
        std::fprintf(stderr, "ceilings: no memory for %d threads\n", threads);
        return 1;
    }
    madvise(data, PART * threads, MADV_HUGEPAGE);
    std::memset(data, 1, PART * threads);
    I ones = load_bytes(data), others = load_bytes(data + BYTES);
    double one = fastest(cores, threads, seconds, [&](int i) { read_part<1>(data + i * PART, PART); });
    double four = fastest(cores, threads, seconds, [&](int i) { read_part<4>(data + i * PART, PART); });
    double read = std::min(one, four);
    auto rate = [&](double products, const std::function<void(int)>& work) {
        constexpr int passes = 64;  // long enough for the start of a pass not to count
        double best = fastest(cores, threads, seconds, [&](int i) {
            for (int j = 0; j < passes; j++) work(i);
        });
        return 2 * products * double(ROUNDS) * threads * passes / best;
    };
    double f32 = rate(CHAINS * (BYTES / 4), [](int) { multiply_float(); });
    double bf16 = rate(CHAINS * BF16_PRODUCTS, [=](int) { multiply_bf16(ones, others); });
    double int8 = rate((BYTES == 64 ? CHAINS : 10) * BYTES, [=](int) { multiply_int8(ones, others); });
    std::printf(
        "{\"threads\": %d, \"read\": %.6g, \"f32\": %.6g, \"bf16\": %.6g, \"int8\": %.6g, \"bf16_unit\": \"%s\", "
        "\"int8_unit\": \"%s\"}\n",
        threads, PART * double(threads) / read, f32, bf16, int8, BF16_UNIT, INT8_UNIT);
    return 0;
}
