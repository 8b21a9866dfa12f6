// Attention of one new token per row over paged keys and values, on a CPU. Built and called by paged_cpu.py, which has the
// figures; paged_attention.py says what is computed.
//
// The unit of work is one row and one kv head: its G query heads go over the pages together, in tiles of at most TILE positions
// that never cross a page, so that a tile of K and V stays in the first-level cache while all heads use it. Per tile:
//
//   scores   dot products, up to HEADS heads at a time so that a key is loaded once for them
//   weights  p = 2^(s - m') with the running maximum m', in registers of WIDTH; s is in base 2, q carries scaling * log2(e)
//   values   acc += p v in tiles of HEADS x COLUMNS registers
//
// All arithmetic is float32, whatever the pages hold. A row's result depends on its own length, page size and contents alone:
// equal bits in any batch and with any number of threads.

#include <cmath>
#include <vector>

#include "cpu_vectors.h"

namespace {

constexpr long TILE = 64;  // positions; K and V of 64 dimensions are then 32 KiB in float32
// HEADS * COLUMNS sums stay in registers: there are 32 of 512 bits, 16 of 256 or 128.
#if defined(__AVX512F__)
constexpr int HEADS = 4, COLUMNS = 4;
#else
constexpr int HEADS = 2, COLUMNS = 4;
#endif

template <typename T>
struct Call {
    const T *q, *k, *v;
    T *pages_k, *pages_v, *out;
    const int32_t *table, *length;
    long q_row, q_head, k_row, k_head, v_row, v_head;  // strides, in elements
    long page_k, page_v, table_row;
    long rows, heads_kv, group, dim, page, window;
    float factor;  // scaling * log2(e)
};

// 2^x for x <= 0; 0 below 2^-126. The polynomial is the Taylor series of 2^f for |f| <= 1/2; what it leaves out is below 2e-7.
inline Floats exp2(Floats x) {
    const Floats low = Floats{} - 126.0f;
    const auto tiny = x < low;
    x = tiny ? low : x;
    const Floats magic = Floats{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
    const Floats shifted = x + magic;
    const Floats f = x - (shifted - magic);
    Floats p = f * 1.5403530393e-4f + 1.3333558146e-3f;
    p = p * f + 9.6181291076e-3f;
    p = p * f + 5.5504108665e-2f;
    p = p * f + 2.4022650696e-1f;
    p = p * f + 6.9314718056e-1f;
    p = p * f + 1.0f;
    // x - x is 0 but for NaN, which the sum of bits above might have made a number
    const Floats result = (Floats)((Words)p + ((Words)shifted << 23)) + (x - x);
    return tiny ? Floats{} : result;
}

inline float max(Floats v) {
    float lane[WIDTH], most = -INFINITY;
    std::memcpy(lane, &v, sizeof v);
    for (float x : lane) most = x > most ? x : most;
    return most;
}

// scores[h][t] = q[h] . keys[t] for R heads.
template <int R, typename T>
inline void scores(const float* q, const T* keys, long count, long dim, float* out) {
    for (long t = 0; t < count; ++t) {
        Floats acc[R] = {};
        for (long d = 0; d < dim; d += WIDTH) {
            const Floats key = load(keys + t * dim + d);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) acc[r] += key * load(q + r * dim + d);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) out[r * TILE + t] = sum(acc[r]);
    }
}

// acc[h][d] += sum_t p[h][t] values[t][d] for R heads and C registers of columns.
template <int R, int C, typename T>
inline void add_values(const float* p, const T* values, long count, long dim, float* out) {
    Floats acc[R][C];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[r][c] = load(out + r * dim + c * WIDTH);
    for (long t = 0; t < count; ++t) {
        Floats value[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) value[c] = load(values + t * dim + c * WIDTH);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) acc[r][c] += p[r * TILE + t] * value[c];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) std::memcpy(out + r * dim + c * WIDTH, &acc[r][c], sizeof(Floats));
}

template <int R, int C = COLUMNS, typename T>
void all_columns(const float* p, const T* values, long count, long dim, float* out, long d = 0) {
    for (; d + C * WIDTH <= dim; d += C * WIDTH) add_values<R, C>(p, values + d, count, dim, out + d);
    if constexpr (C > 1) all_columns<R, C / 2>(p, values, count, dim, out, d);
}

