// NVFP4 on a CPU, straight from the packed bytes. Built and called by cpu_native.py; docs/cpu_kernels.md has the figures.
//
//   P[n, k] = e2m1(code[n, k]) * e4m3(block[n, k / 16])        exact in float32 and in bfloat16
//
// qerl_decode_*  writes P; a matrix product in torch follows (many activation rows).
// qerl_linear_*  y[m, n] = decode_scale * sum_k x[m, k] P[n, k] without ever writing P (few activation rows).
//
// The unit of work is one register of WIDTH floats: WIDTH / 2 bytes of codes are broadcast to all lanes, each lane shifts its own
// nibble down, and a nibble becomes a value by a table permutation (AVX-512, AVX2) or by arithmetic that makes no subnormal
// number, so that flush-to-zero mode changes nothing. GCC/Clang vector types carry the rest. WIDTH is what the hardware has:
// GCC lowers wider types through memory, eight times slower.
//
// Every y[m, n] is summed in one order that depends on K and the instruction set alone: results repeat bit by bit for any number
// of threads, and a row of x gives the same y whatever other rows are in the batch.

#include <type_traits>

#include "cpu_vectors.h"

namespace {

constexpr int BLOCK = 16;  // columns that share one E4M3 scale

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define QERL_BF16_DOT 1
#endif

// A tile of ROWS weight rows by BATCH activation rows keeps its sums in registers: there are 32 of 512 bits, 16 of 256 or 128.
#if defined(__AVX512F__)
constexpr int ROWS = 3, BATCH = 8;
#else
constexpr int ROWS = 2, BATCH = 4;
#endif

struct E4M3Table {
    float value[256];
    E4M3Table() {
        for (int byte = 0; byte < 256; ++byte) {
            const uint32_t magnitude = byte & 0x7f;
            // Exponent bias 7 against 127, mantissa 3 bits against 23; magnitudes below 8 are subnormals in steps of 2^-9.
            const uint32_t bits = (magnitude << 20) + (120u << 23);
            float f;
            std::memcpy(&f, &bits, 4);
            if (magnitude < 8) f = magnitude / 512.0f;
            if (magnitude == 0x7f) f = __builtin_nanf("");
            value[byte] = byte & 0x80 ? -f : f;
        }
    }
};
const E4M3Table E4M3;

// WIDTH codes (WIDTH / 2 bytes) -> WIDTH values.
inline Floats decode(const uint8_t* codes) {
#if defined(__AVX512F__)
    uint32_t word[2];
    std::memcpy(word, codes, 8);
    const Words shift = {0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};
    const Floats values = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};
    const __m512i words = _mm512_mask_mov_epi32(_mm512_set1_epi32(word[0]), 0xff00, _mm512_set1_epi32(word[1]));
    // The permutation reads only the low four bits of each index.
    return (Floats)_mm512_permutexvar_ps(_mm512_srlv_epi32(words, (__m512i)shift), (__m512)values);
#elif defined(__AVX2__)
    uint32_t word;
    std::memcpy(&word, codes, 4);
    const Words shift = {0, 4, 8, 12, 16, 20, 24, 28};
    const Floats magnitudes = {0, .5f, 1, 1.5f, 2, 3, 4, 6};
    const Words code = (Words)_mm256_srlv_epi32(_mm256_set1_epi32(word), (__m256i)shift);
    // The permutation reads only the low three bits of each index; bit 3 is the sign.
    return (Floats)((Words)_mm256_permutevar8x32_ps((__m256)magnitudes, (__m256i)code) | ((code & 8) << 28));
#else
    uint16_t word;
    std::memcpy(&word, codes, 2);
    const Words code = {word, uint32_t(word) >> 4, uint32_t(word) >> 8, uint32_t(word) >> 12};
    // With the exponent offset by 126 the code reads f = (1 + m/2) 2^(e-1): right for e >= 1, and for e = 0 the value is
    // 2f - 1. The smaller of the two lines is the value for every e.
    const Floats f = (Floats)(((code & 7) << 22) + (126u << 23));
    const Floats line = f + f - 1.0f;
    return (Floats)((Words)(f < line ? f : line) | ((code & 8) << 28));
#endif
}

// WIDTH products from column k on, k a multiple of WIDTH.
inline Floats products(const uint8_t* codes, const uint8_t* blocks, long k) {
    return decode(codes + k / 2) * E4M3.value[blocks[k / BLOCK]];
}

#ifdef QERL_BF16_DOT

// The sixteen products of each scale byte in bf16: 8 KiB, a quarter of the first-level cache.
struct ProductTable {
    alignas(64) uint16_t bits[256][BLOCK];
    ProductTable() {
        const float values[BLOCK] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};
        for (int byte = 0; byte < 256; ++byte) {
            for (int code = 0; code < BLOCK; ++code) {
                const float product = values[code] * E4M3.value[byte];
                uint32_t word;
                std::memcpy(&word, &product, 4);
                bits[byte][code] = word >> 16;
            }
        }
    }
};
const ProductTable PRODUCTS;

