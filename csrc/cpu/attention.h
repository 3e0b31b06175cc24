// Causal attention over sequences packed end to end, and its gradient.
#pragma once

#include "decode.h"

namespace {

// What forward and backward are given, in the order of the exported functions. Row i of a key stream (rows, key_heads,
// ...) begins at i times the token stride; key_rope (rows, rope_width), shared by the heads, may be null. query_index,
// or the query's own number if it is null, is a query's row in the key stream. bounds (sequences + 1) are the
// sequences'.
struct Pack {
  const float *q, *k, *v, *key_rope;
  int64_t k_token, k_head, v_token, v_head, rope_token;
  const int64_t *bounds, *query_index;
  int64_t sequences, queries, heads, key_heads, key_width, rope_width, value_width;
  float scale;

  int64_t width() const { return key_width + rope_width; }
};

constexpr int64_t QUERIES = 32;  // whose scores are made at a time

// Queries by sequence: those of sequence s are list[begins[s]] to list[begins[s + 1] - 1], each at `places` in it.
// Memory of the thread that asks.
struct Queries {
  int64_t *list, *begins, *places;

  explicit Queries(const Pack &p) {
    static thread_local Scratch memory;
    list = static_cast<int64_t *>(memory.bytes((3 * p.queries + p.sequences + 2) * sizeof(int64_t)));
    places = list + p.queries;
    int64_t *const sequence = places + p.queries;
    begins = sequence + p.queries;
    std::memset(begins, 0, (p.sequences + 2) * sizeof(int64_t));
    for (int64_t t = 0; t < p.queries; ++t) {
      const int64_t row = p.query_index ? p.query_index[t] : t;
      int64_t low = 0, high = p.sequences - 1;  // the last sequence that begins at or before the row
      while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (p.bounds[middle] <= row) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
      sequence[t] = low;
      ++begins[low + 2];
    }
    for (int64_t s = 2; s < p.sequences + 2; ++s) begins[s] += begins[s - 1];
    for (int64_t t = 0; t < p.queries; ++t) {
      const int64_t at = begins[sequence[t] + 1]++, row = p.query_index ? p.query_index[t] : t;
      list[at] = t;
      places[at] = row - p.bounds[sequence[t]];
    }
  }
};

// Of one sequence and key head: its keys and values, also transposed, and room for a block's scores.
struct Sequence {
  int64_t start, length, room;
  Matrix keys, rope, values;
  float *keys_across, *values_across;  // (width, room), (value_width, room)
  float *scores, *slopes;              // (QUERIES, room)
  float *key_grads, *value_grads;      // (length, width), (length, value_width)

  Sequence(const Pack &p, int64_t s, int64_t head, bool backward, Scratch &memory)
      : start(p.bounds[s]), length(p.bounds[s + 1] - start), room((length + LANES - 1) / LANES * LANES) {
    keys = {p.k + start * p.k_token + head * p.k_head, p.k_token, nullptr};
    rope = {p.rope_width ? p.key_rope + start * p.rope_token : nullptr, p.rope_token, nullptr};
    values = {p.v + start * p.v_token + head * p.v_head, p.v_token, nullptr};
    const int64_t forward = (p.width() + QUERIES) * room;
    const int64_t more = backward ? (p.value_width + QUERIES) * room + length * (p.width() + p.value_width) : 0;
    keys_across = static_cast<float *>(memory.bytes((forward + more) * sizeof(float)));
    scores = keys_across + p.width() * room;
    values_across = scores + QUERIES * room;
    slopes = values_across + p.value_width * room;
    key_grads = slopes + QUERIES * room;
    value_grads = key_grads + length * p.width();
    across(keys, p.key_width, keys_across);
    across(rope, p.rope_width, keys_across + p.key_width * room);
    if (backward) {
      across(values, p.value_width, values_across);
      std::memset(key_grads, 0, length * (p.width() + p.value_width) * sizeof(float));
    }
  }

