/* 3 x 3 convolution by Winograd's minimal filtering F(2 x 2, 3 x 3) (Lavin & Gray 2016, arXiv:1509.09308): in
   bfloat16 where HALF is defined, for processors with AVX-512's products of bfloat16 pairs, else in float32.

   An output tile of 2 x 2 pixels needs 4 x 4 input pixels.  Both these and the kernel are transformed to 16
   points, at each of which channels meet in a matrix product of their own: 16 products where the definition
   takes 36.  In bfloat16 points are rounded to it, and sums are in float32.  A tile's result depends neither
   on other tiles nor on the number of threads. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    long batch, height, width, from, to; /* height, width: even; from, to: channels, multiples of 16 */
    int threads, half_bias;              /* half_bias: whether the bias is bfloat16 rather than float32 */
} Task;

#ifdef HALF
#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && !defined(__AMX_BF16__)
#define RUNS
#endif
#elif defined(__AVX2__) && defined(__FMA__)
#define RUNS
#endif

#ifdef RUNS
#include <immintrin.h>
#include <omp.h>

#define INLINE static inline __attribute__((always_inline))

/* TILES x MOST_LANES: sums held in registers.  STRIPE: most tiles transformed at a time.  APART: numbers
   between points beyond their tiles, so that the points of a tile do not fall into one set of the cache. */
#ifdef __AVX512F__
enum { LANES = 16, TILES = 8 };
#else
enum { LANES = 8, TILES = 4 };
#endif
enum { MOST_LANES = 3, POINTS = 16, STRIPE = 64, APART = 32 };

typedef float F __attribute__((vector_size(4 * LANES)));
typedef F Anywhere __attribute__((aligned(4)));

INLINE F floats(const float *at) { return *(const Anywhere *)at; }
INLINE void put(float *at, F value) { *(Anywhere *)at = value; }
INLINE F all(float value) { return value - (F){}; }

#ifdef HALF
/* A word, what a product takes from each factor, holds two numbers. */
typedef uint16_t Number;
typedef __m512i Words;
enum { IN_WORD = 2 };

INLINE F numbers(const Number *at) {
    return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)at)), 16);
}

INLINE void round_to(Number *at, F value) {
    _mm256_storeu_si256((void *)at, (__m256i)_mm512_cvtneps_pbh((__m512)value));
}

/* As number `which` of each word; the second is zero until it is known. */
INLINE void round_into(Number *words, F value, int which) {
    __m512i halves = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)value));
    if (which) halves = _mm512_or_si512(_mm512_loadu_si512(words), _mm512_slli_epi32(halves, 16));
    _mm512_storeu_si512(words, halves);
}

INLINE Words words_at(const int *at) { return _mm512_loadu_si512(at); }

INLINE F product(F sum, int word, Words words) {
    return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(word), (__m512bh)words);
}
#else
/* A word, what a product takes from each factor, is a number. */
typedef float Number;
typedef F Words;
enum { IN_WORD = 1 };

INLINE F numbers(const Number *at) { return floats(at); }
INLINE void round_to(Number *at, F value) { put(at, value); }
INLINE void round_into(Number *words, F value, int which) {
    (void)which;
    put(words, value);
}
INLINE Words words_at(const int *at) { return floats((const float *)at); }

INLINE F product(F sum, int word, Words words) {
    float number;
    memcpy(&number, &word, sizeof number);
    return sum + all(number) * words;
}
#endif

INLINE F gathered(const float *at, long between) {
#ifdef __AVX512F__
    __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (F)_mm512_i32gather_ps(_mm512_mullo_epi32(place, _mm512_set1_epi32((int)between)), at, 4);
#else
    __m256i place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return (F)_mm256_i32gather_ps(at, _mm256_mullo_epi32(place, _mm256_set1_epi32((int)between)), 4);
#endif
}

/* Registers of output channels that are worked on together: as even a share as MOST_LANES allows. */
INLINE long share(long left) {
    long parts = (left + MOST_LANES - 1) / MOST_LANES;
    return (left + parts - 1) / parts;
}

