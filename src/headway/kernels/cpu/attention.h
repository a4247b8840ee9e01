// Queries, keys and values of a row of tokens, and what the queries gather from the cache.

static const int QUERIES = 4;  // of one head, that read each key and value together; or of one token,
static const int HEADS = 2;    // as many heads, if they share keys and values
static const i64 SOON = 16384;  // bytes of keys, and of values, that are asked for before one token's first product

FN uint16_t float_to_half(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
    if (size >= 0x7F800000) return (uint16_t)(sign | 0x7C00 | (size > 0x7F800000 ? 0x200 : 0));
    if (size >= 0x477FF000) return (uint16_t)(sign | 0x7C00);
    if (size < 0x38800000) {  // below 2^-14: a whole multiple of 2^-24, halves to even
        float positive;
        __builtin_memcpy(&positive, &size, sizeof positive);
        return (uint16_t)(sign | (uint32_t)__builtin_nearbyintf(positive * 16777216.0f));
    }
    return (uint16_t)(sign | ((size - 0x38000000 + 0xFFF + (size >> 13 & 1)) >> 13));
}

// LANES numbers rounded to half floats.
FN Halves to_halves(Floats value) {
#if LEVEL >= 3
    return (Halves)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
#elif LEVEL == 2
    return (Halves)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#else
    Halves out;
    for (int i = 0; i < LANES; ++i) out[i] = float_to_half(value[i]);
    return out;
#endif
}

// One head's H numbers normalised in place.
TARGET static void norm_head(float *x, i64 H, i64 normalization, const float *weight, const float *bias, float eps) {
    const Statistics of = statistics_of(x, H, normalization, eps);
    for (i64 i = 0; i < H; i += LANES) {
        Floats v = (load_some(x + i, H - i) - of.mean) * of.factor * load_some(weight + i, H - i);
        if (bias) v += load_some(bias + i, H - i);
        store_some(x + i, v, H - i);
    }
}

template <int STEP> TARGET void turn_head(float *__restrict x, float *__restrict y, const float *__restrict angles, i64 pairs) {
    for (i64 i = 0; i < pairs; ++i) {
        const float c = angles[2 * i], s = angles[2 * i + 1], a = x[STEP * i], b = y[STEP * i];
        x[STEP * i] = a * c - b * s;
        y[STEP * i] = b * c + a * s;
    }
}

FN void keep(void *to, float *scales, i64 at, const float *x, i64 H, i64 kept) {
    int32_t sum;
    if (kept == CODES) scales[at / H] = code_chunk(x, H, 1, (int8_t *)to + at, 0, &sum, 0);
    else if (kept == FLOATS) __builtin_memcpy((float *)to + at, x, H * sizeof(float));
    else for (i64 i = 0; i < H; i += LANES) store_some((uint16_t *)to + at + i, to_halves(load_some(x + i, H - i)), H - i);
}

// Items: rows.
TARGET static void heads(const Heads &h, i64 begin, i64 end) {
    for (i64 t = begin; t < end; ++t) {
        float *row = h.qkv + t * (h.N + 2 * h.K) * h.H;
        const float *angles = h.angles + t * 2 * h.pairs;
        const i64 sequence = h.rows[3 * t], column = h.rows[3 * t + 2];
        for (i64 n = 0; n < h.N + 2 * h.K; ++n) {
            float *x = row + n * h.H;
            const bool is_q = n < h.N, is_v = n >= h.N + h.K;
            if (!is_v && h.normalization != PLAIN)
                norm_head(x, h.H, h.normalization, is_q ? h.q_weight : h.k_weight, is_q ? h.q_bias : h.k_bias, h.eps);
            if (!is_v && h.angles && h.interleaved) turn_head<2>(x, x + 1, angles, h.pairs);
            else if (!is_v && h.angles) turn_head<1>(x, x + h.pairs, angles, h.pairs);
            if (is_q || column < 0) continue;
            const Columns &c = h.columns;
            const i64 head = is_v ? n - h.N - h.K : n - h.N;
            const i64 at = sequence * c.sequence_stride + head * c.head_stride + column * c.column_stride;
            keep(is_v ? c.values : c.keys, is_v ? c.value_scales : c.key_scales, at, x, h.H, c.kept);
        }
    }
}

