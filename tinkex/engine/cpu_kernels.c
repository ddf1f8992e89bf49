/* A decoding step on a CPU: one more token of every running sequence, through all layers.
 *
 * The threads of one OpenMP team share each product by the rows of its matrix, and meet at a few
 * barriers a layer. Activations are float32; weights, keys and values are read as they are stored.
 * Each number of a result is summed in the same order whatever the other sequences of the step, and
 * whatever the number of threads: a sequence's tokens do not depend on its company.
 *
 * Notation: N sequences, K columns of a matrix, H heads, G key/value heads, D head size.
 * cpu_kernels.py compiles this file, and mirrors its structs.
 */
#include <stdlib.h>

#include "cpu_vectors.h"
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#define omp_get_num_threads() 1
#endif

/* -- vectors ----------------------------------------------------------------------------------- */

/* A tile of a product: MR rows of the matrix times NR sequences, V sums in all. Many rows: the
 * inputs of all sequences are read once for each MR rows, from the L2 cache if they are many. */
#define NR (V > 4 ? 2 : 1)
#define MR (V / NR)

typedef float v4 __attribute__((vector_size(16), aligned(4)));
typedef int8_t vb __attribute__((vector_size(V), aligned(1)));

INLINE vf load_bf16(const bf16 *p) {
  return (vf)(__builtin_convertvector(*(const vh *)p, vi) << 16);
}

INLINE vf load_i8(const int8_t *p) { return __builtin_convertvector(*(const vb *)p, vf); }

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

/* Lanes that hold sums of a and b by turns of 1, 2, 4 or 8. */
#if V == 16
#define SUM1(a, b)                                                            \
  (SHUFFLE(a, b, 0, 17, 2, 19, 4, 21, 6, 23, 8, 25, 10, 27, 12, 29, 14, 31) + \
   SHUFFLE(a, b, 1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30))
#define SUM2(a, b)                                                           \
  (SHUFFLE(a, b, 0, 1, 18, 19, 4, 5, 22, 23, 8, 9, 26, 27, 12, 13, 30, 31) + \
   SHUFFLE(a, b, 2, 3, 16, 17, 6, 7, 20, 21, 10, 11, 24, 25, 14, 15, 28, 29))
#define SUM4(a, b)                                                           \
  (SHUFFLE(a, b, 0, 1, 2, 3, 20, 21, 22, 23, 8, 9, 10, 11, 28, 29, 30, 31) + \
   SHUFFLE(a, b, 4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27))
#define SUM8(a, b)                                                         \
  (SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28, 29, 30, 31) + \
   SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23))
#elif V == 8
#define SUM1(a, b) \
  (SHUFFLE(a, b, 0, 9, 2, 11, 4, 13, 6, 15) + SHUFFLE(a, b, 1, 8, 3, 10, 5, 12, 7, 14))
#define SUM2(a, b) \
  (SHUFFLE(a, b, 0, 1, 10, 11, 4, 5, 14, 15) + SHUFFLE(a, b, 2, 3, 8, 9, 6, 7, 12, 13))
#define SUM4(a, b) \
  (SHUFFLE(a, b, 0, 1, 2, 3, 12, 13, 14, 15) + SHUFFLE(a, b, 4, 5, 6, 7, 8, 9, 10, 11))
#else
#define SUM1(a, b) (SHUFFLE(a, b, 0, 5, 2, 7) + SHUFFLE(a, b, 1, 4, 3, 6))
#define SUM2(a, b) (SHUFFLE(a, b, 0, 1, 6, 7) + SHUFFLE(a, b, 2, 3, 4, 5))
#endif

/* Lane i of the result is the sum of all lanes of a[i]; uses up a. */
INLINE vf sums(vf *a) {
  UNROLL for (int i = 0; i < V / 2; i++) a[i] = SUM1(a[2 * i], a[2 * i + 1]);
  UNROLL for (int i = 0; i < V / 4; i++) a[i] = SUM2(a[2 * i], a[2 * i + 1]);
#if V >= 8
  UNROLL for (int i = 0; i < V / 8; i++) a[i] = SUM4(a[2 * i], a[2 * i + 1]);
#endif
#if V >= 16
  a[0] = SUM8(a[0], a[1]);
#endif
  return a[0];
}

INLINE float sum(vf a) {
  vf all[V];
  UNROLL for (int i = 0; i < V; i++) all[i] = a;
  return sums(all)[0];
}

/* Applies an expression of a vector x to count floats at p. */
#define EACH(p, count, expression)                          \
  do {                                                      \
    int64_t at = 0;                                         \
    for (; at + V <= (count); at += V) {                    \
      vf x = load((p) + at);                                \
      *(vf_any *)((p) + at) = (expression);                 \
    }                                                       \
    if (at < (count)) {                                     \
      vf x = {0};                                           \
      memcpy(&x, (p) + at, ((count) - at) * sizeof(float)); \
      x = (expression);                                     \
      memcpy((p) + at, &x, ((count) - at) * sizeof(float)); \
    }                                                       \
  } while (0)

/* -- what is computed (mirrored in cpu_kernels.py) ---------------------------------------------- */

enum { FLOAT32, BFLOAT16, INT8 };

/* Low-rank matrices of an adapter: a (parts rank, K), b (rows of the matrix, rank). */
typedef struct {
  const void *a, *b; /* NULL if the adapter does not change this matrix */
  int64_t rank;
} Thin;

