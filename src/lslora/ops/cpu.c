/* The piecewise spline in one pass over the elements; see reference.py for the mathematics and the notation.
 *
 * LANES elements at a time, eight, in blocks of BLOCK that threads share; cpu.py gives these and other sizes to the
 * compiler. Every block has sums of its own, added up in order at the end, so the spline's gradients do not depend on the
 * number of threads; blocks are short, for these sums are in float32.
 *
 * All gradients of the spline follow from the sum of g and one sum an interval, C[j] = sum of g * ramp_j(p), where
 * ramp_j rises from 0 to 1 over interval j: the hat of knot i is ramp_(i-1) - ramp_i. A knot without elements beside
 * it gets an exact zero, for the same numbers are added up in the same order on both sides of it.
 */

#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX2__
#include <immintrin.h>
#endif

/* As wide as AVX; compilers split it where the machine's registers are narrower. */
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* stretch * spline(scaling * x / stretch), as Python hands it over; stretch may be NULL, or not positive, for 1. A scale
   is origin plus what is pointed to, which may be NULL for 0: the scale itself from 0, or its deviation from 1. */
typedef struct {
    const float *offsets, *scale_in, *scale_out, *stretch;
    float scaling, origin, k_min, k_max;
    int knots, clamps; /* extrapolation: clamp (1) or linear (0) */
} Spline;

/* The same with everything that is constant multiplied out. */
typedef struct {
    float factor, k_min, k_max, per_spacing, scale_in, scale_out;
    int count; /* of intervals, K - 1 */
    int clamps;
} Shape;

typedef struct {
    Floats z, c, t, u, p; /* input, clamped input, scaled, clamped once more, position */
    Ints j;               /* interval */
} Place;

#define INLINE static inline __attribute__((always_inline))

INLINE Floats all(float x) { return (Floats){x, x, x, x, x, x, x, x}; }

INLINE Floats only(Ints mask, Floats x) { return (Floats)((Ints)x & mask); }

INLINE Floats pick(Ints mask, Floats x, Floats otherwise) {
    return (Floats)(((Ints)x & mask) | ((Ints)otherwise & ~mask));
}

INLINE Floats load(const float *from) { return *(const Floats *)from; }

INLINE void store(float *to, Floats x) { *(Floats *)to = x; }

INLINE Floats load_some(const float *from, long count) {
    Floats x = all(0);
    memcpy(&x, from, count * sizeof *from);
    return x;
}

INLINE void store_some(float *to, Floats x, long count) { memcpy(to, &x, count * sizeof *to); }

/* Both of them give x where one of the two is NaN. */
INLINE Floats at_least(Floats low, Floats x) {
#ifdef __AVX2__
    return _mm256_max_ps(low, x);
#else
    return pick(x < low, low, x);
#endif
}

INLINE Floats at_most(Floats high, Floats x) {
#ifdef __AVX2__
    return _mm256_min_ps(high, x);
#else
    return pick(x > high, high, x);
#endif
}

INLINE Floats clamp(Floats x, float low, float high) { return at_most(all(high), at_least(all(low), x)); }

static float stretch_of(const Spline *spline) {
    return spline->stretch && *spline->stretch > 0 ? *spline->stretch : 1.0f;
}

static float scale_of(const Spline *spline, const float *scale) { return spline->origin + (scale ? *scale : 0.0f); }

static Shape shape_of(const Spline *spline) {
    float stretch = stretch_of(spline), per_spacing = (spline->knots - 1) / (spline->k_max - spline->k_min);
    return (Shape){
        spline->scaling / stretch, spline->k_min,          spline->k_max, per_spacing, scale_of(spline, spline->scale_in),
        scale_of(spline, spline->scale_out) * stretch, spline->knots - 1, spline->clamps};
}

