/* The piecewise spline in one pass over the elements; see reference.py for the mathematics and the notation.
 *
 * LANES elements at a time, eight, in blocks of BLOCK that threads share; cpu.py gives both to the compiler. Every block
 * has sums of its own, added up in order at the end, so the result does not depend on the number of threads; blocks are
 * short, for these sums are in float32.
 *
 * All gradients of the spline follow from the sum of g and one sum an interval, C[j] = sum of g * ramp_j(p), where
 * ramp_j rises from 0 to 1 over interval j: the hat of knot i is ramp_(i-1) - ramp_i. A knot without elements beside
 * it gets an exact zero, for the same numbers are added up in the same order on both sides of it.
 */

#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

/* As wide as AVX; compilers split it where the machine's registers are narrower. */
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* stretch * spline(scaling * x / stretch), as Python hands it over; stretch may be NULL for 1. A scale is origin plus
   what is pointed to, which may be NULL for 0: the scale itself from 0, or its deviation from 1. */
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

static float stretch_of(const Spline *spline) { return spline->stretch ? *spline->stretch : 1.0f; }

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

INLINE void forward_block(const float *input, const float *base, float *out, long n, const float *offsets, Shape s) {
    const Lines lines = make_lines(offsets, s.count);
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
}

/* out = base + scale_out * phi; base may be NULL for 0. */
void spline_forward(const float *input, const float *base, float *out, long n, const Spline *spline) {
    const Shape s = shape_of(spline);
#pragma omp parallel for schedule(static) if (n > BLOCK)
    for (long i = 0; i < n; i += BLOCK) {
        const float *of_base = base ? base + i : NULL;
        CALL(forward_block, s, input + i, of_base, out + i, n - i < BLOCK ? n - i : BLOCK, spline->offsets);
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

/* From the sums the gradients of the offsets (K numbers), input_scale and output_scale; see from_ramps. */
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