typedef struct {
  const void *weight;  /* (rows, columns) */
  const float *scales; /* (rows,) of int8, or NULL */
  const float *bias;   /* (rows,) or NULL */
  const int64_t *ends; /* (parts,) the row after the last of each part */
  const Thin *thin;    /* one for each adapter of the step, or NULL */
  int64_t rows, columns, parts;
} Matrix;

/* RMSNorm of columns start..stop of queries, keys and values, each *size* of them for itself. */
typedef struct {
  const float *weight; /* (stop - start,) or NULL */
  int64_t start, stop, size;
} HeadNorm;

typedef struct {
  const float *before_attention, *before_mlp, *after_attention, *after_mlp; /* or NULL */
  const float *cosines, *sines; /* (N, half) of each sequence's position, or NULL */
  int64_t half, window;         /* window: 0 is all */
  HeadNorm heads[2];
  Matrix qkv, o, gate_up, down;
} Layer;

/* Keys and values of some positions; strides in numbers. */
typedef struct {
  void *k, *v;
  int64_t layer, head; /* from a layer, or a head, to the next */
  int64_t length;
} Span;

/* The prompt that it shares with others, and its own; the new position is the last of its own. */
typedef struct {
  Span spans[2];
} Sequence;

typedef struct {
  const Layer *layers;
  const Sequence *sequences;
  const int64_t *adapters; /* (adapters + 1,) first sequence of each adapter, and N */
  const float *final_norm; /* (width,) */
  float *x;                /* (N, width) into the first layer; changed */
  const int64_t *wanted;   /* (wanted_count,) the sequences whose logits are wanted, ascending */
  const int64_t *wanted_adapters; /* as *adapters*, of these */
  float *logits;           /* (wanted_count, ld_logits), of which the vocabulary is written */
  Matrix head;
  int64_t count, depth, width, heads, kv_heads, head_dim, mlp, adapter_count,
      wanted_count, ld_logits;
  int32_t weights, cache, activation, interleaved, threads;
  float eps, scale, cap, residual;
} Step;

/* -- products ----------------------------------------------------------------------------------- */

/* What becomes of a product: product + bias, or added to y with a factor. */
typedef struct {
  const float *bias;
  float factor;
  int adds;
} End;

INLINE void finish(vf result, float *y, size_t ldy, int64_t row, int rows, int count, End end) {
  float values[V] __attribute__((aligned(64)));
  *(vf *)values = result;
  if (rows % 4 == 0) {
    UNROLL for (int j = 0; j < count; j++) UNROLL for (int i = 0; i < rows; i += 4) {
      v4 value = *(v4 *)(values + j * rows + i);
      v4 *at = (v4 *)(y + j * ldy + row + i);
      if (end.bias) value += *(const v4 *)(end.bias + row + i);
      *at = end.adds ? *at + end.factor * value : value;
    }
    return;
  }
  float value = values[0] + (end.bias ? end.bias[row] : 0), *at = y + row;
  *at = end.adds ? *at + end.factor * value : value;
}

/* Keeps a vector in a register: gcc would read it from memory for each use. */
#if defined(__x86_64__)
#define HOLD(x) __asm__("" : "+v"(x))
#else
#define HOLD(x)
#endif

/* What a product reads: floats, and the same rounded where bfloat16 is multiplied in pairs. */
typedef struct {
  float *exact;
  bf16 *rounded; /* or NULL */
  size_t ld;
} Input;

/* Low-rank changes of a product: of each adapter's sequences, B (A x). */
typedef struct {
  const Thin *thin;      /* one for each adapter, or NULL */
  const int64_t *bounds; /* (adapters + 1,) the first sequence of each, and the end */
  int64_t adapters, part;
  Input inner;           /* (N, ld) A x of all parts */
} Change;

/* The *left* numbers at p and zeros, as a vector. */
#define LOAD_LAST(T, STRIDE, LOAD, p, left) \
  ({                                        \
    T last[STRIDE] = {0};                   \
    memcpy(last, p, (left) * sizeof(T));    \
    LOAD(last);                             \
  })

/* How numbers of types W and X are multiplied: STRIDE at a time, as vectors VEC. */
#define MULTIPLY_ADD(total, a, b) ((total) + (a) * (b))
#define AS_FLOATS(W, LOAD_W) W, float, V, vf, LOAD_W, load, LOAD_LAST, MULTIPLY_ADD

#ifdef __AVX512BF16__
#define HAS_PAIRS 1
typedef int16_t pairs __attribute__((vector_size(64)));
typedef int16_t pairs_any __attribute__((vector_size(64), aligned(2)));
#define LOAD_PAIRS(p) (*(const pairs_any *)(p))
#define LOAD_LAST_PAIRS(T, STRIDE, LOAD, p, left) \
  ((pairs)_mm512_maskz_loadu_epi16(((__mmask32)1 << (left)) - 1, p))
#define MULTIPLY_PAIRS(total, a, b) \
  ((vf)_mm512_dpbf16_ps((__m512)(total), (__m512bh)(a), (__m512bh)(b)))
#define AS_PAIRS bf16, bf16, 32, pairs, LOAD_PAIRS, LOAD_PAIRS, LOAD_LAST_PAIRS, MULTIPLY_PAIRS
#else
#define HAS_PAIRS 0
#endif

