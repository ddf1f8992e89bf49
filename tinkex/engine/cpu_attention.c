/* Causal attention within packed sequences, and its derivative, on a CPU.
 *
 * Queries are taken in blocks, and for each the keys that they attend to, in blocks. Scores are never
 * held for more than one pair of blocks; the derivative computes them again (Dao et al. 2022). All
 * products are of small matrices that lie in the caches. In bfloat16 they read pairs of numbers and
 * sum in float32, where the processor can; scores and weights are float32 until they are multiplied.
 *
 * Notation: N tokens, H heads, G key/value heads, D head size, which is a multiple of V.
 * cpu_attention.py has this file compiled, and mirrors `Attention`.
 */
#include <stdlib.h>

#include "cpu_vectors.h"

/* A tile of a product: ROWS rows times up to WIDE vectors of columns, whose sums are in registers. */
#define ROWS 6
#define WIDE (V == 16 ? 4 : 2)

/* Queries and keys of a block: multiples of ROWS and V, and even. */
#define QUERIES 96
#define KEYS 192
/* From a row of weights to the next: room for zeros after the last key. */
#define LD (KEYS + 16)
/* Rows of a sequence are padded with zeros to a multiple of this. */
#define PADDED 48

typedef uint32_t word; /* what a product reads at a time: a float, or a pair of bfloat16 */

/* How numbers are multiplied: as floats, or bfloat16 in pairs. */
enum { PAIRS = HALVES + 1 };
#define PER_WORD (kind == PAIRS ? 2 : 1)

typedef struct {
  const void *qkv;       /* (N, (H + 2 G) D), positions applied */
  const int64_t *bounds; /* (sequences + 1,) where each sequence starts, and N */
  void *out;             /* (N, H D) */
  float *ends;           /* (N, H) logarithms of the sums of the weights */
  const void *dout;      /* (N, H D) gradient at out; NULL: forward only */
  void *dqkv;            /* as qkv */
  int64_t sequences, heads, kv_heads, size;
  int64_t window;        /* positions that a query attends to, with its own; 0 is all */
  int32_t is_half, threads;
  float scale, cap;      /* cap: scores are capped softly at +-cap; 0 is no cap */
} Attention;

/* Buffers of one thread. */
typedef struct {
  word *k_across, *k_along, *v_across, *v_along; /* a sequence's keys and values, for products */
  word *q, *q_along, *dout, *dout_along;         /* of a block of queries */
  float *weights, *slopes;                       /* (QUERIES, LD); slopes: of the scores */
  word *rows, *columns;                          /* weights in pairs along a row, or a column */
  word *slope_rows, *slope_columns;
  float *total, *dk, *dv;                        /* (QUERIES, D) out or dq; (padded T, D) */
  float *most, *sum, *dot;                       /* (QUERIES,) */
} Room;

/* -- layouts of words ------------------------------------------------------------------------------- */

/* Word w of the numbers at p. */
INLINE word get(int kind, const void *p, int64_t w) {
  word x;
  if (kind == HALVES) return (word)((const bf16 *)p)[w] << 16;
  memcpy(&x, (const char *)p + 4 * w, 4);
  return x;
}

/* Words of rows, ld numbers apart, of which the first n exist: to[row][w]. */
INLINE void copy(int kind, word *to, const void *p, int64_t ld, int64_t n, int64_t rows, int64_t size) {
  int64_t words = size / PER_WORD;
  for (int64_t i = 0; i < n; i++)
    for (int64_t w = 0; w < words; w++) to[i * words + w] = get(kind, at(kind, p, i * ld), w);
  if (n < rows) memset(to + n * words, 0, (rows - n) * words * sizeof(word));
}

/* The same with V rows side by side: to[row / V][w][row % V]. */
INLINE void across(int kind, word *to, const void *p, int64_t ld, int64_t n, int64_t rows, int64_t size) {
  int64_t words = size / PER_WORD;
  for (int64_t i = 0; i < rows; i++)
    for (int64_t w = 0; w < words; w++)
      to[(i / V * words + w) * V + i % V] = i < n ? get(kind, at(kind, p, i * ld), w) : 0;
}

/* Words of numbers of the same column: to[row / PER_WORD][column]. */
INLINE void along(int kind, word *to, const void *p, int64_t ld, int64_t n, int64_t rows, int64_t size) {
  if (kind != PAIRS) {
    copy(kind, to, p, ld, n, rows, size);
    return;
  }
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t d = 0; d < size; d++) {
      word low = i < n ? ((const bf16 *)at(kind, p, i * ld))[d] : 0;
      word high = i + 1 < n ? ((const bf16 *)at(kind, p, (i + 1) * ld))[d] : 0;
      to[i / 2 * size + d] = low | high << 16;
    }
}

