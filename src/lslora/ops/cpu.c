/* The piecewise spline in one pass over the elements; see reference.py for the mathematics and the notation.
 *
 * Sums are kept in double, one pair an interval: S0[j] = sum of g, S1[j] = sum of g * f with f the fraction of the
 * interval. All gradients of the spline follow from them, and a knot without elements beside it gets an exact zero.
 */

typedef struct {
    float k_min, k_max, per_spacing, scale_in, scale_out;
    int last;   /* index of the last interval, K - 2 */
    int clamps; /* extrapolation: clamp (1) or linear (0) */
} Shape;

/* Written so that a NaN falls through both comparisons unchanged. */
static inline float clamp(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

static inline int interval(float p, int last) {
    if (!(p > 0.0f)) return 0; /* NaN too: it lives on in p */
    return p >= (float)last ? last : (int)p;
}

void spline_forward(const float *z, float *out, long n, const Shape *s, const float *offset, const float *rise) {
    for (long i = 0; i < n; i++) {
        float t = s->scale_in * (s->clamps ? clamp(z[i], s->k_min, s->k_max) : z[i]);
        float u = s->clamps ? clamp(t, s->k_min, s->k_max) : t;
        float p = (u - s->k_min) * s->per_spacing;
        int j = interval(p, s->last);
        out[i] = s->scale_out * (u + (offset[j] + (p - (float)j) * rise[j]));
    }
}

/* sums: S0 (K - 1 numbers), S1 (K - 1 numbers), sum of g * u, sum of g * slope * c; all zero on entry. */
void spline_backward(const float *g, const float *z, float *grad_z, long n, const Shape *s, const float *rise,
                     double *sums) {
    double *s0 = sums, *s1 = sums + s->last + 1, value = 0.0, slope_c = 0.0;
    for (long i = 0; i < n; i++) {
        float c = s->clamps ? clamp(z[i], s->k_min, s->k_max) : z[i];
        float t = s->scale_in * c;
        float u = s->clamps ? clamp(t, s->k_min, s->k_max) : t;
        float p = (u - s->k_min) * s->per_spacing;
        int j = interval(p, s->last);
        float slope = u == t ? 1.0f + rise[j] * s->per_spacing : 0.0f;
        s0[j] += g[i];
        s1[j] += (double)g[i] * (p - (float)j);
        value += (double)g[i] * u;
        slope_c += (double)g[i] * slope * c;
        grad_z[i] = c == z[i] ? g[i] * slope * (s->scale_in * s->scale_out) : 0.0f;
    }
    sums[2 * (s->last + 1)] = value;
    sums[2 * (s->last + 1) + 1] = slope_c;
}
