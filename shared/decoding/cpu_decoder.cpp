// One step of a GPT on a CPU: tokens of any slots, at any positions, in one pass over the weights.
//
// A row does not depend on other rows: every number is summed in one fixed order, whatever the number of rows and
// threads. So a row has the same bits alone and among others, in a chunk of a prompt and when it decodes.
// Shapes: R rows, C width, F hidden width, H heads, D head width, S positions, N outputs, V vocabulary. The rows of all
// activations are padded to a multiple of BLOCK numbers.

#include <cmath>
#include <cstddef>
#include <cstring>

// Numbers in a vector, and rows of a product that are summed at a time in the processor's registers.
#if defined(__AVX512F__)
constexpr int WIDTH = 16, ROWS = 12;
#elif defined(__AVX__)
constexpr int WIDTH = 8, ROWS = 6;
#else
constexpr int WIDTH = 4, ROWS = 6;
#endif
// Outputs of a product that are summed at a time. Weights are (N / BLOCK, C, BLOCK), to be read in order.
constexpr int BLOCK = 2 * WIDTH;
// A draw first finds its block of this many tokens, by the sums of their weights.
constexpr int DRAW_BLOCK = 1024;
// This many rows of x, and of each this many numbers, use a part of the weights while it is in a core's nearest cache.
constexpr int TILE = 8 * ROWS, PART = 128;

template <int size>
struct Numbers {
    typedef float Floats __attribute__((vector_size(4 * size), aligned(4), may_alias));
    typedef int Integers __attribute__((vector_size(4 * size), aligned(4), may_alias));
};
using Vector = Numbers<WIDTH>::Floats;
using Integers = Numbers<WIDTH>::Integers;

struct Product {
    const float *weight, *bias;
};

struct Norm {
    const float *weight, *bias;
};

struct Layer {
    Norm attention_norm;
    Product qkv, output;
    Norm feed_forward_norm;
    Product up, down;
    float *keys, *values;  // (slots, H, S, D)
};

struct Model {
    int layers, width, hidden, heads, positions, vocabulary, threads;
    float epsilon;
    const float *tokens, *places;  // (V, C), (S, C)
    Norm norm;
    Product head;
    const Layer *layer;
};

static int padded(int size) { return (size + BLOCK - 1) / BLOCK * BLOCK; }

static Vector &at(float *place) { return *(Vector *)place; }
static const Vector &at(const float *place) { return *(const Vector *)place; }

// Adds halves to halves until one number is left.
template <int size>
static float sum(typename Numbers<size>::Floats v) {
    if constexpr (size == 1) {
        return v[0];
    } else {
        typename Numbers<size / 2>::Floats halves[2];
        memcpy(halves, &v, sizeof v);
        return sum<size / 2>(halves[0] + halves[1]);
    }
}

// exp(x), 0 below -50 and exp(50) above 50: denormal numbers would cost a hundred times more. NaN stays NaN.
// Source: Moshier 1992, Cephes mathematical library, expf.
static Vector exponential(Vector x) {
    const Vector zero = {}, top = zero + 50.0f;
    Integers low = x < -50.0f;
    x = x > 50.0f ? top : x;
    Vector n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
    Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
    p *= (Vector)power;
    return low ? zero : p;
}

// GELU in its tanh form (Hendrycks & Gimpel 2016, section 2): x times the sigmoid of twice the argument of tanh.
static Vector gelu(Vector x) {
    constexpr float twice = -1.59576912160573f;
    return x / (1.0f + exponential(x * (twice + twice * 0.044715f * x * x)));
}

enum class Then { store, add, store_gelu };

