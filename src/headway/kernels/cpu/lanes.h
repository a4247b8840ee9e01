// Vectors of floats and integers, and the few operations that C++ cannot say: the dot product of codes, half floats.
//
// This file and the kernels after it are compiled once for each instruction set, in a namespace of its own (run.cpp):
// LEVEL is 0 portable, 2 AVX2, 3 AVX-512, 4 AVX-512 with VNNI; TARGET is the attribute that says so to the compiler.
// Vectors are GCC's and Clang's vector extension at the machine's own width; intrinsics stand here alone. No function of
// the standard library is called: the linker might keep the copy that was compiled for the larger instruction set.

#define FN TARGET static inline __attribute__((always_inline))
#define VECTOR __attribute__((vector_size(WIDTH)))

static const int WIDTH = LEVEL >= 3 ? 64 : LEVEL == 2 ? 32 : 16;  // bytes
static const int LANES = WIDTH / 4, PARTS = 16 / LANES;           // a block of sixteen rows has PARTS vectors

typedef float Floats VECTOR;
typedef int32_t Ints VECTOR;
typedef int16_t Shorts VECTOR;
typedef uint16_t Words VECTOR;
typedef uint16_t Halves __attribute__((vector_size(WIDTH / 2)));
typedef int8_t Bytes __attribute__((vector_size(WIDTH / 4)));
typedef uint8_t Codes VECTOR;  // four consecutive codes for each of LANES rows

template <class V> FN V load(const void *from) {
    V value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}

template <class V> FN void store(void *to, V value) { __builtin_memcpy(to, &value, sizeof value); }

// The first `count` of LANES numbers, and zeros where there are fewer.
FN Floats load_some(const float *from, i64 count) {
    if (count >= LANES) return load<Floats>(from);
    Floats value = {};
    if (count > 0) __builtin_memcpy(&value, from, count * sizeof(float));
    return value;
}

template <class T, class V> FN void store_some(T *to, V value, i64 count) {
    if (count >= LANES) store(to, value);
    else if (count > 0) __builtin_memcpy(to, &value, count * sizeof(T));
}

FN Floats splat(float value) { return value - Floats{}; }
FN Ints splat(int32_t value) { return value - Ints{}; }

// The number that stands at a place, in every lane: one load, where `splat` takes a detour through a register.
FN Floats splat_from(const float *at) {
#if LEVEL >= 3
    return (Floats)_mm512_set1_ps(*at);
#elif LEVEL == 2
    return (Floats)_mm256_broadcast_ss(at);
#else
    return splat(*at);
#endif
}

FN Ints splat_from(const int32_t *at) { return (Ints)splat_from((const float *)at); }
FN Floats to_floats(Ints value) { return __builtin_convertvector(value, Floats); }

// The nearest integers, halves to even.
FN Ints nearest(Floats value) {
#if LEVEL >= 3
    return (Ints)_mm512_cvtps_epi32((__m512)value);
#elif LEVEL == 2
    return (Ints)_mm256_cvtps_epi32((__m256)value);
#elif HEADWAY_X86
    return (Ints)_mm_cvtps_epi32((__m128)value);
#else
    Ints out;
    for (int i = 0; i < LANES; ++i) out[i] = (int32_t)__builtin_nearbyintf(value[i]);
    return out;
#endif
}

// Integers of one byte; the compiler by itself would take them one by one.
FN Bytes narrowed(Ints v) {
#if LEVEL >= 3
    return (Bytes)_mm512_cvtepi32_epi8((__m512i)v);
#elif LEVEL == 2
    const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    const __m128i bytes = _mm_packs_epi16(shorts, shorts);
    return load<Bytes>(&bytes);
#else
    return __builtin_convertvector(v, Bytes);
#endif
}

typedef int32_t FourInts __attribute__((vector_size(16)));
typedef float FourFloats __attribute__((vector_size(16)));

template <class Four, class V> FN Four folded(V v) {
    Four parts[WIDTH / 16];
    store(parts, v);
    for (int i = 1; i < WIDTH / 16; ++i) parts[0] += parts[i];
    return parts[0];
}

