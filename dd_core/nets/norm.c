/* Group normalisation, an affine map for each channel of each sample, and SiLU; forwards and backwards.

   A sample is `pixels` rows of `channels` numbers, float32 or bfloat16.  Arithmetic is in float32, sums over
   more than a block of pixels are in float64.  A block stays in a near cache, sixteen of its channels at a
   time in registers.  What comes of a sample depends neither on its batch nor on the number of threads:
   where samples are fewer than threads the blocks of each are shared out, and added up in the same order. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { BLOCK = 128, LANES = 16 };
typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES)));

typedef struct {
    long batch, pixels, channels, groups;
    int threads, silu, half; /* half: bfloat16 */
} Task;

/* Pixels of a sample, from `begin` up to `end`. */
typedef struct {
    long begin, end, channels;
} Block;

/* `count` numbers from the i-th on; lanes beyond them are zero. */
INLINE F load(const void *from, long i, int count, int half) {
    if (half) {
        H h = {0};
        memcpy(&h, (const uint16_t *)from + i, 2 * count);
        return (F)(__builtin_convertvector(h, U) << 16);
    }
    F v = {0};
    memcpy(&v, (const float *)from + i, 4 * count);
    return v;
}

/* bfloat16: to the nearest, ties to even; what is not a number stays so. */
INLINE void store(void *to, long i, F v, int count, int half) {
    if (half) {
        U bits = (U)v, nan = (U)(v != v);
        bits = ((bits + 0x7fff + (bits >> 16 & 1)) & ~nan) | (nan & 0x7fc00000);
        H h = __builtin_convertvector(bits >> 16, H);
        memcpy((uint16_t *)to + i, &h, 2 * count);
    } else {
        memcpy((float *)to + i, &v, 4 * count);
    }
}

/* 1 / (1 + exp(-z)), to 3e-7 of itself, beyond |z| = 80 as there; exp with the numbers of Cephes' expf. */
INLINE F sigmoid(F z) {
    F zero = {0};
    I above = z > 80, below = z < -80;
    F x = (F)(((I)-z & ~(above | below)) | (above & (I)(zero - 80)) | (below & (I)(zero + 80)));
    F n = x * 1.44269504f + 12582912.0f - 12582912.0f; /* to a whole number */
    F r = x - n * 0.693359375f + n * 2.12194440e-4f;
    F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    return (zero + 1) / (p * (F)((__builtin_convertvector(n, I) + 127) << 23) + 1);
}

/* Gradient of what SiLU was given, from that of what it gave. */
INLINE F before_silu(F dy, F z, int silu) {
    if (!silu) return dy;
    F t = sigmoid(z);
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
        store(y, i, silu ? z * sigmoid(z) : z, count, half);
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
        F dz = before_silu(load(dy, i, count, half), u * g + o, silu);
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
        F dz = before_silu(load(dy, i, count, half), u * g + o, silu);
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

static float *room(long numbers) {
    float *made = malloc(numbers * sizeof(float));
    if (!made) abort();
    return made;
}

/* One sample; moments of its groups are written to mean and scale. */
static void forward(const void *x, void *y, float *mean, float *scale, const float *gain, const float *offset,
                    double epsilon, Task task) {
    long C = task.channels, N = task.pixels, wide = C / task.groups, blocks = (N + BLOCK - 1) / BLOCK;
    float *sums = room((2 * blocks + 3) * C), *pivot = sums + 2 * blocks * C, *g = pivot + C, *o = g + C;
    for (long c = 0; c < C; c++) pivot[c] = load(x, c, 1, task.half)[0];
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
            g[c] = gain[c] * scale[q];
            o[c] = offset[c] - mean[q] * g[c];
        }
    }
    BLOCKS(CHANNELS(answer, block(k, task), x, y, g, o));
    free(sums);
}

/* One sample; gradients of its gain and offset are written to d_gain and d_offset. */
static void backward(const void *dy, const void *x, void *dx, float *d_gain, float *d_offset,
                     const float *mean, const float *scale, const float *gain, const float *offset, Task task) {
    long C = task.channels, N = task.pixels, wide = C / task.groups, blocks = (N + BLOCK - 1) / BLOCK;
    float *sums = room((2 * blocks + 4) * C), *of = sums + 2 * blocks * C;
    Back known = {of, of + C, of + 2 * C, of + 3 * C, gain, offset};
    for (long c = 0; c < C; c++) {
        known.scale[c] = scale[c / wide];
        known.shift[c] = -mean[c / wide] * scale[c / wide];
    }
    BLOCKS(CHANNELS(back_moments, block(k, task), dy, x, known, sums + 2 * k * C));
    for (long q = 0; q < task.groups; q++) {
        double first, second, lean = 0, turn = 0;
        for (long c = q * wide; c < (q + 1) * wide; c++) {
            add_up(sums, c, blocks, C, &first, &second);
            d_offset[c] = first;
            d_gain[c] = second;
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

void norm_forward(const char *x, char *y, float *of_groups, const float *gain, const float *offset,
                  double epsilon, Task task) {
    long C = task.channels, G = task.groups, bytes = task.pixels * C * (task.half ? 2 : 4);
    float *mean = of_groups, *scale = mean + task.batch * G;
    SAMPLES(forward(x + b * bytes, y + b * bytes, mean + b * G, scale + b * G, gain + b * C, offset + b * C,
                    epsilon, task));
}

void norm_backward(const char *dy, const char *x, char *dx, float *d_gain, float *d_offset,
                   const float *of_groups, const float *gain, const float *offset, Task task) {
    long C = task.channels, G = task.groups, bytes = task.pixels * C * (task.half ? 2 : 4);
    const float *mean = of_groups, *scale = mean + task.batch * G;
    SAMPLES(backward(dy + b * bytes, x + b * bytes, dx + b * bytes, d_gain + b * C, d_offset + b * C,
                     mean + b * G, scale + b * G, gain + b * C, offset + b * C, task));
}
