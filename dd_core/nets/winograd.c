/* 3 x 3 convolution in bfloat16 by Winograd's minimal filtering F(2 x 2, 3 x 3) (Lavin & Gray 2016,
   arXiv:1509.09308), for processors with AVX-512's products of bfloat16 pairs.

   An output tile of 2 x 2 pixels needs 4 x 4 input pixels.  Both these and the kernel are transformed to 16
   points, at each of which channels meet in a matrix product of their own: 16 products where the definition
   takes 36.  Points are rounded to bfloat16, sums are in float32; a tile's result depends neither on other
   tiles nor on the number of threads. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    long batch, height, width, from, to; /* height, width: even; from, to: channels, multiples of 16 */
    int threads, half_bias;              /* half_bias: whether the bias is bfloat16 rather than float32 */
} Task;

#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && !defined(__AMX_BF16__)
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16, MOST_LANES = 3, POINTS = 16, TILES = 8, STRIPE = 64, APART = 32 };
/* TILES x MOST_LANES: sums held in registers.  STRIPE: most tiles transformed at a time.  APART: numbers
   between points beyond their tiles, so that the points of a tile do not fall into one set of the cache. */

typedef uint16_t Half;
typedef __m512 F;

INLINE F half(const void *at) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(at)), 16));
}

INLINE void round_to(Half *at, F value) {
    _mm256_storeu_si256((void *)at, (__m256i)_mm512_cvtneps_pbh(value));
}

/* As one half of pairs: the first, whose partner is zero until it is known, or the second. */
INLINE void round_into_pairs(Half *at, F value, int second) {
    __m512i halves = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(value));
    if (second) halves = _mm512_or_si512(_mm512_loadu_si512(at), _mm512_slli_epi32(halves, 16));
    _mm512_storeu_si512(at, halves);
}

/* Registers of output channels that are worked on together: as even a share as MOST_LANES allows. */
INLINE long share(long left) {
    long parts = (left + MOST_LANES - 1) / MOST_LANES;
    return (left + parts - 1) / parts;
}

/* G w G': the 16 points of a register of kernels, from its nine taps. */
INLINE void kernel_points(const F *tap, F *point) {
    F half_of = _mm512_set1_ps(.5f), down[4][3];
    for (int x = 0; x < 3; x++) {
        F outer = _mm512_mul_ps(half_of, _mm512_add_ps(tap[x], tap[6 + x]));
        F inner = _mm512_mul_ps(half_of, tap[3 + x]);
        down[0][x] = tap[x];
        down[1][x] = _mm512_add_ps(outer, inner);
        down[2][x] = _mm512_sub_ps(outer, inner);
        down[3][x] = tap[6 + x];
    }
    for (int y = 0; y < 4; y++) {
        F outer = _mm512_mul_ps(half_of, _mm512_add_ps(down[y][0], down[y][2]));
        F inner = _mm512_mul_ps(half_of, down[y][1]);
        point[4 * y] = down[y][0];
        point[4 * y + 1] = _mm512_add_ps(outer, inner);
        point[4 * y + 2] = _mm512_sub_ps(outer, inner);
        point[4 * y + 3] = down[y][2];
    }
}

/* Lays kernels out as `winograd` reads them: by share of outputs, point, pair of inputs, output, input of the
   pair.  `strides`: numbers between outputs, inputs, rows and columns of `w`; the latter two may be negative. */
void winograd_lay(const float *w, const long *strides, long from, long to, int threads, Half *laid) {
    __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i step = _mm512_mullo_epi32(place, _mm512_set1_epi32((int)strides[0]));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long p = 0; p < from / 2; p++)
        for (long done = 0; done < to / LANES;) {
            long lanes = share(to / LANES - done);
            int *block = (int *)laid + POINTS * (from / 2) * done * LANES;
            for (long s = 0; s < lanes; s++) {
                F point[2][POINTS];
                for (int i = 0; i < 2; i++) {
                    F tap[9];
                    for (int k = 0; k < 9; k++) {
                        const float *at = w + (done + s) * LANES * strides[0] + (2 * p + i) * strides[1];
                        at += k / 3 * strides[2] + k % 3 * strides[3];
                        tap[k] = _mm512_i32gather_ps(step, at, 4);
                    }
                    kernel_points(tap, point[i]);
                }
                for (int k = 0; k < POINTS; k++) {
                    __m512i even = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(point[0][k]));
                    __m512i odd = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(point[1][k]));
                    int *at = block + ((k * (from / 2) + p) * lanes + s) * LANES;
                    _mm512_storeu_si512(at, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
                }
            }
            done += lanes;
        }
}