// Two blocks (16 bytes, two scales) -> 32 products in bf16. One permutation of 16-bit lanes looks both blocks up: the table
// register holds the products of the first scale below those of the second, and bit 4 of an index chooses between them.
inline __m512i products_of_two_blocks(const uint8_t* codes, const uint8_t* blocks) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes));
    const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    // Low half of each lane: low nibble. High half: high nibble, which is 12 bits above. 0xa8 is (a | b) & c.
    const __m512i nibbles = _mm512_ternarylogic_epi32(bytes, _mm512_slli_epi32(bytes, 12), _mm512_set1_epi32(0x000f000f), 0xa8);
    const __m256i low = _mm256_load_si256((const __m256i*)PRODUCTS.bits[blocks[0]]);
    const __m256i high = _mm256_load_si256((const __m256i*)PRODUCTS.bits[blocks[1]]);
    const __m512i table = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    return _mm512_permutexvar_epi16(_mm512_or_si512(nibbles, second), table);
}

#endif

inline void store_exact(float* out, Floats v) { std::memcpy(out, &v, sizeof v); }

inline void store_exact(bf16* out, Floats v) {
    const Halves high = __builtin_convertvector((Words)v >> 16, Halves);
    std::memcpy(out, &high, sizeof high);
}

// y[m, n] for R weight rows and B activation rows.
template <typename T, int R, int B>
inline void tile(const T* x, const uint8_t* codes, const uint8_t* blocks, long k_in, float decode_scale, T* y, long n_out) {
    const long codes_stride = k_in / 2, blocks_stride = k_in / BLOCK;
    Floats acc[R][B] = {};
    long k = 0;
#ifdef QERL_BF16_DOT
    if constexpr (std::is_same_v<T, bf16>) {
        for (; k + 2 * BLOCK <= k_in; k += 2 * BLOCK) {
            __m512bh w[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
                w[r] = (__m512bh)products_of_two_blocks(codes + r * codes_stride + k / 2, blocks + r * blocks_stride + k / BLOCK);
#pragma GCC unroll 8
            for (int b = 0; b < B; ++b) {
                const __m512bh v = (__m512bh)_mm512_loadu_si512(x + b * k_in + k);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) acc[r][b] = (Floats)_mm512_dpbf16_ps((__m512)acc[r][b], v, w[r]);
            }
        }
    }
#endif
    for (; k < k_in; k += WIDTH) {
        Floats w[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) w[r] = products(codes + r * codes_stride, blocks + r * blocks_stride, k);
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) {
            const Floats v = load(x + b * k_in + k);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) acc[r][b] += v * w[r];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) store(y + b * n_out + r, sum(acc[r][b]) * decode_scale);
}

// All activation rows against R weight rows, in tiles of BATCH, then BATCH / 2, ... 1.
template <typename T, int R, int B = BATCH>
void batch(const T* x, long m, const uint8_t* codes, const uint8_t* blocks, long k_in, float decode_scale, T* y, long n_out) {
    for (; m >= B; m -= B, x += B * k_in, y += B * n_out) tile<T, R, B>(x, codes, blocks, k_in, decode_scale, y, n_out);
    if constexpr (B > 1) {
        if (m > 0) batch<T, R, B / 2>(x, m, codes, blocks, k_in, decode_scale, y, n_out);
    }
}

template <typename T>
void linear(const T* x, long m, const uint8_t* codes, const uint8_t* blocks, long n, long k, float decode_scale, T* y,
            int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long row = 0; row < n; row += ROWS) {
        if (row + ROWS <= n) {
            batch<T, ROWS>(x, m, codes + row * (k / 2), blocks + row * (k / BLOCK), k, decode_scale, y + row, n);
        } else {
            for (long r = row; r < n; ++r)
                batch<T, 1>(x, m, codes + r * (k / 2), blocks + r * (k / BLOCK), k, decode_scale, y + r, n);
        }
    }
}

template <typename T>
void decode_rows(const uint8_t* codes, long codes_stride, const uint8_t* blocks, long blocks_stride, long n, long k, T* out,
                 int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long row = 0; row < n; ++row) {
        const uint8_t *c = codes + row * codes_stride, *s = blocks + row * blocks_stride;
        long i = 0;
#ifdef QERL_BF16_DOT
        if constexpr (std::is_same_v<T, bf16>) {
            for (; i + 2 * BLOCK <= k; i += 2 * BLOCK)
                _mm512_storeu_si512(out + row * k + i, products_of_two_blocks(c + i / 2, s + i / BLOCK));
        }
#endif
        for (; i < k; i += WIDTH) store_exact(out + row * k + i, products(c, s, i));
    }
}

}  // namespace

extern "C" {

// Whether bfloat16 activations are multiplied as such; if not, float32 is the faster form to pass.
int qerl_has_bf16_dot() {
#ifdef QERL_BF16_DOT
    return 1;
#else
    return 0;
#endif
}

void qerl_linear_bf16(const bf16* x, long m, const uint8_t* codes, const uint8_t* blocks, long n, long k, float decode_scale,
                      bf16* y, int threads) {
    linear(x, m, codes, blocks, n, k, decode_scale, y, threads);
}

void qerl_linear_f32(const float* x, long m, const uint8_t* codes, const uint8_t* blocks, long n, long k, float decode_scale,
                     float* y, int threads) {
    linear(x, m, codes, blocks, n, k, decode_scale, y, threads);
}

void qerl_decode_bf16(const uint8_t* codes, long codes_stride, const uint8_t* blocks, long blocks_stride, long n, long k,
                      bf16* out, int threads) {
    decode_rows(codes, codes_stride, blocks, blocks_stride, n, k, out, threads);
}

void qerl_decode_f32(const uint8_t* codes, long codes_stride, const uint8_t* blocks, long blocks_stride, long n, long k,
                     float* out, int threads) {
    decode_rows(codes, codes_stride, blocks, blocks_stride, n, k, out, threads);
}

}  // extern "C"