FN float sum_of(Floats v) {
    const FourFloats four = folded<FourFloats>(v);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

FN int32_t total_of(Ints v) {
    const FourInts four = folded<FourInts>(v);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

FN int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

FN int32_t largest_of(Ints v) {
    FourInts parts[WIDTH / 16];
    store(parts, v);
    for (int i = 1; i < WIDTH / 16; ++i) parts[0] = parts[i] > parts[0] ? parts[i] : parts[0];
    return larger(larger(parts[0][0], parts[0][2]), larger(parts[0][1], parts[0][3]));
}

#if LEVEL >= 3
// Steps towards the sums of many vectors: half of what is to be added is, and the rest of both vectors stands in one.
FN __m512 beside(__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }

FN __m512 pairs_beside(__m512 a, __m512 b) {
    const __m512d low = _mm512_unpacklo_pd((__m512d)a, (__m512d)b), high = _mm512_unpackhi_pd((__m512d)a, (__m512d)b);
    return _mm512_add_ps((__m512)low, (__m512)high);
}

FN __m512 fours_beside(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}
#endif

// The sums of LANES vectors, as one.
FN Floats sums_of(const Floats *v) {
#if LEVEL >= 3
    __m512 four[4];
    for (int i = 0; i < 4; ++i) {
        const __m512 *w = (const __m512 *)v + 4 * i;
        four[i] = pairs_beside(beside(w[0], w[1]), beside(w[2], w[3]));
    }
    return (Floats)fours_beside(fours_beside(four[0], four[1]), fours_beside(four[2], four[3]));
#elif LEVEL == 2
    const __m256 *w = (const __m256 *)v;
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(w[0], w[1]), _mm256_hadd_ps(w[2], w[3]));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(w[4], w[5]), _mm256_hadd_ps(w[6], w[7]));
    return (Floats)_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
#else
    Floats out;
    for (int i = 0; i < LANES; ++i) out[i] = sum_of(v[i]);
    return out;
#endif
}

// A sum that is not merged with what it is added to. GCC's own barrier takes a vector apart, lane by lane.
template <class V> FN V apart(V value) {
#if HEADWAY_X86
    asm("" : "+v"(value));
    return value;
#elif defined(__has_builtin) && __has_builtin(__builtin_assoc_barrier)
    return __builtin_assoc_barrier(value);
#else
    return value;
#endif
}

// sum + a b, rounded alike wherever it is inlined.
FN Floats plus_product(Floats sum, Floats a, Floats b) {
#if LEVEL >= 3
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif LEVEL == 2
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return sum + apart(a * b);
#endif
}

FN Codes low_halves(Codes pairs) { return pairs & 15; }
FN Codes high_halves(Codes pairs) { return (Codes)((Words)pairs >> 4) & 15; }

FN Floats load_halves(const uint16_t *from) {
#if LEVEL >= 3
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif LEVEL == 2
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
    const Ints half = __builtin_convertvector(load<Halves>(from), Ints), rest = half & 0x7FFF;
    const Ints normal = (rest << 13) + 0x38000000, beyond = (rest << 13) | 0x7F800000;
    const Floats small = to_floats(rest) * 5.9604644775390625e-8f;  // zero or subnormal: a whole multiple of 2^-24
    return (Floats)((rest < 0x400 ? (Ints)small : rest < 0x7C00 ? normal : beyond) | (half & 0x8000) << 16);
#endif
}

FN float half_to_float(uint16_t half) {
    const uint16_t several[LANES] = {half};
    return load_halves(several)[0];
}

FN Floats load_bytes(const int8_t *from) {
#if LEVEL >= 3
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#elif LEVEL == 2
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#else
    return to_floats(__builtin_convertvector(load<Bytes>(from), Ints));
#endif
}

// LANES numbers from place `at` of floats, half floats, or codes of one byte.
template <int KEPT> FN Floats numbers_at(const void *from, i64 at) {
    if (KEPT == CODES) return load_bytes((const int8_t *)from + at);
    return KEPT == HALVES ? load_halves((const uint16_t *)from + at) : load<Floats>((const float *)from + at);
}

