// Products of rows with packed weights, and LayerNorm.
//
// Shapes: R rows, C inputs, N outputs. Rows of numbers are padded to a multiple of BLOCK.

// How weights are stored. Keys and values are fp32 with the first, and bf16 with the others.
enum class Format { fp32, bf16, int8 };

// Outputs of a product that are summed at a time. Weights are (N / BLOCK, C, BLOCK), to be read in order; of bf16 numbers
// a word of 32 bits holds those of two outputs, the upper half the one WIDTH outputs before the other; of bytes it holds
// four inputs of one output.
constexpr int BLOCK = 2 * WIDTH;
// This many rows of x, and of each this many numbers, use a part of the weights while it is in a core's nearest cache.
// With bytes, the numbers of a row in a part have one scale.
constexpr int TILE = 8 * ROWS, PART = 128;

static int padded(int size) { return (size + BLOCK - 1) / BLOCK * BLOCK; }
static int parts(int C) { return (C + PART - 1) / PART; }

// Weights (N padded, C), with a scale for each output if they are bytes; the bias may be missing.
struct Product {
    const char *weight;
    const float *scales, *bias;
};

struct Norm {
    const float *weight, *bias;
};

// The bytes of a block's weights of one input.
template <Format format>
constexpr int BYTES = BLOCK * (format == Format::fp32 ? 4 : format == Format::bf16 ? 2 : 1);
// Inputs whose weights lie in one word.
template <Format format>
constexpr int PER_WORD = format == Format::int8 ? 4 : 1;

// The bytes of packed weights (N, C).
template <Format format>
static size_t packed_bytes(int N, int C) {
    return (size_t)padded(N) / BLOCK * BYTES<format> * ((C + PER_WORD<format> - 1) / PER_WORD<format> * PER_WORD<format>);
}

// Where the packed weight of output n and input c lies.
template <Format format>
static size_t place_of(int C, int n, int c) {
    const size_t block = packed_bytes<format>(BLOCK, C) * (n / BLOCK), output = n % BLOCK;
    if (format == Format::fp32) return block + (c * BLOCK + output) * 4;
    if (format == Format::bf16) return block + (c * WIDTH + output % WIDTH) * 4 + (output < WIDTH ? 2 : 0);
    return block + (c / 4 * BLOCK + output) * 4 + c % 4;
}

// Numbers that are not larger become 0 in bytes: the inverse of their scale would overflow.
constexpr float SMALLEST = 1e-36f;

// Packs weights (N, C) into zeroed memory; stores a scale for each output if they are bytes, which is NaN if one of its
// weights is not finite.
template <Format format>
static void pack(int N, int C, const float *weights, char *packed, float *scales) {
    for (int n = 0; n < N; n++) {
        const float *row = weights + (size_t)n * C;
        float most = 0.0f, zero = 0.0f;
        for (int c = 0; c < C; c++) most = fabsf(row[c]) > most ? fabsf(row[c]) : most, zero += row[c] * 0.0f;
        const float inverse = most > SMALLEST && zero == 0.0f ? 127.0f / most : 0.0f;
        if (format == Format::int8) scales[n] = most / 127.0f + zero;
        for (int c = 0; c < C; c++) {
            char *place = packed + place_of<format>(C, n, c);
            if (format == Format::fp32) *(float *)place = row[c];
            if (format == Format::bf16) *(bf16 *)place = to_bf16(row[c]);
            if (format == Format::int8) *(uint8_t *)place = zero == 0.0f ? (int)rintf(row[c] * inverse) + ZERO : 0;
        }
    }
}

// Returns one of the weights (N, C).
template <Format format>
static float weight_at(Product product, int C, int n, int c) {
    const char *place = product.weight + place_of<format>(C, n, c);
    if (format == Format::fp32) return *(const float *)place;
    if (format == Format::bf16) return to_float(*(const bf16 *)place);
    return (int8_t)(*(const uint8_t *)place - ZERO) * product.scales[n];
}

// The inputs of a product, (R, C padded). If the weights are bytes, then also as bytes, with scales and sums (R, parts).
struct Inputs {
    const float *numbers;
    int8_t *bytes;
    float *scales;
    int *sums;
};

// Quantizes each part of a row symmetrically, by its largest number. If a number is not finite, the scale is NaN.
static void quantize(int C, const float *x, int8_t *bytes, float *scales, int *sums) {
    for (int start = 0; start < C; start += PART) {
        const int end = start + PART < C ? start + PART : C;
        Vector highs = {}, zeros = {};
        int c = start;
        for (; c + WIDTH <= end; c += WIDTH) {
            const Vector v = at(x + c), size = v < 0.0f ? -v : v;
            highs = size > highs ? size : highs;
            zeros += v * 0.0f;
        }
        float most = 0.0f, zero = sum<WIDTH>(zeros);
        for (int lane = 0; lane < WIDTH; lane++) most = highs[lane] > most ? highs[lane] : most;
        for (; c < end; c++) most = fabsf(x[c]) > most ? fabsf(x[c]) : most, zero += x[c] * 0.0f;
        scales[start / PART] = most / 127.0f + zero;
        const float inverse = most > SMALLEST && zero == 0.0f ? 127.0f / most : 0.0f;
        Integers totals = {};
        int total = 0;
        for (c = start; c + WIDTH <= end; c += WIDTH) {
            // The sum's last bits are the nearest integer.
            const Integers rounded =
                zero == 0.0f ? (Integers)(at(x + c) * inverse + 12582912.0f) - 0x4b400000 : Integers{};
            totals += rounded;
            *(Bytes *)(bytes + c) = __builtin_convertvector(rounded, Bytes);
        }
        for (; c < end; c++) total += bytes[c] = zero == 0.0f ? (int)rintf(x[c] * inverse) : 0;
        for (; c % 4; c++) bytes[c] = 0;
        for (int lane = 0; lane < WIDTH; lane++) total += totals[lane];
        sums[start / PART] = total;
    }
}

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
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int n = 0; n < N; n += BLOCK) {
        const char *block = product.weight + packed_bytes<format>(n, C);
        for (int start = 0; start < R; start += TILE) {
            const int end = start + TILE < R ? start + TILE : R, passes = (end - start + ROWS - 1) / ROWS;
            Vector sums[TILE][2];
            memset(sums, 0, sizeof(sums[0]) * (end - start));
            for (int c = 0; c < C; c += PART) {
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
