// Products of rows with packed weights, and LayerNorm.
//
// Shapes: R rows, C inputs, N outputs.

// This many rows use a part of the weights while it is in a core's nearest cache.
constexpr int CACHED_ROWS = 8 * ROWS;

// Adds to the sums of `count` rows, from row r on, the products of the inputs c to c + length with a part of a block's
// weights. Meanwhile prefetches the next weights, `step` bytes further each time: memory is slower than the products.
template <Format format, int rows>
static void accumulate(int count, int length, int C, Inputs x, int r, int c, const char *weight, const char *next,
                       int step, Vector (*sums)[2]) {
    if constexpr (rows > 1)
        if (count < rows) return accumulate<format, rows - 1>(count, length, C, x, r, c, weight, next, step, sums);
    constexpr int bytes = BYTES<format> * PER_WORD<format>;
    const int stride = padded(C);
    const size_t first = (size_t)r * stride + c, part = (size_t)r * parts(C) + c / PART;
    if constexpr (format == Format::int8) {
        Integers left[rows], right[rows];
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) left[i] = right[i] = Integers{} - ZERO * x.sums[part + i * parts(C)];
#pragma GCC unroll 2
        for (int place = 0; place < length; place += PER_WORD<format>) {
            const Integers low = *(const Integers *)weight, high = *(const Integers *)(weight + bytes / 2);
            weight += bytes;
            prefetch(next, bytes), next += step;
#pragma GCC unroll 12
            for (int i = 0; i < rows; i++) {
                int here;
                memcpy(&here, x.bytes + first + (size_t)i * stride + place, sizeof here);
                left[i] = add_products(left[i], low, Integers{} + here);
                right[i] = add_products(right[i], high, Integers{} + here);
            }
        }
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            const Vector scale = broadcast(x.scales[part + i * parts(C)]);
            sums[i][0] = multiply_add(__builtin_convertvector(left[i], Vector), scale, sums[i][0]);
            sums[i][1] = multiply_add(__builtin_convertvector(right[i], Vector), scale, sums[i][1]);
        }
    } else {
        Vector left[rows], right[rows];
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) left[i] = sums[i][0], right[i] = sums[i][1];
        for (int place = 0; place < length; place++) {
            Vector low, high;
            if constexpr (format == Format::fp32) {
                low = at((const float *)weight), high = at((const float *)weight + WIDTH);
            } else {
                const Integers words = *(const Integers *)weight;
                low = (Vector)(words & (int)0xffff0000), high = (Vector)(words << 16);
            }
            weight += bytes;
            prefetch(next, bytes), next += step;
#pragma GCC unroll 12
            for (int i = 0; i < rows; i++) {
                const Vector here = broadcast(x.numbers[first + (size_t)i * stride + place]);
                left[i] = multiply_add(here, low, left[i]);
                right[i] = multiply_add(here, high, right[i]);
            }
        }
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) sums[i][0] = left[i], sums[i][1] = right[i];
    }
}

enum class Then { store, add, store_gelu };

// out (R, N padded) = x times the transposed weight (N, C), plus the bias if there is one.
template <Format format>
static void multiply(int threads, int R, int C, int N, Inputs x, Product product, Then then, float *out) {
    const int out_stride = padded(N);
    if (format == Format::int8)
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
        for (int r = 0; r < R; r++)
            quantize(C, x.numbers + (size_t)r * padded(C), x.bytes + (size_t)r * padded(C), x.scales + r * parts(C),
                           x.sums + r * parts(C));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Tiles tiles(format == Format::int8 && R >= FEWEST_TILE_ROWS && C % TILE_BYTES == 0);
#pragma omp for schedule(static)
        for (int n = 0; n < N; n += BLOCK) {
            const char *block = product.weight + packed_bytes<format>(n, C);
            for (int start = 0; start < R; start += CACHED_ROWS) {
                const int end = start + CACHED_ROWS < R ? start + CACHED_ROWS : R, passes = (end - start + ROWS - 1) / ROWS;
                Vector sums[CACHED_ROWS][2];
                memset(sums, 0, sizeof(sums[0]) * (end - start));
                if (tiles.used) accumulate_tiles(end - start, C, x, start, block, sums);
                for (int c = 0; c < C && !tiles.used; c += PART) {
                    const int length = C - c < PART ? C - c : PART;
                    const char *weight = block + (size_t)c * BYTES<format>, *next = weight + length * BYTES<format>;
                    for (int r = start, pass = 0; r < end; r += ROWS, pass++)
                        accumulate<format, ROWS>(end - r, length, C, x, r, c, weight,
                                                 next + (size_t)pass * length * BYTES<format> / passes,
                                                 BYTES<format> * PER_WORD<format> / passes, sums + (r - start));
                }
                for (int r = start; r < end; r++)
                    for (int half = 0; half < 2; half++) {
                        const int first = n + half * WIDTH;
                        Vector value = sums[r - start][half];
                        float *place = out + (size_t)r * out_stride + first;
                        if (format == Format::int8) value *= at(product.scales + first);
                        if (product.bias) value += at(product.bias + first);
                        if (then == Then::add) value += at(place);
                        if (then == Then::store_gelu) value = gelu(value);
                        at(place) = value;
                    }
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
