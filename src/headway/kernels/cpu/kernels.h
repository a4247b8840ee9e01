// The steps, each over a range of its items and independent of how the items are shared out among threads.

#include "lanes.h"

static const int ROWS = 16;  // of W, side by side: a block
static const int PAIR = LEVEL >= 3 ? 2 : 1;  // blocks that many rows meet together, so that each activation is loaded once

struct Block {  // one number for each row of W of a pair
    Floats parts[PAIR * PARTS];
};

FN Floats numbers(const void *from, i64 at, i64 half) {
    return half ? numbers_at<HALVES>(from, at) : numbers_at<FLOATS>(from, at);
}

// A tile is what the registers have room for: sums of AT_ONCE rows with BESIDE vectors of a block, each of which then
// meets each activation as it is loaded.
static const int AT_ONCE = LEVEL >= 3 ? 8 : 4;
static const i64 AHEAD = 2048;  // bytes of codes: by itself a core asks for too few at a time to keep the memory busy
static const i64 PANEL = 64;  // rows whose codes stay in the second cache while all of W passes

// out[r] = BLOCKS times sixteen rows of W times row r of `in`, for COUNT rows: each code is read once for all of them.
template <int BITS, int CHUNK, bool MINIMA, int COUNT, int BLOCKS>
TARGET void tile(const Matrix &w, i64 block, const Coded &in, i64 row, Block *out) {
    const int QUADS = CHUNK / (BITS == 4 ? 8 : 4), ALL = BLOCKS * PARTS, BESIDE = ALL == 4 && COUNT > 1 ? 2 : ALL;
    const i64 chunks = (w.columns + CHUNK - 1) / CHUNK, per_group = w.group / CHUNK, width = chunks * CHUNK;
    const i64 groups = (chunks + per_group - 1) / per_group, next = chunks * QUADS * 64;  // from block to block
    const uint8_t *codes = w.codes + block * next;
    const int8_t *a = in.codes + row * width;
    const float *a_scales = in.scales + row * chunks;
    const int32_t *a_sums = in.sums + row * chunks;
    const Ints less = Sum<BITS>::less(w.zero);
    Floats totals[COUNT][ALL];
#pragma GCC unroll 16
    for (int r = 0; r < COUNT; ++r)
        for (int p = 0; p < ALL; ++p) totals[r][p] = Floats{};
    i64 group = block * groups * ROWS, left = per_group;
    for (i64 c = 0; c < chunks; ++c, a += CHUNK, codes += QUADS * 64) {
        for (int q = 0; q < BLOCKS * QUADS; ++q) __builtin_prefetch(codes + AHEAD + q / QUADS * next + q % QUADS * 64);
        for (int p = 0; p < ALL; p += BESIDE) {
            Sum<BITS> dots[COUNT][BESIDE];
#pragma GCC unroll 16
            for (int r = 0; r < COUNT; ++r) {
                const Ints sum = MINIMA && !Sum<BITS>::SHIFT ? Ints{} : splat_from(a_sums + r * chunks + c);
                for (int b = 0; b < BESIDE; ++b) dots[r][b].begin(less, sum);
            }
#pragma GCC unroll 8
            for (int q = 0; q < QUADS; ++q) {
                Codes low[BESIDE], high[BESIDE];
                for (int b = 0; b < BESIDE; ++b) {
                    const Codes both = load<Codes>(codes + (p + b) / PARTS * next + q * 64 + (p + b) % PARTS * WIDTH);
                    low[b] = BITS == 4 ? low_halves(both) : both;
                    high[b] = BITS == 4 ? high_halves(both) : both;
                }
#pragma GCC unroll 16
                for (int r = 0; r < COUNT; ++r) {
                    const int8_t *from = a + r * width + 4 * q;
                    for (int b = 0; b < BESIDE; ++b) dots[r][b].add(low[b], from);
                    for (int b = 0; BITS == 4 && b < BESIDE; ++b) dots[r][b].add(high[b], from + CHUNK / 2);
                }
            }
            Floats scale[BESIDE], minimum[BESIDE];
            for (int b = 0; b < BESIDE; ++b) {
                const i64 at = group + (p + b) / PARTS * groups * ROWS + (p + b) % PARTS * LANES;
                scale[b] = numbers(w.scales, at, w.half);
                if (MINIMA) minimum[b] = numbers(w.minima, at, w.half);
            }
#pragma GCC unroll 16
            for (int r = 0; r < COUNT; ++r) {
                const Floats step = splat_from(a_scales + r * chunks + c);
                const Floats whole = step * to_floats(splat_from(a_sums + r * chunks + c));
                for (int b = 0; b < BESIDE; ++b) {
                    Floats &total = totals[r][p + b];
                    total = plus_product(total, to_floats(dots[r][b].total()), apart(scale[b] * step));
                    if (MINIMA) total = plus_product(total, minimum[b], whole);
                }
            }
        }
        if (--left == 0) group += ROWS, left = per_group;
    }
#pragma GCC unroll 16
    for (int r = 0; r < COUNT; ++r)
        for (int p = 0; p < ALL; ++p) out[r].parts[p] = totals[r][p];
}