/* -- products ----------------------------------------------------------------------------------- */

/* c (ROWS, count vectors) = a b, or added to c: the words of a's rows are a_row and a_next apart,
 * the vectors of b's columns b_vector, its rows b_next. */
#define PRODUCT_ARGUMENTS                                                                          \
  const word *a, size_t a_row, size_t a_next, const word *b, size_t b_vector, size_t b_next,       \
      int64_t inner, float *c, size_t ldc
#define PRODUCT_VALUES a, a_row, a_next, b, b_vector, b_next, inner, c, ldc

INLINE void tile(const int pairs, const int count, PRODUCT_ARGUMENTS, int adds) {
  vf total[ROWS][WIDE];
  UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int j = 0; j < count; j++)
      total[i][j] = adds ? load(c + i * ldc + j * V) : (vf){0};
  for (int64_t k = 0; k < inner; k++, a += a_next, b += b_next) {
    vf column[WIDE];
    UNROLL for (int j = 0; j < count; j++) column[j] = load((const float *)(b + j * b_vector));
    UNROLL for (int i = 0; i < ROWS; i++) {
      vf x = (vf)((vu){0} + a[i * a_row]);
      UNROLL for (int j = 0; j < count; j++) {
#ifdef __AVX512BF16__
        if (pairs) {
          total[i][j] = (vf)_mm512_dpbf16_ps((__m512)total[i][j], (__m512bh)x, (__m512bh)column[j]);
          continue;
        }
#endif
        total[i][j] += x * column[j];
      }
    }
  }
  UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int j = 0; j < count; j++)
      store(c + i * ldc + j * V, total[i][j]);
}

#define PRODUCT(NAME, PAIRED)                                                       \
  static void NAME(PRODUCT_ARGUMENTS, int64_t count, int adds) {                    \
    for (; count >= WIDE; count -= WIDE, b += WIDE * b_vector, c += WIDE * V)       \
      tile(PAIRED, WIDE, PRODUCT_VALUES, adds);                                     \
    if (count == 1) tile(PAIRED, 1, PRODUCT_VALUES, adds);                          \
    if (WIDE > 2 && count == 2) tile(PAIRED, 2, PRODUCT_VALUES, adds);              \
    if (WIDE > 2 && count == 3) tile(PAIRED, WIDE - 1, PRODUCT_VALUES, adds);       \
  }
PRODUCT(multiply_floats, 0)
PRODUCT(multiply_pairs, 1)
#define multiply(...) (kind == PAIRS ? multiply_pairs(__VA_ARGS__) : multiply_floats(__VA_ARGS__))

/* -- weights ------------------------------------------------------------------------------------ */

/* Which of V keys from t on query i attends to. */
INLINE vi attended(const Attention *s, int64_t i, int64_t t) {
  vi position;
  UNROLL for (int lane = 0; lane < V; lane++) position[lane] = lane;
  position += (int32_t)t;
  vi seen = position <= (int32_t)i;
  return s->window ? seen & (position > (int32_t)(i - s->window)) : seen;
}

/* V scores of query i with keys from t on; -infinity where it does not attend. Sets the derivative
 * of the cap, and which keys it attends to. */
INLINE vf scores(const Attention *s, const float *products, int64_t i, int64_t t, vf *steepness, vi *seen) {
  vf x = load(products) * s->scale;
  if (s->cap) {
    vf y = vtanh(x / s->cap);
    x = y * s->cap;
    *steepness = 1.0f - y * y;
  }
  *seen = attended(s, i, t);
  return x;
}

/* Store rows i, i + 1 of weights (or one row, if they are floats) for both kinds of products. */
INLINE void put(int kind, const vf *x, float *exact, word *rows, word *columns, int64_t i, int64_t t) {
  if (kind != PAIRS) {
    store(exact + i * LD + t, x[0]);
    return;
  }
  vu first = rounded(x[0]) >> 16, second = rounded(x[1]) >> 16;
  *(vu_any *)(columns + i / 2 * LD + t) = first | second << 16;
  *(vh *)((bf16 *)rows + i * LD + t) = __builtin_convertvector(first, vh);
  *(vh *)((bf16 *)rows + (i + 1) * LD + t) = __builtin_convertvector(second, vh);
}

