// Products of matrices: out (M, N) = left (M, K) times right (K, N).
//
// As in Goto & van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication": a tile of ROWS x PANEL sums
// stays in the processor's registers, the part of `right` that it reads in the nearest cache, and that of `left` in the
// next one.

// Columns of a tile.
constexpr int PANEL = 2 * WIDTH;
// Sums of a tile at a time; rows of `left` and columns of `right` in a part that is used while it is in a cache.
constexpr int DEPTH = 384, HEIGHT = 8 * ROWS, BREADTH = 2048;

// left[i][k] = data[i * row_step + k * step]; one of the steps is 1.
struct Left {
    const float *data;
    size_t row_step, step;

    Left from(size_t row, size_t k) const { return {data + row * row_step + k * step, row_step, step}; }
};

// right[k][j] = data[k * step + j * column_step]; one of the steps is 1.
struct Right {
    const float *data;
    size_t step, column_step;

    Right from(size_t k, size_t column) const { return {data + k * step + column * column_step, step, column_step}; }
};

static Left rows_of(const float *data, size_t stride) { return {data, stride, 1}; }
static Left columns_of(const float *data, size_t stride) { return {data, 1, stride}; }
static Right matrix(const float *data, size_t stride) { return {data, stride, 1}; }
static Right transposed(const float *data, size_t stride) { return {data, 1, stride}; }

// What becomes of a sum: it is stored; the number of `other` is added to it; GELU of it goes to `other`; or it is
// multiplied by the slope of GELU at the number of `other`, which becomes its GELU.
enum class Then { store, add_other, gelu, gelu_slope };

// `other` has the shape and stride of `out`. A bias (N,) is added to each sum before, and the number that is there
// already if `add` is true.
struct Out {
    float *data;
    size_t stride;
    bool add = false;
    const float *bias = nullptr;
    float *other = nullptr;

    Out from(size_t row, size_t column) const {
        const size_t place = row * stride + column;
        return {data + place, stride, add, bias ? bias + column : nullptr, other ? other + place : nullptr};
    }
};

static int panels(int columns) { return (columns + PANEL - 1) / PANEL; }

// out (C, R) = the transposed x (R, C).
static void transpose(int R, int C, const float *x, size_t stride, float *out, size_t out_stride) {
    int rows = 0, columns = 0;
    // Four by four numbers at a time; GCC before 12 lacks the function.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
    typedef Numbers<4>::Floats Four;
    rows = R / 4 * 4, columns = C / 4 * 4;
    for (int c = 0; c < columns; c += 4)
        for (int r = 0; r < rows; r += 4) {
            const float *from = x + r * stride + c;
            float *to = out + c * out_stride + r;
            const Four p = *(const Four *)from, q = *(const Four *)(from + stride);
            const Four s = *(const Four *)(from + 2 * stride), t = *(const Four *)(from + 3 * stride);
            const Four pq = __builtin_shufflevector(p, q, 0, 4, 1, 5), st = __builtin_shufflevector(s, t, 0, 4, 1, 5);
            const Four PQ = __builtin_shufflevector(p, q, 2, 6, 3, 7), ST = __builtin_shufflevector(s, t, 2, 6, 3, 7);
            *(Four *)to = __builtin_shufflevector(pq, st, 0, 1, 4, 5);
            *(Four *)(to + out_stride) = __builtin_shufflevector(pq, st, 2, 3, 6, 7);
            *(Four *)(to + 2 * out_stride) = __builtin_shufflevector(PQ, ST, 0, 1, 4, 5);
            *(Four *)(to + 3 * out_stride) = __builtin_shufflevector(PQ, ST, 2, 3, 6, 7);
        }
#endif
#endif
    for (int r = 0; r < R; r++)
        for (int c = r < rows ? columns : 0; c < C; c++) out[c * out_stride + r] = x[r * stride + c];
}

// Copies right (K, N) to panels (N / PANEL, K, PANEL), with zeros in the place of missing columns.
static void pack_right(int K, int N, Right right, float *packed) {
    for (int first = 0; first < N; first += PANEL, packed += (size_t)K * PANEL) {
        const float *data = right.data + first * right.column_step;
        const int columns = N - first < PANEL ? N - first : PANEL;
        if (columns < PANEL) memset(packed, 0, (size_t)K * PANEL * sizeof(float));
        if (right.step == 1) transpose(columns, K, data, right.column_step, packed, PANEL);
        else if (columns == PANEL)  // copies of a known size are a few moves of vectors
            for (int k = 0; k < K; k++)
                memcpy(packed + (size_t)k * PANEL, data + k * right.step, PANEL * sizeof(float));
        else
            for (int k = 0; k < K; k++)
                memcpy(packed + (size_t)k * PANEL, data + k * right.step, columns * sizeof(float));
    }
}

// Copies left (M, K), whose rows are adjacent, to (M / ROWS, K, ROWS).
static void pack_left(int M, int K, Left left, float *packed) {
    for (int first = 0; first < M; first += ROWS, packed += (size_t)K * ROWS) {
        const float *data = left.data + first;
        const size_t bytes = (M - first < ROWS ? M - first : ROWS) * sizeof(float);
        for (int k = 0; k < K; k++) {
            if (bytes == ROWS * sizeof(float))  // a copy of a known size
                memcpy(packed + k * ROWS, data + k * left.step, ROWS * sizeof(float));
            else memcpy(packed + k * ROWS, data + k * left.step, bytes);
        }
    }
}