INLINE Place place(Floats input, const Shape *s) {
    Place a;
    a.z = s->factor * input;
    a.c = s->clamps ? clamp(a.z, s->k_min, s->k_max) : a.z;
    a.t = s->scale_in * a.c;
    a.u = s->clamps ? clamp(a.t, s->k_min, s->k_max) : a.t;
    a.p = (a.u - s->k_min) * s->per_spacing;
    Floats reached = at_least(a.p, all(0)); /* of a NaN the first interval; it lives on in p */
    a.j = __builtin_convertvector(at_most(all((float)(s->count - 1)), reached), Ints);
    return a;
}

/* delta(p) on interval j is left[j] + (p - j) * rise[j], with left[j] = offsets[j] and the rise to offsets[j + 1].
 * For as many intervals as there are lanes both are at hand in a register. */
typedef struct {
    const float *offsets;
    Floats left, rise;
    int fits;
} Lines;

INLINE Lines make_lines(const float *offsets, int count) {
    int fits = count <= LANES;
    Floats left = load_some(offsets, fits ? count : LANES);
    return (Lines){offsets, left, load_some(offsets + 1, fits ? count : LANES) - left, fits};
}

INLINE Floats left_of(const Lines *lines, Ints j) {
#ifdef __AVX2__
    if (lines->fits) return _mm256_permutevar8x32_ps(lines->left, (__m256i)j);
#endif
    Floats found;
    for (int lane = 0; lane < LANES; lane++) found[lane] = lines->offsets[j[lane]];
    return found;
}

INLINE Floats rise_of(const Lines *lines, Ints j) {
#ifdef __AVX2__
    if (lines->fits) return _mm256_permutevar8x32_ps(lines->rise, (__m256i)j);
#endif
    Floats found;
    for (int lane = 0; lane < LANES; lane++) found[lane] = lines->offsets[j[lane] + 1] - lines->offsets[j[lane]];
    return found;
}

/* The compiler makes a loop of its own for a spline of which it knows this much. */
INLINE Shape known(Shape s, int count, int clamps) {
    s.count = count;
    s.clamps = clamps;
    return s;
}

/* Call FUNCTION(…, s) as one of the three loops that it is compiled to: one for the default number of intervals and
 * extrapolation, one for those recommended (what is summed up for every interval stays in registers), one for all. */
#define CALL(FUNCTION, s, ...)                                                         \
    do {                                                                               \
        if ((s).count == 4 && (s).clamps) FUNCTION(__VA_ARGS__, known(s, 4, 1));       \
        else if ((s).count == 8 && !(s).clamps) FUNCTION(__VA_ARGS__, known(s, 8, 0)); \
        else FUNCTION(__VA_ARGS__, s);                                                 \
    } while (0)

INLINE Floats value(Floats input, const Shape *s, const Lines *lines) {
    Place a = place(input, s);
    Floats within = a.p - __builtin_convertvector(a.j, Floats);
    return s->scale_out * (a.u + (left_of(lines, a.j) + within * rise_of(lines, a.j)));
}

/* Rows of n elements: of the input they come one after another, `pitch` apart, those of base and out `stride`. */
INLINE void forward_block(const float *input, long pitch, const float *base, float *out, long stride, long rows, long n,
                          const float *offsets, Shape s) {
    const Lines lines = make_lines(offsets, s.count);
    for (long row = 0; row < rows; row++, input += pitch, out += stride) {
        long i = 0;
        for (; i + LANES <= n; i += LANES) {
            Floats y = value(load(input + i), &s, &lines);
            if (base) y += load(base + i);
            store(out + i, y);
        }
        if (i < n) {
            Floats y = value(load_some(input + i, n - i), &s, &lines);
            if (base) y += load_some(base + i, n - i);
            store_some(out + i, y, n - i);
        }
        if (base) base += stride;
    }
}

/* out = scale_out * phi(input) */
void spline_forward(const float *input, float *out, long n, const Spline *spline) {
    const Shape s = shape_of(spline);
#pragma omp parallel for schedule(static) if (n > BLOCK)
    for (long i = 0; i < n; i += BLOCK) {
        const long some = n - i < BLOCK ? n - i : BLOCK;
        CALL(forward_block, s, input + i, some, NULL, out + i, some, 1, some, spline->offsets);
    }
}