/* Products of ROWS queries with keys -> weights, relative to the largest score so far: `most`. The
 * sums and totals so far are made relative to it, too. */
INLINE void weigh(int kind, const Attention *s, Room *r, int64_t query, int64_t i, int64_t key, int64_t count) {
  vf steepness;
  vi seen;
  for (int64_t row = i; row < i + ROWS; row++) {
    float *own = r->weights + row * LD, most = r->most[row];
    vf largest = (vf){0} + most;
    for (int64_t t = 0; t < count; t += V) {
      vf x = scores(s, own + t, query + row, key + t, &steepness, &seen);
      store(own + t, x);
      largest = pick(seen & (x > largest), x, largest);
    }
    for (int lane = 0; lane < V; lane++) most = largest[lane] > most ? largest[lane] : most;
    float shrink = expf(r->most[row] - most);
    r->most[row] = most;
    vf sums = {0};
    for (int64_t t = 0; t < count; t += V) {
      seen = attended(s, query + row, key + t);
      vf x = pick(seen, vexp(load(own + t) - most), (vf){0});
      sums += x;
      store(own + t, x);
    }
    r->sum[row] = r->sum[row] * shrink + sum_of(sums);
    for (int64_t d = 0; d < s->size; d++) r->total[row * s->size + d] *= shrink;
  }
  if (kind == PAIRS)
    for (int64_t row = i; row < i + ROWS; row += 2)
      for (int64_t t = 0; t < count; t += V) {
        vf x[2] = {load(r->weights + row * LD + t), load(r->weights + (row + 1) * LD + t)};
        put(kind, x, NULL, r->rows, r->columns, row, t);
      }
}

/* Products of ROWS queries with keys, and of their gradients with values -> weights, and slopes of
 * the products. Behind the last key are zeros, which products with whole tiles of keys read. */
INLINE void slope(int kind, const Attention *s, Room *r, int64_t query, int64_t i, int64_t key, int64_t count) {
  for (int64_t row = i; row < i + ROWS; row += PER_WORD) {
    vf weights[2], slopes[2], zeros[2] = {{0}, {0}};
    for (int64_t t = 0; t < count; t += V) {
      UNROLL for (int j = 0; j < PER_WORD; j++) {
        vf steepness = (vf){0} + 1.0f;
        vi seen;
        int64_t at = (row + j) * LD + t;
        vf x = scores(s, r->weights + at, query + row + j, key + t, &steepness, &seen);
        weights[j] = pick(seen, vexp(x - r->most[row + j]), (vf){0});
        slopes[j] = weights[j] * (load(r->slopes + at) - r->dot[row + j]) * steepness;
      }
      put(kind, weights, r->weights, r->rows, r->columns, row, t);
      put(kind, slopes, r->slopes, r->slope_rows, r->slope_columns, row, t);
    }
    put(kind, zeros, r->weights, r->rows, r->columns, row, count);
    put(kind, zeros, r->slopes, r->slope_rows, r->slope_columns, row, count);
  }
}

/* -- a sequence's heads of one key head ---------------------------------------------------------- */

INLINE int64_t up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* First key of the first block that the query attends to. */
INLINE int64_t first_key(const Attention *s, int64_t query) {
  return s->window && query >= s->window ? (query - s->window + 1) / KEYS * KEYS : 0;
}

