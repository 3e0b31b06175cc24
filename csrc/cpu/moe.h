// Routing, the sort by expert, and the experts' products.
#pragma once

#include "product.h"

namespace {

constexpr int64_t BLOCK_ROWS = 64;  // of an expert, that one thread takes at a time

// Bits that are ordered as the numbers are. What is no number is the lowest; -0, which no score is, is below 0.
inline int32_t ordered(float x) {
  if (x != x) x = -__builtin_inff();
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

// Index of the largest, the first of equals; it is marked as taken, below all numbers.
inline int64_t take_best(int32_t *keys, int64_t count) {
  int64_t best = 0;
  int32_t most = keys[0];
  for (int64_t i = 1; i < count; ++i) most = keys[i] > most ? keys[i] : most;
  while (keys[best] != most) ++best;
  keys[best] = INT32_MIN;
  return best;
}

inline void scores_of(const float *logits, int64_t experts, bool softmax, float *out) {
  if (!softmax) {
    for (int64_t i = 0; i < experts; i += LANES) store(out + i, sigmoid(load(logits + i, experts - i)), experts - i);
    return;
  }
  float most = logits[0], total = 0;
  for (int64_t i = 1; i < experts; ++i) most = logits[i] > most ? logits[i] : most;
  for (int64_t i = 0; i < experts; i += LANES)
    store(out + i, exponential(load(logits + i, experts - i) - most), experts - i);
  for (int64_t i = 0; i < experts; ++i) total += out[i];
  for (int64_t i = 0; i < experts; ++i) out[i] /= total;
}

// Leaves of a token's keys those of its best groups; the others get the key of minus infinity.
inline void keep_groups(float *choice, int32_t *keys, int32_t *group_keys, int64_t experts, int64_t groups,
                        int64_t kept) {
  const int64_t size = experts / groups;
  for (int64_t g = 0; g < groups; ++g) {
    float first = -__builtin_inff(), second = first;
    for (int64_t i = g * size; i < (g + 1) * size; ++i) {
      const float x = choice[i];
      if (x > first) {
        second = first;
        first = x;
      } else if (x > second) {
        second = x;
      }
    }
    group_keys[g] = ordered(size > 1 ? first + second : first);
  }
  for (int64_t k = 0; k < kept; ++k) take_best(group_keys, groups);
  for (int64_t g = 0; g < groups; ++g)
    if (group_keys[g] != INT32_MIN)
      for (int64_t i = g * size; i < (g + 1) * size; ++i) keys[i] = ordered(-__builtin_inff());
}

// ids and weights (tokens, top_k), counts (experts). With `replay`, these ids are taken. `padding`, if given, is true
// for tokens that weigh nothing and are not counted.
void route(const float *logits, const float *bias, int64_t experts, int64_t top_k, int64_t groups, int64_t kept_groups,
           float scale, bool softmax, const int64_t *replay, const bool *padding, int64_t tokens, int64_t *ids,
           float *weights, int64_t *counts, int threads) {
#pragma omp parallel num_threads(threads_for(tokens * experts * (8 + top_k), threads))
  {
    static thread_local Scratch memory;
    auto *const scores = static_cast<float *>(memory.bytes((3 * experts + groups) * sizeof(float)));
    float *const choice = scores + experts;
    auto *const keys = reinterpret_cast<int32_t *>(choice + experts), *const group_keys = keys + experts;
#pragma omp for
    for (int64_t t = 0; t < tokens; ++t) {
      scores_of(logits + t * experts, experts, softmax, scores);
      int64_t *const chosen = ids + t * top_k;
      if (replay) {
        std::memcpy(chosen, replay + t * top_k, top_k * sizeof(int64_t));
      } else {
        for (int64_t i = 0; i < experts; ++i) {
          choice[i] = bias ? scores[i] + bias[i] : scores[i];
          keys[i] = ordered(choice[i]);
        }
        if (groups > 1) keep_groups(choice, keys, group_keys, experts, groups, kept_groups);
        for (int64_t k = 0; k < top_k; ++k) chosen[k] = take_best(keys, experts);
      }
      float total = 0;
      for (int64_t k = 0; k < top_k; ++k) total += scores[chosen[k]];
      const float factor = scale / (total + 1e-20f);
      for (int64_t k = 0; k < top_k; ++k)
        weights[t * top_k + k] = padding && padding[t] ? 0.0f : scores[chosen[k]] * factor;
    }
  }
  std::memset(counts, 0, experts * sizeof(int64_t));
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < top_k; ++k) counts[ids[t * top_k + k]] += !(padding && padding[t]);
}

// d logits of route's weights.
void route_backward(const float *grad, const float *logits, const int64_t *ids, int64_t experts, int64_t top_k,
                    float scale, bool softmax, const bool *padding, int64_t tokens, float *grad_logits, int threads) {
#pragma omp parallel num_threads(threads_for(8 * tokens * experts, threads))
  {
    static thread_local Scratch memory;
    auto *const scores = static_cast<float *>(memory.bytes(experts * sizeof(float)));
#pragma omp for
    for (int64_t t = 0; t < tokens; ++t) {
      float *const out = grad_logits + t * experts;
      std::memset(out, 0, experts * sizeof(float));
      if (padding && padding[t]) continue;
      scores_of(logits + t * experts, experts, softmax, scores);
      const int64_t *const chosen = ids + t * top_k;
      const float *const g = grad + t * top_k;
      float total = 0, shared = 0;
      for (int64_t k = 0; k < top_k; ++k) {
        total += scores[chosen[k]];
        shared += g[k] * scores[chosen[k]];
      }
      total += 1e-20f;
      shared /= total;
      for (int64_t k = 0; k < top_k; ++k) {
        const float score = scores[chosen[k]], back = (g[k] - shared) * (scale / total) * score;
        // Of a softmax the sum of `back` would be taken from all; it is 0, as weights do not change with the scores'
        // sum.
        out[chosen[k]] += softmax ? back : back * (1 - score);
      }
    }
  }
}

// row_map: t K + k of every row, sorted by expert, stable; counts: rows of each expert. False,
// and nothing done, if an id is no expert's.
bool sort_by_expert(const int64_t *ids, int64_t pairs, int64_t experts, int64_t *row_map, int64_t *counts) {
  std::memset(counts, 0, experts * sizeof(int64_t));
  for (int64_t p = 0; p < pairs; ++p) {
    if (ids[p] < 0 || ids[p] >= experts) return false;
    ++counts[ids[p]];
  }
  static thread_local Scratch memory;
  auto *const next = static_cast<int64_t *>(memory.bytes(experts * sizeof(int64_t)));
  for (int64_t e = 0, begin = 0; e < experts; begin += counts[e++]) next[e] = begin;
  for (int64_t p = 0; p < pairs; ++p) row_map[next[ids[p]]++] = p;
  return true;
}

// out = silu(gate) up weight, for gate_up (2 width).
inline void swiglu_row(const float *gate_up, float weight, int64_t width, float *out) {
  for (int64_t f = 0; f < width; f += LANES) {
    const Vector gate = load(gate_up + f, width - f), up = load(gate_up + width + f, width - f);
    store(out + f, gate * sigmoid(gate) * up * weight, width - f);
  }
}

// d gate_up (2 width), returning d weight; and swiglu_row's result once more, unless `again` is null.
inline float swiglu_row_backward(const float *grad, const float *gate_up, float weight, int64_t width,
                                 float *grad_gate_up, float *again) {
  Vector grad_weight{};
  for (int64_t f = 0; f < width; f += LANES) {
    const Vector gate = load(gate_up + f, width - f), up = load(gate_up + width + f, width - f), s = sigmoid(gate);
    const Vector back = load(grad + f, width - f), activation = gate * s, product = activation * up;
    grad_weight += back * product;
    if (again) store(again + f, product * weight, width - f);
    store(grad_gate_up + f, back * weight * up * (s + activation * (1.0f - s)), width - f);
    store(grad_gate_up + width + f, back * weight * activation, width - f);
  }
  return sum(grad_weight);
}

// Rows sorted by expert. Row p is that of pair list[p], or of pair p itself without a list; a pair's token is
// pair / top_k, and its weight weights[pair], 1 without weights.
struct Pairs {
  const int64_t *list, *counts;
  const float *weights;
  int64_t rows, top_k;