// Sums the products of ROWS rows, whose numbers are `step` apart, with a panel.
template <int step>
__attribute__((always_inline)) static inline void sum_tile(int K, const float *const *rows, const float *panel,
                                                           Vector (*sums)[2]) {
    Vector lows[ROWS], highs[ROWS];
    const float *data[ROWS];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) lows[i] = highs[i] = Vector{}, data[i] = rows[i];
#pragma GCC unroll 2
    for (int k = 0; k < K; k++) {
        const Vector low = at(panel), high = at(panel + WIDTH);
        panel += PANEL;
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            const Vector here = broadcast(data[i][(size_t)k * step]);
            lows[i] = multiply_add(here, low, lows[i]);
            highs[i] = multiply_add(here, high, highs[i]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) sums[i][0] = lows[i], sums[i][1] = highs[i];
}

// The slope of GELU at x, and GELU of x in its place.
static Vector gelu_slope(Vector &x) {
    constexpr float twice = 1.59576912160573f;  // 2 sqrt(2 / pi)
    const Vector gate = 1.0f / (1.0f + exponential(-x * (twice + twice * 0.044715f * x * x)));
    const Vector result = gate + x * gate * (1.0f - gate) * (twice + 3.0f * 0.044715f * twice * x * x);
    x *= gate;
    return result;
}

template <Then then>
static void finish(int rows, Vector (*sums)[2], Out out) {
    for (int i = 0; i < rows; i++)
        for (int half = 0; half < 2; half++) {
            const size_t here = i * out.stride + half * WIDTH;
            float *place = out.data + here, *other = out.other ? out.other + here : nullptr;
            Vector value = sums[i][half];
            if (out.add) value += at(place);
            if (out.bias) value += at(out.bias + half * WIDTH);
            if (then == Then::add_other) value += at(other);
            if (then == Then::gelu) at(other) = gelu(value);
            if (then == Then::gelu_slope) {
                Vector x = at(other);
                value *= gelu_slope(x);
                at(other) = x;
            }
            at(place) = value;
        }
}

// As `finish`, for the first columns of a tile.
template <Then then>
static void finish_part(int rows, int columns, Vector (*sums)[2], Out out) {
    float data[PANEL] = {}, other[PANEL] = {}, bias[PANEL] = {};
    const size_t bytes = columns * sizeof(float);
    if (out.bias) memcpy(bias, out.bias, bytes);
    for (int i = 0; i < rows; i++) {
        const Out row = out.from(i, 0);
        if (out.add) memcpy(data, row.data, bytes);
        if (out.other) memcpy(other, row.other, bytes);
        finish<then>(1, sums + i, {data, PANEL, out.add, bias, other});
        memcpy(row.data, data, bytes);
        if (out.other) memcpy(row.other, other, bytes);
    }
}

// As `multiply`, for at most HEIGHT rows and a packed `right`, whose panels have `depth` rows.
template <Then then, int step>
static void multiply_rows(int M, int N, int K, Left left, const float *packed, int depth, Out out) {
    for (int j = 0; j < N; j += PANEL, packed += (size_t)depth * PANEL)
        for (int i = 0; i < M; i += ROWS) {
            const int rows = M - i < ROWS ? M - i : ROWS, columns = N - j < PANEL ? N - j : PANEL;
            const float *data[ROWS];
            for (int r = 0; r < ROWS; r++)
                data[r] = left.data + (step == 1 ? (i + (r < rows ? r : rows - 1)) * left.row_step : (size_t)i * K + r);
            Vector sums[ROWS][2];
            sum_tile<step>(K, data, packed, sums);
            if (columns == PANEL) finish<then>(rows, sums, out.from(i, j));
            else finish_part<then>(rows, columns, sums, out.from(i, j));
        }
}

// As `multiply`, with a packed `right`, whose panels have `depth` rows. The space is for a part of `left`.
template <Then then>
static void multiply_packed(int M, int N, int K, Left left, const float *packed, int depth, Out out, float *space) {
    for (int i = 0; i < M; i += HEIGHT) {
        const int rows = M - i < HEIGHT ? M - i : HEIGHT;
        const Left part = left.from(i, 0);
        if (left.step == 1) {
            multiply_rows<then, 1>(rows, N, K, part, packed, depth, out.from(i, 0));
        } else {
            pack_left(rows, K, part, space);
            multiply_rows<then, ROWS>(rows, N, K, {space, 0, 0}, packed, depth, out.from(i, 0));
        }
    }
}

// Numbers of the space that `multiply` needs.
constexpr size_t LEFT_SPACE = (size_t)DEPTH * HEIGHT, SPACE = LEFT_SPACE + (size_t)DEPTH * BREADTH;

// Computes out (M, N).
template <Then then = Then::store>
static void multiply(int M, int N, int K, Left left, Right right, Out out, float *space) {
    const int parts = (K + DEPTH - 1) / DEPTH, depth = (K + parts - 1) / parts;
    float *packed = space + LEFT_SPACE;
    for (int j = 0; j < N; j += BREADTH) {
        const int columns = N - j < BREADTH ? N - j : BREADTH;
        for (int k = 0; k < K; k += depth) {
            const int length = K - k < depth ? K - k : depth;
            pack_right(length, columns, right.from(k, j), packed);
            Out here = out.from(0, j);
            here.add = out.add || k > 0;
            if (k + length == K) {
                multiply_packed<then>(M, columns, length, left.from(0, k), packed, length, here, space);
            } else {
                here.bias = nullptr, here.other = nullptr;
                multiply_packed<Then::store>(M, columns, length, left.from(0, k), packed, length, here, space);
            }
        }
    }
}