// Adds to the sums of `count` rows of x, `stride` numbers apart, their products with a part of a weight (length, BLOCK).
// Meanwhile prefetches the next weights, `step` numbers further each time: memory is slower than the products.
template <int rows>
static void accumulate(int count, int length, int stride, const float *x, const float *weight, const float *next,
                       int step, Vector (*sums)[2]) {
    if constexpr (rows > 1)
        if (count < rows) return accumulate<rows - 1>(count, length, stride, x, weight, next, step, sums);
    Vector left[rows], right[rows];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) left[r] = sums[r][0], right[r] = sums[r][1];
    for (int c = 0; c < length; c++) {
        const Vector first = at(weight), second = at(weight + WIDTH);
        weight += BLOCK;
        __builtin_prefetch(next, 0, 2);
        __builtin_prefetch(next + WIDTH, 0, 2);
        next += step;
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            const float here = x[(size_t)r * stride + c];
            left[r] += here * first;
            right[r] += here * second;
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) sums[r][0] = left[r], sums[r][1] = right[r];
}

// out (R, N) = x (R, C) times the transposed weight (N, C), plus the bias if there is one.
static void multiply(int threads, int R, int C, int N, const float *x, Product product, Then then, float *out) {
    const int stride = padded(C), out_stride = padded(N);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int n = 0; n < N; n += BLOCK) {
        for (int start = 0; start < R; start += TILE) {
            const int end = start + TILE < R ? start + TILE : R, passes = (end - start + ROWS - 1) / ROWS;
            Vector sums[TILE][2];
            memset(sums, 0, sizeof(sums[0]) * (end - start));
            for (int c = 0; c < C; c += PART) {
                const int length = C - c < PART ? C - c : PART;
                const float *weight = product.weight + (size_t)n * C + (size_t)c * BLOCK;
                for (int r = start, pass = 0; r < end; r += ROWS, pass++)
                    accumulate<ROWS>(end - r, length, stride, x + (size_t)r * stride + c, weight,
                                     weight + (size_t)length * BLOCK + (size_t)pass * length * BLOCK / passes,
                                     BLOCK / passes, sums + (r - start));
            }
            for (int r = start; r < end; r++)
                for (int half = 0; half < 2; half++) {
                    Vector value = sums[r - start][half];
                    float *place = out + (size_t)r * out_stride + n + half * WIDTH;
                    if (product.bias) value += at(product.bias + n + half * WIDTH);
                    if (then == Then::add) value += at(place);
                    if (then == Then::store_gelu) value = gelu(value);
                    at(place) = value;
                }
        }
    }
}

// LayerNorm (Ba et al. 2016) of a row.
static void normalise(int C, float epsilon, const float *x, Norm norm, float *out) {
    const int whole = C / WIDTH * WIDTH;
    Vector sums = {}, squares = {};
    for (int c = 0; c < whole; c += WIDTH) sums += at(x + c);
    float mean = sum<WIDTH>(sums);
    for (int c = whole; c < C; c++) mean += x[c];
    mean /= C;
    for (int c = 0; c < whole; c += WIDTH) squares += (at(x + c) - mean) * (at(x + c) - mean);
    float variance = sum<WIDTH>(squares);
    for (int c = whole; c < C; c++) variance += (x[c] - mean) * (x[c] - mean);
    const float inverse = 1.0f / sqrtf(variance / C + epsilon);
    for (int c = 0; c < C; c++) out[c] = (x[c] - mean) * inverse * norm.weight[c] + norm.bias[c];
}

// Sums `length` values (S, D) by their weights, `vectors` vectors at a time from d on; returns the next d.
template <int vectors>
static int collect(int d, int D, int length, const float *weights, float scale, const float *values, float *attended) {
    for (; d + vectors * WIDTH <= D; d += vectors * WIDTH) {
        Vector sums[vectors] = {};
        for (int s = 0; s < length; s++)
            for (int v = 0; v < vectors; v++) sums[v] += weights[s] * at(values + (size_t)s * D + d + v * WIDTH);
        for (int v = 0; v < vectors; v++) at(attended + d + v * WIDTH) = sums[v] * scale;
    }
    return d;
}

