// Vectors of GCC and Clang: what is loaded, stored and made of numbers of 8, 16 and 32 bits.
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
typedef uint16_t half_t;  // bf16 or fp16: 16 bits
typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));

constexpr int LANES = 16;
// V fits a register, F are 16 numbers: compilers take vectors apart badly that are wider than the processor's.
#ifdef __AVX512F__
constexpr int WIDE = 16;
#else
constexpr int WIDE = 8;
#endif
constexpr int HALVES = LANES / WIDE;
typedef float V __attribute__((vector_size(4 * WIDE)));
typedef int32_t VI __attribute__((vector_size(4 * WIDE)));
typedef uint32_t VU __attribute__((vector_size(4 * WIDE)));
typedef uint16_t VH __attribute__((vector_size(2 * WIDE)));
typedef uint8_t VB __attribute__((vector_size(WIDE)));

template <class V, class T> INLINE V load(const T *p) { V v; memcpy(&v, p, sizeof v); return v; }
template <class V, class T> INLINE void store(T *p, V v) { memcpy(p, &v, sizeof v); }
INLINE F splat(float x) { return F{} + x; }
INLINE F wide(const float *p) { return load<F>(p); }
INLINE F wide(const half_t *p) { return (F)(__builtin_convertvector(load<H>(p), U) << 16); }
INLINE float wide1(half_t x) { uint32_t u = (uint32_t)x << 16; float f; memcpy(&f, &u, 4); return f; }
INLINE float wide1(float x) { return x; }
INLINE half_t narrow1(float x) {  // to nearest, ties to even
  uint32_t u; memcpy(&u, &x, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return (u >> 16) | 64;
  return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
INLINE H narrow(F x) {
  U u = (U)x;
  U r = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? r : U{} + 0x7fc0, H);
}
INLINE void put(float *p, float x) { *p = x; }
INLINE void put(half_t *p, float x) { *p = narrow1(x); }
INLINE float sum(F v) {  // halves onto halves
  typedef float F8 __attribute__((vector_size(32)));
  typedef float F4 __attribute__((vector_size(16)));
  F8 a[2];
  memcpy(a, &v, sizeof v);
  a[0] += a[1];
  F4 b[2];
  memcpy(b, a, sizeof b);
  b[0] += b[1];
  return (b[0][0] + b[0][2]) + (b[0][1] + b[0][3]);
}
INLINE F fp16s(const half_t *p) {  // 16 numbers: fp32's exponent begins 112 lower
  U h = __builtin_convertvector(load<H>(p), U);
  F size = (F)((h & 0x7fff) << 13) * 0x1p112f;
  return (F)((U)size | (h & 0x8000) << 16);
}

// Numbers of 8 and of 16 bits as numbers of 32: what compilers do one by one.
#if defined(__AVX512F__)
INLINE VI whole(const uint8_t *p) { return (VI)_mm512_cvtepu8_epi32(load<__m128i>(p)); }
INLINE VI whole(const uint16_t *p) { return (VI)_mm512_cvtepu16_epi32(load<__m256i>(p)); }
#elif defined(__AVX2__)
INLINE VI whole(const uint8_t *p) { return (VI)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
INLINE VI whole(const uint16_t *p) { return (VI)_mm256_cvtepu16_epi32(load<__m128i>(p)); }
#else
INLINE VI whole(const uint8_t *p) { return __builtin_convertvector(load<VB>(p), VI); }
INLINE VI whole(const uint16_t *p) { return __builtin_convertvector(load<VH>(p), VI); }
#endif

// Ask for lines of 64 bytes that will be read soon, where the processor does not foresee it.
INLINE void ask(const void *p, int lines) {
  for (int i = 0; i < lines; i++) __builtin_prefetch((const char *)p + i * 64);
}
