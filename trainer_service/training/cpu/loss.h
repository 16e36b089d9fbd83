// The loss of a language model, and that of a student of other models.
//
// Shapes: N predictions, n of them at a time, C width, V vocabulary.

// The most predictions whose logits exist at a time.
constexpr int LOGIT_ROWS = 256;

// Hidden states (N, C), and the matrix (V, C) that maps them to logits.
struct Predictions {
    int C;
    const float *hidden, *head;

    // Computes the logits (n, V) from row `first` on.
    void logits(int first, int n, int V, float *out, float *space) const {
        multiply(n, V, C, rows_of(hidden + (size_t)first * C, C), transposed(head, C), {out, (size_t)V}, space);
    }
};

// Stores the cross-entropy (N,) of the targets in nats.
static void losses_of(Predictions predictions, int N, int V, const int *targets, float *losses, float *logits,
                      float *space) {
    for (int first = 0; first < N; first += LOGIT_ROWS) {
        const int n = N - first < LOGIT_ROWS ? N - first : LOGIT_ROWS;
        predictions.logits(first, n, V, logits, space);
        for (int i = 0; i < n; i++) {
            float *row = logits + (size_t)i * V;
            const float at_target = row[targets[first + i]];
            const Exponentials found = exponentials(V, 1.0f, row, row);
            losses[first + i] = logf(found.sum) + (found.highest - at_target);
        }
    }
}

// As `Distillation` of `loss.py`.
struct Teaching {
    int teachers;
    float alpha, temperature;
};

// Adds factor * softmax(logits / temperature) to out (V,), or stores it if `add` is false. Overwrites the logits, which
// may be `out`.
static Exponentials add_softmax(int V, float factor, float temperature, float *logits, float *out, bool add) {
    const Exponentials found = exponentials(V, 1.0f / temperature, logits, logits);
    const float scaled = factor / found.sum;
    for_vectors(V, [&](int c, int count) {
        const Vector before = add ? load(out + c, count) : Vector{};
        store(out + c, multiply_add(load(logits + c, count), broadcast(scaled), before), count);
    });
    return found;
}

// Returns the sum of the losses, in nats, each multiplied by its share (N,); stores the slopes of the hidden states,
// and adds those of the head, of the loss of `Distillation`.
//
// The slope of the logits z of a target is its share of (1 - alpha) (softmax(z) - one at the target) + alpha T (p - q).
static double loss_slopes(Predictions student, int N, int V, const int *targets, const float *shares, Teaching teaching,
                          const Predictions *teachers, float *hidden_slopes, float *head_slopes, float *logits,
                          float *others, float *space) {
    const float own = teaching.teachers ? 1.0f - teaching.alpha : 1.0f, pull = teaching.alpha * teaching.temperature;
    const int C = student.C;
    double total = 0.0;
    for (int first = 0; first < N; first += LOGIT_ROWS) {
        const int n = N - first < LOGIT_ROWS ? N - first : LOGIT_ROWS;
        student.logits(first, n, V, logits, space);
        for (int i = 0; i < n; i++) {
            float *row = logits + (size_t)i * V, *copy = others + (size_t)i * V;
            const int target = targets[first + i];
            const float share = shares[first + i], at_target = row[target];
            if (teaching.teachers) memcpy(copy, row, V * sizeof(float));
            const Exponentials found = add_softmax(V, own * share, 1.0f, row, row, false);
            row[target] -= own * share;
            total += share * (logf(found.sum) + (found.highest - at_target));
            if (teaching.teachers) add_softmax(V, pull * share, teaching.temperature, copy, row, true);
        }
        for (int t = 0; t < teaching.teachers; t++) {
            teachers[t].logits(first, n, V, others, space);
            for (int i = 0; i < n; i++)
                add_softmax(V, -pull / teaching.teachers * shares[first + i], teaching.temperature,
                            others + (size_t)i * V, logits + (size_t)i * V, true);
        }
        const float *hidden = student.hidden + (size_t)first * C;
        multiply(n, C, V, rows_of(logits, V), matrix(student.head, C), {hidden_slopes + (size_t)first * C, (size_t)C},
                 space);
        multiply(V, C, n, columns_of(logits, V), matrix(hidden, C), {head_slopes, (size_t)C, true}, space);
    }
    return total;
}
