/* Group normalisation, an affine map for each channel of each sample, and SiLU; forwards and backwards.

   A sample is `pixels` rows of `channels` numbers, float32 or bfloat16.  Arithmetic is in float32, sums over
   more than a block of pixels are in float64.  A block stays in a near cache, as many of its channels in a
   register as that holds.  What comes of a sample depends neither on its batch nor on the number of threads:
   where samples are fewer than threads the blocks of each are shared out, and added up in the same order. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512DQ__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

#ifdef __AVX512DQ__
enum { BLOCK = 128, LANES = 16 };
#else
enum { BLOCK = 128, LANES = 8 }; /* with vectors wider than its registers gcc takes three times as long */
#endif
typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES)));

typedef struct {
    long batch, pixels, channels, groups;
    int threads, silu, half, half_affine, half_told; /* half: bfloat16 */
} Task;

/* A norm's weight and bias for each channel, and what one sample is told: scales, then shifts, or NULL. */
typedef struct {
    const void *weight, *bias, *told;
} Affine;

/* Pixels of a sample, from `begin` up to `end`. */
typedef struct {
    long begin, end, channels;
} Block;

/* What AVX-512 has an instruction for, and the same for other processors. */
#ifdef __AVX512DQ__
INLINE F widened(H h) { return (F)((U)_mm512_cvtepu16_epi32((__m256i)h) << 16); }
INLINE F within_80(F z) { /* the second operand of min and max is what they give of something not a number */
    return (F)_mm512_max_ps(_mm512_set1_ps(-80), _mm512_min_ps(_mm512_set1_ps(80), (__m512)z));
}
INLINE F times_power(F p, F n) { return (F)_mm512_scalef_ps((__m512)p, (__m512)n); } /* of n rounded down */
INLINE F above_whole(F n) { return (F)_mm512_reduce_ps((__m512)n, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
INLINE F near_reciprocal(F d) { return (F)_mm512_rcp14_ps((__m512)d); } /* to 2^-14 */
INLINE F reciprocal(F d) {
    F near = near_reciprocal(d); /* Newton's step squares its error */
    return near + near * (1 - d * near);
}
#else
INLINE F widened(H h) { return (F)(__builtin_convertvector(h, U) << 16); }
INLINE F within_80(F z) {
    F zero = {0};
    I above = z > 80, below = z < -80;
    return (F)(((I)z & ~(above | below)) | (above & (I)(zero + 80)) | (below & (I)(zero - 80)));
}
INLINE F times_power(F p, F n) { return p * (F)((__builtin_convertvector(n, I) + 127) << 23); }
INLINE F reciprocal(F d) { return 1 / d; }
#endif

/* bfloat16: to the nearest, ties to even; what is not a number stays so. */
INLINE H narrowed(F v) {
#if defined __AVX512DQ__ && defined __AVX512BF16__
    return (H)_mm512_cvtneps_pbh((__m512)v);
#else
    U bits = (U)v, nan = (U)(v != v);
    bits = ((bits + 0x7fff + (bits >> 16 & 1)) & ~nan) | (nan & 0x7fc00000);
    return __builtin_convertvector(bits >> 16, H);
#endif
}

/* `count` numbers from the i-th on; lanes beyond them are zero. */
INLINE F load(const void *from, long i, int count, int half) {
    if (half) {
        H h = {0};
        memcpy(&h, (const uint16_t *)from + i, 2 * count);
        return widened(h);
    }
    F v = {0};
    memcpy(&v, (const float *)from + i, 4 * count);
    return v;
}

/* The i-th number alone. */
static float number_at(const void *from, long i, int half) {
    if (!half) return ((const float *)from)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)from)[i] << 16;
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

INLINE void store(void *to, long i, F v, int count, int half) {
    if (half) {
        H h = narrowed(v);
        memcpy((uint16_t *)to + i, &h, 2 * count);
    } else {
        memcpy((float *)to + i, &v, 4 * count);
    }
}

/* 1 / (1 + exp(-z)), to 3e-7 of itself, beyond |z| = 80 as there.  exp(x) is 2^n exp(r) with n whole and r at
   most ln 2 / 2, where this polynomial, fitted to the least greatest error, is right to 1e-7. */
INLINE F sigmoid(F z) {
    F x = within_80(-z);
    F n = x * 1.44269504f + 12582912.0f - 12582912.0f; /* to a whole number */
    F r = x - n * 0.693359375f + n * 2.12194440e-4f;
    F p = r * 8.29022937e-3f + 4.18983884e-2f;
    p = p * r + 1.66676402e-1f;
    p = p * r + 4.99991447e-1f;
    p = p * r + 9.99999702e-1f;
    p = p * r + 1;
    return reciprocal(times_power(p, n) + 1);
}

#ifdef __AVX512DQ__
/* 1 / (1 + exp(-z)), to 7e-5 of itself: an answer in bfloat16 is rounded by 28 to 56 times as much.
   exp(-z) is 2^x, and what x has above a whole number is raised by a polynomial of 0 to 1, right to 3e-6. */
INLINE F near_sigmoid(F z) {
    F x = z * -1.44269504f, r = above_whole(x);
    F p = r * 1.34267947e-2f + 5.2242297e-2f;
    p = p * r + 2.41280288e-1f;
    p = p * r + 6.93044834e-1f;
    p = p * r + 1;
    return near_reciprocal(times_power(p, x) + 1);
}
#else
INLINE F near_sigmoid(F z) { return sigmoid(z); }
#endif

/* Gradient of what SiLU was given, from that of what it gave. */
INLINE F before_silu(F dy, F z, int silu, int half) {
    if (!silu) return dy;
    F t = half ? near_sigmoid(z) : sigmoid(z);
    return dy * t * (z * (1 - t) + 1);
}

/* Runs part(c, count, silu, half, ...) for all channels; silu, half and most counts are constants. */
#define CHANNELS(part, ...) \
    do { \
        if (task.silu && task.half) EACH(part, 1, 1, __VA_ARGS__); \
        else if (task.half) EACH(part, 0, 1, __VA_ARGS__); \
        else if (task.silu) EACH(part, 1, 0, __VA_ARGS__); \
        else EACH(part, 0, 0, __VA_ARGS__); \
    } while (0)
#define EACH(part, silu, half, ...) \
    do { \
        long c = 0, rest = task.channels % LANES; \
        for (; c < task.channels - rest; c += LANES) part(c, LANES, silu, half, __VA_ARGS__); \
        if (rest) part(c, rest, silu, half, __VA_ARGS__); \
    } while (0)

/* Sums of x - pivot and of its square. */
INLINE void moments(long c, int count, int silu, int half, Block in, const void *x, const float *pivot,
                    float *sums) {
    (void)silu;
    F first = {0}, second = {0}, p = load(pivot, c, count, 0);
    for (long n = in.begin; n < in.end; n++) {
        F v = load(x, n * in.channels + c, count, half) - p;
        first += v;
        second += v * v;
    }
    store(sums, c, first, count, 0);
    store(sums, in.channels + c, second, count, 0);
}

INLINE void answer(long c, int count, int silu, int half, Block in, const void *x, void *y, const float *gain,
                   const float *offset) {
    F g = load(gain, c, count, 0), o = load(offset, c, count, 0);
    for (long n = in.begin; n < in.end; n++) {
        long i = n * in.channels + c;
        F z = load(x, i, count, half) * g + o;
        if (silu) z *= half ? near_sigmoid(z) : sigmoid(z);
        store(y, i, z, count, half);
    }
}

/* What the way back knows of each channel: u = x * scale + shift is normalised, z = u * gain + offset is what
   SiLU was given, and dx = dz * scale * gain + u * turn + lean. */
typedef struct {
    float *scale, *shift, *turn, *lean;
    const float *gain, *offset;
} Back;

/* Sums of dz and of dz * u. */
INLINE void back_moments(long c, int count, int silu, int half, Block in, const void *dy, const void *x,
                         Back k, float *sums) {
    F first = {0}, second = {0}, r = load(k.scale, c, count, 0), m = load(k.shift, c, count, 0);
    F g = load(k.gain, c, count, 0), o = load(k.offset, c, count, 0);
    for (long n = in.begin; n < in.end; n++) {
        long i = n * in.channels + c;
        F u = load(x, i, count, half) * r + m;
        F dz = before_silu(load(dy, i, count, half), u * g + o, silu, half);
        first += dz;
        second += dz * u;
    }
    store(sums, c, first, count, 0);
    store(sums, in.channels + c, second, count, 0);
}

INLINE void back_answer(long c, int count, int silu, int half, Block in, const void *dy, const void *x,
                        void *dx, Back k) {
    F r = load(k.scale, c, count, 0), m = load(k.shift, c, count, 0), g = load(k.gain, c, count, 0);
    F o = load(k.offset, c, count, 0), t = load(k.turn, c, count, 0), l = load(k.lean, c, count, 0);
    F rg = r * g;
    for (long n = in.begin; n < in.end; n++) {
        long i = n * in.channels + c;
        F u = load(x, i, count, half) * r + m;
        F dz = before_silu(load(dy, i, count, half), u * g + o, silu, half);
        store(dx, i, dz * rg + (u * t + l), count, half);
    }
}

static Block block(long k, Task task) {
    long end = (k + 1) * BLOCK;
    return (Block){k * BLOCK, end < task.pixels ? end : task.pixels, task.channels};
}

/* Both sums of channel c over all blocks. */
static void add_up(const float *sums, long c, long blocks, long channels, double *first, double *second) {
    *first = *second = 0;
    for (long k = 0; k < blocks; k++) {
        *first += sums[2 * k * channels + c];
        *second += sums[(2 * k + 1) * channels + c];
    }
}

/* Runs `one` for every sample b, several at once; where there are few, one by one with all threads. */
#define SAMPLES(one) \
    do { \
        if (task.batch < task.threads) { \
            for (long b = 0; b < task.batch; b++) one; \
        } else { \
            int threads = task.threads; \
            task.threads = 1; \
            _Pragma("omp parallel for num_threads(threads)") for (long b = 0; b < task.batch; b++) one; \
        } \
    } while (0)

/* Runs `one` for every block k of a sample. */
#define BLOCKS(one) \
    do { \
        int threads = task.threads < blocks ? task.threads : blocks; \
        if (threads < 2) { \
            for (long k = 0; k < blocks; k++) one; \
        } else { \
            _Pragma("omp parallel for num_threads(threads)") for (long k = 0; k < blocks; k++) one; \
        } \
    } while (0)

/* What each channel is multiplied with and what is added, at last. */
static void affine(Affine of, float *gain, float *offset, Task task) {
    for (long c = 0; c < task.channels; c++) {
        float scale = 1, shift = 0;
        if (of.told) {
            scale += number_at(of.told, c, task.half_told);
            shift = number_at(of.told, task.channels + c, task.half_told);
        }
        gain[c] = number_at(of.weight, c, task.half_affine) * scale;
        offset[c] = number_at(of.bias, c, task.half_affine) * scale + shift;
    }
}

static float *room(long numbers) {
    float *made = malloc(numbers * sizeof(float));
    if (!made) abort();
    return made;
}

/* One sample; moments of its groups are written to mean and scale. */
static void forward(const void *x, void *y, float *mean, float *scale, Affine of, double epsilon, Task task) {
    long C = task.channels, N = task.pixels, wide = C / task.groups, blocks = (N + BLOCK - 1) / BLOCK;
    float *sums = room((2 * blocks + 3) * C), *pivot = sums + 2 * blocks * C, *g = pivot + C, *o = g + C;
    affine(of, g, o, task);
    for (long c = 0; c < C; c++) pivot[c] = number_at(x, c, task.half);
    BLOCKS(CHANNELS(moments, block(k, task), x, pivot, sums + 2 * k * C));
    for (long q = 0; q < task.groups; q++) {
        double base = pivot[q * wide], m = 0, square = 0; /* both of x - base, at first sums */
        for (long c = q * wide; c < (q + 1) * wide; c++) {
            double first, second, d = pivot[c] - base;
            add_up(sums, c, blocks, C, &first, &second);
            m += first / N + d;
            square += second / N + 2 * d * first / N + d * d;
        }
        m /= wide;
        double variance = square / wide - m * m;
        scale[q] = 1 / sqrt((variance < 0 ? 0 : variance) + epsilon);
        mean[q] = m + base;
        for (long c = q * wide; c < (q + 1) * wide; c++) {
            g[c] *= scale[q];
            o[c] -= mean[q] * g[c];
        }
    }
    BLOCKS(CHANNELS(answer, block(k, task), x, y, g, o));
    free(sums);
}

/* One sample; what it adds to the gradients of weight and bias, and the gradient of what it was told. */
static void backward(const void *dy, const void *x, void *dx, float *d_weight, float *d_bias, float *d_told,
                     const float *mean, const float *scale, Affine of, Task task) {
    long C = task.channels, N = task.pixels, wide = C / task.groups, blocks = (N + BLOCK - 1) / BLOCK;
    float *sums = room((2 * blocks + 6) * C), *k0 = sums + 2 * blocks * C;
    float *gain = k0 + 4 * C, *offset = gain + C;
    Back known = {k0, k0 + C, k0 + 2 * C, k0 + 3 * C, gain, offset};
    affine(of, gain, offset, task);
    for (long c = 0; c < C; c++) {
        known.scale[c] = scale[c / wide];
        known.shift[c] = -mean[c / wide] * scale[c / wide];
    }
    BLOCKS(CHANNELS(back_moments, block(k, task), dy, x, known, sums + 2 * k * C));
    for (long q = 0; q < task.groups; q++) {
        double lean = 0, turn = 0;
        for (long c = q * wide; c < (q + 1) * wide; c++) {
            double first, second; /* the gradients of offset and gain */
            add_up(sums, c, blocks, C, &first, &second);
            double told = of.told ? 1 + number_at(of.told, c, task.half_told) : 1;
            d_weight[c] = second * told;
            d_bias[c] = first * told;
            if (of.told) {
                d_told[c] = second * number_at(of.weight, c, task.half_affine) +
                            first * number_at(of.bias, c, task.half_affine);
                d_told[C + c] = first;
            }
            lean += gain[c] * first;
            turn += gain[c] * second;
        }
        for (long c = q * wide; c < (q + 1) * wide; c++) {
            known.lean[c] = -lean / (N * wide) * scale[q];
            known.turn[c] = -turn / (N * wide) * scale[q];
        }
    }
    BLOCKS(CHANNELS(back_answer, block(k, task), dy, x, dx, known));
    free(sums);
}

/* What sample b is told. */
static Affine of_sample(Affine of, long b, Task task) {
    long bytes = 2 * task.channels * (task.half_told ? 2 : 4);
    if (of.told) of.told = (const char *)of.told + b * bytes;
    return of;
}

void norm_forward(const char *x, char *y, float *of_groups, const void *weight, const void *bias,
                  const void *told, double epsilon, Task task) {
    long C = task.channels, G = task.groups, bytes = task.pixels * C * (task.half ? 2 : 4);
    float *mean = of_groups, *scale = mean + task.batch * G;
    Affine of = {weight, bias, told};
    SAMPLES(forward(x + b * bytes, y + b * bytes, mean + b * G, scale + b * G, of_sample(of, b, task), epsilon,
                    task));
}

/* of_affine: gradients `2 b c`, of the weight, then of the bias, for each sample. */
void norm_backward(const char *dy, const char *x, char *dx, float *of_affine, float *d_told,
                   const float *of_groups, const void *weight, const void *bias, const void *told, Task task) {
    long C = task.channels, G = task.groups, bytes = task.pixels * C * (task.half ? 2 : 4);
    const float *mean = of_groups, *scale = mean + task.batch * G;
    float *d_bias = of_affine + task.batch * C;
    Affine of = {weight, bias, told};
    SAMPLES(backward(dy + b * bytes, x + b * bytes, dx + b * bytes, of_affine + b * C, d_bias + b * C,
                     d_told + 2 * b * C, mean + b * G, scale + b * G, of_sample(of, b, task), task));
}