/* total += rows of w (width apart) times count rows of x; the last columns are zero-padded. A single
 * row of x goes through w row after row, as w is stored. Otherwise some *lines* of rows *ahead* are
 * fetched into the cache at each step. */
#define ADD_PRODUCT(W, X, STRIDE, VEC, LOAD_W, LOAD_X, LAST, MULTIPLY, w, width, x, ldx, columns, ahead, lines) \
  do {                                                                                                          \
    const int64_t whole = (columns) / STRIDE * STRIDE, left = (columns) - whole;                                \
    if (count == 1) {                                                                                           \
      UNROLL for (int i = 0; i < rows; i++) {                                                                   \
        vf own = total[i];                                                                                      \
        for (int64_t k = 0; k < whole; k += STRIDE)                                                             \
          own = MULTIPLY(own, LOAD_W((w) + i * (width) + k), LOAD_X((x) + k));                                  \
        total[i] = own;                                                                                         \
      }                                                                                                         \
    } else {                                                                                                    \
      for (int64_t k = 0; k < whole; k += STRIDE) {                                                             \
        UNROLL for (int i = 0; i < lines; i++) __builtin_prefetch((ahead) + i * (width) + k, 0, 2);             \
        VEC b[NR];                                                                                              \
        UNROLL for (int j = 0; j < count; j++) {                                                                \
          b[j] = LOAD_X((x) + j * (ldx) + k);                                                                   \
          HOLD(b[j]);                                                                                           \
        }                                                                                                       \
        UNROLL for (int i = 0; i < rows; i++) {                                                                 \
          VEC a = LOAD_W((w) + i * (width) + k);                                                                \
          HOLD(a);                                                                                              \
          UNROLL for (int j = 0; j < count; j++)                                                                \
            total[j * rows + i] = MULTIPLY(total[j * rows + i], a, b[j]);                                       \
        }                                                                                                       \
      }                                                                                                         \
    }                                                                                                           \
    if (left) {                                                                                                 \
      VEC b[NR];                                                                                                \
      UNROLL for (int j = 0; j < count; j++)                                                                    \
        b[j] = LAST(X, STRIDE, LOAD_X, (x) + j * (ldx) + whole, left);                                          \
      UNROLL for (int i = 0; i < rows; i++) {                                                                   \
        VEC a = LAST(W, STRIDE, LOAD_W, (w) + i * (width) + whole, left);                                       \
        UNROLL for (int j = 0; j < count; j++)                                                                  \
          total[j * rows + i] = MULTIPLY(total[j * rows + i], a, b[j]);                                         \
      }                                                                                                         \
    }                                                                                                           \
  } while (0)

/* Bytes of a tile's row: so many of MR rows stay in the L1 cache while sequences are multiplied. */
#define ROW_BYTES 3072

/* Rows of the matrix from those that are multiplied to those that are fetched. */
#define AHEAD (2 * MR)

/* Products with a matrix of one type. NAME: one tile, of *count* sequences, the *rows* of w from
 * *row* on, and columns from..to. NAME_rows: y of rows first..last. While a tile's rows are
 * multiplied with the first sequences, the rows after the next tile are fetched from memory, some
 * *lines* at each step. */
#define PRODUCTS(NAME, W, X, KIND, THIN, THIN_KIND, FIELD)                                          \
  INLINE void NAME(const int rows, const int count, const int lines, float *y, size_t ldy,          \
                   const X *x, size_t ldx, const W *w, int64_t columns, int64_t width, int64_t row, \
                   const float *scales, const THIN *b, int64_t rank, const X *inner,                \
                   size_t ld_inner, const W *ahead, End end) {                                      \
    vf total[V];                                                                                    \
    UNROLL for (int i = 0; i < V; i++) total[i] = (vf){0};                                          \
    ADD_PRODUCT(KIND, w, width, x, ldx, columns, ahead, lines);                                     \
    if (scales)                                                                                     \
      UNROLL for (int j = 0; j < count; j++) UNROLL for (int i = 0; i < rows; i++)                  \
          total[j * rows + i] *= scales[row + i];                                                   \
    if (b) {                                                                                        \
      const THIN *thin = b + row * rank;                                                            \
      ADD_PRODUCT(THIN_KIND, thin, rank, inner, ld_inner, rank, thin, 0);                           \
    }                                                                                               \
    finish(sums(total), y, ldy, row, rows, count, end);                                             \
  }                                                                                                 \
                                                                                                    \
  static void NAME##_rows(float *y, size_t ldy, const X *x, size_t ldx, const W *w,                 \
                          int64_t columns, int64_t first, int64_t last, const float *scales,        \
                          const Change *change, const W *next, End whole) {                         \
    int64_t start = change->bounds[0], stop = change->bounds[change->adapters], n = stop - start;   \
    int64_t parts = (columns * sizeof(W) + ROW_BYTES - 1) / ROW_BYTES;                              \
    int64_t part = ((columns + parts - 1) / parts + 31) / 32 * 32;                                  \
    int64_t lines = n < 2 * NR ? MR : n < 4 * NR ? MR / 2 : n < 8 * NR ? MR / 4 : 1;                \
    for (int64_t row = first; row < last;) {                                                        \
      int is_single = n == 1 && row + V <= last, is_tile = row + MR <= last;                        \
      for (int64_t from = 0; from < columns; from += part) {                                        \
        int64_t to = from + part < columns ? from + part : columns;                                 \
        End end = from == 0 || whole.adds ? whole : (End){NULL, 1, 1};                              \
        if (from > 0) end.bias = NULL;                                                              \
        int64_t past = row + AHEAD - last;                                                          \
        const W *ahead = (past < 0 ? w + last * columns : next) + past * columns + from;            \
        const W *none = past < 0 || next ? ahead + MR * columns : ahead;                            \
        for (int64_t i = 0; i < change->adapters; i++) {                                            \
          int64_t j = change->bounds[i], end_j = change->bounds[i + 1];                             \
          const Thin *own = change->thin ? &change->thin[i] : NULL;                                 \
          const THIN *b = own && to == columns ? own->b : NULL;                                     \
          int64_t rank = b ? own->rank : 0;                                                         \
          const X *inner = change->inner.FIELD + change->part * rank;                               \
          for (int64_t k = 0; k < MR * rank; k += 64 / sizeof(THIN))                                \
            __builtin_prefetch(b + (row + AHEAD) * rank + k, 0, 2);                                 \
          /* clang-format off */                                                                    \
          if (is_single && j < end_j) {                                                             \
            RUN(NAME, V, 1, 0);                                                                     \
          } else if (is_tile) {                                                                     \
            for (; j + NR <= end_j; j += NR, ahead += lines * columns) {                            \
              if (ahead >= none) RUN(NAME, MR, NR, 0);                                              \
              else if (lines == 1) RUN(NAME, MR, NR, 1);                                            \
              else if (lines == MR / 4) RUN(NAME, MR, NR, MR / 4);                                  \
              else if (lines == MR / 2) RUN(NAME, MR, NR, MR / 2);                                  \
              else RUN(NAME, MR, NR, MR);                                                           \
            }                                                                                       \
            for (; j < end_j; j++) RUN(NAME, MR, 1, 0);                                             \
          } else {                                                                                  \
            for (; j < end_j; j++) RUN(NAME, 1, 1, 0);                                              \
          }                                                                                         \
          /* clang-format on */                                                                     \
        }                                                                                           \
      }                                                                                             \
      row += is_single ? V : is_tile ? MR : 1;                                                      \
    }                                                                                               \
  }
