// Fused elementwise parts of a training step on CPU: RMSNorm, the heads' norm and rotation, squared ReLU.
//
// Each function makes one pass over memory where PyTorch's separate operators make three to ten. Plain C interface over
// raw float32 pointers, no torch headers: one binary serves every torch build. The row functions are compiled for
// several instruction sets and the loader picks one (GCC's target_clones). Sums over rows are taken per thread and then
// added in thread order, so results repeat bit for bit for a given number of threads. The PyTorch twins that
// the tests hold these to live in training.py.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define CLONES
#endif

typedef int64_t i64;

// Arrays never overlap. Said aloud, it spares the vectorised loops a test of addresses at run time, which would make
// the order of a sum depend on where malloc put an array.
typedef const float *__restrict__ In;
typedef float *__restrict__ Out;

static int thread_count() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

static int thread_index() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

CLONES static void rms_forward_row(In x, In w, Out y, Out rstd, i64 n, float eps) {
    float sum = 0;
    for (i64 i = 0; i < n; ++i) sum += x[i] * x[i];
    const float r = 1.0f / std::sqrt(sum / n + eps);
    for (i64 i = 0; i < n; ++i) y[i] = x[i] * r * w[i];
    *rstd = r;
}

// With u = x r: dw += dy u, dx = r (dy w - u mean(dy w u)).
CLONES static void rms_backward_row(In dy, In x, In w, float r, Out dx, Out dw, i64 n) {
    float dot = 0;
    for (i64 i = 0; i < n; ++i) {
        const float u = x[i] * r;
        dw[i] += dy[i] * u;
        dot += dy[i] * w[i] * u;
    }
    dot /= n;
    for (i64 i = 0; i < n; ++i) dx[i] = r * (dy[i] * w[i] - x[i] * r * dot);
}

template <int STEP> static inline __attribute__((always_inline)) void turn_by(In in, Out out, In angle, i64 pairs, float sign) {
    const i64 far = STEP == 2 ? 1 : pairs;
    for (i64 i = 0; i < pairs; ++i) {
        const float c = angle[2 * i], s = sign * angle[2 * i + 1], a = in[STEP * i], b = in[STEP * i + far];
        out[STEP * i] = a * c - b * s;
        out[STEP * i + far] = b * c + a * s;
    }
}

// Turn `pairs` pairs by `angle` = (cos, sin) per pair; `sign` -1 turns back. Interleaved pairs are (2i, 2i + 1),
// the others (i, i + pairs).
CLONES static void turn(In in, Out out, In angle, i64 pairs, bool interleaved, float sign) {
    interleaved ? turn_by<2>(in, out, angle, pairs, sign) : turn_by<1>(in, out, angle, pairs, sign);
}

static const i64 PART = 4096;

CLONES static void relu2_forward_part(In x, Out y, i64 n) {
    for (i64 i = 0; i < n; ++i) {
        const float r = x[i] > 0 ? x[i] : 0.0f;
        y[i] = r * r;
    }
}

CLONES static void relu2_backward_part(In dy, In x, Out dx, i64 n) {
    for (i64 i = 0; i < n; ++i) dx[i] = 2 * (x[i] > 0 ? x[i] : 0.0f) * dy[i];
}

