/* softmax(q k / sqrt(d)) v in bfloat16, for processors with AVX-512's products of bfloat16 pairs.

   A task is one head of one sample, or some of its queries.  It lays keys and values out in pairs, as those
   products want them, and takes ROWS queries at a time: all their logits, their exponentials, the weighted
   sum.  Sums are in float32; a query's result depends neither on its batch nor on the number of threads. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    long batch, heads, queries, keys, width;     /* width: of a head, a multiple of 16 */
    long of_q[3], of_k[3], of_v[3], of_out[3];   /* numbers between samples, heads, rows */
    float scale;
    int threads;
} Task;

#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && !defined(__AMX_BF16__)
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16, ROWS = 8, KEYS = 3, STRIPE = KEYS * LANES, FEWEST = 64 };

typedef uint16_t Half;
typedef __m512 F;

INLINE F product(F sum, int pair, __m512i pairs) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)pairs);
}

INLINE int pair_at(const Half *at) {
    int pair;
    memcpy(&pair, at, sizeof pair);
    return pair;
}

/* 2^x for x <= 0; 0 for -inf.  Of the fraction in [-1/2, 1/2] by a polynomial, relative error 2e-7. */
INLINE F power_of_two(F x) {
    x = _mm512_max_ps(_mm512_set1_ps(-150), x); /* in this order NaN stays NaN */
    F whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    F part = _mm512_sub_ps(x, whole);
    F y = _mm512_set1_ps(1.5403530e-4f);
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1.3333558e-3f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(9.6181291e-3f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(5.5504109e-2f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(2.4022651e-1f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(6.9314718e-1f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1));
    return _mm512_scalef_ps(y, whole);
}

/* laid[p][j]: numbers 2 p and 2 p + 1 of key j, side by side. */
static void lay_keys(const Half *k, long between, long keys, long room, long width, int *laid) {
    __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i step = _mm512_mullo_epi32(place, _mm512_set1_epi32((int)(between * sizeof(Half))));
    for (long j = 0; j < room; j += LANES) {
        long left = keys - j;
        __mmask16 there = left >= LANES ? 0xffff : left > 0 ? (__mmask16)((1 << left) - 1) : 0;
        for (long p = 0; p < width / 2; p++) {
            const Half *from = k + (there ? j : 0) * between + 2 * p;
            _mm512_store_si512(laid + p * room + j,
                               _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, step, from, 1));
        }
    }
}

/* laid[j][c]: number c of values 2 j and 2 j + 1, side by side. */
static void lay_values(const Half *v, long between, long keys, long room, long width, int *laid) {
    for (long j = 0; j < room / 2; j++)
        for (long c = 0; c < width; c += LANES) {
            __m512i pair = _mm512_setzero_si512();
            if (2 * j < keys)
                pair = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(v + 2 * j * between + c)));
            if (2 * j + 1 < keys) {
                __m256i next = _mm256_loadu_si256((const void *)(v + (2 * j + 1) * between + c));
                pair = _mm512_or_si512(pair, _mm512_slli_epi32(_mm512_cvtepu16_epi32(next), 16));
            }
            _mm512_store_si512(laid + j * width + c, pair);
        }
}

/* Logits of ROWS queries, in powers of two; `top` is the highest of each lane. */
INLINE void logits(const Half *const *q, const int *laid, const float *bias, long room, long width, F scale,
                   float *found, F *top) {
    for (long j = 0; j < room; j += STRIPE) {
        F sum[ROWS][KEYS];
        for (int i = 0; i < ROWS; i++)
            for (int s = 0; s < KEYS; s++) sum[i][s] = _mm512_setzero_ps();
        for (long p = 0; p < width / 2; p++) {
            __m512i key[KEYS];
            for (int s = 0; s < KEYS; s++) key[s] = _mm512_load_si512(laid + p * room + j + s * LANES);
            for (int i = 0; i < ROWS; i++) {
                int pair = pair_at(q[i] + 2 * p);
                for (int s = 0; s < KEYS; s++) sum[i][s] = product(sum[i][s], pair, key[s]);
            }
        }
        for (int s = 0; s < KEYS; s++) {
            F own = _mm512_load_ps(bias + j + s * LANES);
            for (int i = 0; i < ROWS; i++) {
                F logit = _mm512_fmadd_ps(sum[i][s], scale, own);
                _mm512_store_ps(found + i * room + j + s * LANES, logit);
                top[i] = _mm512_max_ps(top[i], logit);
            }
        }
    }
}

/* Exponentials of a query's logits, rounded to bfloat16; returns their sum. */
INLINE float weights(const float *logit, float top, long room, Half *weight) {
    F sum = _mm512_setzero_ps(), high = _mm512_set1_ps(top);
    long j = 0;
    for (; j + 2 * LANES <= room; j += 2 * LANES) {
        F one = power_of_two(_mm512_sub_ps(_mm512_load_ps(logit + j), high));
        F two = power_of_two(_mm512_sub_ps(_mm512_load_ps(logit + j + LANES), high));
        sum = _mm512_add_ps(sum, _mm512_add_ps(one, two));
        _mm512_storeu_si512(weight + j, (__m512i)_mm512_cvtne2ps_pbh(two, one));
    }
    for (; j < room; j += LANES) {
        F one = power_of_two(_mm512_sub_ps(_mm512_load_ps(logit + j), high));
        sum = _mm512_add_ps(sum, one);
        _mm256_storeu_si256((void *)(weight + j), (__m256i)_mm512_cvtneps_pbh(one));
    }
    return _mm512_reduce_add_ps(sum);
}