/* Where an output tile is: its sample, and its row and column among the sample's tiles. */
typedef struct {
    long sample, down, across;
} Place;

INLINE Place place_of(long tile, const Task *t) {
    long across = t->width / 2, down = t->height / 2;
    return (Place){tile / across / down, tile / across % down, tile % across};
}

/* B' of four pixels of column x, below each other: a register of channels; outside the picture zeros. */
INLINE void column(const Half *const *row, long x, const Task *t, F *point) {
    F pixel[4];
    for (int y = 0; y < 4; y++)
        pixel[y] = row[y] && x >= 0 && x < t->width ? half(row[y] + x * t->from) : _mm512_setzero_ps();
    point[0] = _mm512_sub_ps(pixel[0], pixel[2]);
    point[1] = _mm512_add_ps(pixel[1], pixel[2]);
    point[2] = _mm512_sub_ps(pixel[2], pixel[1]);
    point[3] = _mm512_sub_ps(pixel[1], pixel[3]);
}

/* B' d B: the points of `count` tiles from `begin` on, a point `between` numbers after the last.  By tile, or
   by pair of tiles, whose numbers lie side by side. */
INLINE void lay_inputs(const Half *x, long begin, long count, long between, Half *laid, int paired,
                       const Task *t) {
    for (long n = 0, run; n < count; n += run) {
        Place at = place_of(begin + n, t);
        run = t->width / 2 - at.across < count - n ? t->width / 2 - at.across : count - n;
        for (long c = 0; c < t->from; c += LANES) {
            const Half *row[4];
            F point[4][4]; /* by column and row; two columns are the next tile's too */
            for (int i = 0; i < 4; i++) {
                long y = 2 * at.down - 1 + i;
                int inside = y >= 0 && y < t->height;
                row[i] = inside ? x + (at.sample * t->height + y) * t->width * t->from + c : NULL;
            }
            column(row, 2 * at.across - 1, t, point[0]);
            column(row, 2 * at.across, t, point[1]);
            for (long r = 0; r < run; r++) {
                long tile = n + r;
                Half *to = laid + (paired ? tile / 2 * 2 * t->from + 2 * c : tile * t->from + c);
                column(row, 2 * (at.across + r) + 1, t, point[2]);
                column(row, 2 * (at.across + r) + 2, t, point[3]);
                for (int y = 0; y < 4; y++) {
                    F across[4] = {
                        _mm512_sub_ps(point[0][y], point[2][y]),
                        _mm512_add_ps(point[1][y], point[2][y]),
                        _mm512_sub_ps(point[2][y], point[1][y]),
                        _mm512_sub_ps(point[1][y], point[3][y]),
                    };
                    for (int k = 0; k < 4; k++)
                        if (paired)
                            round_into_pairs(to + (4 * y + k) * between, across[k], tile % 2);
                        else
                            round_to(to + (4 * y + k) * between, across[k]);
                    point[0][y] = point[2][y];
                    point[1][y] = point[3][y];
                }
            }
        }
    }
}

/* At one point, TILES tiles times a share of kernels. */
INLINE void products(const Half *input, const int *kernel, long from, int lanes, float *found) {
    F sum[TILES][MOST_LANES];
    for (int i = 0; i < TILES; i++)
        for (int s = 0; s < lanes; s++) sum[i][s] = _mm512_setzero_ps();
    for (long p = 0; p < from / 2; p++) {
        __m512bh pairs[MOST_LANES];
        for (int s = 0; s < lanes; s++)
            pairs[s] = (__m512bh)_mm512_loadu_si512(kernel + (p * lanes + s) * LANES);
        for (int i = 0; i < TILES; i++) {
            int pair;
            memcpy(&pair, input + i * from + 2 * p, sizeof pair);
            for (int s = 0; s < lanes; s++)
                sum[i][s] = _mm512_dpbf16_ps(sum[i][s], (__m512bh)_mm512_set1_epi32(pair), pairs[s]);
        }
    }
    for (int i = 0; i < TILES; i++)
        for (int s = 0; s < lanes; s++) _mm512_store_ps(found + (i * lanes + s) * LANES, sum[i][s]);
}