  int64_t operator[](int64_t p) const { return list ? list[p] : p; }
  float weight(int64_t p) const { return weights ? weights[(*this)[p]] : 1.0f; }
};

struct Block {
  int64_t expert, begin, end;
};

// The rows of each expert in blocks. Memory of the thread that asks.
struct Blocks {
  Block *list;
  int64_t count = 0;

  Blocks(const Pairs &pairs, int64_t experts) {
    static thread_local Scratch memory;
    list = static_cast<Block *>(memory.bytes((pairs.rows / BLOCK_ROWS + experts + 1) * sizeof(Block)));
    for (int64_t e = 0, begin = 0; e < experts; begin += pairs.counts[e++])
      for (int64_t p = begin; p < begin + pairs.counts[e]; p += BLOCK_ROWS)
        list[count++] = {e, p, least(p + BLOCK_ROWS, begin + pairs.counts[e])};
  }
};

// out[t] = the sum of its top_k rows of pairs (tokens top_k, hidden), in their order.
void sum_pairs(const float *pairs, int64_t tokens, int64_t top_k, int64_t hidden, float *out, int threads) {
#pragma omp parallel for num_threads(threads_for(tokens * top_k * hidden / 4, threads))
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < hidden; i += LANES) {
      Vector total{};
      for (int64_t k = 0; k < top_k; ++k) total += load(pairs + (t * top_k + k) * hidden + i, hidden - i);
      store(out + t * hidden + i, total, hidden - i);
    }
}

