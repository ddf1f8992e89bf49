/* Operations on the rows of a batch, on a CPU: norms, activations, rotations, sums of likelihoods.
 *
 * Each reads its inputs once and writes its result once; in between, numbers are float32 in registers.
 * Widths are multiples of V, but for those of logits. cpu_rows.py has this file compiled, and mirrors
 * its structs.
 */
#include "cpu_vectors.h"

typedef struct {
  const void *gate_up; /* (N, 2 M) */
  const void *dact;    /* (N, M) gradient at the result; NULL: forward */
  void *out;           /* activation(gate) up (N, M), or the gradient at gate_up */
  int64_t rows, columns;
  int32_t is_half, activation, threads;
} Gate;

typedef struct {
  const void *x, *weight;  /* (N, d), (d,) */
  const void *dy, *plus;   /* (N, d) gradient at the result, and what is added to the gradient at x, or
                            * NULL; both NULL: forward */
  void *out;               /* (N, d) result, or the gradient at x */
  float *rstd;             /* (N,) 1 / rms */
  int64_t rows, columns;
  int32_t is_half, weight_is_half, threads;
  float eps;
} Norm;

typedef struct {
  void *rows;                 /* (N, ld); the first heads of each row are rotated in place */
  const void *cosines, *sines; /* (N, half) */
  int64_t count, ld, heads, size, half;
  int32_t is_half, interleaved, back, threads;
} Rotation;

typedef struct {
  const float *logits;       /* (N, ld), of which *columns* are used */
  const float *temperatures; /* (N,) */
  float *largest;            /* (N,) of the logits */
  float *sums;               /* (N, blocks) of e^((logit - largest) / temperature) */
  int64_t rows, ld, columns, block; /* block: columns of a block; the last may have fewer */
  int32_t threads;
} BlockSums;

INLINE void gate_row(int kind, int name, const Gate *s, int64_t row) {
  int64_t columns = s->columns;
  const void *gate = at(kind, s->gate_up, row * 2 * columns), *up = at(kind, gate, columns);
  const void *out = at(kind, s->out, row * columns * (s->dact ? 2 : 1));
  for (int64_t k = 0; k < columns; k += V) {
    vf slope, u = numbers(kind, at(kind, up, k));
    vf active = activation(name, numbers(kind, at(kind, gate, k)), &slope);
    if (!s->dact) {
      write(kind, (void *)at(kind, out, k), active * u);
      continue;
    }
    vf dact = numbers(kind, at(kind, s->dact, row * columns + k));
    write(kind, (void *)at(kind, out, k), dact * u * slope);
    write(kind, (void *)at(kind, out, columns + k), dact * active);
  }
}

int tinkex_gate(const Gate *s) {
#pragma omp parallel for num_threads(s->threads)
  for (int64_t row = 0; row < s->rows; row++) {
    if (s->is_half)
      s->activation == SILU ? gate_row(HALVES, SILU, s, row) : gate_row(HALVES, GELU_TANH, s, row);
    else
      s->activation == SILU ? gate_row(FLOATS, SILU, s, row) : gate_row(FLOATS, GELU_TANH, s, row);
  }
  return 0;
}

INLINE void norm_row(int kind, int of_weight, const Norm *s, int64_t row) {
  int64_t columns = s->columns, start = row * columns;
  vf sums = {0};
  if (!s->dy) {
    for (int64_t k = 0; k < columns; k += V) {
      vf x = numbers(kind, at(kind, s->x, start + k));
      sums += x * x;
    }
    float rstd = s->rstd[row] = 1.0f / sqrtf(sum_of(sums) / columns + s->eps);
    for (int64_t k = 0; k < columns; k += V)
      write(kind, (void *)at(kind, s->out, start + k),
            numbers(kind, at(kind, s->x, start + k)) * rstd *
                numbers(of_weight, at(of_weight, s->weight, k)));
    return;
  }
  for (int64_t k = 0; k < columns; k += V)
    sums += numbers(kind, at(kind, s->dy, start + k)) * numbers(kind, at(kind, s->x, start + k)) *
            numbers(of_weight, at(of_weight, s->weight, k));
  float rstd = s->rstd[row], along = sum_of(sums) * rstd * rstd * rstd / columns;
  for (int64_t k = 0; k < columns; k += V) {
    vf dx = numbers(kind, at(kind, s->dy, start + k)) *
                numbers(of_weight, at(of_weight, s->weight, k)) * rstd -
            numbers(kind, at(kind, s->x, start + k)) * along;
    if (s->plus) dx += numbers(kind, at(kind, s->plus, start + k));
    write(kind, (void *)at(kind, s->out, start + k), dx);
  }
}