#define RUN(NAME, rows, count, lines)                                                           \
  NAME(rows, count, lines, y + j * ldy, ldy, x + j * ldx + from, ldx, w + row * columns + from, \
       to - from, columns, row, scales, b, rank, inner + j * change->inner.ld, change->inner.ld, ahead, end)

PRODUCTS(times_f32, float, float, AS_FLOATS(float, load), float, AS_FLOATS(float, load), exact)
PRODUCTS(times_bf16, bf16, float, AS_FLOATS(bf16, load_bf16), bf16, AS_FLOATS(bf16, load_bf16), exact)
PRODUCTS(times_i8, int8_t, float, AS_FLOATS(int8_t, load_i8), bf16, AS_FLOATS(bf16, load_bf16), exact)
#if HAS_PAIRS
PRODUCTS(times_pairs, bf16, bf16, AS_PAIRS, bf16, AS_PAIRS, rounded)
#endif

/* y of rows first..last of w; *next* is what this thread reads afterwards, or NULL. */
static void multiply(int type, const void *w, int64_t columns, const float *scales, Input in,
                     const Change *change, const void *next, float *y, size_t ldy, int64_t first,
                     int64_t last, End end) {
#define ROWS(NAME, input) \
  NAME##_rows(y, ldy, input, in.ld, w, columns, first, last, scales, change, next, end)
#if HAS_PAIRS
  if (type == BFLOAT16 && in.rounded) {
    ROWS(times_pairs, in.rounded);
    return;
  }
#endif
  if (type == FLOAT32) ROWS(times_f32, in.exact);
  if (type == BFLOAT16) ROWS(times_bf16, in.exact);
  if (type == INT8) ROWS(times_i8, in.exact);
#undef ROWS
}

/* The part of 0..total, in steps of *quantum*, that is this thread's. */
typedef struct {
  int64_t first, last;
} Portion;

static Portion portion(int64_t total, int64_t quantum) {
  int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
  int64_t steps = (total + quantum - 1) / quantum;
  int64_t first = steps * thread / threads * quantum;
  int64_t last = steps * (thread + 1) / threads * quantum;
  return (Portion){first, last < total ? last : total};
}

/* Rounds some columns of rows first..last. */
static void round_rows(Input in, int64_t first, int64_t last, Portion columns) {
  if (!in.rounded) return;
  for (int64_t j = first; j < last; j++)
    for (int64_t k = columns.first; k < columns.last; k++)
      in.rounded[j * in.ld + k] = to_bf16(in.exact[j * in.ld + k]);
}

/* Adapters are float32 or bfloat16, also where the weights are int8. */
static int thin_type(const Step *s) { return s->weights == FLOAT32 ? FLOAT32 : BFLOAT16; }

static int is_adapted(const Step *s, const Matrix *m) {
  if (m->thin)
    for (int64_t i = 0; i < s->adapter_count; i++)
      if (m->thin[i].a) return 1;
  return 0;
}

static size_t bytes(int type) { return type == FLOAT32 ? 4 : type == BFLOAT16 ? 2 : 1; }

static const void *row_of(const Step *s, const Matrix *m, int64_t row) {
  return (const char *)m->weight + row * m->columns * bytes(s->weights);
}

