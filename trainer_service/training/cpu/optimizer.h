// The update of parameters, in place: AdamW and Muon, as in `training/optimizer.py` and `training/muon.py`.

// What an update needs beside the arrays: the factor that clips gradients, the rate, and the factor by which decay
// scales a weight.
struct Update {
    float clip, rate, decay;
};

struct AdamW {
    float beta1, beta2, correction1, correction2, epsilon;
};

// One of Muon's polynomials: x (a + b x^2 + c x^4).
struct Polynomial {
    float a, b, c;
};

// `size` is the root mean square of an update's numbers at a rate of 1.
struct Muon {
    float momentum, size;
    int polynomials;
    const Polynomial *polynomial;
};

static Vector root(Vector x) {
    for (int lane = 0; lane < WIDTH; lane++) x[lane] = sqrtf(x[lane]);
    return x;
}

// Updates weights and moments (size,).
extern "C" void adamw(int size, const Update *update, const AdamW *values, const float *slopes, float *weights,
                      float *m, float *v) {
    for_vectors(size, [&](int i, int count) {
        const Vector slope = load(slopes + i, count) * update->clip;
        const Vector mean = values->beta1 * load(m + i, count) + (1.0f - values->beta1) * slope;
        const Vector square = values->beta2 * load(v + i, count) + (1.0f - values->beta2) * (slope * slope);
        const Vector direction = mean / values->correction1 / (root(square / values->correction2) + values->epsilon);
        store(m + i, mean, count), store(v + i, square, count);
        store(weights + i, load(weights + i, count) * update->decay - update->rate * direction, count);
    });
}

// out (S, S) = left times right, a symmetric product: computes the blocks up to the diagonal, and mirrors them.
static void multiply_symmetric(int S, int K, Left left, Right right, float *out, float *space) {
    constexpr int BLOCK = 4 * PANEL;
    for (int j = 0; j < S; j += BLOCK) {
        const int columns = S - j < BLOCK ? S - j : BLOCK;
        multiply(j + columns, columns, K, left, right.from(0, j), {out + j, (size_t)S}, space);
    }
    for (int i = 0; i < S; i++)
        for (int j = 0; j < i; j++) out[(size_t)i * S + j] = out[(size_t)j * S + i];
}

// Replaces x (R, S), S at most R, by a matrix with the same singular vectors and singular values close to 1.
static void orthogonalise(int R, int S, Muon muon, float *x, float *space) {
    float *columns = space + SPACE, *square = columns + (size_t)R * S, *sum = square + (size_t)S * S;
    const float norm = sqrtf(squared_norm((size_t)R * S, x));
    for (size_t i = 0; i < (size_t)R * S; i++) x[i] /= norm + 1e-7f;
    for (int p = 0; p < muon.polynomials; p++) {
        const Polynomial polynomial = muon.polynomial[p];
        transpose(R, S, x, S, columns, R);
        multiply_symmetric(S, R, rows_of(columns, R), matrix(x, S), square, space);
        multiply_symmetric(S, S, rows_of(square, S), matrix(square, S), sum, space);
        for (size_t i = 0; i < (size_t)S * S; i++) sum[i] = polynomial.b * square[i] + polynomial.c * sum[i];
        for (int i = 0; i < S; i++) sum[(size_t)i * S + i] += polynomial.a;
        memcpy(columns, x, (size_t)R * S * sizeof(float));
        multiply(R, S, S, rows_of(columns, S), matrix(sum, S), {x, (size_t)S}, space);
    }
}

// Numbers of memory that the update of a matrix (R, S) needs.
extern "C" size_t muon_size(int R, int S) {
    const size_t less = R < S ? R : S;
    return SPACE + (size_t)3 * R * S + 2 * less * less;
}

// Updates weights (R, S) and their momentum.
extern "C" void muon(int R, int S, const Update *update, const Muon *values, const float *slopes, float *weights,
                     float *momenta, float *memory) {
    const Muon muon = *values;
    const size_t size = (size_t)R * S;
    const bool tall = R >= S;
    float *x = memory, *other = x + size;
    for (size_t i = 0; i < size; i++) {
        const float slope = (1.0f - muon.momentum) * (slopes[i] * update->clip);
        momenta[i] = muon.momentum * momenta[i] + slope;
        // Nesterov's momentum.
        x[i] = muon.momentum * momenta[i] + slope;
    }
    if (tall) {
        orthogonalise(R, S, muon, x, other);
    } else {
        transpose(R, S, x, S, other, R);
        memcpy(x, other, size * sizeof(float));
        orthogonalise(S, R, muon, x, other);
        transpose(S, R, x, R, other, S);
        x = other;
    }
    const float factor = update->rate * muon.size * sqrtf(tall ? R : S);
    for (size_t i = 0; i < size; i++) weights[i] = weights[i] * update->decay - factor * x[i];
}
