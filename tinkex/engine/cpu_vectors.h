/* Vectors of floats, by the vector types of gcc and clang, and numbers in memory as such vectors. */
#ifndef TINKEX_CPU_VECTORS_H
#define TINKEX_CPU_VECTORS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define V 16
#elif defined(__AVX__)
#define V 8
#else
#define V 4
#endif

typedef float vf __attribute__((vector_size(4 * V)));
typedef int32_t vi __attribute__((vector_size(4 * V)));
typedef uint32_t vu __attribute__((vector_size(4 * V)));
typedef float vf_any __attribute__((vector_size(4 * V), aligned(4)));
typedef uint32_t vu_any __attribute__((vector_size(4 * V), aligned(4)));
typedef uint16_t vh __attribute__((vector_size(2 * V), aligned(2)));
typedef uint16_t bf16; /* the upper half of a float */

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

/* How numbers are stored: float32 or bfloat16. */
enum { FLOATS, HALVES };

INLINE vf load(const float *p) { return *(const vf_any *)p; }
INLINE void store(float *p, vf x) { *(vf_any *)p = x; }
INLINE vf pick(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

/* x, but at least low and at most high; what is not a number stays so. */
INLINE vf clamp(vf low, vf x, vf high) {
#ifdef __AVX512F__ /* one instruction each, where a comparison and a choice are three */
  return (vf)_mm512_min_ps((__m512)high, _mm512_max_ps((__m512)low, (__m512)x));
#else
  x = pick(x < low, low, x);
  return pick(x > high, high, x);
#endif
}

/* e^x, relative error below 3e-7 (Cephes' expf: e^x = 2^n e^r, |r| <= log(2) / 2). */
INLINE vf vexp(vf x) {
  x = clamp((vf){0} - 87.0f, x, (vf){0} + 88.0f);
  vf n = x * 1.44269504f + 12582912.0f; /* rounds */
  vi power = ((vi)n - 0x4b400000 + 127) << 23;
  n -= 12582912.0f;
  vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = (vf){0} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * r * r + r + 1.0f) * (vf)power;
}

INLINE vf vtanh(vf x) { return 1.0f - 2.0f / (vexp(2.0f * x) + 1.0f); }

enum { SILU, GELU_TANH };

/* An activation, and its derivative. */
INLINE vf activation(int name, vf x, vf *slope) {
  if (name == SILU) {
    vf share = 1.0f / (1.0f + vexp(-x));
    *slope = share * (1.0f + x * (1.0f - share));
    return x * share;
  }
  vf t = vtanh(0.79788456f * (x + 0.044715f * x * x * x));
  *slope = 0.5f * (1.0f + t) +
           0.5f * x * (1.0f - t * t) * (0.79788456f + 3 * 0.79788456f * 0.044715f * x * x);
  return 0.5f * x * (1.0f + t);
}

INLINE bf16 to_bf16(float x) { /* rounds to nearest, ties to even */
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t near = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (bf16)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : near); /* or not a number */
}

INLINE float from_bf16(bf16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

/* Floats whose upper halves are x, rounded to nearest, ties to even. */
INLINE vu rounded(vf x) {
  vu bits = (vu)x;
  return bits + 0x7fff + (bits >> 16 & 1);
}

/* Number i of those at p. */
INLINE const void *at(int kind, const void *p, int64_t i) {
  return (const char *)p + i * (kind == FLOATS ? 4 : 2);
}

/* V numbers at p. */
INLINE vf numbers(int kind, const void *p) {
  if (kind == FLOATS) return load(p);
  return (vf)(__builtin_convertvector(*(const vh *)p, vu) << 16);
}

INLINE void write(int kind, void *p, vf x) {
  if (kind == FLOATS) {
    store(p, x);
    return;
  }
#ifdef __AVX512BF16__
  __m256bh half = _mm512_cvtneps_pbh((__m512)x);
  memcpy(p, &half, sizeof(half));
#else
  *(vh *)p = __builtin_convertvector(rounded(x) >> 16, vh);
#endif
}

/* The sum of a vector's numbers. */
INLINE float sum_of(vf x) {
  float sum = 0;
  for (int i = 0; i < V; i++) sum += x[i];
  return sum;
}

#endif
