// A step of training on one core: the loss and its gradients, which are called slopes here.
//
// Shapes: B rows, T tokens, N = B x T, C width, F hidden width, V vocabulary.

struct Linear {
    float *weight, *bias;
};

struct Layer {
    Norm attention_norm;
    Linear qkv, output;
    Norm feed_forward_norm;
    Linear up, down;
};

struct Shape {
    int layers, width, hidden, heads, vocabulary;
    float epsilon;
};

// The arrays of a model, or their slopes. A head that is tied is that of the tokens.
struct Arrays {
    float *tokens, *positions;
    Norm norm;
    float *head;
    Layer *layer;
};

struct Model {
    Shape shape;
    Arrays arrays;
};

// Inputs (N,), and which of them are kept: all if that is missing. `dropouts` are those of the embeddings and, in each
// layer, of values, attention and feed-forward; they may be missing.
struct Inputs {
    int B, T;
    const int *tokens;
    const float *kept;
    const Dropout *dropouts;

    int size() const { return B * T; }
};

// Hands out parts of a step's memory, each from a cache line on; `used` counts floats. Without a start it only counts.
struct Memory {
    float *start;
    size_t used;

    template <class Item = float>
    Item *take(size_t count) {
        Item *place = start ? (Item *)(start + used) : nullptr;
        used += (count * sizeof(Item) + 63) / 64 * 16;
        return place;
    }
};

// What the slopes of a layer need: the residual stream (N, C) before attention and before the feed-forward part,
// queries, keys and values (N, 3C), attended values (N, C) with their logarithms, and the inputs of GELU (N, F).
struct Saved {
    float *before, *qkv, *attended, *logarithms, *middle, *up;
};

// The memory of a forward pass. If nothing is saved for the backward pass, all layers share theirs.
struct Activations {
    Saved *layer;
    float *last, *hidden, *normed, *gelu;

    Activations(Shape shape, Inputs in, bool saves, Memory &memory) {
        const size_t N = in.size(), C = shape.width, F = shape.hidden;
        layer = memory.take<Saved>(shape.layers);
        Saved saved;
        for (int l = 0; l < shape.layers; l++) {
            if (l == 0 || saves)
                saved = {memory.take(N * C),           memory.take(N * 3 * C), memory.take(N * C),
                         memory.take(N * shape.heads), memory.take(N * C),     memory.take(N * F)};
            if (layer) layer[l] = saved;
        }
        last = saves ? memory.take(N * C) : saved.before;
        hidden = memory.take(N * C), normed = memory.take(N * C), gelu = memory.take(N * F);
    }
};

static Attention attention_of(Shape shape, Inputs in) { return {in.B, in.T, shape.heads, shape.width / shape.heads}; }

static size_t space_of(Shape shape, Inputs in) { return SPACE + attention_of(shape, in).space(); }

// Drops whole vectors of values, or of their slopes.
static void drop_values(Attention a, Dropout dropout, float *qkv) {
    for (int b = 0; b < a.B; b++)
        for (int h = 0; h < a.H; h++)
            for (int t = 0; t < a.T; t++)
                scale(a.D, dropout.factor((b * a.H + h) * a.T + t),
                      qkv + a.place(b, h) + 2 * a.width() + t * a.stride());
}

// out (N, C) = before + x (N, K) times the weights, with dropout of the product.
static void add_linear(int N, int C, int K, const float *x, Linear linear, float *before, const Dropout *dropout,
                       float *out, float *space) {
    const size_t stride = C;
    if (dropout) {
        multiply(N, C, K, rows_of(x, K), transposed(linear.weight, K), {out, stride, false, linear.bias}, space);
        for (size_t i = 0; i < N * stride; i++) out[i] = before[i] + out[i] * dropout->factor(i);
    } else {
        multiply<Then::add_other>(N, C, K, rows_of(x, K), transposed(linear.weight, K),
                                  {out, stride, false, linear.bias, before}, space);
    }
}