int tinkex_norm(const Norm *s) {
#pragma omp parallel for num_threads(s->threads)
  for (int64_t row = 0; row < s->rows; row++) {
    if (!s->is_half)
      norm_row(FLOATS, FLOATS, s, row);
    else if (s->weight_is_half)
      norm_row(HALVES, HALVES, s, row);
    else
      norm_row(HALVES, FLOATS, s, row);
  }
  return 0;
}

INLINE float number(int kind, const void *p, int64_t i) {
  return kind == FLOATS ? ((const float *)p)[i] : from_bf16(((const bf16 *)p)[i]);
}

INLINE void set(int kind, void *p, int64_t i, float x) {
  if (kind == FLOATS)
    ((float *)p)[i] = x;
  else
    ((bf16 *)p)[i] = to_bf16(x);
}

INLINE void rotate_row(int kind, int step, const Rotation *s, int64_t row) {
  const void *cosines = at(kind, s->cosines, row * s->half), *sines = at(kind, s->sines, row * s->half);
  float sign = s->back ? -1.0f : 1.0f;
  for (int64_t h = 0; h < s->heads; h++) {
    void *first = (void *)at(kind, s->rows, row * s->ld + h * s->size);
    void *second = (void *)at(kind, first, step == 2 ? 1 : s->half);
#pragma GCC ivdep
    for (int64_t i = 0; i < s->half; i++) {
      float x = number(kind, first, i * step), y = number(kind, second, i * step);
      float cosine = number(kind, cosines, i), sine = sign * number(kind, sines, i);
      set(kind, first, i * step, x * cosine - y * sine);
      set(kind, second, i * step, y * cosine + x * sine);
    }
  }
}

int tinkex_rotate(const Rotation *s) {
#pragma omp parallel for num_threads(s->threads)
  for (int64_t row = 0; row < s->count; row++) {
    if (s->is_half)
      s->interleaved ? rotate_row(HALVES, 2, s, row) : rotate_row(HALVES, 1, s, row);
    else
      s->interleaved ? rotate_row(FLOATS, 2, s, row) : rotate_row(FLOATS, 1, s, row);
  }
  return 0;
}

/* V of the *left* floats at p; beyond them, -infinity. */
INLINE vf some(const float *p, int64_t left) {
  if (left >= V) return load(p);
  vf x = (vf){0} - INFINITY;
  for (int64_t i = 0; i < left; i++) x[i] = p[i];
  return x;
}

INLINE float largest_of(const float *p, int64_t count) {
  vf most = (vf){0} - INFINITY;
  for (int64_t k = 0; k < count; k += V) {
    vf x = some(p + k, count - k);
    most = pick(x > most, x, most);
  }
  float largest = most[0];
  for (int i = 1; i < V; i++) largest = most[i] > largest ? most[i] : largest;
  return largest;
}

INLINE float likelihoods(const float *p, int64_t count, float largest, float temperature) {
  vf total = {0};
  for (int64_t k = 0; k < count; k += V) {
    vf x = (some(p + k, count - k) - largest) / temperature;
    total += pick(x < -87.0f, (vf){0}, vexp(x));
  }
  return sum_of(total);
}

/* A thread takes some of the blocks of every row, so that even a single row is divided. */
int tinkex_block_sums(const BlockSums *s) {
  int64_t blocks = (s->columns + s->block - 1) / s->block;
#pragma omp parallel num_threads(s->threads)
  {
    for (int64_t row = 0; row < s->rows; row++) {
      const float *logits = s->logits + row * s->ld;
      float *sums = s->sums + row * blocks;
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < blocks; i++) {
        int64_t from = i * s->block, left = s->columns - from;
        sums[i] = largest_of(logits + from, left < s->block ? left : s->block);
      }
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t row = 0; row < s->rows; row++)
      s->largest[row] = largest_of(s->sums + row * blocks, blocks);
    for (int64_t row = 0; row < s->rows; row++) {
      const float *logits = s->logits + row * s->ld;
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < blocks; i++) {
        int64_t from = i * s->block, left = s->columns - from;
        s->sums[row * blocks + i] = likelihoods(logits + from, left < s->block ? left : s->block,
                                                s->largest[row], s->temperatures[row]);
      }
    }
  }
  return 0;
}
