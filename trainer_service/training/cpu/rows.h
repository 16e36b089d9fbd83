// Operations on the rows of a matrix, a vector at a time.
//
// Shapes: N rows, C numbers in each.

// Calls body(place, count) for each vector of `size` numbers; the count is WIDTH, but less for the last one.
template <class Body>
__attribute__((always_inline)) static inline void for_vectors(int size, Body body) {
    int place = 0;
    for (; place + WIDTH <= size; place += WIDTH) body(place, std::integral_constant<int, WIDTH>{});
    if (place < size) body(place, size - place);
}

// The numbers at a place, followed by zeros.
static Vector load(const float *place, int count) {
    if (count == WIDTH) return at(place);
    Vector v = {};
    memcpy(&v, place, count * sizeof(float));
    return v;
}
static void store(float *place, Vector v, int count) {
    if (count == WIDTH) at(place) = v;
    else memcpy(place, &v, count * sizeof(float));
}

// Returns v with zeros in the lanes from `count` on.
static Vector first_lanes(Vector v, int count) {
    for (int lane = count; lane < WIDTH; lane++) v[lane] = 0.0f;
    return v;
}

static float dot(int C, const float *x, const float *y) {
    Vector sums = {};
    for_vectors(C, [&](int c, int count) { sums = multiply_add(load(x + c, count), load(y + c, count), sums); });
    return sum<WIDTH>(sums);
}

// Returns the sum of the squares, in an order that does not depend on the processor: ranks compare what follows.
extern "C" double squared_norm(size_t size, const float *x) {
    constexpr size_t LANES = 16;
    double sums[LANES] = {}, total = 0.0;
    for (size_t i = 0; i + LANES <= size; i += LANES)
        for (size_t lane = 0; lane < LANES; lane++) sums[lane] += (double)x[i + lane] * x[i + lane];
    for (size_t i = size / LANES * LANES; i < size; i++) sums[0] += (double)x[i] * x[i];
    for (size_t lane = 0; lane < LANES; lane++) total += sums[lane];
    return total;
}

static void scale(int C, float factor, float *x) {
    for_vectors(C, [&](int c, int count) { store(x + c, load(x + c, count) * factor, count); });
}

// sums (C,) += the sum of the rows of x (N, C).
static void add_columns(int N, int C, const float *x, float *sums) {
    for (int n = 0; n < N; n++, x += C)
        for_vectors(C, [&](int c, int count) { store(sums + c, load(sums + c, count) + load(x + c, count), count); });
}

// Replaces a row by exp((x - highest) * factor), for its highest number; returns that and the sum. NaN stays NaN.
struct Exponentials {
    float highest, sum;
};
static Exponentials exponentials(int C, float factor, const float *x, float *out) {
    Vector highs = Vector{} - INFINITY, sums = {};
    for_vectors(C, [&](int c, int count) {
        Vector v = load(x + c, count);
        for (int lane = count; lane < WIDTH; lane++) v[lane] = -INFINITY;
        highs = v > highs ? v : highs;
    });
    float highest = highs[0];
    for (int lane = 1; lane < WIDTH; lane++) highest = highs[lane] > highest ? highs[lane] : highest;
    for_vectors(C, [&](int c, int count) {
        const Vector v = exponential((load(x + c, count) - highest) * factor);
        sums += first_lanes(v, count);
        store(out + c, v, count);
    });
    return {highest, sum<WIDTH>(sums)};
}

// The mean of a row, and the inverse of its standard deviation.
struct Moments {
    float mean, inverse;
};
static Moments moments_of(int C, float epsilon, const float *x) {
    Vector sums = {}, squares = {};
    for_vectors(C, [&](int c, int count) { sums += load(x + c, count); });
    const float mean = sum<WIDTH>(sums) / C;
    for_vectors(C, [&](int c, int count) {
        const Vector centred = first_lanes(load(x + c, count) - mean, count);
        squares = multiply_add(centred, centred, squares);
    });
    return {mean, 1.0f / sqrtf(sum<WIDTH>(squares) / C + epsilon)};
}

struct Norm {
    float *weight, *bias;
};

// out (N, C) = LayerNorm (Ba et al. 2016, equation 4) of the rows of x.
static void normalise(int N, int C, float epsilon, const float *x, Norm norm, float *out) {
    for (int n = 0; n < N; n++, x += C, out += C) {
        const Moments moments = moments_of(C, epsilon, x);
        for_vectors(C, [&](int c, int count) {
            const Vector scaled = (load(x + c, count) - moments.mean) * moments.inverse;
            store(out + c, multiply_add(scaled, load(norm.weight + c, count), load(norm.bias + c, count)), count);
        });
    }
}

// Adds to the slopes (N, C) of x, and to those of the norm, what follows from the slopes of its LayerNorm.
static void normalise_slopes(int N, int C, float epsilon, const float *x, Norm norm, const float *slopes_of_norm,
                             float *slopes, Norm norm_slopes) {
    for (int n = 0; n < N; n++, x += C, slopes_of_norm += C, slopes += C) {
        const Moments moments = moments_of(C, epsilon, x);
        Vector sums = {}, products = {};
        for_vectors(C, [&](int c, int count) {
            const Vector slope = load(slopes_of_norm + c, count),
                         scaled = (load(x + c, count) - moments.mean) * moments.inverse;
            store(norm_slopes.weight + c, multiply_add(slope, scaled, load(norm_slopes.weight + c, count)), count);
            store(norm_slopes.bias + c, load(norm_slopes.bias + c, count) + slope, count);
            const Vector weighted = slope * load(norm.weight + c, count);
            sums += weighted;
            products = multiply_add(weighted, scaled, products);
        });
        const float mean = sum<WIDTH>(sums) / C, product = sum<WIDTH>(products) / C;
        for_vectors(C, [&](int c, int count) {
            const Vector weighted = load(slopes_of_norm + c, count) * load(norm.weight + c, count);
            const Vector scaled = (load(x + c, count) - moments.mean) * moments.inverse;
            const Vector change = (weighted - mean - scaled * product) * moments.inverse;
            store(slopes + c, load(slopes + c, count) + change, count);
        });
    }
}

// A random choice of the numbers that are set to zero, a share of them; the others are multiplied by `scale`.
//
// Each choice is a hash of the number's place and of two random numbers, which takes a few instructions. Source of the
// constants: Wellons 2018, "Prospecting for Hash Functions".
struct Dropout {
    uint32_t first, second, least;
    float scale;

    float factor(uint32_t place) const {
        uint32_t x = place + first;
        x = (x ^ (x >> 16)) * 0x7FEB352Du;
        x = (x ^ (x >> 15) ^ second) * 0x846CA68Bu;
        return (x >> 8) >= least ? scale : 0.0f;
    }
};

static void drop(size_t size, Dropout dropout, float *x) {
    for (size_t i = 0; i < size; i++) x[i] *= dropout.factor(i);
}