template <int BITS, int CHUNK, bool MINIMA, int BLOCKS>
TARGET void tiles(const Matrix &w, i64 block, const Coded &in, i64 row, int count, Block *out) {
    for (; count >= AT_ONCE; count -= AT_ONCE, row += AT_ONCE, out += AT_ONCE)
        tile<BITS, CHUNK, MINIMA, AT_ONCE, BLOCKS>(w, block, in, row, out);
    for (; AT_ONCE > 4 && count >= 4; count -= 4, row += 4, out += 4)
        tile<BITS, CHUNK, MINIMA, 4, BLOCKS>(w, block, in, row, out);
    for (; count >= 2; count -= 2, row += 2, out += 2) tile<BITS, CHUNK, MINIMA, 2, BLOCKS>(w, block, in, row, out);
    if (count) tile<BITS, CHUNK, MINIMA, 1, BLOCKS>(w, block, in, row, out);
}

template <int BITS, int CHUNK>
TARGET void products(const Matrix &w, i64 block, int blocks, const Coded &in, i64 row, int count, Block *out) {
    if (w.minima && blocks == 1) return tiles<BITS, CHUNK, true, 1>(w, block, in, row, count, out);
    if (w.minima) return tiles<BITS, CHUNK, true, PAIR>(w, block, in, row, count, out);
    if (blocks == 1) return tiles<BITS, CHUNK, false, 1>(w, block, in, row, count, out);
    tiles<BITS, CHUNK, false, PAIR>(w, block, in, row, count, out);
}

TARGET static void
multiply(const Matrix &w, i64 block, int blocks, const Coded &in, i64 row, int count, Block *out) {
    if (w.bits == 4) return products<4, 32>(w, block, blocks, in, row, count, out);
    if (w.bits == 7 && w.chunk == 16) return products<7, 16>(w, block, blocks, in, row, count, out);
    if (w.bits == 7) return products<7, 32>(w, block, blocks, in, row, count, out);
    if (w.chunk == 16) return products<8, 16>(w, block, blocks, in, row, count, out);
    products<8, 32>(w, block, blocks, in, row, count, out);
}

// Chunk `c` of one row of W as floats.
TARGET static void unpack(const Matrix &w, i64 row, i64 c, float *out) {
    const i64 block = row / ROWS, lane = row % ROWS, chunks = (w.columns + w.chunk - 1) / w.chunk;
    const i64 groups = (w.columns + w.group - 1) / w.group, at = (block * groups + c * w.chunk / w.group) * ROWS;
    const i64 part = lane / LANES, kept = w.bits == 4 ? w.chunk / 2 : w.chunk;
    const float scale = numbers(w.scales, at + part * LANES, w.half)[lane % LANES];
    const float minimum = w.minima ? numbers(w.minima, at + part * LANES, w.half)[lane % LANES] : 0.0f;
    const uint8_t *codes = w.codes + ((block * chunks + c) * kept * ROWS + lane * 4);
    for (i64 i = 0; i < w.chunk; ++i) {
        const uint8_t both = codes[i % kept / 4 * 4 * ROWS + i % 4];
        const int code = w.bits == 4 ? (i < kept ? both & 15 : both >> 4) : both;
        const float product = apart((float)(code - (int)w.zero) * scale);
        out[i] = w.minima ? product + minimum : product;
    }
}