/* This thread's rows of A of an adapter. */
static Portion rows_of_a(const Matrix *m, const Thin *thin) { return portion(m->parts * thin->rank, V); }

/* What this thread reads first of a matrix, of which it multiplies the rows from *row* on: its rows
 * of A of the first adapter from number i on that has an A, else that row. */
static const void *beginning(const Step *s, const Matrix *m, int64_t row, int64_t i) {
  for (; m->thin && i < s->adapter_count; i++) {
    const Thin *thin = &m->thin[i];
    if (thin->a)
      return (const char *)thin->a + rows_of_a(m, thin).first * m->columns * bytes(thin_type(s));
  }
  return row_of(s, m, row);
}

/* This thread's portion of A x of all adapters, then a barrier; it multiplies the rows of the
 * matrix from *row* on. */
static void times_a(const Step *s, const Matrix *m, Input in, Input inner, int64_t row) {
  if (!is_adapted(s, m)) return;
  for (int64_t i = 0; i < s->adapter_count; i++) {
    const Thin *thin = &m->thin[i];
    if (!thin->a) continue;
    Change none = {.bounds = s->adapters + i, .adapters = 1};
    Portion own = rows_of_a(m, thin);
    multiply(thin_type(s), thin->a, m->columns, NULL, in, &none, beginning(s, m, row, i + 1),
             inner.exact, inner.ld, own.first, own.last, (End){0});
    round_rows(inner, s->adapters[i], s->adapters[i + 1], own);
  }
#pragma omp barrier
}

/* y[own] of the matrix with the adapters, after times_a. */
static void times(const Step *s, const Matrix *m, Input in, Input inner, const void *next, float *y,
                  size_t ldy, Portion own, float factor, int adds) {
  Change change = {m->thin, s->adapters, s->adapter_count, 0, inner};
  int64_t begin = 0;
  for (; change.part < m->parts; begin = m->ends[change.part++]) {
    int64_t from = own.first > begin ? own.first : begin;
    int64_t to = own.last < m->ends[change.part] ? own.last : m->ends[change.part];
    if (from < to)
      multiply(s->weights, m->weight, m->columns, m->scales, in, &change,
               to < own.last ? row_of(s, m, to) : next, y, ldy, from, to,
               (End){m->bias, factor, adds});
  }
}

/* -- parts of a layer --------------------------------------------------------------------------- */

/* 1 / rms of x (count,). */
INLINE float inverse_rms(const float *x, int64_t count, float eps) {
  vf total = {0};
  int64_t k = 0;
  for (; k + V <= count; k += V) {
    vf a = load(x + k);
    total += a * a;
  }
  float rest = sum(total);
  for (; k < count; k++) rest += x[k] * x[k];
  return 1.0f / sqrtf(rest / count + eps);
}

static void norm(float *to, const float *x, const float *weight, int64_t count, float eps) {
  if (!weight) {
    if (to != x) memcpy(to, x, count * sizeof(float));
    return;
  }
  float scale = inverse_rms(x, count, eps);
  for (int64_t k = 0; k < count; k++) to[k] = x[k] * scale * weight[k];
}

static void rotate(float *head, const float *cosines, const float *sines, int64_t half,
                   int interleaved) {
  int64_t step = interleaved ? 2 : 1, other = interleaved ? 1 : half;
  for (int64_t i = 0; i < half; i++) {
    float *a = head + i * step, *b = a + other, first = *a, second = *b;
    *a = first * cosines[i] - second * sines[i];
    *b = second * cosines[i] + first * sines[i];
  }
}