INLINE void forward(int kind, const Attention *s, Room *r, int64_t start, int64_t n, int64_t g) {
  int64_t size = s->size, words = size / PER_WORD, heads = s->heads / s->kv_heads;
  int64_t ld = (s->heads + 2 * s->kv_heads) * size, ld_out = s->heads * size, padded = up(n, PADDED);
  const void *first = at(kind, s->qkv, start * ld);
  across(kind, r->k_across, at(kind, first, (s->heads + g) * size), ld, n, padded, size);
  along(kind, r->v_along, at(kind, first, (s->heads + s->kv_heads + g) * size), ld, n, padded, size);
  size_t weights_row = kind == PAIRS ? LD / 2 : LD;
  const word *weights = kind == PAIRS ? r->rows : (word *)r->weights;
  for (int64_t h = g * heads; h < (g + 1) * heads; h++)
    for (int64_t query = 0; query < n; query += QUERIES) {
      int64_t count = least(QUERIES, n - query);
      copy(kind, r->q, at(kind, first, query * ld + h * size), ld, count, QUERIES, size);
      memset(r->total, 0, QUERIES * size * sizeof(float));
      for (int64_t i = 0; i < QUERIES; i++) r->most[i] = -1e30f, r->sum[i] = 0;
      for (int64_t key = first_key(s, query); key < query + count; key += KEYS)
        for (int64_t i = 0; i < count; i += ROWS) {
          int64_t keys = up(least(least(query + i + ROWS, n) - key, KEYS), V);
          if (keys <= 0) continue;
          multiply(r->q + i * words, words, 1, r->k_across + key * words, words * V, V, words,
                   r->weights + i * LD, LD, keys / V, 0);
          weigh(kind, s, r, query, i, key, keys);
          multiply(weights + i * weights_row, weights_row, 1, r->v_along + key / PER_WORD * size, V,
                   size, keys / PER_WORD, r->total + i * size, size, size / V, 1);
        }
      for (int64_t i = 0; i < count; i++) {
        char *out = (char *)at(kind, s->out, (start + query + i) * ld_out + h * size);
        for (int64_t d = 0; d < size; d += V)
          write(kind, (void *)at(kind, out, d), load(r->total + i * size + d) / r->sum[i]);
        s->ends[(start + query + i) * s->heads + h] = r->most[i] + logf(r->sum[i]);
      }
    }
}

INLINE void backward(int kind, const Attention *s, Room *r, int64_t start, int64_t n, int64_t g) {
  int64_t size = s->size, words = size / PER_WORD, heads = s->heads / s->kv_heads;
  int64_t ld = (s->heads + 2 * s->kv_heads) * size, ld_out = s->heads * size, padded = up(n, PADDED);
  int64_t of_k = (s->heads + g) * size, of_v = of_k + s->kv_heads * size;
  const void *first = at(kind, s->qkv, start * ld);
  across(kind, r->k_across, at(kind, first, of_k), ld, n, padded, size);
  across(kind, r->v_across, at(kind, first, of_v), ld, n, padded, size);
  along(kind, r->k_along, at(kind, first, of_k), ld, n, padded, size);
  memset(r->dk, 0, padded * size * sizeof(float));
  memset(r->dv, 0, padded * size * sizeof(float));
  size_t row = kind == PAIRS ? LD / 2 : LD;
  const word *columns = kind == PAIRS ? r->columns : (word *)r->weights;
  const word *slope_rows = kind == PAIRS ? r->slope_rows : (word *)r->slopes;
  const word *slope_columns = kind == PAIRS ? r->slope_columns : (word *)r->slopes;
  for (int64_t h = g * heads; h < (g + 1) * heads; h++)
    for (int64_t query = 0; query < n; query += QUERIES) {
      int64_t count = least(QUERIES, n - query), whole = up(count, ROWS);
      const void *q = at(kind, first, query * ld + h * size);
      int64_t of_out = (start + query) * ld_out + h * size;
      const void *dout = at(kind, s->dout, of_out), *out = at(kind, s->out, of_out);
      copy(kind, r->q, q, ld, count, QUERIES, size);
      along(kind, r->q_along, q, ld, count, QUERIES, size);
      copy(kind, r->dout, dout, ld_out, count, QUERIES, size);
      along(kind, r->dout_along, dout, ld_out, count, QUERIES, size);
      memset(r->total, 0, QUERIES * size * sizeof(float));
      for (int64_t i = 0; i < QUERIES; i++) {
        vf sums = {0};
        if (i < count)
          for (int64_t d = i * ld_out; d < i * ld_out + size; d += V)
            sums += numbers(kind, at(kind, dout, d)) * numbers(kind, at(kind, out, d));
        r->dot[i] = sum_of(sums);
        r->most[i] = i < count ? s->ends[(start + query + i) * s->heads + h] : 0;
      }
      for (int64_t key = first_key(s, query); key < query + count; key += KEYS) {
        for (int64_t i = 0; i < count; i += ROWS) {
          int64_t keys = up(least(least(query + i + ROWS, n) - key, KEYS), V);
          if (keys <= 0) continue;
          multiply(r->q + i * words, words, 1, r->k_across + key * words, words * V, V, words,
                   r->weights + i * LD, LD, keys / V, 0);
          multiply(r->dout + i * words, words, 1, r->v_across + key * words, words * V, V, words,
                   r->slopes + i * LD, LD, keys / V, 0);
          slope(kind, s, r, query, i, key, keys);
          multiply(slope_rows + i * row, row, 1, r->k_along + key / PER_WORD * size, V, size,
                   keys / PER_WORD, r->total + i * size, size, size / V, 1);
        }
        for (int64_t t = 0; t < KEYS && key + t < query + count; t += ROWS) {
          int64_t from = key + t > query ? (key + t - query) / ROWS * ROWS : 0;
          int64_t queries = (whole - from) / PER_WORD, skipped = from / PER_WORD;
          multiply(columns + skipped * LD + t, 1, LD, r->dout_along + skipped * size, V, size,
                   queries, r->dv + (key + t) * size, size, size / V, 1);
          multiply(slope_columns + skipped * LD + t, 1, LD, r->q_along + skipped * size, V, size,
                   queries, r->dk + (key + t) * size, size, size / V, 1);
        }
      }
      for (int64_t i = 0; i < count; i++)
        for (int64_t d = 0; d < size; d += V)
          write(kind, (void *)at(kind, s->dqkv, (start + query + i) * ld + h * size + d),
                load(r->total + i * size + d) * s->scale);
    }
  for (int64_t i = 0; i < n; i++)
    for (int64_t d = 0; d < size; d += V) {
      write(kind, (void *)at(kind, s->dqkv, (start + i) * ld + of_k + d),
            load(r->dk + i * size + d) * s->scale);
      write(kind, (void *)at(kind, s->dqkv, (start + i) * ld + of_v + d), load(r->dv + i * size + d));
    }
}