  void across(Matrix from, int64_t width, float *to) const {
    for (int64_t i = 0; i < length; ++i)
      for (int64_t d = 0; d < width; ++d) to[d * room + i] = from[i][d];
    for (int64_t d = 0; d < width; ++d)
      for (int64_t i = length; i < room; ++i) to[d * room + i] = 0;
  }
};

// Up to QUERIES queries of a sequence and one head: their rows of q, out or a gradient, and how many keys they see.
struct QueryBlock {
  const int64_t *list, *places;
  int64_t count, most = 0;

  QueryBlock(const Queries &queries, int64_t begin, int64_t end)
      : list(queries.list + begin), places(queries.places + begin), count(least(QUERIES, end - begin)) {
    for (int64_t i = 0; i < count; ++i) most = places[i] + 1 > most ? places[i] + 1 : most;
  }

  int64_t vectors() const { return (most + LANES - 1) / LANES * LANES; }

  template <class Number>
  void rows(Number *x, int64_t heads, int64_t head, int64_t width, Number **out) const {
    for (int64_t i = 0; i < count; ++i) out[i] = x + (list[i] * heads + head) * width;
  }
};

// out (queries, heads, value_width), and the log of every row's sum of exponentials, lse (queries, heads).
void attention(const float *q, const float *k, const float *v, const float *key_rope, int64_t k_token, int64_t k_head,
               int64_t v_token, int64_t v_head, int64_t rope_token, const int64_t *bounds, const int64_t *query_index,
               int64_t sequences, int64_t num_queries, int64_t heads, int64_t key_heads, int64_t key_width,
               int64_t rope_width, int64_t value_width, float scale, float *out, float *lse, int threads) {
  const Pack p{q,         k,          v,          key_rope,    k_token,   k_head,      v_token,
               v_head,    rope_token, bounds,     query_index, sequences, num_queries, heads,
               key_heads, key_width,  rope_width, value_width, scale};
  const Queries queries(p);
  const int64_t shared = heads / key_heads;
#pragma omp parallel for schedule(dynamic) \
    num_threads(threads_for(p.queries *p.heads *(p.width() + p.value_width) * 32, threads))
  for (int64_t task = 0; task < p.sequences * p.key_heads; ++task) {
    static thread_local Scratch memory;
    const int64_t s = task / p.key_heads, key_head = task % p.key_heads;
    if (queries.begins[s] == queries.begins[s + 1]) continue;
    const Sequence sequence(p, s, key_head, false, memory);
    for (int64_t head = key_head * shared; head < (key_head + 1) * shared; ++head)
      for (int64_t begin = queries.begins[s]; begin < queries.begins[s + 1]; begin += QUERIES) {
        const QueryBlock block(queries, begin, queries.begins[s + 1]);
        const float *from[QUERIES], *weights[QUERIES];
        float *scores[QUERIES], *to[QUERIES];
        block.rows(p.q, p.heads, head, p.width(), from);
        block.rows(out, p.heads, head, p.value_width, to);
        for (int64_t i = 0; i < block.count; ++i) weights[i] = scores[i] = sequence.scores + i * sequence.room;
        multiply(from, {sequence.keys_across, sequence.room, nullptr}, block.count, p.width(), block.vectors(), scores);
        for (int64_t i = 0; i < block.count; ++i) {
          const int64_t seen = block.places[i] + 1;
          lse[block.list[i] * p.heads + head] = softmax(scores[i], seen, p.scale);
          for (int64_t j = seen; j < block.most; ++j) scores[i][j] = 0;
        }
        multiply(weights, sequence.values, block.count, block.most, p.value_width, to);
      }
  }
}

// grad_q (queries, heads, width), grad_k (rows, key_heads, key_width), grad_v (rows, key_heads, value_width), and by
// key head grad_rope (rows, key_heads, rope_width). Keys that no query sees get 0.
void attention_backward(const float *q, const float *k, const float *v, const float *key_rope, int64_t k_token,
                        int64_t k_head, int64_t v_token, int64_t v_head, int64_t rope_token, const int64_t *bounds,
                        const int64_t *query_index, int64_t sequences, int64_t num_queries, int64_t heads,
                        int64_t key_heads, int64_t key_width, int64_t rope_width, int64_t value_width, float scale,
                        const float *grad, const float *out, const float *lse, float *grad_q, float *grad_k,
                        float *grad_v, float *grad_rope, int threads) {
  const Pack p{q,         k,          v,          key_rope,    k_token,   k_head,      v_token,
               v_head,    rope_token, bounds,     query_index, sequences, num_queries, heads,
               key_heads, key_width,  rope_width, value_width, scale};
  const Queries queries(p);
  const int64_t shared = heads / key_heads, D = p.width(), R = rope_width, V = value_width;
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(p.queries *p.heads *(D + V) * 64, threads))
  for (int64_t task = 0; task < p.sequences * p.key_heads; ++task) {
    static thread_local Scratch memory;
    const int64_t s = task / p.key_heads, key_head = task % p.key_heads;
    const Sequence sequence(p, s, key_head, true, memory);
    const int64_t room = sequence.room;
    for (int64_t head = key_head * shared; head < (key_head + 1) * shared; ++head)
      for (int64_t begin = queries.begins[s]; begin < queries.begins[s + 1]; begin += QUERIES) {
        const QueryBlock block(queries, begin, queries.begins[s + 1]);
        const float *from[QUERIES], *ups[QUERIES], *outs[QUERIES], *slope_rows[QUERIES];
        float *scores[QUERIES], *slopes[QUERIES], *to[QUERIES];
        block.rows(p.q, p.heads, head, D, from);
        block.rows(grad, p.heads, head, V, ups);
        block.rows(out, p.heads, head, V, outs);
        block.rows(grad_q, p.heads, head, D, to);
        for (int64_t i = 0; i < block.count; ++i) {
          scores[i] = sequence.scores + i * room;
          slope_rows[i] = slopes[i] = sequence.slopes + i * room;
        }
        multiply(from, {sequence.keys_across, room, nullptr}, block.count, D, block.vectors(), scores);
        multiply(ups, {sequence.values_across, room, nullptr}, block.count, V, block.vectors(), slopes);
        for (int64_t i = 0; i < block.count; ++i) {
          const float bound = lse[block.list[i] * p.heads + head];
          Vector along{};
          for (int64_t d = 0; d < V; d += LANES) along += load(ups[i] + d, V - d) * load(outs[i] + d, V - d);
          const float offset = sum(along);
          for (int64_t j = 0; j < block.vectors(); j += LANES) {
            const Vector weight = exponential(load(scores[i] + j) * p.scale - bound);
            store(scores[i] + j, weight);
            store(slopes[i] + j, weight * (load(slopes[i] + j) - offset) * p.scale);
          }
          for (int64_t j = block.places[i] + 1; j < block.most; ++j) scores[i][j] = slopes[i][j] = 0;
        }
        multiply(slope_rows, sequence.keys, block.count, block.most, p.key_width, to);
        for (int64_t i = 0; i < block.count; ++i) to[i] += p.key_width;
        if (R) multiply(slope_rows, sequence.rope, block.count, block.most, R, to);
        multiply_outer({sequence.slopes, room, nullptr}, {p.q + head * D, p.heads * D, block.list}, block.count, 0,
                       block.most, D, sequence.key_grads, true);
        multiply_outer({sequence.scores, room, nullptr}, {grad + head * V, p.heads * V, block.list}, block.count, 0,
                       block.most, V, sequence.value_grads, true);
      }
    for (int64_t i = 0; i < sequence.length; ++i) {
      const int64_t row = (sequence.start + i) * p.key_heads + key_head;
      std::memcpy(grad_k + row * p.key_width, sequence.key_grads + i * D, p.key_width * sizeof(float));
      std::memcpy(grad_v + row * V, sequence.value_grads + i * V, V * sizeof(float));
      if (R) std::memcpy(grad_rope + row * R, sequence.key_grads + i * D + p.key_width, R * sizeof(float));
    }
  }
}

}  // namespace