// With gate_up (experts, hidden, 2 width) as [gate | up] and down (experts, width, hidden):
// first (rows, 2 width) = x gate_up, for the backward, and by_pair (pairs, hidden) = (silu(gate) up weight) down, each
// row at its pair's place.
void experts_forward(const float *x, const float *gate_up, const float *down, int64_t experts, int64_t hidden,
                     int64_t width, const int64_t *row_map, const int64_t *counts, const float *weights, int64_t rows,
                     int64_t top_k, float *first, float *by_pair, int threads) {
  const Pairs pairs{row_map, counts, weights, rows, top_k};
  const Blocks blocks(pairs, experts);
  const int64_t F = width, H = hidden;
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(3 * pairs.rows * H * F, threads))
  for (int64_t i = 0; i < blocks.count; ++i) {
    static thread_local Scratch memory;
    const auto [expert, begin, end] = blocks.list[i];
    auto *const middle = static_cast<float *>(memory.bytes(BLOCK_ROWS * F * sizeof(float)));
    const float *from[BLOCK_ROWS], *middles[BLOCK_ROWS];
    float *firsts[BLOCK_ROWS], *to[BLOCK_ROWS];
    for (int64_t p = begin; p < end; ++p) {
      from[p - begin] = x + pairs[p] / pairs.top_k * H;
      firsts[p - begin] = first + p * 2 * F;
      middles[p - begin] = middle + (p - begin) * F;
      to[p - begin] = by_pair + pairs[p] * H;
    }
    multiply(from, {gate_up + expert * H * 2 * F, 2 * F, nullptr}, end - begin, H, 2 * F, firsts);
    for (int64_t p = begin; p < end; ++p) swiglu_row(firsts[p - begin], pairs.weight(p), F, middle + (p - begin) * F);
    multiply(middles, {down + expert * F * H, H, nullptr}, end - begin, F, H, to);
  }
}

