// Draws of tokens by their logits.
//
// Shapes: V vocabulary.

// A draw first finds its block of this many tokens, by the sums of their weights.
constexpr int DRAW_BLOCK = 1024;

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
    // A number that is not finite, times 0, is not 0.
    float highest = -INFINITY, zero = 0.0f;
    Vector highs = Vector{} - INFINITY, zeros = {};
    int token = 0;
    for (; token + WIDTH <= V; token += WIDTH) {
        const Vector v = at(logits + token);
        zeros += v * 0.0f;
        highs = v > highs ? v : highs;
    }
    for (; token < V; token++) zero += logits[token] * 0.0f, highest = logits[token] > highest ? logits[token] : highest;
    for (int lane = 0; lane < WIDTH; lane++) highest = highs[lane] > highest ? highs[lane] : highest;
    if (zero + sum<WIDTH>(zeros) != 0.0f) return -1;
    if (masked >= 0 && logits[masked] == highest) {
        highest = -INFINITY;
        for (token = 0; token < V; token++)
            if (token != masked && logits[token] > highest) highest = logits[token];
    }
    if (inverse == 0.0f) {
        token = 0;
        while (token < V - 1 && (token == masked || logits[token] != highest)) token++;
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
