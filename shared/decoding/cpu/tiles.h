// Products of bytes in the processor's tiles (Intel AMX): 16 rows with 16 outputs and 64 inputs in one instruction.
//
// The sums of a part are integers, so they have the bits of those that vectors compute. R rows, C inputs.

// Bytes of a tile's row.
constexpr int TILE_BYTES = 64;
// With fewer rows vectors are faster.
constexpr int FEWEST_TILE_ROWS = 12;

#if defined(__AMX_INT8__) && defined(__linux__)

// A process asks Linux for its tiles once (arch_prctl(2)); a sandbox may say no.
static const bool HAS_TILES = [] {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}();

// Eight tiles of one shape, as `ldtilecfg` reads it.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};

    TileShapes() {
        for (int tile = 0; tile < 8; tile++) bytes[tile] = TILE_BYTES, rows[tile] = TILE_ROWS;
    }
};
static const TileShapes TILE_SHAPES;

// The tiles of a thread while this object lives, if they are wanted and there are any.
struct Tiles {
    const bool used;

    explicit Tiles(bool wanted) : used(wanted && HAS_TILES) {
        if (used) _tile_loadconfig(&TILE_SHAPES);
    }
    ~Tiles() {
        if (used) _tile_release();
    }
};

// The products of a part: two tiles of rows, halves of a block, rows.
typedef Integers PartProducts[2][2][TILE_ROWS];

// Multiplies one or two tiles of rows, `stride` bytes apart, with the same part of a block's weights.
static void multiply_part(bool two, int length, const int8_t *rows, size_t stride, const char *weight,
                          PartProducts &products) {
    constexpr int line = 4 * BLOCK;
    _tile_zero(0);
    _tile_zero(1);
    if (two) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int c = 0; c < length; c += TILE_BYTES, weight += TILE_BYTES / 4 * line) {
        _tile_loadd(6, weight, line);
        _tile_loadd(4, rows + c, stride);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, weight + line / 2, line);
        _tile_dpbsud(1, 4, 7);
        if (two) {
            _tile_loadd(5, rows + TILE_ROWS * stride + c, stride);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
    }
    _tile_stored(0, products[0][0], TILE_BYTES);
    _tile_stored(1, products[0][1], TILE_BYTES);
    if (two) {
        _tile_stored(2, products[1][0], TILE_BYTES);
        _tile_stored(3, products[1][1], TILE_BYTES);
    }
}

// Adds the products of a part to the sums of `count` rows from row r on; meanwhile prefetches `share` bytes.
static void add_part(int count, const PartProducts &products, int C, Inputs x, int r, int part, const char *next, int share,
                     Vector (*sums)[2]) {
    const int each = share / count & -64;
    for (int i = 0; i < count; i++) {
        const size_t place = (size_t)(r + i) * parts(C) + part;
        const Vector scale = broadcast(x.scales[place]);
        const Integers zero = Integers{} + ZERO * x.sums[place];
        for (int half = 0; half < 2; half++) {
            const Integers sum = products[i / TILE_ROWS][half][i % TILE_ROWS] - zero;
            sums[i][half] = multiply_add(__builtin_convertvector(sum, Vector), scale, sums[i][half]);
        }
        prefetch(next, each), next += each;
    }
}

// Adds to the sums of R rows, from row r on, their products with all weights of a block.
static void accumulate_tiles(int R, int C, Inputs x, int r, const char *block, Vector (*sums)[2]) {
    constexpr int together = 2 * TILE_ROWS, bytes = PART * BYTES<Format::int8>;
    const int groups = (R + together - 1) / together, units = parts(C) * groups;
    const size_t stride = padded(C);
    alignas(64) PartProducts products[2];
    // Vectors add the products of a unit while tiles multiply the next one.
    for (int unit = 0; unit <= units; unit++) {
        if (unit < units) {
            const int c = unit / groups * PART, first = unit % groups * together, length = C - c < PART ? C - c : PART;
            multiply_part(R - first > TILE_ROWS, length, x.bytes + (r + first) * stride + c, stride,
                          block + (size_t)c * BYTES<Format::int8>, products[unit % 2]);
        }
        if (unit > 0) {
            const int before = unit - 1, part = before / groups, group = before % groups, first = group * together;
            add_part(R - first < together ? R - first : together, products[before % 2], C, x, r + first, part,
                     block + (size_t)(part + 2) * bytes + group * (bytes / groups), bytes / groups, sums + first);
        }
    }
}

#else

constexpr bool HAS_TILES = false;
struct Tiles {
    const bool used = false;

    explicit Tiles(bool) {}
};
static void accumulate_tiles(int, int, Inputs, int, const char *, Vector (*)[2]) {}

#endif