typedef struct {
    Floats g, g_u, g_slope_c;
} Sums;

/* The gradient of the input; adds to the sums and to those of the ramps. */
INLINE Floats gradient(Floats g, Floats input, const Shape *s, const Lines *lines, Sums *sums, Floats *ramps) {
    Place a = place(input, s);
#pragma GCC unroll 8
    for (int j = 0; j < s->count; j++) {
        Floats ramp = j > 0 ? at_least(all(0), a.p - (float)j) : a.p;
        ramps[j] += g * (j < s->count - 1 ? at_most(all(1), ramp) : ramp);
    }
    Floats g_t = g * (1.0f + rise_of(lines, a.j) * s->per_spacing);
    if (s->clamps) g_t = only(a.u == a.t, g_t);
    sums->g += g;
    sums->g_u += g * a.u;
    sums->g_slope_c += g_t * a.c;
    Floats g_input = g_t * (s->scale_in * s->scale_out * s->factor);
    return s->clamps ? only(a.c == a.z, g_input) : g_input;
}

INLINE double total(Floats x) {
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += x[lane];
    return sum;
}

/* row: sums of g * ramp_j (K - 1 numbers), g, g * u and g * slope * c. more: room for LANES numbers an interval. */
INLINE void backward_block(const float *g, const float *input, float *grad, long n, const float *offsets, double *row,
                           float *more, Shape s) {
    const Lines lines = make_lines(offsets, s.count);
    Floats in_registers[LANES], *ramps = s.count <= LANES ? in_registers : (Floats *)more;
    for (int j = 0; j < s.count; j++) ramps[j] = all(0);
    Sums sums = {all(0), all(0), all(0)};
    long i = 0;
    for (; i + LANES <= n; i += LANES)
        store(grad + i, gradient(load(g + i), load(input + i), &s, &lines, &sums, ramps));
    if (i < n) { /* the lanes beyond have g = 0 */
        Floats g_rest = load_some(g + i, n - i), rest = load_some(input + i, n - i);
        store_some(grad + i, gradient(g_rest, rest, &s, &lines, &sums, ramps), n - i);
    }
    for (int j = 0; j < s.count; j++) row[j] = total(ramps[j]);
    row[s.count] = total(sums.g);
    row[s.count + 1] = total(sums.g_u);
    row[s.count + 2] = total(sums.g_slope_c);
}

/* Adds to sums those of a block (see there) over all blocks. For every block, rows is room for its row and more for
 * LANES numbers an interval. grad may be the same memory as input. */
void spline_backward(const float *g, const float *input, float *grad, long n, const Spline *spline, float *more,
                     double *rows, double *sums) {
    const Shape s = shape_of(spline);
    const int width = s.count + 3;
    const long blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) if (blocks > 1)
    for (long block = 0; block < blocks; block++) {
        long i = block * BLOCK;
        CALL(backward_block, s, g + i, input + i, grad + i, n - i < BLOCK ? n - i : BLOCK, spline->offsets,
             rows + block * width, more + block * s.count * LANES);
    }
    for (long block = 0; block < blocks; block++)
        for (int k = 0; k < width; k++) sums[k] += rows[block * width + k];
}

/* From the sums the gradients of the offsets (K numbers), input_scale and output_scale. Ramp j rises from 0 to 1 over
   interval j, and the first and the last go on beyond the grid: a knot's weight is the ramp before it less the one after
   it. And as phi = u + delta is linear in the offsets, the sum of g delta is that of offset times gradient over knots. */
