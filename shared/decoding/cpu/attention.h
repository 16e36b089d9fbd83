// Attention of a query to the keys and values of its slot and head.
//
// Shapes: D head width, S positions. Keys are (S / WIDTH, D, WIDTH), so that the scores of neighbouring positions are the
// numbers of a vector; values are (S, D), and as many numbers as a
// vector has can be read behind them.

static int key_blocks(int S) { return (S + WIDTH - 1) / WIDTH; }

// Keys and values of a slot and head.
template <typename Number>
struct Cache {
    Number *keys, *values;
};

// Stores the key and the value (D) of a position.
template <typename Number>
static void keep(int D, int position, const float *key, const float *value, Cache<Number> cache) {
    Number *block = cache.keys + (size_t)(position / WIDTH) * D * WIDTH + position % WIDTH;
    for (int d = 0; d < D; d++) store(block + d * WIDTH, key[d]);
    for (int d = 0; d < D; d++) store(cache.values + (size_t)position * D + d, value[d]);
}

// Queries (Q, D) of one slot and head, the positions that each sees, and what each attends to (Q, D).
struct Queries {
    const float *query;
    int query_stride;
    const int *positions;  // the last one, of each
    float *attended;
    int attended_stride;
};

// Stores the scores of `count` blocks of keys from block `first` on. Prefetches as much of `next`.
template <int Q, int blocks, typename Number>
static void score(int count, int D, Queries queries, int first, const Number *keys, const Number *next, float *scores,
                  int scores_stride) {
    if constexpr (blocks > 1)
        if (count < blocks)
            return score<Q, blocks - 1>(count, D, queries, first, keys, next, scores, scores_stride);
    const float scale = 1.0f / sqrtf(D);
    const size_t start = (size_t)first * D * WIDTH;
    Vector sums[Q][blocks] = {};
    for (int d = 0; d < D; d++) {
        if (next) prefetch(next + start + d * blocks * WIDTH, blocks * WIDTH * sizeof(Number));
#pragma GCC unroll 8
        for (int b = 0; b < blocks; b++) {
            const Vector key = load(keys + start + ((size_t)b * D + d) * WIDTH);
#pragma GCC unroll 4
            for (int q = 0; q < Q; q++)
                sums[q][b] = multiply_add(broadcast(queries.query[q * queries.query_stride + d]), key, sums[q][b]);
        }
    }
    for (int q = 0; q < Q; q++)
        for (int b = 0; b < blocks; b++) at(scores + q * scores_stride + (first + b) * WIDTH) = sums[q][b] * scale;
}

// Turns the scores of `length` positions into weights, up to the position `end`, a multiple of a vector; returns one
// divided by their sum.
static float softmax(int length, int end, float *scores) {
    for (int s = length; s < end; s++) scores[s] = -INFINITY;
    Vector highs = Vector{} - INFINITY, sums = {};
    for (int s = 0; s < end; s += WIDTH) highs = at(scores + s) > highs ? at(scores + s) : highs;
    float highest = -INFINITY;
    for (int lane = 0; lane < WIDTH; lane++) highest = highs[lane] > highest ? highs[lane] : highest;
    for (int s = 0; s < end; s += WIDTH) sums += at(scores + s) = exponential(at(scores + s) - highest);
    return 1.0f / sum<WIDTH>(sums);
}

// Sums the values by their weights from d on, `vectors` vectors at a time as long as they fit; returns the next d. A single
// vector may pass D; what it has there is not stored. The values of even and of odd positions have sums of their own.
// Prefetches as much of `next`.
template <int Q, int vectors, typename Number>
static int collect(int d, int D, Queries queries, const float *weights, int weights_stride, const float *scales,
                   const Number *values, const Number *next) {
    constexpr int least = vectors > 1 ? vectors * WIDTH : 1;
    for (; d + least <= D; d += vectors * WIDTH) {
        Vector sums[Q][2][vectors] = {};
        const auto value_at = [&](int s, int v) { return load(values + (size_t)s * D + d + v * WIDTH); };
        // Positions that all queries see, an even number.
        int common = queries.positions[0] + 1;
        for (int q = 1; q < Q; q++) common = queries.positions[q] + 1 < common ? queries.positions[q] + 1 : common;
        common -= common % 2;
        for (int s = 0; s < common; s += 2) {
            if (next) prefetch(next + (size_t)s * D + d, 2 * vectors * WIDTH * sizeof(Number));
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; odd++)
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++) {
                    const Vector value = value_at(s + odd, v);
#pragma GCC unroll 4
                    for (int q = 0; q < Q; q++)
                        sums[q][odd][v] = multiply_add(broadcast(weights[q * weights_stride + s + odd]), value, sums[q][odd][v]);
                }
        }
        // No query sees the numbers of later positions, which may not be finite.
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) {
            for (int s = common; s <= queries.positions[q]; s += 2)
#pragma GCC unroll 2
                for (int odd = 0; odd < 2; odd++)
                    if (s + odd <= queries.positions[q])
#pragma GCC unroll 4
                        for (int v = 0; v < vectors; v++)
                            sums[q][odd][v] = multiply_add(broadcast(weights[q * weights_stride + s + odd]),
                                                           value_at(s + odd, v), sums[q][odd][v]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                const Vector attended = (sums[q][0][v] + sums[q][1][v]) * scales[q];
                float *place = queries.attended + q * queries.attended_stride + d + v * WIDTH;
                if (vectors > 1 || d + WIDTH <= D)
                    at(place) = attended;
                else
                    for (int lane = 0; lane < D - d; lane++) place[lane] = attended[lane];
            }
        }
    }
    return d;
}

// Attends from Q queries to the keys and values up to their positions; `weights` has room for Q rows of all positions.
// Meanwhile prefetches `next`, if there is one, which is used next. The numbers of a query do not depend on Q.
template <int Q, typename Number>
static void attend(int D, Queries queries, Cache<Number> cache, Cache<Number> next, float *weights) {
    int length = 0;
    for (int q = 0; q < Q; q++) length = queries.positions[q] + 1 > length ? queries.positions[q] + 1 : length;
    const int blocks = key_blocks(length), stride = blocks * WIDTH;
    constexpr int at_once = Q > 1 ? 4 : 8;
    float scales[Q];
    for (int b = 0; b < blocks; b += at_once)
        score<Q, at_once>(blocks - b, D, queries, b, cache.keys, next.keys, weights, stride);
    for (int q = 0; q < Q; q++) scales[q] = softmax(queries.positions[q] + 1, stride, weights + q * stride);
    int d = 0;
    if constexpr (Q == 1) {
        d = collect<Q, 4>(d, D, queries, weights, stride, scales, cache.values, next.values);
        d = collect<Q, 3>(d, D, queries, weights, stride, scales, cache.values, next.values);
    } else {
        d = collect<Q, 2>(d, D, queries, weights, stride, scales, cache.values, next.values);
    }
    collect<Q, 1>(d, D, queries, weights, stride, scales, cache.values, next.values);
}