/* -- all sequences ------------------------------------------------------------------------------- */

/* Set the buffers of a thread within *memory*, or count their bytes if it is NULL. */
static size_t divide(Room *r, char *memory, int64_t padded, int64_t size, int has_gradient) {
  size_t used = 0;
#define TAKE(field, count) (r->field = (void *)(memory + used), used += up((count) * 4, 64))
  TAKE(k_across, padded * size);
  TAKE(v_along, padded * size);
  TAKE(q, QUERIES * size);
  TAKE(weights, QUERIES * LD);
  TAKE(rows, QUERIES * LD / 2);
  TAKE(columns, QUERIES * LD / 2);
  TAKE(total, QUERIES * size);
  TAKE(most, QUERIES);
  TAKE(sum, QUERIES);
  if (!has_gradient) return used;
  r->v_across = r->v_along; /* the gradient needs only the former */
  TAKE(k_along, padded * size);
  TAKE(q_along, QUERIES * size);
  TAKE(dout, QUERIES * size);
  TAKE(dout_along, QUERIES * size);
  TAKE(slopes, QUERIES * LD);
  TAKE(slope_rows, QUERIES * LD / 2);
  TAKE(slope_columns, QUERIES * LD / 2);
  TAKE(dk, padded * size);
  TAKE(dv, padded * size);
  TAKE(dot, QUERIES);
#undef TAKE
  return used;
}

static void attend(const Attention *s, Room *r, int64_t start, int64_t n, int64_t g) {
#ifdef __AVX512BF16__
  enum { OF_HALVES = PAIRS };
#else
  enum { OF_HALVES = HALVES };
#endif
  if (s->dout) {
    if (s->is_half)
      backward(OF_HALVES, s, r, start, n, g);
    else
      backward(FLOATS, s, r, start, n, g);
  } else if (s->is_half) {
    forward(OF_HALVES, s, r, start, n, g);
  } else {
    forward(FLOATS, s, r, start, n, g);
  }
}

/* The forward pass, or if `dout` is not NULL the derivative. 0, or -1 if there is not enough memory. */
int tinkex_attention(const Attention *s) {
  int64_t longest = 0, failed = 0;
  for (int64_t j = 0; j < s->sequences; j++)
    if (s->bounds[j + 1] - s->bounds[j] > longest) longest = s->bounds[j + 1] - s->bounds[j];
#pragma omp parallel num_threads(s->threads)
  {
    Room room;
    void *memory = NULL;
    size_t bytes = divide(&room, NULL, up(longest, PADDED), s->size, s->dout != NULL);
    if (posix_memalign(&memory, 64, bytes))
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    else
      divide(&room, memory, up(longest, PADDED), s->size, s->dout != NULL);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < s->sequences * s->kv_heads; i++) {
      int64_t j = i / s->kv_heads, start = s->bounds[j];
      if (memory) attend(s, &room, start, s->bounds[j + 1] - start, i % s->kv_heads);
    }
    free(memory);
  }
  return failed ? -1 : 0;
}
