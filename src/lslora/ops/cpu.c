/* The piecewise spline in one pass over the elements; see reference.py for the mathematics and the notation.
 *
 * Eight elements at a time, in blocks that threads share. Every block has sums of its own, added up in order by the
 * caller, so the result does not depend on the number of threads; blocks are short, for these sums are in float32.
 * Sums are one pair an interval: S0[j] = sum of g and S1[j] = sum of g * f with f the fraction of the interval. All
 * gradients of the spline follow from them, and a knot without elements beside it gets an exact zero.
 */

#include <string.h>

enum { LANES = 8, BLOCK = 1024 };

/* As wide as AVX; compilers split it where the machine's registers are narrower. */
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef struct {
    float factor; /* of the input, before everything else */
    float k_min, k_max, per_spacing, scale_in, scale_out;
    int last;   /* index of the last interval, K - 2 */
    int clamps; /* extrapolation: clamp (1) or linear (0) */
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

INLINE Floats load(const float *from, long count) {
    Floats x = all(0);
    memcpy(&x, from, count * sizeof *from);
    return x;
}

INLINE void store(float *to, Floats x, long count) { memcpy(to, &x, count * sizeof *to); }

/* Written so that a NaN falls through both comparisons unchanged. */
INLINE Floats clamp(Floats x, float low, float high) {
    x = pick(x < low, all(low), x);
    return pick(x > high, all(high), x);
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

INLINE Floats lookup(const float *table, Floats j) {
    Ints at = __builtin_convertvector(j, Ints);
    Floats found;
    for (int lane = 0; lane < LANES; lane++) found[lane] = table[at[lane]];
    return found;
}

INLINE Floats value(Floats input, const Shape *s, const float *offset, const float *rise) {
    Place a = place(input, s);
    return s->scale_out * (a.u + (lookup(offset, a.j) + (a.p - a.j) * lookup(rise, a.j)));
}

/* out = base + scale_out * phi; base may be NULL for 0. */
void spline_forward(const float *input, const float *base, float *out, long n, const Shape *shape, const float *offset,
                    const float *rise) {
#pragma omp parallel for schedule(static) if (n > BLOCK)
    for (long start = 0; start < n; start += BLOCK) {
        const Shape s = *shape;
        long stop = n - start < BLOCK ? n : start + BLOCK, i = start;
        for (; i + LANES <= stop; i += LANES) {
            Floats y = value(load(input + i, LANES), &s, offset, rise);
            if (base) y += load(base + i, LANES);
            store(out + i, y, LANES);
        }
        if (i < stop) {
            Floats y = value(load(input + i, stop - i), &s, offset, rise);
            if (base) y += load(base + i, stop - i);
            store(out + i, y, stop - i);
        }
    }
}

typedef struct {
    Floats s0, s1;
} Sums;

/* The gradient of the input; each of sums gets the pair of its interval, whole gets g * u and g * slope * c. */
INLINE Floats gradient(Floats g, Floats input, const Shape *s, const float *rise, Sums *sums, Sums *whole) {
    Place a = place(input, s);
    Floats part = g * (a.p - a.j), up = all(0);
    for (int j = 0; j <= s->last; j++) {
        Ints here = a.j == (float)j;
        up += only(here, all(rise[j]));
        sums[j].s0 += only(here, g);
        sums[j].s1 += only(here, part);
    }
    Floats slope = only(a.u == a.t, 1.0f + up * s->per_spacing);
    whole->s0 += g * a.u;
    whole->s1 += g * slope * a.c;
    return only(a.c == a.z, g * slope * (s->scale_in * s->scale_out * s->factor));
}

INLINE double total(Floats x) {
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += x[lane];
    return sum;
}

/* totals: a row for every block with S0 (K - 1 numbers), S1 (K - 1), sum of g * u, sum of g * slope * c.
 * grad may be the same memory as input. */
void spline_backward(const float *g, const float *input, float *grad, long n, const Shape *shape, const float *rise,
                     double *totals) {
#pragma omp parallel for schedule(static) if (n > BLOCK)
    for (long start = 0; start < n; start += BLOCK) {
        const Shape s = *shape;
        const int count = s.last + 1;
        long stop = n - start < BLOCK ? n : start + BLOCK, i = start;
        Sums sums[count], whole = {all(0), all(0)};
        memset(sums, 0, sizeof sums);
        for (; i + LANES <= stop; i += LANES)
            store(grad + i, gradient(load(g + i, LANES), load(input + i, LANES), &s, rise, sums, &whole), LANES);
        if (i < stop) { /* the lanes beyond have g = 0 */
            Floats rest = gradient(load(g + i, stop - i), load(input + i, stop - i), &s, rise, sums, &whole);
            store(grad + i, rest, stop - i);
        }
        double *row = totals + start / BLOCK * (2 * count + 2);
        for (int j = 0; j < count; j++) {
            row[j] = total(sums[j].s0);
            row[count + j] = total(sums[j].s1);
        }
        row[2 * count] = total(whole.s0);
        row[2 * count + 1] = total(whole.s1);
    }
}
