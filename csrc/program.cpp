// Runs programs; see program.h. A function may be called by a program once it is in the table below: its arguments are
// taken from the cells by their types.
#include "program.h"

#include <cstring>
#include <utility>

namespace quire {
namespace {

using Caller = int32_t (*)(const int64_t* cells);

template <class T>
T argument(const int64_t* cell) {
    static_assert(sizeof(T) <= sizeof(*cell));
    T value;
    std::memcpy(&value, cell, sizeof(T));
    return value;
}

template <auto FUNCTION, class Result, class... Types, size_t... PLACES>
int32_t call(Result (*)(Types...), const int64_t* cells, std::index_sequence<PLACES...>) {
    if constexpr (std::is_void_v<Result>) {
        FUNCTION(argument<Types>(cells + PLACES)...);
        return 0;
    } else {
        return FUNCTION(argument<Types>(cells + PLACES)...);
    }
}

template <class Result, class... Types>
constexpr auto places(Result (*)(Types...)) {
    return std::index_sequence_for<Types...>{};
}

template <auto FUNCTION>
int32_t caller(const int64_t* cells) {
    return call<FUNCTION>(FUNCTION, cells, places(FUNCTION));
}

#define QUIRE_CALLABLES(X)               \
    X(quire_linear)                      \
    X(quire_quantized_linear)            \
    X(quire_rms_norm_quantized_linear)   \
    X(quire_layer_norm_quantized_linear) \
    X(quire_gated_quantized_linear)      \
    X(quire_write_cache)                 \
    X(quire_rotary)                      \
    X(quire_attention)                   \
    X(quire_heads_linear)                \
    X(quire_rms_norm)                    \
    X(quire_layer_norm)                  \
    X(quire_experts)                     \
    X(quire_gated)                       \
    X(quire_strided)                     \
    X(quire_move)                        \
    X(quire_gather_rows)
#define QUIRE_NAME(function) #function " "
#define QUIRE_CALLER(function) caller<function>,

constexpr Caller CALLERS[] = {QUIRE_CALLABLES(QUIRE_CALLER)};

}  // namespace
}  // namespace quire

using namespace quire;

const char* quire_program_functions(void) { return QUIRE_CALLABLES(QUIRE_NAME); }

int64_t quire_run_program(const QuireCall* calls, int64_t count, const QuirePatch* patches, void* cells,
                          const int64_t* addresses, const int64_t* sizes) {
    for (int64_t i = 0; i < count; i++) {
        const QuireCall& call = calls[i];
        for (const QuirePatch* patch = patches + call.patch; patch < patches + call.patch + call.patches; patch++) {
            int64_t value = patch->offset;
            if (patch->base >= 0) value += addresses[patch->base];
            if (patch->size >= 0) value += patch->factor * sizes[patch->size];
            std::memcpy(static_cast<char*>(cells) + patch->place, &value, size_t(patch->bytes));
        }
        if (CALLERS[call.function](static_cast<const int64_t*>(cells) + call.cell) != 0) return i;
    }
    return -1;
}