// Attends from a query (D) to the first `length` keys and values (S, D) of its slot and head, and stores the result (D).
// `weights` has room for a number per position and one more vector.
static void attend(int D, int length, const float *query, const float *keys, const float *values, float *weights,
                   float *attended) {
    const float scale = 1.0f / sqrtf(D);
    float highest = -INFINITY;
    for (int s = 0; s < length; s++) {
        const float *key = keys + (size_t)s * D;
        Vector sums = {};
        int d = 0;
        for (; d + WIDTH <= D; d += WIDTH) sums += at(query + d) * at(key + d);
        float score = sum<WIDTH>(sums);
        for (; d < D; d++) score += query[d] * key[d];
        weights[s] = score * scale;
        if (weights[s] > highest) highest = weights[s];
    }
    for (int s = length; s % WIDTH; s++) weights[s] = -INFINITY;
    Vector sums = {};
    for (int s = 0; s < length; s += WIDTH) sums += at(weights + s) = exponential(at(weights + s) - highest);
    const float inverse = 1.0f / sum<WIDTH>(sums);
    int d = collect<4>(0, D, length, weights, inverse, values, attended);
    d = collect<3>(d, D, length, weights, inverse, values, attended);
    d = collect<1>(d, D, length, weights, inverse, values, attended);
    for (; d < D; d++) {
        float total = 0.0f;
        for (int s = 0; s < length; s++) total += weights[s] * values[(size_t)s * D + d];
        attended[d] = total * inverse;
    }
}

extern "C" int block_size() { return BLOCK; }

// The size of the scratch memory that `forward` needs for R rows.
extern "C" size_t scratch_size(const Model *model, int R) {
    const size_t qkv = padded(3 * model->width), hidden = padded(model->hidden);
    return R * (2 * padded(model->width) + (qkv > hidden ? qkv : hidden));
}

// Computes one token (R) for each slot (R) at its position (R), and stores all of them in the cache before any attends.
// Stores the logits (K, V padded) after K wanted rows.
extern "C" void forward(const Model *model, int R, const int *tokens, const int *slots, const int *positions, int K,
                        const int *wanted, float *scratch, float *logits) {
    const int C = model->width, F = model->hidden, H = model->heads, D = C / H, S = model->positions;
    const int threads = model->threads, stride = padded(C), qkv_stride = padded(3 * C);
    float *x = scratch, *normed = x + (size_t)R * stride, *wide = normed + (size_t)R * stride;
    for (int r = 0; r < R; r++) {
        const float *token = model->tokens + (size_t)tokens[r] * C, *place = model->places + (size_t)positions[r] * C;
        for (int c = 0; c < C; c++) x[(size_t)r * stride + c] = token[c] + place[c];
    }
    for (const Layer *layer = model->layer; layer < model->layer + model->layers; layer++) {
        for (int r = 0; r < R; r++)
            normalise(C, model->epsilon, x + (size_t)r * stride, layer->attention_norm, normed + (size_t)r * stride);
        multiply(threads, R, C, 3 * C, normed, layer->qkv, Then::store, wide);
        for (int r = 0; r < R; r++)
            for (int h = 0; h < H; h++) {
                const size_t place = (((size_t)slots[r] * H + h) * S + positions[r]) * D;
                const float *query = wide + (size_t)r * qkv_stride + h * D;
                memcpy(layer->keys + place, query + C, sizeof(float) * D);
                memcpy(layer->values + place, query + 2 * C, sizeof(float) * D);
            }
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
        for (int task = 0; task < R * H; task++) {
            const int r = task / H, h = task % H;
            const size_t place = ((size_t)slots[r] * H + h) * S * D;
            float weights[S + WIDTH];
            attend(D, positions[r] + 1, wide + (size_t)r * qkv_stride + h * D, layer->keys + place,
                   layer->values + place, weights, normed + (size_t)r * stride + h * D);
        }
        multiply(threads, R, C, C, normed, layer->output, Then::add, x);
        for (int r = 0; r < R; r++)
            normalise(C, model->epsilon, x + (size_t)r * stride, layer->feed_forward_norm, normed + (size_t)r * stride);
        multiply(threads, R, C, F, normed, layer->up, Then::store_gelu, wide);
        multiply(threads, R, F, C, wide, layer->down, Then::add, x);
    }
    for (int k = 0; k < K; k++)
        normalise(C, model->epsilon, x + (size_t)wanted[k] * stride, model->norm, normed + (size_t)k * stride);
    multiply(threads, K, C, model->vocabulary, normed, model->head, Then::store, logits);
}