// e^x for x <= 0 within 2 ulp: 2^n e^r with |r| <= ln(2) / 2 and the degree-6 polynomial of Cephes' expf. Written out so
// that loops over it vectorise.
static inline float exp_negative(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float n = std::nearbyintf(x * 1.44269504088896341f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const float value = p * r * r + r + 1.0f;
    const int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return value * power;
}

// softmax(scale * s) over scores low to high of n, zero for the rest.
CLONES static void softmax_row(float *s, i64 low, i64 high, i64 n, float scale) {
    float top = s[low];
    for (i64 i = low; i < high; ++i) top = s[i] > top ? s[i] : top;
    for (i64 i = low; i < high; ++i) s[i] = exp_negative((s[i] - top) * scale);
    float sum = 0;
    for (i64 i = low; i < high; ++i) sum += s[i];
    const float inverse = 1.0f / sum;
    for (i64 i = low; i < high; ++i) s[i] *= inverse;
    for (i64 i = 0; i < low; ++i) s[i] = 0;
    for (i64 i = high; i < n; ++i) s[i] = 0;
}

// With weights p = softmax(scale * s): ds = scale p (dp - sum(p dp)), written over dp.
CLONES static void softmax_backward_row(In p, Out dp, i64 low, i64 high, i64 n, float scale) {
    float dot = 0;
    for (i64 i = low; i < high; ++i) dot += p[i] * dp[i];
    for (i64 i = low; i < high; ++i) dp[i] = scale * p[i] * (dp[i] - dot);
    for (i64 i = 0; i < low; ++i) dp[i] = 0;
    for (i64 i = high; i < n; ++i) dp[i] = 0;
}

// Partial sums of one gradient per thread, added up in thread order.
struct Partials {
    std::vector<float> data;
    i64 size;
    explicit Partials(i64 n) : data(thread_count() * n, 0.0f), size(n) {}
    float *mine() { return data.data() + thread_index() * size; }
    void sum(float *out) const {
        std::memset(out, 0, size * sizeof(float));
        for (i64 t = 0; t < (i64)data.size() / size; ++t)
            for (i64 i = 0; i < size; ++i) out[i] += data[t * size + i];
    }
};

// The shape of a fused projection: B x T rows of N query, K key and K value heads of H; the first 2 * pairs dimensions
// of queries and keys are rotated. angle_rows is 0 when all batch rows stand at the same positions, else T.
struct Heads {
    i64 B, T, N, K, H, pairs, angle_rows, interleaved, normed;
    float eps;
    i64 all() const { return N + 2 * K; }
};

// A block of C queries from position `first` on, in sequences of T, with the S keys up to its end.
struct Block {
    i64 B, N, C, S, T, first;
    float scale;
    i64 low(const i64 *starts, i64 row) const { return starts ? starts[row / (N * C) * T + first + row % C] : 0; }
};

extern "C" {

void hw_rms_norm_forward(const float *x, const float *w, float *y, float *rstd, i64 rows, i64 n, float eps) {
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < rows; ++i) rms_forward_row(x + i * n, w, y + i * n, rstd + i, n, eps);
}

void hw_rms_norm_backward(const float *dy, const float *x, const float *w, const float *rstd, float *dx, float *dw,
                          i64 rows, i64 n) {
    Partials partials(n);
#pragma omp parallel
    {
        float *mine = partials.mine();
#pragma omp for schedule(static)
        for (i64 i = 0; i < rows; ++i) rms_backward_row(dy + i * n, x + i * n, w, rstd[i], dx + i * n, mine, n);
    }
    partials.sum(dw);
}

// qkv (B, T, N + 2K, H) -> q (B, N, T, H), k and v (B, K, T, H), queries and keys normalised per head and rotated.
// rstd (B, T, N + K) is kept for the backward pass.
void hw_heads_forward(const float *qkv, const float *angles, const float *wq, const float *wk, float *q, float *k,
                      float *v, float *rstd, const Heads *h) {
    const i64 H = h->H, turned = 2 * h->pairs;
#pragma omp parallel
    {
        std::vector<float> row(H);
#pragma omp for schedule(static)
        for (i64 bt = 0; bt < h->B * h->T; ++bt) {
            const i64 b = bt / h->T, t = bt % h->T;
            const float *angle = angles + (b * h->angle_rows + t) * turned;
            for (i64 n = 0; n < h->all(); ++n) {
                const float *in = qkv + (bt * h->all() + n) * H;
                const bool is_q = n < h->N, is_v = n >= h->N + h->K;
                const i64 heads = is_q ? h->N : h->K, head = is_q ? n : is_v ? n - h->N - h->K : n - h->N;
                float *out = (is_q ? q : is_v ? v : k) + ((b * heads + head) * h->T + t) * H;
                if (is_v) {
                    std::memcpy(out, in, H * sizeof(float));
                    continue;
                }
                if (h->normed) {
                    rms_forward_row(in, is_q ? wq : wk, row.data(), rstd + bt * (h->N + h->K) + n, H, h->eps);
                    in = row.data();
                }
                turn(in, out, angle, h->pairs, h->interleaved, 1.0f);
                if (turned < H) std::memcpy(out + turned, in + turned, (H - turned) * sizeof(float));
            }
        }
    }
}

// Gradients of q, k, v, read through (batch, head, position) strides in floats -> dqkv and the two norm weights'.
void hw_heads_backward(const float *qkv, const float *angles, const float *wq, const float *wk, const float *rstd,
                       const float *dq, const float *dk, const float *dv, const i64 *strides, float *dqkv, float *dwq,
                       float *dwk, const Heads *h) {
    const i64 H = h->H, turned = 2 * h->pairs;
    Partials partials(2 * H);
#pragma omp parallel
    {
        std::vector<float> row(H);
        float *mine = partials.mine();
#pragma omp for schedule(static)
        for (i64 bt = 0; bt < h->B * h->T; ++bt) {
            const i64 b = bt / h->T, t = bt % h->T;
            const float *angle = angles + (b * h->angle_rows + t) * turned;
            for (i64 n = 0; n < h->all(); ++n) {
                const bool is_q = n < h->N, is_v = n >= h->N + h->K;
                const i64 head = is_q ? n : is_v ? n - h->N - h->K : n - h->N;
                const i64 *s = strides + (is_q ? 0 : is_v ? 6 : 3);
                const float *in = (is_q ? dq : is_v ? dv : dk) + b * s[0] + head * s[1] + t * s[2];
                float *out = dqkv + (bt * h->all() + n) * H;
                if (is_v) {
                    std::memcpy(out, in, H * sizeof(float));
                    continue;
                }
                float *back = h->normed ? row.data() : out;
                turn(in, back, angle, h->pairs, h->interleaved, -1.0f);
                if (turned < H) std::memcpy(back + turned, in + turned, (H - turned) * sizeof(float));
                if (h->normed)
                    rms_backward_row(back, qkv + (bt * h->all() + n) * H, is_q ? wq : wk,
                                     rstd[bt * (h->N + h->K) + n], out, mine + (is_q ? 0 : H), H);
            }
        }
    }
    if (!h->normed) return;
    std::vector<float> sums(2 * H);
    partials.sum(sums.data());
    std::memcpy(dwq, sums.data(), H * sizeof(float));
    std::memcpy(dwk, sums.data() + H, H * sizeof(float));
}

void hw_relu2_forward(const float *x, float *y, i64 n) {
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < n; i += PART) relu2_forward_part(x + i, y + i, n - i < PART ? n - i : PART);
}

void hw_relu2_backward(const float *dy, const float *x, float *dx, i64 n) {
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < n; i += PART) relu2_backward_part(dy + i, x + i, dx + i, n - i < PART ? n - i : PART);
}

// In place over scores (B, N, C, S): the query of row c stands at position first + c and sees the keys from `starts`
// (B, T) of it, or from 0 where there is none, to itself.
void hw_causal_softmax(float *scores, const i64 *starts, const Block *b) {
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < b->B * b->N * b->C; ++i)
        softmax_row(scores + i * b->S, b->low(starts, i), b->first + i % b->C + 1, b->S, b->scale);
}

void hw_causal_softmax_backward(const float *weights, float *d, const i64 *starts, const Block *b) {
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < b->B * b->N * b->C; ++i)
        softmax_backward_row(weights + i * b->S, d + i * b->S, b->low(starts, i), b->first + i % b->C + 1, b->S, b->scale);
}
}