template <int KEPT> FN float number_at(const void *from, i64 at) {
    return KEPT == HALVES ? half_to_float(((const uint16_t *)from)[at]) : ((const float *)from)[at];
}

// What some rows of one sequence see of one head: S columns from `keys` and `values` on, the sequence's from `first` on;
// `in_order` if each stands at its position.
struct View {
    const char *keys, *values;
    const float *key_scales, *value_scales;
    const i64 *positions;
    i64 S, stride, size, first, room;  // bytes of a number; S up to whole vectors
    bool in_order;
};

// scores[r][s] = q[r] k[s] for COUNT rows, which share the keys as they are loaded. What a row gets depends neither on the
// other rows nor, if the first column is the same, on how many they see: a token is the same whatever it is read with.
template <int KEPT, int COUNT> TARGET void scores_some(const float *q, i64 q_stride, const View &v, i64 H, float *scores) {
    const i64 whole = H / LANES * LANES;
    const int KEYS = LANES / COUNT;  // at once: the sums of all are one vector
    for (i64 s = 0; s < v.S; s += KEYS) {
        i64 at[KEYS];  // behind the last column stands the last one again
        for (int j = 0; j < KEYS; ++j) at[j] = (s + j < v.S ? s + j : v.S - 1) * v.stride;
        Floats sums[LANES] = {};
        for (i64 i = 0; i < whole; i += LANES) {
#pragma GCC unroll 16
            for (int j = 0; j < KEYS; ++j) {
                const Floats key = numbers_at<KEPT>(v.keys, at[j] + i);
                for (int r = 0; r < COUNT; ++r)
                    sums[r * KEYS + j] = plus_product(sums[r * KEYS + j], key, load<Floats>(q + r * q_stride + i));
            }
        }
        const Floats found = sums_of(sums);
        for (int r = 0; r < COUNT; ++r) __builtin_memcpy(scores + r * v.room + s, (const float *)&found + r * KEYS, KEYS * sizeof(float));
    }
    for (int r = 0; whole < H && r < COUNT; ++r)
        for (i64 s = 0; s < v.S; ++s)
            for (i64 i = whole; i < H; ++i) scores[r * v.room + s] += number_at<KEPT>(v.keys, s * v.stride + i) * q[r * q_stride + i];
}

template <int KEPT> TARGET void scores_of(const float *q, i64 q_stride, int count, const View &v, i64 H, float *scores) {
    const int TOGETHER = LANES / 4;
    int r = 0;
    for (; r + TOGETHER <= count; r += TOGETHER) scores_some<KEPT, TOGETHER>(q + r * q_stride, q_stride, v, H, scores + r * v.room);
    for (; LANES > 8 && r + 2 <= count; r += 2) scores_some<KEPT, 2>(q + r * q_stride, q_stride, v, H, scores + r * v.room);
    for (; r < count; ++r) scores_some<KEPT, 1>(q + r * q_stride, q_stride, v, H, scores + r * v.room);
}

// out[r] = sum over s of weights[r][s] v[s], for COUNT rows and WIDE vectors of each at a time.
template <int KEPT, int COUNT, int WIDE> TARGET void gather_some(const float *weights, const View &v, i64 i, float *out, i64 stride) {
    Floats sums[COUNT][WIDE] = {};
    for (i64 s = 0; s < v.S; ++s) {
        Floats values[WIDE];
        for (int w = 0; w < WIDE; ++w) values[w] = numbers_at<KEPT>(v.values, s * v.stride + i + w * LANES);
        for (int r = 0; r < COUNT; ++r)
            for (int w = 0; w < WIDE; ++w) sums[r][w] = plus_product(sums[r][w], values[w], splat(weights[r * v.room + s]));
    }
    for (int r = 0; r < COUNT; ++r)
        for (int w = 0; w < WIDE; ++w) store(out + r * stride + i + w * LANES, sums[r][w]);
}

template <int KEPT, int COUNT> TARGET void gather_rows(const float *weights, const View &v, i64 H, float *out, i64 stride) {
    const int WIDE = COUNT == QUERIES && LANES < 16 ? 2 : 4;
    i64 i = 0;
    for (; i + WIDE * LANES <= H; i += WIDE * LANES) gather_some<KEPT, COUNT, WIDE>(weights, v, i, out, stride);
    for (; i + LANES <= H; i += LANES) gather_some<KEPT, COUNT, 1>(weights, v, i, out, stride);
    for (; i < H; ++i)
        for (int r = 0; r < COUNT; ++r) {
            float sum = 0;
            for (i64 s = 0; s < v.S; ++s) sum += weights[r * v.room + s] * number_at<KEPT>(v.values, s * v.stride + i);
            out[r * stride + i] = sum;
        }
}