// Calls `use` with the vectors of a block of logits (V) from `start` on: minus infinity for the masked one and beyond the
// last.
template <typename Use>
static void over_block(const float *logits, int V, int masked, int start, Use use) {
    const int end = start + DRAW_BLOCK;
    if (end <= V && (masked < start || masked >= end)) {
        for (int place = start; place < end; place += WIDTH) use(at(logits + place));
        return;
    }
    for (int place = start; place < V && place < end; place += WIDTH) {
        Vector v = Vector{} - INFINITY;
        memcpy(&v, logits + place, sizeof(float) * (place + WIDTH <= V ? WIDTH : V - place));
        if (masked >= place && masked < place + WIDTH) v[masked - place] = -INFINITY;
        use(v);
    }
}

// Returns the token at which the cumulated weights of a row pass a share in [0, 1) of their sum; the likeliest token if
// the inverse of the temperature is 0; -1 if a logit is not finite.
static int draw_row(const float *logits, int V, int masked, float inverse, double number) {
    Vector highs = Vector{} - INFINITY, zeros = {};
    for (int start = 0; start < V; start += DRAW_BLOCK)
        over_block(logits, V, masked, start, [&](Vector v) { highs = v > highs ? v : highs; });
    // A number that is not finite, times 0, is not 0.
    const int whole = V / WIDTH * WIDTH;
    for (int place = 0; place < whole; place += WIDTH) zeros += at(logits + place) * 0.0f;
    for (int token = whole; token < V; token++) zeros[0] += logits[token] * 0.0f;
    float highest = -INFINITY;
    for (int lane = 0; lane < WIDTH; lane++) {
        if (zeros[lane] != 0.0f) return -1;
        if (highs[lane] > highest) highest = highs[lane];
    }
    if (inverse == 0.0f) {
        int token = 0;
        while (token == masked || logits[token] != highest) token++;
        return token;
    }
    const auto weigh = [&](Vector v) { return exponential((v - highest) * inverse); };
    double blocks[V / DRAW_BLOCK + 1], total = 0.0;
    for (int start = 0; start < V; start += DRAW_BLOCK) {
        Vector sums = {};
        over_block(logits, V, masked, start, [&](Vector v) { sums += weigh(v); });
        total += blocks[start / DRAW_BLOCK] = sum<WIDTH>(sums);
    }
    double left = number * total;
    int start = 0;
    // Rounding can raise the target to the sum itself, which no token passes: then take the last possible token.
    int last = (V - 1) / DRAW_BLOCK * DRAW_BLOCK;
    while (blocks[last / DRAW_BLOCK] == 0.0) last -= DRAW_BLOCK;
    while (start < last && left >= blocks[start / DRAW_BLOCK]) left -= blocks[start / DRAW_BLOCK], start += DRAW_BLOCK;
    int drawn = start, place = start;
    over_block(logits, V, masked, start, [&](Vector v) {
        const Vector weights = weigh(v);
        for (int lane = 0; lane < WIDTH; lane++)
            if (weights[lane] > 0.0f && left >= 0.0) left -= weights[lane], drawn = place + lane;
        place += WIDTH;
    });
    return drawn;
}

// Draws a token for each of K rows of logits (V).
extern "C" void draw(int threads, int K, int V, const float *const *logits, const int *masked, const float *inverse,
                     const double *numbers, int *tokens) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int k = 0; k < K; k++) tokens[k] = draw_row(logits[k], V, masked[k], inverse[k], numbers[k]);
}