// The running sum of LANES rows over quadruples of codes, less W's zero, times activations. BITS says how large codes may
// be: 4 (below 16), 7 (below 128) or 8. SHIFT is what `add` takes off each code.
//
// Without VNNI, AVX2 and AVX-512 multiply bytes into sums of 16 bits, which hold 16 products of 15 * 127, two of 127 * 127,
// and none more of 255 * 127: 4-bit codes of one chunk are summed in 16 bits, others in 32; 8-bit codes are made signed,
// and their sign goes over to the activation. The portable kernel widens both first. The zero times the sum of the
// activations is taken off before all else, of 16 bits from the lower sum: neither then exceeds 2 * 16 * 8 * 127.
template <int BITS> struct Sum {
    static const int SHIFT = BITS == 8 && (LEVEL == 2 || LEVEL == 3) ? 128 : 0;
    static const bool SHORT = BITS == 4 && (LEVEL == 2 || LEVEL == 3);
    Ints ints;

    TARGET static Ints less(i64 zero) { return splat((int32_t)(SHORT ? -zero & 0xFFFF : SHIFT - zero)); }
    TARGET void begin(Ints less, Ints sum) { ints = SHORT ? (Ints)((Shorts)less * (Shorts)sum) : less * sum; }

    TARGET void add(Codes codes, const int8_t *four) {
        int32_t packed;
        __builtin_memcpy(&packed, four, 4);
#if LEVEL == 4
        ints = (Ints)_mm512_dpbusd_epi32((__m512i)ints, (__m512i)codes, _mm512_set1_epi32(packed));
#elif LEVEL == 3
        __m512i code = (__m512i)codes, times = _mm512_set1_epi32(packed);
        if (BITS == 8) {
            code = code ^ _mm512_set1_epi8(-128);
            times = _mm512_mask_sub_epi8(times, _mm512_movepi8_mask(code), _mm512_setzero_si512(), times);
            code = _mm512_abs_epi8(code);
        }
        add_pairs((Shorts)_mm512_maddubs_epi16(code, times));
#elif LEVEL == 2
        __m256i code = (__m256i)codes, times = _mm256_set1_epi32(packed);
        if (BITS == 8) {
            code = code ^ _mm256_set1_epi8(-128);
            times = _mm256_sign_epi8(times, code);
            code = _mm256_abs_epi8(code);
        }
        add_pairs((Shorts)_mm256_maddubs_epi16(code, times));
#elif HEADWAY_X86
        // Two columns at a time in 16 bits, the first and the third and then the others.
        const __m128i four16 = _mm_srai_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(packed), _mm_cvtsi32_si128(packed)), 8);
        const __m128i even = _mm_shuffle_epi32(_mm_shufflelo_epi16(four16, 0x88), 0);
        const __m128i odd = _mm_shuffle_epi32(_mm_shufflelo_epi16(four16, 0xDD), 0);
        ints += (Ints)_mm_madd_epi16((__m128i)((Words)codes & 255), even);
        ints += (Ints)_mm_madd_epi16((__m128i)((Words)codes >> 8), odd);
        asm("" : "+x"(ints));
#else
        const Ints even = splat((four[0] & 0xFFFF) | four[2] * 65536), odd = splat((four[1] & 0xFFFF) | four[3] * 65536);
        ints += widened((Shorts)((Words)codes & 255) * (Shorts)even) + widened((Shorts)((Words)codes >> 8) * (Shorts)odd);
#endif
    }

    TARGET void add_pairs(Shorts pairs) {
        ints = SHORT ? (Ints)((Shorts)ints + pairs) : ints + widened(pairs);
#if LEVEL >= 2
        // Else the compiler puts all additions of a chunk behind its products, for which there are no registers.
        asm("" : "+v"(ints));
#endif
    }

    TARGET static Ints widened(Shorts pairs) {
#if LEVEL >= 3
        return (Ints)_mm512_madd_epi16((__m512i)pairs, _mm512_set1_epi16(1));
#elif LEVEL == 2
        return (Ints)_mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi16(1));
#else
        return ((Ints)pairs >> 16) + ((Ints)pairs << 16 >> 16);
#endif
    }

    TARGET Ints total() const { return SHORT ? widened((Shorts)ints) : ints; }
};
