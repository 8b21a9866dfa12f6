// One register of floats, in GCC/Clang vector types, and how float32 and bfloat16 come in and out of it.
//
// WIDTH is what the hardware has: GCC lowers wider types through memory, eight times slower. Bits are moved by shifts alone, so
// that flush-to-zero mode changes nothing.

#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
struct bf16 { uint16_t bits; };

inline Floats load(const float* x) {
    Floats v;
    std::memcpy(&v, x, sizeof v);
    return v;
}

inline Floats load(const bf16* x) {
    Halves v;
    std::memcpy(&v, x, sizeof v);
    return (Floats)(__builtin_convertvector(v, Words) << 16);
}

inline void store(float* y, float value) { *y = value; }

inline void store(bf16* y, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    // Round to nearest even. A NaN stays one: it comes from bf16 activations, so its low half is zero and nothing carries.
    y->bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline float sum(Floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    typedef float Four __attribute__((vector_size(16)));
    Four part[WIDTH / 4];
    std::memcpy(part, &v, sizeof v);
    const Four four = WIDTH == 4 ? part[0] : part[0] + part[WIDTH / 4 - 1];
    return (four[0] + four[2]) + (four[1] + four[3]);
#endif
}

}  // namespace