// e^x within 2 ulp: 2^n e^r with |r| <= ln(2) / 2 and the degree-6 polynomial of Cephes' expf.
FN Floats exponential(Floats x) {
    x = x > 88.0f ? splat(88.0f) : x;
    x = x < -87.0f ? splat(-87.0f) : x;
    const Ints n = nearest(x * 1.44269504088896341f);
    const Floats whole = to_floats(n), r = apart(x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Floats p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * (Floats)((n + 127) << 23);
}

FN Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

// 1 - erf(x) for x >= 0 within 1.2e-7 of it (Numerical Recipes' erfcc).
FN Floats erfc_positive(Floats x) {
    const Floats t = 1.0f / (1.0f + 0.5f * x);
    Floats p = splat(0.17087277f);
    p = p * t - 0.82215223f;
    p = p * t + 1.48851587f;
    p = p * t - 1.13520398f;
    p = p * t + 0.27886807f;
    p = p * t - 0.18628806f;
    p = p * t + 0.09678418f;
    p = p * t + 0.37409196f;
    p = p * t + 1.00002368f;
    p = p * t - 1.26551223f;
    return t * exponential(p - x * x);
}

FN Floats activate(Floats x, i64 activation) {
    switch (activation) {
    case RELU: return x < 0 ? Floats{} : x;  // NaN stays what it is
    case RELU2: return x < 0 ? Floats{} : x * x;
    case SILU: return x * sigmoid(x);
    case QUICK_GELU: return x * sigmoid(1.702f * x);
    case GELU_TANH: return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));  // tanh(z) = 2 sigmoid(2 z) - 1
    case GELU: {
        const Floats rest = 0.5f * erfc_positive((x < 0 ? -x : x) * 0.7071067811865476f);
        return x * (x < 0 ? rest : 1.0f - rest);
    }
    default: return x;
    }
}

FN i64 width_of(const Linear &l) { return l.gated ? l.weight.rows / 2 : l.weight.rows; }

// Of `count` rows from t on: the products with blocks of W and all that is added to them, in the first of `sums`. What a
// layer has or has not is asked once for all of them, not for each vector.
TARGET static void sums_with(const Linear &l, i64 block, int blocks, i64 t, int count, Block *sums) {
    const i64 planes = l.in.planes;
    const int parts = blocks * PARTS;
    multiply(l.weight, block, blocks, l.in, t * planes, count * (int)planes, sums);
    for (int r = 0; planes == 2 && r < count; ++r)
        for (int p = 0; p < parts; ++p) sums[r].parts[p] = sums[2 * r].parts[p] + sums[2 * r + 1].parts[p];
    for (int r = 0; l.weight.bias && r < count; ++r)
        for (int p = 0; p < parts; ++p) sums[r].parts[p] += load<Floats>(l.weight.bias + block * ROWS + p * LANES);
    for (int r = 0; l.beside && r < count; ++r) {
        const float *beside = l.beside + (t + r) * l.beside_stride + block * ROWS;
        for (int p = 0; p < parts; ++p) sums[r].parts[p] += load<Floats>(beside + p * LANES);
    }
}

// How many blocks of W go together: of a single row one, so that there are shares enough for all threads.
FN i64 together(i64 T) { return T > 1 ? PAIR : 1; }