// From grad, by token: d x by pair (pairs, hidden), d weights by pair unless it is null, and d gate_up and d down
// unless they are null, which `accumulate` adds to. An expert without rows gets 0. `between` is memory for 3 rows width
// + 3 experts hidden width: the second product's input, the gradient of the first product, the weights transposed.
void experts_backward(const float *grad, const float *x, const float *gate_up, const float *down, int64_t experts,
                      int64_t hidden, int64_t width, const int64_t *row_map, const int64_t *counts,
                      const float *weights, int64_t rows, int64_t top_k, const float *first, float *between,
                      float *grad_x, float *grad_weights, float *grad_gate_up, float *grad_down, bool accumulate,
                      int threads) {
  const Pairs pairs{row_map, counts, weights, rows, top_k};
  const Blocks blocks(pairs, experts);
  const int64_t F = width, H = hidden;
  float *const middle = between, *const grad_first = middle + rows * F;
  float *const gate_up_across = grad_first + rows * 2 * F, *const down_across = gate_up_across + experts * H * 2 * F;
  static thread_local Scratch token_memory;
  auto *const tokens = static_cast<int64_t *>(token_memory.bytes((pairs.rows + experts + 1) * sizeof(int64_t)));
  int64_t *const begins = tokens + pairs.rows;
  for (int64_t p = 0; p < pairs.rows; ++p) tokens[p] = pairs[p] / pairs.top_k;
  begins[0] = 0;
  for (int64_t i = 0; i < experts; ++i) begins[i + 1] = begins[i] + pairs.counts[i];
#pragma omp parallel num_threads(threads_for(9 * pairs.rows * H * F, threads))
  {
    static thread_local Scratch memory;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < experts; ++i) {
      if (!pairs.counts[i]) continue;
      transpose(gate_up + i * H * 2 * F, H, 2 * F, gate_up_across + i * H * 2 * F);
      transpose(down + i * F * H, F, H, down_across + i * F * H);
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < blocks.count; ++i) {
      const auto [expert, begin, end] = blocks.list[i];
      auto *const grad_middle = static_cast<float *>(memory.bytes(BLOCK_ROWS * F * sizeof(float)));
      const float *from[BLOCK_ROWS], *grad_firsts[BLOCK_ROWS];
      float *middles[BLOCK_ROWS], *to[BLOCK_ROWS];
      for (int64_t p = begin; p < end; ++p) {
        from[p - begin] = grad + tokens[p] * H;
        middles[p - begin] = grad_middle + (p - begin) * F;
        grad_firsts[p - begin] = grad_first + p * 2 * F;
        to[p - begin] = grad_x + pairs[p] * H;
      }
      multiply(from, {down_across + expert * H * F, F, nullptr}, end - begin, H, F, middles);
      for (int64_t p = begin; p < end; ++p) {
        const float grad_weight = swiglu_row_backward(middles[p - begin], first + p * 2 * F, pairs.weight(p), F,
                                                      grad_first + p * 2 * F, middle + p * F);
        if (grad_weights) grad_weights[pairs[p]] = grad_weight;
      }
      multiply(grad_firsts, {gate_up_across + expert * H * 2 * F, H, nullptr}, end - begin, 2 * F, H, to);
    }
    // The weights' gradients: an expert's rows in their order, parts of its matrix by different threads.
    const int64_t parts_up = (H + BLOCK_ROWS - 1) / BLOCK_ROWS, parts = parts_up + (F + BLOCK_ROWS - 1) / BLOCK_ROWS;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < experts * parts; ++i) {
      const int64_t expert = i / parts, part = i % parts, begin = begins[expert], depth = begins[expert + 1] - begin;
      const bool up = part < parts_up;
      const int64_t row = (up ? part : part - parts_up) * BLOCK_ROWS, last = least(row + BLOCK_ROWS, up ? H : F);
      float *const out = up ? grad_gate_up : grad_down;
      if (!out || (accumulate && !depth)) continue;
      if (up)
        multiply_outer({x, H, tokens + begin}, {grad_first + begin * 2 * F, 2 * F, nullptr}, depth, row, last, 2 * F,
                       out + expert * H * 2 * F, accumulate);
      else
        multiply_outer({middle + begin * F, F, nullptr}, {grad, H, tokens + begin}, depth, row, last, H,
                       out + expert * F * H, accumulate);
    }
  }
}

// out (rows, width) = silu(gate) up, times weights if there are any, of gate_up (rows, 2 width).
void swiglu(const float *gate_up, int64_t stride, const float *weights, int64_t rows, int64_t width, float *out,
            int threads) {
#pragma omp parallel for num_threads(threads_for(8 * rows * width, threads))
  for (int64_t r = 0; r < rows; ++r)
    swiglu_row(gate_up + r * stride, weights ? weights[r] : 1.0f, width, out + r * width);
}

// d gate_up (rows, 2 width), and d weights unless it is null.
void swiglu_backward(const float *grad, const float *gate_up, int64_t stride, const float *weights, int64_t rows,
                     int64_t width, float *grad_gate_up, float *grad_weights, int threads) {
#pragma omp parallel for num_threads(threads_for(12 * rows * width, threads))
  for (int64_t r = 0; r < rows; ++r) {
    const float grad_weight = swiglu_row_backward(grad + r * width, gate_up + r * stride, weights ? weights[r] : 1.0f,
                                                  width, grad_gate_up + r * 2 * width, nullptr);
    if (grad_weights) grad_weights[r] = grad_weight;
  }
}

}  // namespace