// One tile for all heads, HEADS at a time, then HEADS / 2, ... 1. `most` and `total` are m and l.
template <int R = HEADS, typename T>
void tile(const float* q, const T* keys, const T* values, long count, long heads, long dim, float* acc, float* most,
          float* total) {
    for (; heads >= R; heads -= R, q += R * dim, acc += R * dim, most += R, total += R) {
        float p[R * TILE];
        const long padded = (count + WIDTH - 1) / WIDTH * WIDTH;
        scores<R>(q, keys, count, dim, p);
        for (int r = 0; r < R; ++r) {
            float* row = p + r * TILE;
            for (long t = count; t < padded; ++t) row[t] = -INFINITY;
            Floats highest = load(row);
            for (long t = WIDTH; t < padded; t += WIDTH) {
                const Floats s = load(row + t);
                highest = s > highest ? s : highest;
            }
            const float next = std::fmax(most[r], max(highest));
            const float keep = std::exp2(most[r] - next);
            Floats added = {};
            for (long t = 0; t < padded; t += WIDTH) {
                const Floats weight = exp2(load(row + t) - next);
                std::memcpy(row + t, &weight, sizeof weight);
                added += weight;
            }
            most[r] = next;
            total[r] = total[r] * keep + sum(added);
            for (long d = 0; d < dim; ++d) acc[r * dim + d] *= keep;
        }
        all_columns<R>(p, values, count, dim, acc);
    }
    if constexpr (R > 1) {
        if (heads > 0) tile<R / 2>(q, keys, values, count, heads, dim, acc, most, total);
    }
}

template <typename T>
void attend(const Call<T>& c, long b, long j, std::vector<float>& scratch) {
    const long length = c.length[b], dim = c.dim, group = c.group, last = length - 1;
    T* out = c.out + (b * c.heads_kv + j) * group * dim;
    if (length == 0) {
        for (long i = 0; i < group * dim; ++i) store(out + i, 0.0f);
        return;
    }
    const int32_t* table = c.table + b * c.table_row;
    const long inside = j * c.page * dim, place = inside + last % c.page * dim;
    std::memcpy(c.pages_k + table[last / c.page] * c.page_k + place, c.k + b * c.k_row + j * c.k_head, dim * sizeof(T));
    std::memcpy(c.pages_v + table[last / c.page] * c.page_v + place, c.v + b * c.v_row + j * c.v_head, dim * sizeof(T));

    scratch.assign(group * (2 * dim + 2), 0.0f);
    float *q = scratch.data(), *acc = q + group * dim, *total = acc + group * dim, *most = total + group;
    for (long g = 0; g < group; ++g) {
        const T* head = c.q + b * c.q_row + (j * group + g) * c.q_head;
        for (long d = 0; d < dim; d += WIDTH) {
            const Floats scaled = load(head + d) * c.factor;
            std::memcpy(q + g * dim + d, &scaled, sizeof scaled);
        }
        most[g] = -INFINITY;
    }
    for (long t = c.window && length > c.window ? length - c.window : 0; t < length;) {
        const long left = c.page - t % c.page, rest = length - t;
        long count = left < rest ? left : rest;
        if (count > TILE) count = TILE;
        const long page = table[t / c.page], at = inside + t % c.page * dim;
        tile(q, c.pages_k + page * c.page_k + at, c.pages_v + page * c.page_v + at, count, group, dim, acc, most, total);
        t += count;
    }
    for (long g = 0; g < group; ++g)
        for (long d = 0; d < dim; ++d) store(out + g * dim + d, acc[g * dim + d] / total[g]);
}

template <typename T>
void decode(const Call<T>& c, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> scratch;
        // Rows have different lengths: whoever is done takes the next one.
#pragma omp for schedule(dynamic)
        for (long i = 0; i < c.rows * c.heads_kv; ++i) attend(c, i / c.heads_kv, i % c.heads_kv, scratch);
    }
}

template <typename T>
void write(const Call<T>& c, long k_step, long v_step, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (long i = 0; i < c.rows * c.heads_kv; ++i) {
        const long b = i / c.heads_kv, j = i % c.heads_kv;
        for (long t = 0; t < c.length[b]; ++t) {
            const long page = c.table[b * c.table_row + t / c.page], at = (j * c.page + t % c.page) * c.dim;
            const T *k = c.k + b * c.k_row + j * c.k_head + t * k_step, *v = c.v + b * c.v_row + j * c.v_head + t * v_step;
            std::memcpy(c.pages_k + page * c.page_k + at, k, c.dim * sizeof(T));
            std::memcpy(c.pages_v + page * c.page_v + at, v, c.dim * sizeof(T));
        }
    }
}

}  // namespace

extern "C" {

// The first row whose length is not in [0, limit], or of whose pages from position `length - window` on one is not in
// [0, pages); -1 if there is none. `limit` is at most the positions that a row of the table has.
long qerl_paged_bad_row(const int32_t* table, long table_row, const int32_t* length, long rows, long page, long window, long limit,
                        long pages) {
    for (long b = 0; b < rows; ++b) {
        const long n = length[b];
        if (n < 0 || n > limit) return b;
        for (long i = window && n > window ? (n - window) / page : 0; i * page < n; ++i) {
            const long number = table[b * table_row + i];
            if (number < 0 || number >= pages) return b;
        }
    }
    return -1;
}

void qerl_paged_decode_f32(const Call<float>* call, int threads) { decode(*call, threads); }
void qerl_paged_decode_bf16(const Call<bf16>* call, int threads) { decode(*call, threads); }
void qerl_paged_write_f32(const Call<float>* call, long k_step, long v_step, int threads) { write(*call, k_step, v_step, threads); }
void qerl_paged_write_bf16(const Call<bf16>* call, long k_step, long v_step, int threads) { write(*call, k_step, v_step, threads); }

}  // extern "C"
