// One step of a GPT on a CPU: tokens of any slots, at any positions, in one pass over the weights.
//
// A row does not depend on other rows: every number is summed in one fixed order, whatever the number of rows and
// threads. So a row has the same bits alone and among others, in a chunk of a prompt and when it decodes.
// Shapes: R rows, C width, F hidden width, H heads, D head width, S positions, V vocabulary.

struct Layer {
    Norm attention_norm;
    Product qkv, output;
    Norm feed_forward_norm;
    Product up, down;
    void *keys, *values;  // of all slots and heads, as in attention.h
};

struct Model {
    Format format;
    int layers, width, hidden, heads, positions, vocabulary, threads;
    float epsilon;
    Product tokens;       // (V, C)
    const float *places;  // (S, C)
    Norm norm;
    Product head;
    const Layer *layer;
};

// Rows of one slot that attend to its keys together.
constexpr int QUERY_ROWS = 4;

// The memory of a step for R rows, each part beginning at a multiple of 64 bytes.
struct Scratch {
    float *x, *normed, *wide;
    Inputs of_normed, of_wide;
    float *weights;  // of attention, for each thread
    size_t weights_of_thread, bytes;

    Scratch(const Model *model, int rows, char *memory) : bytes(0) {
        const int C = model->width, F = model->hidden, wider = 3 * C > F ? 3 * C : F, wides = parts(F > C ? F : C);
        const size_t R = rows;
        const auto take = [&](size_t size) {
            char *place = memory + bytes;
            bytes += (size + 63) / 64 * 64;
            return place;
        };
        x = (float *)take(R * padded(C) * sizeof(float));
        normed = (float *)take(R * padded(C) * sizeof(float));
        wide = (float *)take(R * padded(wider) * sizeof(float));
        auto *rounded = (int8_t *)take((size_t)tiled(rows) * padded(F > C ? F : C));
        auto *scales = (float *)take(R * wides * sizeof(float));
        auto *sums = (int *)take(R * wides * sizeof(int));
        weights_of_thread = (size_t)QUERY_ROWS * key_blocks(model->positions) * WIDTH;
        weights = (float *)take(model->threads * weights_of_thread * sizeof(float));
        of_normed = {normed, rounded, scales, sums};
        of_wide = {wide, rounded, scales, sums};
    }
};