// Stores the hidden states (N, C) after the last LayerNorm in `a.hidden`, and what a backward pass needs in `a.layer`.
static void forward(Model model, Inputs in, Activations &a, float *space) {
    const Shape shape = model.shape;
    const int N = in.size(), C = shape.width, F = shape.hidden;
    const Attention attention = attention_of(shape, in);
    float *x = a.layer[0].before;
    for (int n = 0; n < N; n++) {
        const float *token = model.arrays.tokens + (size_t)in.tokens[n] * C,
                    *position = model.arrays.positions + (size_t)(n % in.T) * C;
        const float kept = in.kept ? in.kept[n] : 1.0f;
        for (int c = 0; c < C; c++) x[(size_t)n * C + c] = token[c] * kept + position[c];
    }
    if (in.dropouts) drop((size_t)N * C, in.dropouts[0], x);
    for (int l = 0; l < shape.layers; l++) {
        const Layer &layer = model.arrays.layer[l];
        const Saved &saved = a.layer[l];
        const Dropout *dropout = in.dropouts ? in.dropouts + 1 + 3 * l : nullptr;
        normalise(N, C, shape.epsilon, saved.before, layer.attention_norm, a.normed);
        multiply(N, 3 * C, C, rows_of(a.normed, C), transposed(layer.qkv.weight, C),
                 {saved.qkv, (size_t)3 * C, false, layer.qkv.bias}, space);
        if (dropout) drop_values(attention, dropout[0], saved.qkv);
        attend(attention, saved.qkv, saved.attended, saved.logarithms, space);
        add_linear(N, C, C, saved.attended, layer.output, saved.before, dropout ? dropout + 1 : nullptr, saved.middle,
                   space);
        normalise(N, C, shape.epsilon, saved.middle, layer.feed_forward_norm, a.normed);
        multiply<Then::gelu>(N, F, C, rows_of(a.normed, C), transposed(layer.up.weight, C),
                             {saved.up, (size_t)F, false, layer.up.bias, a.gelu}, space);
        add_linear(N, C, F, a.gelu, layer.down, saved.middle, dropout ? dropout + 2 : nullptr,
                   l + 1 < shape.layers ? a.layer[l + 1].before : a.last, space);
    }
    normalise(N, C, shape.epsilon, a.last, model.arrays.norm, a.hidden);
}

// The memory of a backward pass.
struct Slopes {
    float *x, *dropped, *normed, *qkv, *attended, *up;

    Slopes(Shape shape, Inputs in, Memory &memory) {
        const size_t N = in.size(), C = shape.width;
        x = memory.take(N * C), dropped = memory.take(N * C), normed = memory.take(N * C), qkv = memory.take(N * 3 * C);
        attended = memory.take(N * C), up = memory.take(N * shape.hidden);
    }
};

// Adds to the slopes of weights (K, C) and bias what follows from those of their outputs (N, K), for inputs x (N, C).
static void add_linear_slopes(int N, int K, int C, const float *output_slopes, const float *x, Linear slopes,
                              float *space) {
    multiply(K, C, N, columns_of(output_slopes, K), matrix(x, C), {slopes.weight, (size_t)C, true}, space);
    add_columns(N, K, output_slopes, slopes.bias);
}

// Adds to the slopes of all arrays but the head what follows from `hidden_slopes` (N, C). The activations are lost.
static void backward(Model model, Inputs in, Activations &a, const float *hidden_slopes, Slopes &s, Arrays slopes,
                     float *space) {
    const Shape shape = model.shape;
    const int N = in.size(), C = shape.width, F = shape.hidden;
    const size_t size = (size_t)N * C;
    const Attention attention = attention_of(shape, in);
    // The slopes of what is added to the residual stream.
    const auto dropped = [&](const Dropout *dropout) {
        if (!dropout) return s.x;
        for (size_t i = 0; i < size; i++) s.dropped[i] = s.x[i] * dropout->factor(i);
        return s.dropped;
    };
    memset(s.x, 0, size * sizeof(float));
    normalise_slopes(N, C, shape.epsilon, a.last, model.arrays.norm, hidden_slopes, s.x, slopes.norm);
    for (int l = shape.layers - 1; l >= 0; l--) {
        const Layer &layer = model.arrays.layer[l], &its = slopes.layer[l];
        const Saved &saved = a.layer[l];
        const Dropout *dropout = in.dropouts ? in.dropouts + 1 + 3 * l : nullptr;
        const float *added = dropped(dropout ? dropout + 2 : nullptr);
        // This leaves the outputs of GELU in `up`.
        multiply<Then::gelu_slope>(N, F, C, rows_of(added, C), matrix(layer.down.weight, F),
                                   {s.up, (size_t)F, false, nullptr, saved.up}, space);
        add_linear_slopes(N, C, F, added, saved.up, its.down, space);
        normalise(N, C, shape.epsilon, saved.middle, layer.feed_forward_norm, a.normed);
        add_linear_slopes(N, F, C, s.up, a.normed, its.up, space);
        multiply(N, C, F, rows_of(s.up, F), matrix(layer.up.weight, C), {s.normed, (size_t)C}, space);
        normalise_slopes(N, C, shape.epsilon, saved.middle, layer.feed_forward_norm, s.normed, s.x,
                         its.feed_forward_norm);

        added = dropped(dropout ? dropout + 1 : nullptr);
        add_linear_slopes(N, C, C, added, saved.attended, its.output, space);
        multiply(N, C, C, rows_of(added, C), matrix(layer.output.weight, C), {s.attended, (size_t)C}, space);
        attend_slopes(attention, saved.qkv, saved.attended, saved.logarithms, s.attended, s.qkv, space);
        if (dropout) drop_values(attention, dropout[0], s.qkv);
        normalise(N, C, shape.epsilon, saved.before, layer.attention_norm, a.normed);
        add_linear_slopes(N, 3 * C, C, s.qkv, a.normed, its.qkv, space);
        multiply(N, C, 3 * C, rows_of(s.qkv, 3 * C), matrix(layer.qkv.weight, C), {s.normed, (size_t)C}, space);
        normalise_slopes(N, C, shape.epsilon, saved.before, layer.attention_norm, s.normed, s.x, its.attention_norm);
    }
    if (in.dropouts) drop(size, in.dropouts[0], s.x);
    for (int n = 0; n < N; n++) {
        float *token = slopes.tokens + (size_t)in.tokens[n] * C, *position = slopes.positions + (size_t)(n % in.T) * C;
        const float kept = in.kept ? in.kept[n] : 1.0f;
        const float *x = s.x + (size_t)n * C;
        for (int c = 0; c < C; c++) token[c] += x[c] * kept, position[c] += x[c];
    }
}