// Items: a block or a pair of them, 16 or 32 columns of the output, for a panel of rows, one panel after the other.
TARGET static void linear(const Linear &l, i64 T, i64 begin, i64 end) {
    const i64 width = width_of(l), all = (width + ROWS - 1) / ROWS, step = together(T), across = (all + step - 1) / step;
    for (i64 at = begin; at < end; ++at) {
        const i64 block = at % across * step, first = at / across * PANEL, last = first + PANEL < T ? first + PANEL : T;
        const i64 left = width - block * ROWS;
        const int blocks = (int)(all - block < step ? all - block : step), parts = blocks * PARTS;
        for (i64 t = first; t < last; t += AT_ONCE) {
            const int count = (int)(last - t < AT_ONCE ? last - t : AT_ONCE);
            Block sums[2 * AT_ONCE], factors[2 * AT_ONCE];
            sums_with(l, block, blocks, t, count, sums);
            if (l.gated) sums_with(l, block + width / ROWS, blocks, t, count, factors);
            for (int r = 0; l.activation != NONE && r < count; ++r)
                for (int p = 0; p < parts; ++p) sums[r].parts[p] = activate(sums[r].parts[p], l.activation);
            for (int r = 0; l.gated && r < count; ++r)
                for (int p = 0; p < parts; ++p) sums[r].parts[p] *= factors[r].parts[p];
            for (int r = 0; r < count; ++r) {
                float *out = l.out + (t + r) * l.out_stride + block * ROWS;
                for (int p = 0; l.adds && p < parts; ++p) sums[r].parts[p] += load_some(out + p * LANES, left - p * LANES);
                for (int p = 0; p < parts; ++p) store_some(out + p * LANES, sums[r].parts[p], left - p * LANES);
            }
        }
    }
}

static const float TINY = 1e-34f;  // what is smaller is zero: the inverse of its step would overflow

// One chunk of x, `chunk` numbers, in codes; returns its step: 0 where all is zero, NaN (and codes of zero) where x is not
// finite.
TARGET static float code_chunk(const float *x, i64 chunk, i64 planes, int8_t *codes, i64 plane, int32_t *sums, i64 next) {
    const Ints no_sign = splat(0x7FFFFFFF);
    Ints largest = {};  // sizes of floats are in the order of their bits
    for (i64 i = 0; i < chunk; i += LANES) {
        const Ints size = load<Ints>(x + i) & no_sign;
        largest = size > largest ? size : largest;
    }
    int32_t bits = largest_of(largest);
    if (bits >= 0x7F800000) bits = 0x7FC00000;  // infinity is no more than NaN here
    float top;
    __builtin_memcpy(&top, &bits, sizeof top);
    const float inverse = top > TINY ? 127.0f / top : 0.0f;
    const float fine = planes == 2 ? inverse * 128.0f : inverse;
    Ints high_sum = {}, low_sum = {};
    for (i64 i = 0; i < chunk; i += LANES) {
        const Ints code = inverse > 0 ? nearest(load<Floats>(x + i) * fine) : Ints{}, high = planes == 2 ? (code + 64) >> 7 : code;
        store(codes + i, narrowed(high));
        high_sum += high;
        if (planes != 2) continue;
        store(codes + plane + i, narrowed(code - high * 128));
        low_sum += code - high * 128;
    }
    sums[0] = total_of(high_sum);
    if (planes == 2) sums[next] = total_of(low_sum);
    return inverse > 0 ? top / 127.0f : top == top ? 0.0f : top;
}

// What normalising takes off each of n numbers, and what it multiplies them by.
struct Statistics {
    float mean, factor;
};

TARGET static Statistics statistics_of(const float *x, i64 n, i64 normalization, float eps) {
    if (normalization == PLAIN) return {0.0f, 1.0f};
    Floats sums = {}, squares = {};
    for (i64 i = 0; normalization == LAYER && i < n; i += LANES) sums += load_some(x + i, n - i);
    const float mean = sum_of(sums) / (float)n;
    for (i64 i = 0; i < n; i += LANES) {
        const Floats away = load_some(x + i, n - i) - mean;
        squares = plus_product(squares, away, load_some((const float *)&away, n - i));  // none behind the end
    }
    return {mean, 1.0f / __builtin_sqrtf(sum_of(squares) / (float)n + eps)};
}