template <int KEPT> TARGET void gather(const float *weights, int count, const View &v, i64 H, float *out, i64 stride) {
    if (count == QUERIES) return gather_rows<KEPT, QUERIES>(weights, v, H, out, stride);
    if (count == HEADS) return gather_rows<KEPT, HEADS>(weights, v, H, out, stride);
    for (int r = 0; r < count; ++r) gather_rows<KEPT, 1>(weights + r * v.room, v, H, out + r * stride, stride);
}

FN bool sees(const Attend &a, i64 position, i64 column) {
    const i64 back = position - column;
    return column >= 0 && (!a.causal || back >= 0) && (!a.window || (back < a.window && -back < a.window));
}

// The columns from the first to the last that any of `count` rows, from positions `least` to `most`, sees of `used` ones.
struct Range {
    i64 low, high;
};

// Where each column stands at its position.
FN Range range_in_order(const Attend &a, i64 least, i64 most, i64 used) {
    const i64 before = least - a.window + 1, after = a.causal ? most + 1 : a.window ? most + a.window : used;
    const i64 low = a.window && before > 0 ? before : 0, high = after < used ? after : used;
    return {low < high ? low : high, high};
}

// The scores of a row at `position` become weights that sum to one, times the scales of values in codes; a row that sees
// nothing has weights of zero.
TARGET static void weigh(float *s, const View &v, i64 position, const Attend &a, const float *bias) {
    const float none = -__builtin_inff();
    for (i64 i = 0; v.key_scales && i < v.S; ++i) s[i] *= v.key_scales[i];
    for (i64 i = 0; i < v.S; ++i) s[i] *= a.scale;
    for (i64 i = 0; a.cap > 0 && i < v.S; ++i) s[i] = a.cap * (1.0f - 2.0f / (1.0f + __builtin_expf(2.0f * s[i] / a.cap)));
    for (i64 i = 0; bias && i < v.S; ++i) {
        const i64 away = v.positions[i] - position;
        s[i] += bias[away < -a.reach ? -a.reach : away > a.reach ? a.reach : away];
    }
    const Range all = {v.first, v.first + v.S}, seen = v.in_order ? range_in_order(a, position, position, all.high) : all;
    for (i64 i = 0; i < seen.low - v.first; ++i) s[i] = none;
    for (i64 i = 0; !v.in_order && i < v.S; ++i) s[i] = sees(a, position, v.positions[i]) ? s[i] : none;
    for (i64 i = seen.high - v.first; i < v.room; ++i) s[i] = none;
    Floats tops = splat(none), totals = {};
    for (i64 i = 0; i < v.room; i += LANES) {
        const Floats x = load<Floats>(s + i);
        tops = x > tops ? x : tops;
    }
    float top = none;
    for (int lane = 0; lane < LANES; ++lane) top = tops[lane] > top ? tops[lane] : top;
    if (top == none) top = 0;
    for (i64 i = 0; i < v.room; i += LANES) {
        const Floats x = load<Floats>(s + i), y = x == splat(none) ? Floats{} : exponential(x - top);
        totals += y;
        store(s + i, y);
    }
    const float total = sum_of(totals);
    const float inverse = total == 0 ? 0.0f : 1.0f / total;
    for (i64 i = 0; i < v.S; ++i) s[i] *= inverse;
    for (i64 i = 0; v.value_scales && i < v.S; ++i) s[i] *= v.value_scales[i];
}

TARGET static Range range_by_search(const Attend &a, const i64 *rows, int count, const i64 *positions, i64 used) {
    i64 low = used, high = 0;
    for (i64 s = 0; s < used; ++s) {
        bool seen = false;
        for (int r = 0; r < count; ++r) seen |= sees(a, rows[3 * r + 1], positions[s]);
        if (!seen) continue;
        low = s < low ? s : low;
        high = s + 1;
    }
    return {high == 0 ? 0 : low, high};
}