/* A' m A, bias and what is there already: a register of channels of an output tile. */
INLINE void output_tile(const float *found, long between, F bias, const Half *onto, Half *out,
                        const Task *t) {
    F down[2][4];
    for (int x = 0; x < 4; x++) {
        F point[4];
        for (int y = 0; y < 4; y++) point[y] = _mm512_load_ps(found + (4 * y + x) * between);
        down[0][x] = _mm512_add_ps(_mm512_add_ps(point[0], point[1]), point[2]);
        down[1][x] = _mm512_sub_ps(_mm512_sub_ps(point[1], point[2]), point[3]);
    }
    for (int y = 0; y < 2; y++) {
        long left = y * t->width * t->to, right = left + t->to;
        F one = _mm512_add_ps(_mm512_add_ps(down[y][0], down[y][1]), _mm512_add_ps(down[y][2], bias));
        F two = _mm512_add_ps(_mm512_sub_ps(down[y][1], down[y][2]), _mm512_sub_ps(bias, down[y][3]));
        if (onto) {
            one = _mm512_add_ps(one, half(onto + left));
            two = _mm512_add_ps(two, half(onto + right));
        }
        round_to(out + left, one);
        round_to(out + right, two);
    }
}

/* A share of output channels, from channel `c` on, of the `count` tiles whose points are laid out. */
INLINE void outputs(const Half *input, const int *kernel, const void *bias, const Half *onto, Half *out,
                    long begin, long count, long between, long c, int lanes, float *found, const Task *t) {
    long room = (count + TILES - 1) / TILES * TILES, found_between = room * lanes * LANES;
    for (int k = 0; k < POINTS; k++)
        for (long n = 0; n < room; n += TILES)
            products(input + k * between + n * t->from, kernel + k * (t->from / 2) * lanes * LANES, t->from,
                     lanes, found + k * found_between + n * lanes * LANES);
    F own[MOST_LANES];
    for (int s = 0; s < lanes; s++) {
        long at = c + s * LANES;
        if (!bias)
            own[s] = _mm512_setzero_ps();
        else
            own[s] = t->half_bias ? half((const Half *)bias + at) : _mm512_loadu_ps((const float *)bias + at);
    }
    for (long n = 0; n < count; n++) {
        Place at = place_of(begin + n, t);
        long first = ((at.sample * t->height + 2 * at.down) * t->width + 2 * at.across) * t->to + c;
        for (int s = 0; s < lanes; s++) {
            long to = first + s * LANES;
            const float *points = found + (n * lanes + s) * LANES;
            output_tile(points, found_between, own[s], onto ? onto + to : NULL, out + to, t);
        }
    }
}

int winograd_runs(void) { return 1; }

/* out = w * x + bias + onto.  x, onto, out: `b h w c`; laid: by winograd_lay; bias, onto: or NULL. */
void winograd(const Half *x, const Half *laid, const void *bias, const Half *onto, Half *out, Task task) {
    const Task *t = &task;
    long tiles = t->batch * (t->height / 2) * (t->width / 2);
    long each = ((tiles + t->threads - 1) / t->threads + TILES - 1) / TILES * TILES;
    if (each > STRIPE) each = STRIPE;
    long between = each * t->from + APART;
    size_t of_inputs = POINTS * between * sizeof(Half), of_found = POINTS * each * MOST_LANES * LANES * 4;
#pragma omp parallel num_threads(t->threads)
    {
        char *made = aligned_alloc(64, of_inputs + of_found);
        if (!made) abort();
        Half *input = (Half *)made;
        float *found = (float *)(made + of_inputs);
#pragma omp for schedule(static)
        for (long begin = 0; begin < tiles; begin += each) {
            long count = tiles - begin < each ? tiles - begin : each;
            lay_inputs(x, begin, count, between, input, 0, t);
            for (long done = 0, lanes; done < t->to / LANES; done += lanes) {
                const int *kernel = (const int *)laid + POINTS * (t->from / 2) * done * LANES;
                long c = done * LANES;
                lanes = share(t->to / LANES - done);
                if (lanes == 3)
                    outputs(input, kernel, bias, onto, out, begin, count, between, c, 3, found, t);
                else if (lanes == 2)
                    outputs(input, kernel, bias, onto, out, begin, count, between, c, 2, found, t);
                else
                    outputs(input, kernel, bias, onto, out, begin, count, between, c, 1, found, t);
            }
        }
        free(made);
    }
}