// What a step reads beside the model: targets (N,) with their shares of the sum of all losses, and perhaps teachers.
struct Task {
    Inputs in;
    const int *targets;
    const float *shares;
    Teaching teaching;
    const Model *teachers;
};

// Returns the sum of the losses times their shares, and adds the gradients of that to the slopes; or if the memory has
// no start, only counts how much of it is needed.
static double take_step(Model model, const Task &task, const Arrays *slopes, Memory memory, size_t &needed) {
    const Inputs in = task.in;
    const Shape shape = model.shape;
    const int N = in.size(), V = shape.vocabulary, count = task.teaching.teachers;
    const size_t logits = (size_t)(N < LOGIT_ROWS ? N : LOGIT_ROWS) * V;
    size_t space_size = space_of(shape, in);
    for (int t = 0; t < count; t++) {
        const size_t its = space_of(task.teachers[t].shape, in);
        space_size = its > space_size ? its : space_size;
    }
    float *space = memory.take(space_size), *own_logits = memory.take(logits);
    float *other_logits = count ? memory.take(logits) : nullptr;
    needed = 0;
    Predictions *teachers = memory.take<Predictions>(count);
    for (int t = 0; t < count; t++) {
        const Model teacher = task.teachers[t];
        float *hidden = memory.take((size_t)N * teacher.shape.width);
        // The memory of the student's pass, which comes later.
        Memory rest = memory;
        Activations activations(teacher.shape, in, false, rest);
        if (rest.used > needed) needed = rest.used;
        if (memory.start) {
            // A teacher sees all inputs, and drops nothing.
            forward(teacher, {in.B, in.T, in.tokens, nullptr, nullptr}, activations, space);
            memcpy(hidden, activations.hidden, (size_t)N * teacher.shape.width * sizeof(float));
            teachers[t] = {teacher.shape.width, hidden, teacher.arrays.head};
        }
    }
    float *hidden_slopes = memory.take((size_t)N * shape.width);
    Activations activations(shape, in, true, memory);
    Slopes passing(shape, in, memory);
    if (memory.used > needed) needed = memory.used;
    if (!memory.start) return 0.0;
    forward(model, in, activations, space);
    const double loss =
        loss_slopes({shape.width, activations.hidden, model.arrays.head}, N, V, task.targets, task.shares,
                    task.teaching, teachers, hidden_slopes, slopes->head, own_logits, other_logits, space);
    backward(model, in, activations, hidden_slopes, passing, *slopes, space);
    return loss;
}

// Stores the losses (N,); or if the memory has no start, only counts how much of it is needed.
static void take_losses(Model model, Inputs in, const int *targets, float *losses, Memory memory, size_t &needed) {
    const int N = in.size(), V = model.shape.vocabulary;
    float *space = memory.take(space_of(model.shape, in)),
          *logits = memory.take((size_t)(N < LOGIT_ROWS ? N : LOGIT_ROWS) * V);
    Activations activations(model.shape, in, false, memory);
    needed = memory.used;
    if (!memory.start) return;
    forward(model, in, activations, space);
    losses_of({model.shape.width, activations.hidden, model.arrays.head}, N, V, targets, losses, logits, space);
}

extern "C" {

// Each returns how many floats of memory, from a cache line on, `add_gradients` or `compute_losses` needs.
size_t gradients_size(const Model *model, const Task *task) {
    size_t needed;
    take_step(*model, *task, nullptr, {nullptr, 0}, needed);
    return needed;
}
size_t losses_size(const Model *model, const Inputs *in) {
    size_t needed;
    take_losses(*model, *in, nullptr, nullptr, {nullptr, 0}, needed);
    return needed;
}

double add_gradients(const Model *model, const Task *task, const Arrays *slopes, float *memory) {
    size_t needed;
    return take_step(*model, *task, slopes, {memory, 0}, needed);
}

void compute_losses(const Model *model, const Inputs *in, const int *targets, float *losses, float *memory) {
    size_t needed;
    take_losses(*model, *in, targets, losses, {memory, 0}, needed);
}
}