/* G w G': the 16 points of a register of kernels, from its nine taps. */
INLINE void kernel_points(const F *tap, F *point) {
    F down[4][3];
    for (int x = 0; x < 3; x++) {
        F outer = .5f * (tap[x] + tap[6 + x]), inner = .5f * tap[3 + x];
        down[0][x] = tap[x];
        down[1][x] = outer + inner;
        down[2][x] = outer - inner;
        down[3][x] = tap[6 + x];
    }
    for (int y = 0; y < 4; y++) {
        F outer = .5f * (down[y][0] + down[y][2]), inner = .5f * down[y][1];
        point[4 * y] = down[y][0];
        point[4 * y + 1] = outer + inner;
        point[4 * y + 2] = outer - inner;
        point[4 * y + 3] = down[y][2];
    }
}

/* Lays kernels out as `winograd` reads them: by share of outputs, point, word of inputs, output.  `strides`:
   numbers between outputs, inputs, rows and columns of `w`; the latter two may be negative. */
void winograd_lay(const float *w, const long *strides, long from, long to, int threads, Number *laid) {
    long words = from / IN_WORD;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long p = 0; p < words; p++)
        for (long done = 0, lanes; done < to / LANES; done += lanes) {
            int *block = (int *)laid + POINTS * words * done * LANES;
            lanes = share(to / LANES - done);
            for (long s = 0; s < lanes; s++)
                for (int i = 0; i < IN_WORD; i++) {
                    const float *first = w + (done + s) * LANES * strides[0] + (p * IN_WORD + i) * strides[1];
                    F tap[9], point[POINTS];
                    for (int k = 0; k < 9; k++)
                        tap[k] = gathered(first + k / 3 * strides[2] + k % 3 * strides[3], strides[0]);
                    kernel_points(tap, point);
                    for (int k = 0; k < POINTS; k++)
                        round_into((Number *)(block + ((k * words + p) * lanes + s) * LANES), point[k], i);
                }
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
INLINE void column(const Number *const *row, long x, const Task *t, F *point) {
    F pixel[4];
    for (int y = 0; y < 4; y++)
        pixel[y] = row[y] && x >= 0 && x < t->width ? numbers(row[y] + x * t->from) : (F){};
    point[0] = pixel[0] - pixel[2];
    point[1] = pixel[1] + pixel[2];
    point[2] = pixel[2] - pixel[1];
    point[3] = pixel[1] - pixel[3];
}

/* B' d B: the points of `count` tiles from `begin` on, a point `between` numbers after the last.  By tile, so
   that words hold channels, or by as many tiles as words hold. */
INLINE void lay_inputs(const Number *x, long begin, long count, long between, Number *laid, int by_words,
                       const Task *t) {
    for (long n = 0, run; n < count; n += run) {
        Place at = place_of(begin + n, t);
        run = t->width / 2 - at.across < count - n ? t->width / 2 - at.across : count - n;
        for (long c = 0; c < t->from; c += LANES) {
            const Number *row[4];
            F point[4][4]; /* by column and row; two columns are the next tile's too */
            for (int i = 0; i < 4; i++) {
                long y = 2 * at.down - 1 + i;
                int inside = y >= 0 && y < t->height;
                row[i] = inside ? x + (at.sample * t->height + y) * t->width * t->from + c : NULL;
            }
            column(row, 2 * at.across - 1, t, point[0]);
            column(row, 2 * at.across, t, point[1]);
            for (long r = 0; r < run; r++) {
                long tile = n + r, word = tile / IN_WORD * IN_WORD;
                Number *to = laid + (by_words ? word * t->from + c * IN_WORD : tile * t->from + c);
                column(row, 2 * (at.across + r) + 1, t, point[2]);
                column(row, 2 * (at.across + r) + 2, t, point[3]);
                for (int y = 0; y < 4; y++) {
                    F across[4] = {point[0][y] - point[2][y], point[1][y] + point[2][y],
                                   point[2][y] - point[1][y], point[1][y] - point[3][y]};
                    for (int k = 0; k < 4; k++)
                        if (by_words)
                            round_into(to + (4 * y + k) * between, across[k], tile % IN_WORD);
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
INLINE void products(const Number *input, const int *kernel, long from, int lanes, float *found) {
    F sum[TILES][MOST_LANES];
    for (int i = 0; i < TILES; i++)
        for (int s = 0; s < lanes; s++) sum[i][s] = (F){};
    for (long p = 0; p < from / IN_WORD; p++) {
        Words words[MOST_LANES];
        for (int s = 0; s < lanes; s++) words[s] = words_at(kernel + (p * lanes + s) * LANES);
        for (int i = 0; i < TILES; i++) {
            int word;
            memcpy(&word, input + i * from + p * IN_WORD, sizeof word);
            for (int s = 0; s < lanes; s++) sum[i][s] = product(sum[i][s], word, words[s]);
        }
    }
    for (int i = 0; i < TILES; i++)
        for (int s = 0; s < lanes; s++) put(found + (i * lanes + s) * LANES, sum[i][s]);
}

/* A' m A, bias and what is there already: a register of channels of an output tile. */
INLINE void output_tile(const float *found, long between, F bias, const Number *onto, Number *out,
                        const Task *t) {
    F down[2][4];
    for (int x = 0; x < 4; x++) {
        F point[4];
        for (int y = 0; y < 4; y++) point[y] = floats(found + (4 * y + x) * between);
        down[0][x] = point[0] + point[1] + point[2];
        down[1][x] = point[1] - point[2] - point[3];
    }
    for (int y = 0; y < 2; y++) {
        long left = y * t->width * t->to, right = left + t->to;
        F one = down[y][0] + down[y][1] + down[y][2] + bias;
        F two = down[y][1] - down[y][2] - down[y][3] + bias;
        round_to(out + left, onto ? one + numbers(onto + left) : one);
        round_to(out + right, onto ? two + numbers(onto + right) : two);
    }
}

/* A share of output channels, from channel `c` on, of the `count` tiles whose points are laid out. */
INLINE void outputs(const Number *input, const int *kernel, const void *bias, const Number *onto, Number *out,
                    long begin, long count, long between, long c, int lanes, float *found, const Task *t) {
    long room = (count + TILES - 1) / TILES * TILES, found_between = room * lanes * LANES;
    for (int k = 0; k < POINTS; k++)
        for (long n = 0; n < room; n += TILES)
            products(input + k * between + n * t->from, kernel + k * (t->from / IN_WORD) * lanes * LANES,
                     t->from, lanes, found + k * found_between + n * lanes * LANES);
    F own[MOST_LANES];
    for (int s = 0; s < lanes; s++) {
        long at = c + s * LANES;
        if (!bias)
            own[s] = (F){};
        else
            own[s] = t->half_bias ? numbers((const Number *)bias + at) : floats((const float *)bias + at);
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
void winograd(const Number *x, const Number *laid, const void *bias, const Number *onto, Number *out,
              Task task) {
    const Task *t = &task;
    long tiles = t->batch * (t->height / 2) * (t->width / 2);
    long each = ((tiles + t->threads - 1) / t->threads + TILES - 1) / TILES * TILES;
    if (each > STRIPE) each = STRIPE;
    long between = each * t->from + APART;
    size_t of_inputs = POINTS * between * sizeof(Number), of_found = POINTS * each * MOST_LANES * LANES * 4;
#pragma omp parallel num_threads(t->threads)
    {
        char *made = aligned_alloc(64, of_inputs + of_found);
        if (!made) abort();
        Number *input = (Number *)made;
        float *found = (float *)(made + of_inputs);
#pragma omp for schedule(static)
        for (long begin = 0; begin < tiles; begin += each) {
            long count = tiles - begin < each ? tiles - begin : each;
            lay_inputs(x, begin, count, between, input, 0, t);
            for (long done = 0, lanes; done < t->to / LANES; done += lanes) {
                const int *kernel = (const int *)laid + POINTS * (t->from / IN_WORD) * done * LANES;
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

/* A dy A': the points of gradients of `count` tiles, by as many tiles as words hold; their sums to `sums`. */
INLINE void lay_gradients(const Number *grad, long begin, long count, long between, Number *laid, float *sums,
                          const Task *t) {
    memset(sums, 0, t->to * sizeof(float));
    for (long n = 0; n < count; n++) {
        Place at = place_of(begin + n, t);
        const Number *first = grad;
        first += ((at.sample * t->height + 2 * at.down) * t->width + 2 * at.across) * t->to;
        for (long c = 0; c < t->to; c += LANES) {
            Number *to = laid + n / IN_WORD * IN_WORD * t->to + c * IN_WORD;
            F down[4][2];
            for (int x = 0; x < 2; x++) {
                F upper = numbers(first + x * t->to + c), lower = numbers(first + (t->width + x) * t->to + c);
                down[0][x] = upper;
                down[1][x] = upper + lower;
                down[2][x] = upper - lower;
                down[3][x] = -lower;
            }
            for (int y = 0; y < 4; y++) {
                F left = down[y][0], right = down[y][1];
                F across[4] = {left, left + right, left - right, -right};
                for (int k = 0; k < 4; k++) round_into(to + (4 * y + k) * between, across[k], n % IN_WORD);
            }
            put(sums + c, floats(sums + c) + down[1][0] + down[1][1]);
        }
    }
}

/* Some stripes of tiles, laid out to be met at every point. */
typedef struct {
    const Number *first;
    long count, each;       /* stripes; numbers of one */
    long to_input, to_grad; /* numbers between its points of inputs, of gradients */
    long size, tiles;       /* tiles of a stripe, of all stripes: the last may be shorter */
} Stripes;

/* At point `k`, TILES input channels from `i` on times a share of output channels from `c` on, over all tiles
   of some stripes; added to `sum` unless these are the first. */
INLINE void meetings(const Stripes *laid, int k, long i, long c, int lanes, int first, float *sum,
                     const Task *t) {
    F own[TILES][MOST_LANES];
    for (int j = 0; j < TILES; j++)
        for (int s = 0; s < lanes; s++) own[j][s] = first ? (F){} : floats(sum + j * t->to + s * LANES);
    for (long n = 0; n < laid->count; n++) {
        const Number *stripe = laid->first + n * laid->each;
        const int *input = (const int *)(stripe + k * laid->to_input) + i;
        const int *grad = (const int *)(stripe + POINTS * laid->to_input + k * laid->to_grad) + c;
        long left = laid->tiles - n * laid->size, there = left < laid->size ? left : laid->size;
        for (long p = 0; p < (there + IN_WORD - 1) / IN_WORD; p++) {
            Words both[MOST_LANES];
            for (int s = 0; s < lanes; s++) both[s] = words_at(grad + p * t->to + s * LANES);
            for (int j = 0; j < TILES; j++) {
                int word;
                memcpy(&word, input + p * t->from + j, sizeof word);
                for (int s = 0; s < lanes; s++) own[j][s] = product(own[j][s], word, both[s]);
            }
        }
    }
    for (int j = 0; j < TILES; j++)
        for (int s = 0; s < lanes; s++) put(sum + j * t->to + s * LANES, own[j][s]);
}

/* At every point all channels, of which this member of a team takes its share. */
static void meet(const Stripes *laid, int first, float *sums, int member, int members, const Task *t) {
    long parts = POINTS * (t->from / TILES);
    for (long part = parts * member / members; part < parts * (member + 1) / members; part++) {
        long k = part / (t->from / TILES), i = part % (t->from / TILES) * TILES;
        for (long done = 0, lanes; done < t->to / LANES; done += lanes) {
            long c = done * LANES;
            float *sum = sums + (k * t->from + i) * t->to + c;
            lanes = share(t->to / LANES - done);
            if (lanes == 3)
                meetings(laid, k, i, c, 3, first, sum, t);
            else if (lanes == 2)
                meetings(laid, k, i, c, 2, first, sum, t);
            else
                meetings(laid, k, i, c, 1, first, sum, t);
        }
    }
}

/* G' m G: the nine taps of a register of kernels, from their 16 points. */
INLINE void kernel_taps(const F *point, F *tap) {
    F down[3][4];
    for (int x = 0; x < 4; x++) {
        F both = .5f * (point[4 + x] + point[8 + x]);
        down[0][x] = point[x] + both;
        down[1][x] = .5f * (point[4 + x] - point[8 + x]);
        down[2][x] = both + point[12 + x];
    }
    for (int y = 0; y < 3; y++) {
        F both = .5f * (down[y][1] + down[y][2]);
        tap[3 * y] = down[y][0] + both;
        tap[3 * y + 1] = .5f * (down[y][1] - down[y][2]);
        tap[3 * y + 2] = both + down[y][3];
    }
}

/* The gradients of kernels and bias.  x, grad: `b h w c`; d_w: `to from 3 3`, contiguous; d_bias: `to`.

   Of many tiles every thread makes a sum.  A sum has 16 from to numbers, a tile's points 16 (from + to): of
   few tiles a sum for each thread would be the most to write, and all threads are one team, whose members lay
   out a stripe each and then share out points and input channels.  Where few ends is measured. */
void winograd_gradients(const Number *x, const Number *grad, float *d_w, float *d_bias, Task task) {
    const Task *t = &task;
    long tiles = t->batch * (t->height / 2) * (t->width / 2), size = STRIPE;
    int few = tiles < 2 * t->threads * t->from * t->to / (t->from + t->to);
    if (few && tiles < STRIPE * t->threads) size = (tiles / t->threads + IN_WORD) / IN_WORD * IN_WORD;
    long stripes = (tiles + size - 1) / size, of_sums = POINTS * t->from * t->to;
    long to_input = size * t->from + APART, to_grad = size * t->to + APART;
    long each = POINTS * (to_input + to_grad);
    float *sums = aligned_alloc(64, ((few ? 1 : t->threads) * of_sums + stripes * t->to) * sizeof(float));
    Number *laid = aligned_alloc(64, t->threads * each * sizeof(Number));
    if (!sums || !laid) abort();
    float *of_stripes = sums + (few ? 1 : t->threads) * of_sums;
#pragma omp parallel num_threads(t->threads)
    {
        int threads = omp_get_num_threads(), members = few ? threads : 1, teams = threads / members;
        int team = omp_get_thread_num() / members, member = omp_get_thread_num() % members;
        long begin = stripes * team / teams, end = stripes * (team + 1) / teams;
        float *own = sums + team * of_sums;
        Number *of_team = laid + team * members * each;
        if (begin == end) memset(own, 0, of_sums * sizeof(float));
        for (long n = begin; n < end; n += members) {
            long count = end - n < members ? end - n : members, tile = (n + member) * size;
            if (member < count) {
                Number *input = of_team + member * each, *output = input + POINTS * to_input;
                long there = tiles - tile < size ? tiles - tile : size;
                lay_inputs(x, tile, there, to_input, input, 1, t);
                lay_gradients(grad, tile, there, to_grad, output, of_stripes + (n + member) * t->to, t);
            }
            Stripes stripes_laid = {of_team, count, each, to_input, to_grad, size, tiles - n * size};
            if (few) {
#pragma omp barrier
            }
            meet(&stripes_laid, n == begin, own, member, members, t);
            if (few) {
#pragma omp barrier
            }
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (long i = 0; i < t->from; i++)
            for (long c = 0; c < t->to; c += LANES) {
                F point[POINTS], tap[9];
                float lane[9][LANES];
                for (int k = 0; k < POINTS; k++) {
                    point[k] = (F){};
                    for (int one = 0; one < teams; one++)
                        point[k] += floats(sums + one * of_sums + (k * t->from + i) * t->to + c);
                }
                kernel_taps(point, tap);
                for (int k = 0; k < 9; k++) put(lane[k], tap[k]);
                for (int s = 0; s < LANES; s++)
                    for (int k = 0; k < 9; k++) d_w[((c + s) * t->from + i) * 9 + k] = lane[k][s];
            }
    }
    memset(d_bias, 0, t->to * sizeof(float));
    for (long n = 0; n < stripes; n++)
        for (long c = 0; c < t->to; c++) d_bias[c] += of_stripes[n * t->to + c];
    free(laid);
    free(sums);
}

#else

int winograd_runs(void) { return 0; }

#endif