/* A dy A': the points of gradients of `count` tiles, by pair of tiles; adds the gradients to `sums`. */
INLINE void lay_gradients(const Half *grad, long begin, long count, long between, Half *laid, float *sums,
                          const Task *t) {
    for (long n = 0; n < count; n++) {
        Place at = place_of(begin + n, t);
        const Half *first = grad + ((at.sample * t->height + 2 * at.down) * t->width + 2 * at.across) * t->to;
        for (long c = 0; c < t->to; c += LANES) {
            Half *to = laid + n / 2 * 2 * t->to + 2 * c;
            F down[4][2];
            for (int x = 0; x < 2; x++) {
                F upper = half(first + x * t->to + c), lower = half(first + (t->width + x) * t->to + c);
                down[0][x] = upper;
                down[1][x] = _mm512_add_ps(upper, lower);
                down[2][x] = _mm512_sub_ps(upper, lower);
                down[3][x] = _mm512_sub_ps(_mm512_setzero_ps(), lower);
            }
            for (int y = 0; y < 4; y++) {
                F across[4] = {
                    down[y][0],
                    _mm512_add_ps(down[y][0], down[y][1]),
                    _mm512_sub_ps(down[y][0], down[y][1]),
                    _mm512_sub_ps(_mm512_setzero_ps(), down[y][1]),
                };
                for (int k = 0; k < 4; k++)
                    round_into_pairs(to + (4 * y + k) * between, across[k], n % 2);
                if (y == 1) _mm512_storeu_ps(sums + c, _mm512_add_ps(_mm512_loadu_ps(sums + c), across[1]));
            }
        }
    }
}

/* At one point, adds to `sum` TILES input channels times a share of output channels, over pairs of tiles. */
INLINE void meetings(const int *input, const int *grad, long pairs, int lanes, float *sum, const Task *t) {
    F own[TILES][MOST_LANES];
    for (int i = 0; i < TILES; i++)
        for (int s = 0; s < lanes; s++) own[i][s] = _mm512_loadu_ps(sum + i * t->to + s * LANES);
    for (long p = 0; p < pairs; p++) {
        __m512bh both[MOST_LANES];
        for (int s = 0; s < lanes; s++) both[s] = (__m512bh)_mm512_loadu_si512(grad + p * t->to + s * LANES);
        for (int i = 0; i < TILES; i++) {
            __m512bh pair = (__m512bh)_mm512_set1_epi32(input[p * t->from + i]);
            for (int s = 0; s < lanes; s++) own[i][s] = _mm512_dpbf16_ps(own[i][s], pair, both[s]);
        }
    }
    for (int i = 0; i < TILES; i++)
        for (int s = 0; s < lanes; s++) _mm512_storeu_ps(sum + i * t->to + s * LANES, own[i][s]);
}

/* G' m G: the nine taps of a register of kernels, from their 16 points. */
INLINE void kernel_taps(const F *point, F *tap) {
    F half_of = _mm512_set1_ps(.5f), down[3][4];
    for (int x = 0; x < 4; x++) {
        F plus = _mm512_mul_ps(half_of, _mm512_add_ps(point[4 + x], point[8 + x]));
        down[0][x] = _mm512_add_ps(point[x], plus);
        down[1][x] = _mm512_mul_ps(half_of, _mm512_sub_ps(point[4 + x], point[8 + x]));
        down[2][x] = _mm512_add_ps(plus, point[12 + x]);
    }
    for (int y = 0; y < 3; y++) {
        F plus = _mm512_mul_ps(half_of, _mm512_add_ps(down[y][1], down[y][2]));
        tap[3 * y] = _mm512_add_ps(down[y][0], plus);
        tap[3 * y + 1] = _mm512_mul_ps(half_of, _mm512_sub_ps(down[y][1], down[y][2]));
        tap[3 * y + 2] = _mm512_add_ps(plus, down[y][3]);
    }
}