TARGET static View view_of(const Attend &a, i64 t, int count, i64 n) {
    const Columns &c = a.columns;
    const i64 *rows = a.rows + 3 * t, first = c.starts ? c.starts[rows[0]] : rows[0];
    const i64 *positions = c.positions + first * c.positions_stride, size = c.kept == CODES ? 1 : c.kept == HALVES ? 2 : 4;
    const i64 used = c.starts ? c.starts[rows[0] + 1] - first : c.state[0];
    i64 least = rows[1], most = rows[1];
    for (int r = 1; r < count; ++r) {
        least = rows[3 * r + 1] < least ? rows[3 * r + 1] : least;
        most = rows[3 * r + 1] > most ? rows[3 * r + 1] : most;
    }
    const Range of = c.state[1] ? range_in_order(a, least, most, used) : range_by_search(a, rows, count, positions, used);
    const i64 at = first * c.sequence_stride + n / (a.N / a.K) * c.head_stride + of.low * c.column_stride, vector = at / a.H;
    const char *keys = (const char *)c.keys + at * size, *values = (const char *)c.values + at * size;
    const float *k_scales = c.kept == CODES ? c.key_scales + vector : nullptr;
    const float *v_scales = c.kept == CODES ? c.value_scales + vector : nullptr;
    const i64 S = of.high - of.low, room = (S + LANES - 1) / LANES * LANES;
    return {keys, values, k_scales, v_scales, positions + of.low, S, c.column_stride, size, of.low, room, c.state[1] != 0};
}

FN i64 shared_heads(const Attend &a) { return (a.N / a.K + HEADS - 1) / HEADS; }  // items of a key-value head

// What some tokens from t on gather with their head n, or one token with some heads from n on.
template <int KEPT> TARGET void mix(const Attend &a, i64 t, i64 n, int tokens, int heads, float *scores) {
    const View v = view_of(a, t, tokens, n);
    const int count = tokens * heads;
    const i64 all = v.S * v.stride * v.size, soon = all < SOON ? all : SOON;
    for (i64 b = 0; tokens == 1 && b < soon; b += 64) {  // since its last token all weights have passed the caches
        __builtin_prefetch(v.keys + b);
        __builtin_prefetch(v.values + b);
    }
    const i64 q_stride = heads > 1 ? a.H : a.q_stride, out_stride = heads > 1 ? a.H : a.N * a.H, width = 2 * a.reach + 1;
    scores_of<KEPT>(a.q + t * a.q_stride + n * a.H, q_stride, count, v, a.H, scores);
    for (int r = 0; r < count; ++r) {
        const float *bias = a.bias ? a.bias + (n + r % heads) * width + a.reach : nullptr;
        weigh(scores + r * v.room, v, a.rows[3 * (t + r / heads) + 1], a, bias);
    }
    gather<KEPT>(scores, count, v, a.H, a.out + (t * a.N + n) * a.H, out_stride);
}

TARGET static void mix_kept(const Attend &a, i64 t, i64 n, int tokens, int heads, float *scores) {
    if (a.columns.kept == CODES) return mix<CODES>(a, t, n, tokens, heads, scores);
    if (a.columns.kept == HALVES) return mix<HALVES>(a, t, n, tokens, heads, scores);
    mix<FLOATS>(a, t, n, tokens, heads, scores);
}

// Items: QUERIES tokens and HEADS heads that share keys. Tokens of one sequence are taken together, or else heads.
TARGET static void attend(const Attend &a, i64 T, i64 begin, i64 end, i64 thread) {
    float *scores = a.scratch + thread * QUERIES * a.room;
    const i64 group = a.N / a.K, shared = shared_heads(a), across = a.K * shared;
    for (i64 item = begin; item < end; ++item) {
        const i64 first = item / across * QUERIES, last = first + QUERIES < T ? first + QUERIES : T;
        const i64 k = item % across / shared, in_group = item % shared * HEADS, n = k * group + in_group;
        const int heads = group - in_group < HEADS ? (int)(group - in_group) : HEADS;
        int count = 1;
        for (i64 t = first; t < last; t += count) {
            count = 1;
            while (t + count < last && a.rows[3 * (t + count)] == a.rows[3 * t]) ++count;
            if (count == 1) mix_kept(a, t, n, 1, heads, scores);
            else for (int h = 0; h < heads; ++h) mix_kept(a, t, n + h, count, 1, scores);
        }
    }
}