void spline_gradients(const Spline *spline, const double *sums, float *out) {
    const int count = spline->knots - 1;
    const double stretch = stretch_of(spline), scale = stretch * scale_of(spline, spline->scale_out);
    double before = sums[count], value = sums[count + 1]; /* the ramp before the first knot is 1 everywhere */
    for (int i = 0; i <= count; i++) {
        double after = i < count ? sums[i] : 0, knot = before - after;
        out[i] = (float)(scale * knot);
        value += knot * spline->offsets[i];
        before = after;
    }
    out[count + 1] = (float)(scale * sums[count + 2]);
    out[count + 2] = (float)(stretch * value);
}

/* The whole update: base + stretch * spline(scaling * h B^T / stretch), h B^T in tiles that never leave the cache.
 *
 * A tile is a BLOCK, so what is summed up for the spline is summed up as above. */
enum { ROWS = BLOCK / COLUMNS, BAND = 4 * ROWS };

/* Row-major, and filled up with zeros: n to a multiple of GROUP, r of LANES, m of COLUMNS. n and m count without. */
typedef struct {
    const float *h, *weight; /* (n, r), and B: (m, r) */
    float *across;           /* room for B^T: (r, m); null for product_of_few, where n is not filled up */
    long n, m, r;
    int threads;
} Product;

/* Otherwise the compiler reads them anew for each product, and reading, not multiplying, takes the time. */
#ifdef __AVX2__
#define IN_REGISTER(x) __asm__("" : "+x"(x))
#else
#define IN_REGISTER(x)
#endif

/* c = a b, or added to c; rows is a multiple of GROUP, columns of LANES, and rows of b and c are without gaps. */
INLINE void multiply(const float *a, long a_row, long a_column, const float *b, long b_row, float *c, long c_row,
                     long rows, long depth, long columns, int adds) {
    for (long j = 0; j < columns; j += 2 * LANES) {
        const long next = j + LANES < columns ? LANES : 0; /* of a last single group both halves are the same */
        for (long i = 0; i < rows; i += GROUP) {
            const float *left = a + i * a_row, *right = b + j;
            float *to = c + i * c_row + j;
            Floats sums[GROUP][2];
            for (int q = 0; q < GROUP; q++) {
                sums[q][0] = adds ? load(to + q * c_row) : all(0);
                sums[q][1] = adds ? load(to + q * c_row + next) : all(0);
            }
            for (long k = 0; k < depth; k++, right += b_row) {
                Floats one = load(right), other = load(right + next);
                IN_REGISTER(one);
                IN_REGISTER(other);
                for (int q = 0; q < GROUP; q++) {
                    const Floats x = all(left[q * a_row + k * a_column]);
                    sums[q][0] += x * one;
                    sums[q][1] += x * other;
                }
            }
            for (int q = 0; q < GROUP; q++) {
                store(to + q * c_row, sums[q][0]);
                store(to + q * c_row + next, sums[q][1]);
            }
        }
    }
}

static long padded(long count, long to) { return (count + to - 1) / to * to; }

static long least(long a, long b) { return a < b ? a : b; }

/* Fill `across`; every thread takes a part. */
INLINE void transpose(const Product *p) {
    const long across = padded(p->m, COLUMNS);
#pragma omp for schedule(static)
    for (long j = 0; j < across; j++)
        for (long k = 0; k < p->r; k++) p->across[k * across + j] = p->weight[j * p->r + k];
}

/* z = h B^T of the tile whose first element is (i, j), with rows of COLUMNS. */
INLINE void product_tile(const Product *p, long i, long j, long rows, float *z) {
    const long across = padded(p->m, COLUMNS);
    multiply(p->h + i * p->r, p->r, 1, p->across + j, across, z, COLUMNS, padded(rows, GROUP), p->r, COLUMNS, 0);
}