static void keep(const Step *s, void *to, const float *from, int64_t count) {
  if (s->cache == FLOAT32) {
    memcpy(to, from, count * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; i++) ((bf16 *)to)[i] = to_bf16(from[i]);
}

INLINE void *place(const Step *s, void *base, int64_t numbers) {
  return (char *)base + numbers * (s->cache == FLOAT32 ? 4 : 2);
}

/* Norms and positions of a sequence's queries and keys (qkv); keeps its keys and values. */
static void prepare(const Step *s, const Layer *layer, int64_t number, int64_t j, Input qkv) {
  float *row = qkv.exact + j * qkv.ld;
  const Span *own = &s->sequences[j].spans[1];
  int64_t size = s->head_dim, rotated = s->heads + s->kv_heads;
  for (int i = 0; i < 2; i++) {
    const HeadNorm *n = &layer->heads[i];
    for (int64_t at = n->start; n->weight && at < n->stop; at += n->size)
      norm(row + at, row + at, n->weight + at - n->start, n->size, s->eps);
  }
  if (layer->cosines)
    for (int64_t h = 0; h < rotated; h++)
      rotate(row + h * size, layer->cosines + j * layer->half, layer->sines + j * layer->half,
             layer->half, s->interleaved);
  for (int64_t g = 0; g < s->kv_heads; g++) {
    int64_t at = number * own->layer + g * own->head + (own->length - 1) * size;
    keep(s, place(s, own->k, at), row + (s->heads + g) * size, size);
    keep(s, place(s, own->v, at), row + (rotated + g) * size, size);
  }
  if (qkv.rounded)
    for (int64_t k = 0; k < s->heads * size; k++) qkv.rounded[j * qkv.ld + k] = to_bf16(row[k]);
}

/* Positions of a piece of attention, which one thread computes. */
#define PIECE 256

/* out (D,) += weights (count,) times values (count, D) */
static void add_values(const Step *s, float *out, const float *weights, const void *values,
                       int64_t count) {
  int64_t size = s->head_dim, d = 0;
#define SOME(VECTORS, TYPE, LOAD)                                                     \
  for (; d + VECTORS * V <= size; d += VECTORS * V) {                                 \
    vf total[VECTORS];                                                                \
    UNROLL for (int i = 0; i < VECTORS; i++) total[i] = load(out + d + i * V);        \
    for (int64_t t = 0; t < count; t++)                                               \
      UNROLL for (int i = 0; i < VECTORS; i++)                                        \
          total[i] += weights[t] * LOAD((const TYPE *)values + t * size + d + i * V); \
    UNROLL for (int i = 0; i < VECTORS; i++) *(vf_any *)(out + d + i * V) = total[i]; \
  }
  if (s->cache == FLOAT32) {
    SOME(4, float, load)
    SOME(1, float, load)
    for (; d < size; d++)
      for (int64_t t = 0; t < count; t++) out[d] += weights[t] * ((const float *)values)[t * size + d];
  } else {
    SOME(4, bf16, load_bf16)
    SOME(1, bf16, load_bf16)
    for (; d < size; d++)
      for (int64_t t = 0; t < count; t++)
        out[d] += weights[t] * from_bf16(((const bf16 *)values)[t * size + d]);
  }
#undef SOME
}

/* A piece of attention: of one sequence, one key/value head, positions start..stop. Its queries'
 * results follow each other in *out*: D sums of values, their greatest product, and the sum of
 * weights, which are relative to it. */
static void attend(const Step *s, const Layer *layer, int64_t number, int64_t j, int64_t g,
                   int64_t start, int64_t stop, Input qkv, float *scores, float *out) {
  const Sequence *sequence = &s->sequences[j];
  int64_t size = s->head_dim, group = s->heads / s->kv_heads, done = 0;
  int64_t length = sequence->spans[0].length + sequence->spans[1].length;
  int64_t seen = layer->window && layer->window < length ? length - layer->window : 0;
  int64_t room = size + 2;
  if (start < seen) start = seen;
  for (int64_t h = 0; h < group; h++) {
    memset(out + h * room, 0, room * sizeof(float));
    out[h * room + size] = -INFINITY;
  }
  if (start >= stop) return;
  const int64_t bounds[2] = {0, group};
  Change heads = {.bounds = bounds, .adapters = 1};
  struct { const void *v; int64_t first, count; } read[2];
  Input queries = {qkv.exact + j * qkv.ld + g * group * size,
                   qkv.rounded ? qkv.rounded + j * qkv.ld + g * group * size : NULL, size};
  for (int i = 0; i < 2; i++) {
    const Span *span = &sequence->spans[i];
    int64_t before = i ? sequence->spans[0].length : 0;
    int64_t from = start > before ? start - before : 0;
    int64_t to = stop - before < span->length ? stop - before : span->length;
    int64_t count = to > from ? to - from : 0;
    read[i].count = count;
    read[i].first = done;
    if (!count) continue;
    int64_t at = number * span->layer + g * span->head + from * size;
    read[i].v = place(s, span->v, at);
    multiply(s->cache, place(s, span->k, at), size, NULL, queries, &heads, NULL,
             scores + done, PIECE, 0, count, (End){0});
    done += count;
  }
  for (int64_t h = 0; h < group; h++) {
    float *own = scores + h * PIECE, *result = out + h * room, scale = s->scale, cap = s->cap;
    int64_t whole = (done + V - 1) / V * V; /* PIECE is a multiple of V */
    vf most = (vf){0} - INFINITY, total = {0};
    for (int64_t t = done; t < whole; t++) own[t] = -INFINITY;
    for (int64_t t = 0; t < whole; t += V) {
      vf x = load(own + t);
      x = cap ? cap * vtanh(x * (scale / cap)) : x * scale;
      if (t + V > done)
        for (int64_t i = done - t; i < V; i++) x[i] = -INFINITY;
      most = pick(x > most, x, most);
      *(vf_any *)(own + t) = x;
    }
    float greatest = most[0];
    for (int i = 1; i < V; i++) greatest = most[i] > greatest ? most[i] : greatest;
    for (int64_t t = 0; t < whole; t += V) {
      vf x = vexp(load(own + t) - greatest);
      if (t + V > done)
        for (int64_t i = done - t; i < V; i++) x[i] = 0;
      total += x;
      *(vf_any *)(own + t) = x;
    }
    for (int i = 0; i < 2; i++)
      if (read[i].count) add_values(s, result, own + read[i].first, read[i].v, read[i].count);
    result[size] = greatest;
    result[size + 1] = sum(total);
  }
}

/* The results of a head's pieces, each *stride* after the last, put together. */
static void join(float *to, const float *pieces, int64_t count, size_t stride, int64_t size) {
  float most = -INFINITY, total = 0;
  for (int64_t i = 0; i < count; i++)
    if (pieces[i * stride + size] > most) most = pieces[i * stride + size];
  memset(to, 0, size * sizeof(float));
  for (int64_t i = 0; i < count; i++) {
    const float *piece = pieces + i * stride;
    float weight = expf(piece[size] - most);
    total += weight * piece[size + 1];
    for (int64_t d = 0; d < size; d++) to[d] += weight * piece[d];
  }
  for (int64_t d = 0; d < size; d++) to[d] /= total;
}

/* -- the step ----------------------------------------------------------------------------------- */

/* Buffers that all threads share, and what is counted once. */
typedef struct {
  float *qkv, *gate_up, *act, *branch, *pieces;
  bf16 *queries;
  Input inner;
  int64_t *first_piece;   /* (N + 1,) pieces before each sequence */
  int64_t *next;          /* (layers,) the next piece that is computed */
  size_t ld_qkv, ld_gate_up, ld_act;
} Shared;

static int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

static size_t inner_room(const Step *s, const Matrix *m) {
  int64_t most = 0;
  if (m->thin)
    for (int64_t i = 0; i < s->adapter_count; i++)
      most = largest(most, m->thin[i].a ? m->parts * m->thin[i].rank : 0);
  return most;
}

/* x += residual times a branch, whose last matrix is m; *after* is the norm that ends it, *next*
 * what this thread reads afterwards. */
static void end_branch(const Step *s, const Shared *all, const Matrix *m, const float *after,
                       Input in, const void *next) {
  Portion own = portion(m->rows, V);
  float *to = after ? all->branch : s->x;
  times_a(s, m, in, all->inner, own.first);
  times(s, m, in, all->inner, next, to, s->width, own, s->residual, !after);
#pragma omp barrier
  if (!after) return;
  Portion rows = portion(s->count, 1);
  for (int64_t j = rows.first; j < rows.last; j++) {
    float *branch = all->branch + j * s->width, *x = s->x + j * s->width;
    norm(branch, branch, after, s->width, s->eps);
    for (int64_t k = 0; k < s->width; k++) x[k] += s->residual * branch[k];
  }
#pragma omp barrier
}

static void attention_branch(const Step *s, const Shared *all, int64_t number, Input in,
                             float *scores) {
  const Layer *layer = &s->layers[number];
  Input qkv = {all->qkv, all->queries, all->ld_qkv};
  int64_t group = s->heads / s->kv_heads, size = s->head_dim;
  size_t stride = group * (size + 2);
  for (int64_t j = 0; j < s->count; j++)
    norm(in.exact + j * in.ld, s->x + j * s->width, layer->before_attention, s->width, s->eps);
  round_rows(in, 0, s->count, (Portion){0, s->width});
  const Matrix *m = &layer->qkv;
  Portion own = portion(m->rows, V);
  times_a(s, m, in, all->inner, own.first);
  const void *next = beginning(s, &layer->o, portion(layer->o.rows, V).first, 0);
  times(s, m, in, all->inner, next, qkv.exact, qkv.ld, own, 1, 0);
#pragma omp barrier
  Portion rows = portion(s->count, 1);
  for (int64_t j = rows.first; j < rows.last; j++) prepare(s, layer, number, j, qkv);
#pragma omp barrier
  int64_t pieces = all->first_piece[s->count] * s->kv_heads, j = 0;
  while (1) {
    int64_t taken = __atomic_fetch_add(&all->next[number], 1, __ATOMIC_RELAXED);
    if (taken >= pieces) break;
    int64_t piece = taken / s->kv_heads, g = taken % s->kv_heads;
    while (piece >= all->first_piece[j + 1]) j++; /* pieces come in ascending order */
    const Span *spans = s->sequences[j].spans;
    int64_t start = (piece - all->first_piece[j]) * PIECE, length = spans[0].length + spans[1].length;
    int64_t stop = start + PIECE < length ? start + PIECE : length;
    attend(s, layer, number, j, g, start, stop, qkv, scores, all->pieces + taken * stride);
  }
#pragma omp barrier
  for (j = 0; j < s->count; j++)
    for (int64_t h = 0; h < s->heads; h++) {
      int64_t first = all->first_piece[j], count = all->first_piece[j + 1] - first;
      const float *from =
          all->pieces + (first * s->kv_heads + h / group) * stride + h % group * (size + 2);
      join(in.exact + j * in.ld + h * size, from, count, s->kv_heads * stride, size);
    }
  round_rows(in, 0, s->count, (Portion){0, s->heads * size});
  next = beginning(s, &layer->gate_up, portion(s->mlp, V).first, 0);
  end_branch(s, all, &layer->o, layer->after_attention, in, next);
}

static void mlp_branch(const Step *s, const Shared *all, int64_t number, Input in) {
  const Layer *layer = &s->layers[number];
  const Matrix *m = &layer->gate_up;
  int64_t mlp = s->mlp;
  Portion own = portion(mlp, V);
  for (int64_t j = 0; j < s->count; j++)
    norm(in.exact + j * in.ld, s->x + j * s->width, layer->before_mlp, s->width, s->eps);
  round_rows(in, 0, s->count, (Portion){0, s->width});
  times_a(s, m, in, all->inner, own.first);
  const void *down = beginning(s, &layer->down, portion(layer->down.rows, V).first, 0);
  times(s, m, in, all->inner, row_of(s, m, mlp + own.first), all->gate_up, all->ld_gate_up, own, 1, 0);
  times(s, m, in, all->inner, down, all->gate_up, all->ld_gate_up,
        (Portion){mlp + own.first, mlp + own.last}, 1, 0);
  for (int64_t j = 0; j < s->count; j++) {
    float *gate = all->gate_up + j * all->ld_gate_up, *act = all->act + j * all->ld_act;
    int64_t count = own.last - own.first;
    vf slope;
    if (s->activation == SILU)
      EACH(gate + own.first, count, activation(SILU, x, &slope));
    else
      EACH(gate + own.first, count, activation(GELU_TANH, x, &slope));
    for (int64_t k = own.first; k < own.last; k++) act[k] = gate[k] * gate[mlp + k];
  }
#pragma omp barrier
  Input acts = {all->act, NULL, all->ld_act};
  if (in.rounded) {
    acts.rounded = in.rounded; /* this thread's own */
    round_rows(acts, 0, s->count, (Portion){0, mlp});
  }
  const Matrix *next = number + 1 < s->depth ? &s->layers[number + 1].qkv : &s->head;
  end_branch(s, all, &layer->down, layer->after_mlp, acts,
             beginning(s, next, portion(next->rows, V).first, 0));
}

static void head(const Step *s, const Shared *all, Input in) {
  const Matrix *m = &s->head;
  Step of_wanted = *s;
  of_wanted.count = s->wanted_count;
  of_wanted.adapters = s->wanted_adapters;
  for (int64_t i = 0; i < s->wanted_count; i++)
    norm(in.exact + i * in.ld, s->x + s->wanted[i] * s->width, s->final_norm, s->width, s->eps);
  round_rows(in, 0, s->wanted_count, (Portion){0, s->width});
  Portion own = portion(m->rows, V);
  times_a(&of_wanted, m, in, all->inner, own.first);
  times(&of_wanted, m, in, all->inner, NULL, s->logits, s->ld_logits, own, 1, 0);
}

static void *aligned(size_t bytes) {
  void *room = NULL;
  return posix_memalign(&room, 64, bytes ? bytes : 64) ? NULL : room;
}

/* Pieces of attention before each sequence. */
static void count_pieces(const Step *s, int64_t *first) {
  first[0] = 0;
  for (int64_t j = 0; j < s->count; j++) {
    const Span *spans = s->sequences[j].spans;
    first[j + 1] = first[j] + (spans[0].length + spans[1].length + PIECE - 1) / PIECE;
  }
}

/* Numbers from a row of a buffer to the next: an odd number of lines, so that the same columns of
 * many rows do not share a set of the cache. cpu_decoding.py does the same for logits. */
static int64_t padded(int64_t columns) { return ((columns + 15) / 16 | 1) * 16; }

/* 0, or -1 if there is not enough memory. */
int tinkex_decode_step(const Step *s) {
  int64_t n = s->count, group = s->heads / s->kv_heads, failed = 0;
  int64_t widest = largest(s->width, s->heads * s->head_dim), ld = padded(widest);
  size_t room = inner_room(s, &s->head);
  for (int64_t i = 0; i < s->depth; i++) {
    const Layer *l = &s->layers[i];
    room = largest(room, inner_room(s, &l->qkv));
    room = largest(room, inner_room(s, &l->o));
    room = largest(room, inner_room(s, &l->gate_up));
    room = largest(room, inner_room(s, &l->down));
  }
  int rounds = HAS_PAIRS && s->weights == BFLOAT16;
  int64_t ld_qkv = padded((s->heads + 2 * s->kv_heads) * s->head_dim);
  int64_t *first_piece = aligned((n + 1) * sizeof(int64_t));
  if (!first_piece) return -1;
  count_pieces(s, first_piece);
  size_t of_pieces = (size_t)first_piece[n] * s->heads * (s->head_dim + 2);
  size_t floats = n * (ld_qkv + padded(2 * s->mlp) + padded(s->mlp) + s->width + room) + of_pieces;
  Shared all = {.first_piece = first_piece, .ld_qkv = ld_qkv,
                .ld_gate_up = padded(2 * s->mlp), .ld_act = padded(s->mlp)};
  float *shared = all.qkv = aligned(floats * sizeof(float));
  all.queries = rounds ? aligned(n * ld_qkv * sizeof(bf16)) : NULL;
  all.inner = (Input){NULL, rounds ? aligned(n * room * sizeof(bf16)) : NULL, room};
  all.next = calloc(s->depth, sizeof(int64_t));
  if (!shared || (rounds && !(all.queries && all.inner.rounded)) || !all.next) {
    failed = 1;
  } else {
    all.gate_up = all.qkv + n * ld_qkv;
    all.act = all.gate_up + n * all.ld_gate_up;
    all.branch = all.act + n * all.ld_act;
    all.inner.exact = all.branch + n * s->width;
    all.pieces = all.inner.exact + n * room;
#pragma omp parallel num_threads(s->threads)
    {
      float *scores = aligned(group * PIECE * sizeof(float));
      int64_t most = largest(ld, all.ld_act);
      Input in = {aligned(n * ld * sizeof(float)), NULL, ld};
      in.rounded = rounds ? aligned(n * most * sizeof(bf16)) : NULL;
      if (!scores || !in.exact || (rounds && !in.rounded)) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
#pragma omp barrier
      if (!__atomic_load_n(&failed, __ATOMIC_RELAXED)) {
        for (int64_t i = 0; i < s->depth; i++) {
          attention_branch(s, &all, i, in, scores);
          mlp_branch(s, &all, i, in);
        }
        head(s, &all, in);
      }
      free(scores);
      free(in.exact);
      free(in.rounded);
    }
  }
  free(first_piece);
  free(shared);
  free(all.queries);
  free(all.inner.rounded);
  free(all.next);
  return failed ? -1 : 0;
}
