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

/* stretch * spline(scaling * x / stretch), as Python hands it over; stretch may be NULL for 1. */
typedef struct {
    const float *offsets, *input_scale, *output_scale, *stretch;
    float scaling, k_min, k_max;
    int knots, clamps; /* extrapolation: clamp (1) or linear (0) */
} Spline;

/* The same with everything that is constant multiplied out. */
typedef struct {
    float factor, k_min, k_max, per_spacing, scale_in, scale_out;
    int last; /* index of the last interval, K - 2 */
    int clamps;
} Shape;

typedef struct {
    Floats z, c, t, u, p; /* input, clamped input, scaled, clamped once more, position */
    Floats j;             /* interval */
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

/* Both of them give x where it is NaN. */
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

static Shape shape_of(const Spline *spline) {
    float stretch = stretch_of(spline), per_spacing = (spline->knots - 1) / (spline->k_max - spline->k_min);
    return (Shape){
        spline->scaling / stretch, spline->k_min,          spline->k_max, per_spacing, *spline->input_scale,
        *spline->output_scale * stretch, spline->knots - 2, spline->clamps};
}

INLINE Place place(Floats input, const Shape *s) {
    Place a;
    a.z = s->factor * input;
    a.c = s->clamps ? clamp(a.z, s->k_min, s->k_max) : a.z;
    a.t = s->scale_in * a.c;
    a.u = s->clamps ? clamp(a.t, s->k_min, s->k_max) : a.t;
    a.p = (a.u - s->k_min) * s->per_spacing;
    Floats last = all((float)s->last);
    Floats reached = only(a.p > 0.0f, a.p); /* of a NaN the first interval; it lives on in p */
    a.j = __builtin_convertvector(__builtin_convertvector(pick(reached < last, reached, last), Ints), Floats);
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

INLINE Floats left_of(const Lines *lines, Floats j) {
    Ints at = __builtin_convertvector(j, Ints);
#ifdef __AVX2__
    if (lines->fits) return _mm256_permutevar8x32_ps(lines->left, (__m256i)at);
#endif
    Floats found;
    for (int lane = 0; lane < LANES; lane++) found[lane] = lines->offsets[at[lane]];
    return found;
}

INLINE Floats rise_of(const Lines *lines, Floats j) {
    Ints at = __builtin_convertvector(j, Ints);
#ifdef __AVX2__
    if (lines->fits) return _mm256_permutevar8x32_ps(lines->rise, (__m256i)at);
#endif
    Floats found;
    for (int lane = 0; lane < LANES; lane++) found[lane] = lines->offsets[at[lane] + 1] - lines->offsets[at[lane]];
    return found;
}

INLINE Floats value(Floats input, const Shape *s, const Lines *lines) {
    Place a = place(input, s);
    return s->scale_out * (a.u + (left_of(lines, a.j) + (a.p - a.j) * rise_of(lines, a.j)));
}

/* out = base + scale_out * phi; base may be NULL for 0. */
void spline_forward(const float *input, const float *base, float *out, long n, const Spline *spline) {
    const Shape shape = shape_of(spline);
#pragma omp parallel for schedule(static) if (n > BLOCK)
    for (long start = 0; start < n; start += BLOCK) {
        const Shape s = shape;
        const Lines lines = make_lines(spline->offsets, s.last + 1);
        long stop = n - start < BLOCK ? n : start + BLOCK, i = start;
        for (; i + LANES <= stop; i += LANES) {
            Floats y = value(load(input + i), &s, &lines);
            if (base) y += load(base + i);
            store(out + i, y);
        }
        if (i < stop) {
            Floats y = value(load_some(input + i, stop - i), &s, &lines);
            if (base) y += load_some(base + i, stop - i);
            store_some(out + i, y, stop - i);
        }
    }
}

typedef struct {
    Floats g, g_u, g_slope_c;
} Sums;

/* The gradient of the input; adds to the sums and to those of the ramps. */
INLINE Floats gradient(Floats g, Floats input, const Shape *s, const Lines *lines, Sums *sums, Floats *ramps) {
    Place a = place(input, s);
    for (int j = 0; j <= s->last; j++) {
        Floats ramp = a.p - (float)j;
        if (j > 0 || s->clamps) ramp = at_least(all(0), ramp);
        if (j < s->last || s->clamps) ramp = at_most(all(1), ramp);
        ramps[j] += g * ramp;
    }
    Floats slope = only(a.u == a.t, 1.0f + rise_of(lines, a.j) * s->per_spacing);
    sums->g += g;
    sums->g_u += g * a.u;
    sums->g_slope_c += g * slope * a.c;
    return only(a.c == a.z, g * slope * (s->scale_in * s->scale_out * s->factor));
}

INLINE double total(Floats x) {
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += x[lane];
    return sum;
}

/* Adds to sums those of g * ramp_j (K - 1 numbers), g, g * u and g * slope * c. For every block, rows is room for as
 * many numbers, and lanes for K - 1 times LANES, all zero. grad may be the same memory as input. */
void spline_backward(const float *g, const float *input, float *grad, long n, const Spline *spline, float *lanes,
                     double *rows, double *sums) {
    const Shape shape = shape_of(spline);
    const int count = shape.last + 1, width = count + 3;
    const long blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) if (blocks > 1)
    for (long block = 0; block < blocks; block++) {
        const Shape s = shape;
        const Lines lines = make_lines(spline->offsets, count);
        long i = block * BLOCK, stop = n - i < BLOCK ? n : i + BLOCK;
        Floats *ramps = (Floats *)lanes + block * count;
        Sums found = {all(0), all(0), all(0)};
        for (; i + LANES <= stop; i += LANES)
            store(grad + i, gradient(load(g + i), load(input + i), &s, &lines, &found, ramps));
        if (i < stop) { /* the lanes beyond have g = 0 */
            Floats g_rest = load_some(g + i, stop - i), rest = load_some(input + i, stop - i);
            store_some(grad + i, gradient(g_rest, rest, &s, &lines, &found, ramps), stop - i);
        }
        double *row = rows + block * width;
        for (int j = 0; j < count; j++) row[j] = total(ramps[j]);
        row[count] = total(found.g);
        row[count + 1] = total(found.g_u);
        row[count + 2] = total(found.g_slope_c);
    }
    for (long block = 0; block < blocks; block++)
        for (int k = 0; k < width; k++) sums[k] += rows[block * width + k];
}

/* From the sums the gradients of the offsets (K numbers), input_scale and output_scale; see from_ramps. */
void spline_gradients(const Spline *spline, const double *sums, float *out) {
    const int count = spline->knots - 1;
    const double stretch = stretch_of(spline), scale = stretch * *spline->output_scale;
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