/* The lanes' sum in float32, with few additions one after the other. */
INLINE float halved_total(Floats x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

/* The same of a few rows, one element after the other: to transpose B for them takes longer than to multiply with it. */
INLINE void product_of_few(const Product *p, long i, long j, long rows, float *z) {
    for (long row = 0; row < rows; row++)
        for (long column = 0; column < COLUMNS; column++) {
            const float *left = p->h + (i + row) * p->r, *right = p->weight + (j + column) * p->r;
            Floats sum = all(0);
            for (long k = 0; k < p->r; k += LANES) sum += load(left + k) * load(right + k);
            z[row * COLUMNS + column] = halved_total(sum);
        }
}

/* base and out: (n, m) without padding. */
void update_forward(const Product *product, const float *base, float *out, const Spline *spline) {
    const Shape s = shape_of(spline);
    const Product p = *product;
#pragma omp parallel num_threads(p.threads) if (p.n * p.m > BLOCK)
    {
        if (p.across) transpose(&p);
#pragma omp for collapse(2) schedule(static)
        for (long i = 0; i < p.n; i += ROWS)
            for (long j = 0; j < p.m; j += COLUMNS) {
                const long rows = least(ROWS, p.n - i), at = i * p.m + j;
                float z[BLOCK];
                if (p.across)
                    product_tile(&p, i, j, rows, z);
                else
                    product_of_few(&p, i, j, rows, z);
                CALL(forward_block, s, z, COLUMNS, base + at, out + at, p.m, rows, least(COLUMNS, p.m - j),
                     spline->offsets);
            }
    }
}

/* Copy a tile out of rows of `stride`, filled up with zeros. */
INLINE void take_tile(const float *from, long stride, long rows, long columns, float *tile) {
    if (rows < ROWS || columns < COLUMNS) memset(tile, 0, BLOCK * sizeof *tile);
    for (long row = 0; row < rows; row++)
        memcpy(tile + row * COLUMNS, from + row * stride, columns * sizeof *tile);
}

/* g: (n, m). grad_h: like h. grad_weight: like weight, for every thread one, zeros; the sum is left in the first.
 * more: room for LANES numbers an interval, for every thread; rows: a row (see backward_block) for every tile. */
void update_backward(const Product *product, const float *g, float *grad_h, float *grad_weight, const Spline *spline,
                     float *more, double *rows, double *sums) {
    const Shape s = shape_of(spline);
    const Product p = *product;
    const int width = s.count + 3;
    const long tiles = (p.m + COLUMNS - 1) / COLUMNS, size = padded(p.m, COLUMNS) * p.r;
#pragma omp parallel num_threads(p.threads) if (p.n * p.m > BLOCK)
    {
#ifdef _OPENMP
        const long thread = omp_get_thread_num();
#else
        const long thread = 0;
#endif
        float *own = grad_weight + thread * size, *own_more = more + thread * s.count * LANES;
        transpose(&p);
#pragma omp for schedule(static)
        for (long top = 0; top < p.n; top += BAND)
            for (long j = 0; j < p.m; j += COLUMNS)
                for (long i = top; i < least(top + BAND, p.n); i += ROWS) {
                    const long some = least(ROWS, p.n - i), whole = padded(some, GROUP);
                    float z[BLOCK], g_tile[BLOCK];
                    product_tile(&p, i, j, some, z);
                    take_tile(g + i * p.m + j, p.m, some, least(COLUMNS, p.m - j), g_tile);
                    CALL(backward_block, s, g_tile, z, z, whole * COLUMNS, spline->offsets,
                         rows + (i / ROWS * tiles + j / COLUMNS) * width, own_more);
                    multiply(z, COLUMNS, 1, p.weight + j * p.r, p.r, grad_h + i * p.r, p.r, whole, COLUMNS, p.r, j > 0);
                    multiply(z, 1, COLUMNS, p.h + i * p.r, p.r, own + j * p.r, p.r, COLUMNS, whole, p.r, 1);
                }
#pragma omp for schedule(static)
        for (long e = 0; e < size; e++)
            for (int t = 1; t < p.threads; t++) grad_weight[e] += grad_weight[t * size + e];
    }
    for (long tile = 0; tile < (p.n + ROWS - 1) / ROWS * tiles; tile++)
        for (int k = 0; k < width; k++) sums[k] += rows[tile * width + k];
}