// Items: rows.
TARGET static void norm(const Norm &n, i64 begin, i64 end) {
    const i64 D = n.columns, chunk = n.codes.codes ? n.codes.chunk : 32, chunks = (D + chunk - 1) / chunk;
    const i64 planes = n.codes.planes;
    const bool as_it_is = n.normalization == PLAIN && !n.weight && !n.bias && !n.scale && !n.out && D % chunk == 0;
    for (i64 t = begin; t < end; ++t) {
        const float *x = n.in + t * n.in_stride;
        float *out = n.out ? n.out + t * n.out_stride : nullptr;
        const Statistics of = statistics_of(x, D, n.normalization, n.eps);
        for (i64 c = 0; c < chunks; ++c) {
            const i64 at = c * chunk, rest = D - at, count = rest < chunk ? rest : chunk;
            float y[32];
            for (i64 i = count; i < chunk; ++i) y[i] = 0;
            for (i64 i = 0; !as_it_is && i < count; i += LANES) {
                const i64 from = at + i, left = count - i;
                Floats v = (load_some(x + from, left) - of.mean) * of.factor;
                if (n.weight) v *= load_some(n.weight + from, left);
                if (n.bias) v += load_some(n.bias + from, left);
                if (n.scale) v *= load_some(n.scale + from, left);
                store_some(y + i, v, left);
                if (out) store_some(out + from, n.adds ? load_some(out + from, left) + v : v, left);
            }
            if (!n.codes.codes) continue;
            const i64 first = t * planes * chunks + c;
            float *scales = n.codes.scales + first;
            int8_t *codes = n.codes.codes + t * planes * chunks * chunk + at;
            *scales = code_chunk(as_it_is ? x + at : y, chunk, planes, codes, chunks * chunk, n.codes.sums + first, chunks);
            if (planes == 2) scales[chunks] = *scales / 128.0f;
        }
    }
}

// Items: rows.
TARGET static void gather(const Gather &g, i64 begin, i64 end) {
    const Matrix &w = g.table;
    const i64 C = w.columns;
    for (i64 t = begin; t < end; ++t) {
        const i64 id = g.ids[t * g.id_stride];
        const float *from = g.plain ? g.plain + id * C : nullptr;
        float *out = g.out + t * C, unpacked[32];
        const i64 step = from ? C : w.chunk, chunks = (C + step - 1) / step;
        for (i64 c = 0; c < chunks; ++c) {
            const i64 count = C - c * step < step ? C - c * step : step;
            if (!from) unpack(w, id, c, unpacked);
            for (i64 i = 0; i < count; ++i) {
                const float value = apart(from ? from[i] : unpacked[i]) * g.scale;
                out[c * step + i] = g.adds ? out[c * step + i] + apart(value) : value;
            }
        }
    }
}

#include "attention.h"

TARGET static i64 item_count(const Step &step, i64 T) {
    if (step.kind == NORM || step.kind == HEADS || step.kind == GATHER) return T;
    if (step.kind == ATTEND) {
        const Attend &a = *(const Attend *)step.what;
        return (T + QUERIES - 1) / QUERIES * a.K * shared_heads(a);
    }
    const i64 columns = ROWS * together(T);
    return (width_of(*(const Linear *)step.what) + columns - 1) / columns * ((T + PANEL - 1) / PANEL);
}

TARGET static void run_step(const Step &step, i64 T, i64 begin, i64 end, i64 thread) {
    switch (step.kind) {
    case NORM: return norm(*(const Norm *)step.what, begin, end);
    case LINEAR: return linear(*(const Linear *)step.what, T, begin, end);
    case HEADS: return heads(*(const Heads *)step.what, begin, end);
    case GATHER: return gather(*(const Gather *)step.what, begin, end);
    case ATTEND: return attend(*(const Attend *)step.what, T, begin, end, thread);
    }
}

#undef LEVEL
#undef TARGET
#undef FN
#undef VECTOR