/* `lanes` times LANES numbers of the weighted sums of ROWS queries, of which `rows` are written. */
INLINE void seen(const Half *weight, const int *laid, const float *shares, long room, long width, long c,
                 int lanes, int rows, Half *out, long between) {
    F sum[ROWS][2];
    for (int i = 0; i < ROWS; i++)
        for (int s = 0; s < lanes; s++) sum[i][s] = _mm512_setzero_ps();
    for (long j = 0; j < room / 2; j++) {
        __m512i value[2];
        for (int s = 0; s < lanes; s++) value[s] = _mm512_load_si512(laid + j * width + c + s * LANES);
        for (int i = 0; i < ROWS; i++) {
            int pair = pair_at(weight + i * room + 2 * j);
            for (int s = 0; s < lanes; s++) sum[i][s] = product(sum[i][s], pair, value[s]);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int s = 0; s < lanes; s++) {
            F mean = _mm512_mul_ps(sum[i][s], _mm512_set1_ps(shares[i]));
            void *to = out + i * between + c + s * LANES;
            _mm256_storeu_si256(to, (__m256i)_mm512_cvtneps_pbh(mean));
        }
}

/* The queries of one head of one sample, from `begin` up to `end`. */
static void head(const Half *q, const Half *k, const Half *v, Half *out, const uint8_t *heard, long begin,
                 long end, const Task *t) {
    long room = (t->keys + STRIPE - 1) / STRIPE * STRIPE, width = t->width;
    size_t of_keys = width / 2 * room * 4, of_values = room / 2 * width * 4, of_logits = ROWS * room * 4;
    size_t bytes = of_keys + of_values + of_logits + room * 4 + (ROWS * room * 2 + 63) / 64 * 64;
    char *made = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!made) abort();
    int *keys = (int *)made, *values = (int *)(made + of_keys);
    float *logit = (float *)(made + of_keys + of_values), *bias = logit + ROWS * room;
    Half *weight = (Half *)(bias + room);
    lay_keys(k, t->of_k[2], t->keys, room, width, keys);
    lay_values(v, t->of_v[2], t->keys, room, width, values);
    for (long j = 0; j < room; j++) bias[j] = j < t->keys && (!heard || heard[j]) ? 0 : -__builtin_inff();
    F scale = _mm512_set1_ps(t->scale * 1.44269504f);
    for (long n = begin; n < end; n += ROWS) {
        const Half *row[ROWS];
        F top[ROWS];
        float shares[ROWS];
        int rows = end - n < ROWS ? end - n : ROWS;
        for (int i = 0; i < ROWS; i++) {
            row[i] = q + (n + (i < rows ? i : 0)) * t->of_q[2];
            top[i] = _mm512_set1_ps(-__builtin_inff());
        }
        logits(row, keys, bias, room, width, scale, logit, top);
        for (int i = 0; i < ROWS; i++)
            shares[i] = 1 / weights(logit + i * room, _mm512_reduce_max_ps(top[i]), room, weight + i * room);
        long c = 0;
        Half *to = out + n * t->of_out[2];
        for (; c + 2 * LANES <= width; c += 2 * LANES)
            seen(weight, values, shares, room, width, c, 2, rows, to, t->of_out[2]);
        if (c < width) seen(weight, values, shares, room, width, c, 1, rows, to, t->of_out[2]);
    }
    free(made);
}

int attention_runs(void) { return 1; }

/* heard: `batch keys`, 0 for keys that nothing looks at; or NULL. */
void attention(const Half *q, const Half *k, const Half *v, Half *out, const uint8_t *heard, Task task) {
    long whole = task.batch * task.heads, parts = 1;
    if (whole < 2 * task.threads) parts = (4 * task.threads + whole - 1) / whole;
    long most = (task.queries + FEWEST - 1) / FEWEST;
    if (parts > most) parts = most;
    long each = ((task.queries + parts - 1) / parts + ROWS - 1) / ROWS * ROWS;
#pragma omp parallel for num_threads(task.threads) schedule(static)
    for (long i = 0; i < whole * parts; i++) {
        long b = i / parts / task.heads, h = i / parts % task.heads;
        long begin = i % parts * each, end = begin + each;
        if (end > task.queries) end = task.queries;
        if (begin < end)
            head(q + b * task.of_q[0] + h * task.of_q[1], k + b * task.of_k[0] + h * task.of_k[1],
                 v + b * task.of_v[0] + h * task.of_v[1], out + b * task.of_out[0] + h * task.of_out[1],
                 heard ? heard + b * task.keys : 0, begin, end, &task);
    }
}

#else

int attention_runs(void) { return 0; }

#endif
