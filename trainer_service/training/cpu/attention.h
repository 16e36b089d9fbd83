// Causal attention of whole texts and its gradient: Dao et al. 2022, "FlashAttention", algorithms 1 and 4, for blocks
// of HEIGHT queries with all keys that they see.
//
// Shapes: B rows, H heads, T tokens, D head width, C = H x D.

// Queries, keys and values (B, T, 3, H, D); attended values (B, T, H, D); and for each query the logarithm of the sum
// of its exponentials, (B, H, T).
struct Attention {
    int B, T, H, D;

    size_t width() const { return (size_t)H * D; }
    // The stride of queries, keys and values.
    size_t stride() const { return 3 * width(); }
    size_t place(int b, int h) const { return b * T * stride() + (size_t)h * D; }
    // Floats of scratch memory, beside those of a product.
    size_t space() const { return (size_t)2 * HEIGHT * T + (size_t)(2 * panels(T) * D + 2 * panels(D) * T) * PANEL; }
};

static void attend(Attention a, const float *qkv, float *attended, float *logarithms, float *space) {
    const float factor = 1.0f / sqrtf(a.D);
    float *scores = space + SPACE, *keys = scores + (size_t)HEIGHT * a.T,
          *values = keys + (size_t)panels(a.T) * a.D * PANEL;
    for (int b = 0; b < a.B; b++)
        for (int h = 0; h < a.H; h++) {
            const float *q = qkv + a.place(b, h), *k = q + a.width(), *v = k + a.width();
            pack_right(a.D, a.T, transposed(k, a.stride()), keys);
            pack_right(a.T, a.D, matrix(v, a.stride()), values);
            for (int first = 0; first < a.T; first += HEIGHT) {
                const int rows = a.T - first < HEIGHT ? a.T - first : HEIGHT, end = first + rows;
                multiply_packed<Then::store>(rows, end, a.D, rows_of(q + first * a.stride(), a.stride()), keys, a.D,
                                             {scores, (size_t)a.T}, space);
                float inverses[HEIGHT];
                for (int i = 0; i < rows; i++) {
                    float *row = scores + (size_t)i * a.T;
                    const int seen = first + i + 1;
                    const Exponentials found = exponentials(seen, factor, row, row);
                    memset(row + seen, 0, (end - seen) * sizeof(float));
                    inverses[i] = 1.0f / found.sum;
                    logarithms[((size_t)b * a.H + h) * a.T + first + i] = found.highest * factor + logf(found.sum);
                }
                float *out = attended + ((size_t)b * a.T + first) * a.width() + h * a.D;
                multiply_packed<Then::store>(rows, a.D, end, rows_of(scores, a.T), values, a.T, {out, a.width()},
                                             space);
                for (int i = 0; i < rows; i++) scale(a.D, inverses[i], out + i * a.width());
            }
        }
}

// Stores the slopes of queries, keys and values, given those of the attended values.
static void attend_slopes(Attention a, const float *qkv, const float *attended, const float *logarithms,
                          const float *slopes_of_attended, float *slopes_of_qkv, float *space) {
    const float factor = 1.0f / sqrtf(a.D);
    float *weights = space + SPACE, *slopes = weights + (size_t)HEIGHT * a.T, *keys = slopes + (size_t)HEIGHT * a.T,
          *values = keys + (size_t)panels(a.T) * a.D * PANEL, *key_rows = values + (size_t)panels(a.T) * a.D * PANEL,
          *packed_rows = key_rows + (size_t)panels(a.D) * a.T * PANEL;
    const size_t stride = a.stride(), width = a.width();
    for (int b = 0; b < a.B; b++)
        for (int h = 0; h < a.H; h++) {
            const float *q = qkv + a.place(b, h), *k = q + width, *v = k + width;
            float *q_slopes = slopes_of_qkv + a.place(b, h), *k_slopes = q_slopes + width, *v_slopes = k_slopes + width;
            pack_right(a.D, a.T, transposed(k, stride), keys);
            pack_right(a.D, a.T, transposed(v, stride), values);
            pack_right(a.T, a.D, matrix(k, stride), key_rows);
            for (int t = 0; t < a.T; t++) {
                memset(k_slopes + t * stride, 0, a.D * sizeof(float));
                memset(v_slopes + t * stride, 0, a.D * sizeof(float));
            }
            for (int first = 0; first < a.T; first += HEIGHT) {
                const int rows = a.T - first < HEIGHT ? a.T - first : HEIGHT, end = first + rows;
                const size_t place = ((size_t)b * a.T + first) * width + h * a.D;
                const float *out = attended + place, *out_slopes = slopes_of_attended + place,
                            *some_q = q + first * stride;
                multiply_packed<Then::store>(rows, end, a.D, rows_of(some_q, stride), keys, a.D, {weights, (size_t)a.T},
                                             space);
                multiply_packed<Then::store>(rows, end, a.D, rows_of(out_slopes, width), values, a.D,
                                             {slopes, (size_t)a.T}, space);
                for (int i = 0; i < rows; i++) {
                    float *row = weights + (size_t)i * a.T, *its_slopes = slopes + (size_t)i * a.T;
                    const int seen = first + i + 1;
                    const float logarithm = logarithms[((size_t)b * a.H + h) * a.T + first + i];
                    // The sum of the weights times their slopes: D in algorithm 4.
                    const float mean = dot(a.D, out + i * width, out_slopes + i * width);
                    for_vectors(seen, [&](int s, int count) {
                        const Vector weight = exponential(load(row + s, count) * factor - logarithm);
                        store(row + s, weight, count);
                        store(its_slopes + s, weight * (load(its_slopes + s, count) - mean) * factor, count);
                    });
                    memset(row + seen, 0, (end - seen) * sizeof(float));
                    memset(its_slopes + seen, 0, (end - seen) * sizeof(float));
                }
                multiply_packed<Then::store>(rows, a.D, end, rows_of(slopes, a.T), key_rows, a.T,
                                             {q_slopes + first * stride, stride}, space);
                pack_right(rows, a.D, matrix(some_q, stride), packed_rows);
                multiply_packed<Then::store>(end, a.D, rows, columns_of(slopes, a.T), packed_rows, rows,
                                             {k_slopes, stride, true}, space);
                pack_right(rows, a.D, matrix(out_slopes, width), packed_rows);
                multiply_packed<Then::store>(end, a.D, rows, columns_of(weights, a.T), packed_rows, rows,
                                             {v_slopes, stride, true}, space);
            }
        }
}
