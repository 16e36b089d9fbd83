// Packed weights, and the inputs of their products.
//
// Shapes: R rows, C inputs, N outputs. Rows of numbers are padded to a multiple of BLOCK.

// How weights are stored. Keys and values are fp32 with the first, and bf16 with the others.
enum class Format { fp32, bf16, int8 };

// Outputs of a product that are summed at a time. Weights are (N / BLOCK, C, BLOCK), to be read in order; of bf16 numbers
// a word of 32 bits holds those of two outputs, the upper half the one WIDTH outputs before the other; of bytes it holds
// four inputs of one output.
constexpr int BLOCK = 2 * WIDTH;
// Inputs that use a part of the weights while it is in a core's nearest cache. As bytes they have one scale.
constexpr int PART = 128;

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

// Of inputs as bytes there is memory for a multiple of this many rows: those of a tile (tiles.h).
constexpr int TILE_ROWS = 16;
static int tiled(int R) { return (R + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS; }

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