/* The gradients of kernels and bias.  x, grad: `b h w c`; d_w: `to from 3 3`, contiguous; d_bias: `to`. */
void winograd_gradients(const Half *x, const Half *grad, float *d_w, float *d_bias, Task task) {
    const Task *t = &task;
    long tiles = t->batch * (t->height / 2) * (t->width / 2), of_sums = POINTS * t->from * t->to + t->to;
    long to_input = STRIPE * t->from + APART, to_grad = STRIPE * t->to + APART;
    size_t of_points = POINTS * (to_input + to_grad) * sizeof(Half);
    float *sums = aligned_alloc(64, t->threads * of_sums * sizeof(float));
    if (!sums) abort();
#pragma omp parallel num_threads(t->threads)
    {
        Half *input = aligned_alloc(64, of_points), *output = input + POINTS * to_input;
        if (!input) abort();
#pragma omp for schedule(static)
        for (int thread = 0; thread < t->threads; thread++) {
            float *own = sums + thread * of_sums;
            long stripes = (tiles + STRIPE - 1) / STRIPE;
            long last = stripes * (thread + 1) / t->threads;
            memset(own, 0, of_sums * sizeof(float));
            for (long stripe = stripes * thread / t->threads; stripe < last; stripe++) {
                long begin = stripe * STRIPE, count = tiles - begin < STRIPE ? tiles - begin : STRIPE;
                lay_inputs(x, begin, count, to_input, input, 1, t);
                lay_gradients(grad, begin, count, to_grad, output, own + POINTS * t->from * t->to, t);
                for (int k = 0; k < POINTS; k++)
                    for (long i = 0; i < t->from; i += TILES)
                        for (long done = 0, lanes; done < t->to / LANES; done += lanes) {
                            const int *of_x = (const int *)(input + k * to_input) + i;
                            const int *of_y = (const int *)(output + k * to_grad) + done * LANES;
                            float *sum = own + (k * t->from + i) * t->to + done * LANES;
                            lanes = share(t->to / LANES - done);
                            if (lanes == 3)
                                meetings(of_x, of_y, (count + 1) / 2, 3, sum, t);
                            else if (lanes == 2)
                                meetings(of_x, of_y, (count + 1) / 2, 2, sum, t);
                            else
                                meetings(of_x, of_y, (count + 1) / 2, 1, sum, t);
                        }
            }
        }
        free(input);
#pragma omp for schedule(static)
        for (long i = 0; i < t->from; i++)
            for (long c = 0; c < t->to; c += LANES) {
                F point[POINTS], tap[9];
                float lane[9][LANES];
                for (int k = 0; k < POINTS; k++) {
                    point[k] = _mm512_setzero_ps();
                    for (int thread = 0; thread < t->threads; thread++) {
                        const float *at = sums + thread * of_sums + (k * t->from + i) * t->to + c;
                        point[k] = _mm512_add_ps(point[k], _mm512_loadu_ps(at));
                    }
                }
                kernel_taps(point, tap);
                for (int k = 0; k < 9; k++) _mm512_storeu_ps(lane[k], tap[k]);
                for (int s = 0; s < LANES; s++)
                    for (int k = 0; k < 9; k++) d_w[((c + s) * t->from + i) * 9 + k] = lane[k][s];
            }
    }
    for (long c = 0; c < t->to; c++) {
        d_bias[c] = 0;
        for (int thread = 0; thread < t->threads; thread++)
            d_bias[c] += sums[thread * of_sums + POINTS * t->from * t->to + c];
    }
    free(sums);
}

#else

int winograd_runs(void) { return 0; }

#endif