// Computes one token (R) for each slot (R) at its position (R), and stores all of them in the cache before any attends.
// Stores the logits (K, V padded) after K wanted rows.
template <Format format, typename Number>
static void forward(const Model *model, int R, const int *tokens, const int *slots, const int *positions, int K,
                    const int *wanted, char *memory, float *logits) {
    const int C = model->width, F = model->hidden, H = model->heads, D = C / H, S = model->positions;
    const int threads = model->threads, stride = padded(C), qkv_stride = padded(3 * C);
    const Scratch scratch(model, R, memory);
    float *x = scratch.x, *normed = scratch.normed, *wide = scratch.wide;
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++)
            x[(size_t)r * stride + c] =
                weight_at<format>(model->tokens, C, tokens[r], c) + model->places[(size_t)positions[r] * C + c];
    // Rows of one slot attend together: where those of each bundle begin.
    int starts[R + 1], bundles = 0;
    for (int r = 0; r < R; bundles++) {
        starts[bundles] = r;
        int end = r + 1;
        while (end < R && slots[end] == slots[r] && end < r + QUERY_ROWS) end++;
        r = end == r + QUERY_ROWS ? end : r + 1;
    }
    starts[bundles] = R;
    for (const Layer *layer = model->layer; layer < model->layer + model->layers; layer++) {
        const auto cache = [&](int r, int h) {
            const size_t place = (size_t)slots[r] * H + h;
            return Cache<Number>{(Number *)layer->keys + place * key_blocks(S) * WIDTH * D,
                                 (Number *)layer->values + place * S * D};
        };
        for (int r = 0; r < R; r++)
            normalise(C, model->epsilon, x + (size_t)r * stride, layer->attention_norm, normed + (size_t)r * stride);
        multiply<format>(threads, R, C, 3 * C, scratch.of_normed, layer->qkv, Then::store, wide);
        const auto query = [&](int r, int h) { return wide + (size_t)r * qkv_stride + h * D; };
        for (int r = 0; r < R; r++)
            for (int h = 0; h < H; h++)
                keep(D, positions[r], query(r, h) + C, query(r, h) + 2 * C, cache(r, h));
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
        for (int task = 0; task < bundles * H; task++) {
            const int bundle = task / H, h = task % H, r = starts[bundle];
#if defined(_OPENMP)
            float *weights = scratch.weights + (size_t)omp_get_thread_num() * scratch.weights_of_thread;
#else
            float *weights = scratch.weights;
#endif
            const Queries queries = {query(r, h), qkv_stride, positions + r, normed + (size_t)r * stride + h * D, stride};
            const int then = starts[(task + 1) / H];
            // Later rows of a slot find its keys in a cache of the processor.
            Cache<Number> next = {};
            if (then < R && (then == 0 || slots[then] != slots[then - 1])) next = cache(then, (h + 1) % H);
            if (starts[bundle + 1] - r == QUERY_ROWS)
                attend<QUERY_ROWS>(D, queries, cache(r, h), next, weights);
            else
                attend<1>(D, queries, cache(r, h), next, weights);
        }
        multiply<format>(threads, R, C, C, scratch.of_normed, layer->output, Then::add, x);
        for (int r = 0; r < R; r++)
            normalise(C, model->epsilon, x + (size_t)r * stride, layer->feed_forward_norm, normed + (size_t)r * stride);
        multiply<format>(threads, R, C, F, scratch.of_normed, layer->up, Then::store_gelu, wide);
        multiply<format>(threads, R, F, C, scratch.of_wide, layer->down, Then::add, x);
    }
    for (int k = 0; k < K; k++)
        normalise(C, model->epsilon, x + (size_t)wanted[k] * stride, model->norm, normed + (size_t)k * stride);
    multiply<format>(threads, K, C, model->vocabulary, scratch.of_normed, model->head, Then::store, logits);
}

// Returns what `use` returns for a format, as a template's argument.
template <typename Use>
static auto with(Format format, Use use) {
    if (format == Format::fp32) return use(std::integral_constant<Format, Format::fp32>());
    if (format == Format::bf16) return use(std::integral_constant<Format, Format::bf16>());
    return use(std::integral_constant<Format, Format::int8>());
}

extern "C" {

// The positions of a block of keys.
int vector_width() { return WIDTH; }

// 1 if products of bytes are computed in tiles.
int has_tiles() { return HAS_TILES; }

// A size that is padded as outputs are.
int padded_size(int size) { return padded(size); }

// The bytes of weights (N, C) as `pack_weights` stores them.
size_t packed_size(Format format, int N, int C) {
    return with(format, [&](auto chosen) { return packed_bytes<chosen>(N, C); });
}

// Packs weights (N, C) into zeroed memory. `scales` has room for a number per output.
void pack_weights(Format format, int N, int C, const float *weights, char *packed, float *scales) {
    with(format, [&](auto chosen) { pack<chosen>(N, C, weights, packed, scales); });
}

// The bytes of scratch memory that `compute` needs for R rows.
size_t scratch_size(const Model *model, int R) { return Scratch(model, R, nullptr).bytes; }

// `forward` in the model's format.
void compute(const Model *model, int R, const int *tokens, const int *slots, const int *positions, int K,
             const int *wanted, char *memory, float *logits) {
    with(model->format, [&](auto chosen) {
        using Number = std::conditional_t<chosen == Format::fp32, float, bf16>;
        forward<chosen, Number>(model, R, tokens, slots, positions, K, wanted, memory, logits);
    });
}

// Draws a token for each of K rows of logits (V).
void draw(int threads, int K, int V, const float *const *logits, const int *masked, const float *inverse,
          const double *numbers, int *tokens) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int k = 0; k < K; k++) tokens[k] = draw_row(logits[k], V, masked[k], inverse[k], numbers[k]);
}
}
