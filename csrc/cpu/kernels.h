// What csrc/cpu computes: one table of functions for each instruction set that it was compiled for.
//
// All numbers are float32 and all ids int64 unless said; sizes and strides count elements; `threads` is how many may
// work. norm.h, moe.h, attention.h and decode.h say what each does.
#pragma once

#include <cstdint>

namespace r1::cpu {

struct Kernels {
  void (*rms_norm)(const float *x, int64_t x_stride, const float *weight, float eps, int64_t rows, int64_t width,
                   float *out, float *scales, int threads);
  void (*rms_norm_backward)(const float *grad, int64_t grad_stride, const float *x, int64_t x_stride,
                            const float *weight, const float *scales, int64_t rows, int64_t width, float *grad_x,
                            float *grad_weight, float *parts, int64_t count, int threads);
  void (*apply_rope)(const float *x, int64_t token_stride, int64_t head_stride, const float *cos, const float *sin,
                     int64_t tokens, int64_t heads, int64_t half, bool interleaved, bool inverse, float *out,
                     int threads);
  void (*route)(const float *logits, const float *bias, int64_t experts, int64_t top_k, int64_t groups,
                int64_t kept_groups, float scale, bool softmax, const int64_t *replay, const bool *padding,
                int64_t tokens, int64_t *ids, float *weights, int64_t *counts, int threads);
  void (*route_backward)(const float *grad, const float *logits, const int64_t *ids, int64_t experts, int64_t top_k,
                         float scale, bool softmax, const bool *padding, int64_t tokens, float *grad_logits,
                         int threads);
  bool (*sort_by_expert)(const int64_t *ids, int64_t pairs, int64_t experts, int64_t *row_map, int64_t *counts);
  void (*experts_forward)(const float *x, const float *gate_up, const float *down, int64_t experts, int64_t hidden,
                          int64_t width, const int64_t *row_map, const int64_t *counts, const float *weights,
                          int64_t rows, int64_t top_k, float *first, float *by_pair, int threads);
  void (*experts_backward)(const float *grad, const float *x, const float *gate_up, const float *down, int64_t experts,
                           int64_t hidden, int64_t width, const int64_t *row_map, const int64_t *counts,
                           const float *weights, int64_t rows, int64_t top_k, const float *first, float *between,
                           float *grad_x, float *grad_weights, float *grad_gate_up, float *grad_down, bool accumulate,
                           int threads);
  void (*sum_pairs)(const float *pairs, int64_t tokens, int64_t top_k, int64_t hidden, float *out, int threads);
  void (*swiglu)(const float *gate_up, int64_t stride, const float *weights, int64_t rows, int64_t width, float *out,
                 int threads);
  void (*swiglu_backward)(const float *grad, const float *gate_up, int64_t stride, const float *weights, int64_t rows,
                          int64_t width, float *grad_gate_up, float *grad_weights, int threads);
  void (*attention)(const float *q, const float *k, const float *v, const float *key_rope, int64_t k_token,
                    int64_t k_head, int64_t v_token, int64_t v_head, int64_t rope_token, const int64_t *bounds,
                    const int64_t *query_index, int64_t sequences, int64_t queries, int64_t heads, int64_t key_heads,
                    int64_t key_width, int64_t rope_width, int64_t value_width, float scale, float *out, float *lse,
                    int threads);
  void (*attention_backward)(const float *q, const float *k, const float *v, const float *key_rope, int64_t k_token,
                             int64_t k_head, int64_t v_token, int64_t v_head, int64_t rope_token, const int64_t *bounds,
                             const int64_t *query_index, int64_t sequences, int64_t queries, int64_t heads,
                             int64_t key_heads, int64_t key_width, int64_t rope_width, int64_t value_width, float scale,
                             const float *grad, const float *out, const float *lse, float *grad_q, float *grad_k,
                             float *grad_v, float *grad_rope, int threads);
  int64_t (*decode)(const float *q, const float *k, const float *v, int64_t k_width, int64_t v_width,
                    const int64_t *pages, int64_t table_width, int64_t page_size, int64_t cached_pages,
                    const int64_t *lengths, int64_t batch, int64_t heads, int64_t key_heads, int64_t width,
                    int64_t value_width, float scale, float *out, int threads);
  int64_t (*append)(float *cache, const float *rows, const int64_t *pages, int64_t table_width, int64_t page_size,
                    int64_t cached_pages, const int64_t *positions, int64_t batch, int64_t width);
};

extern const Kernels baseline;
#ifdef R1_X86
extern const Kernels avx2, avx512;
#endif

}  // namespace r1::cpu
