// csrc/fp8/gemm.h on the CPU's machine, for tests/csrc/test_fp8_gemm.py.
#include "../../csrc/fp8/gemm.h"

#include "../../csrc/fp8/choose.h"
#include "machine.h"

using namespace r1;
using namespace r1::fp8;

namespace {

template <class Config>
void run(const Problem &problem, const Scales &scales, Map a, Map b, void *out, int blocks, uint32_t seed) {
  a.box_rows = Config::TILE_ROWS / PAIR;
  b.box_rows = Config::TILE_COLUMNS;
  for (int index = 0; index < blocks / PAIR; ++index) {
    Cluster cluster(Config::Layout::BYTES, seed + index);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < PAIR; ++rank) {
      for (int thread = 0; thread < THREADS; ++thread) {
        threads.emplace_back([&, rank, thread] {
          Gemm<Config, Cpu, Map>{{cluster, index, blocks, rank, thread},
                                 problem,
                                 scales,
                                 a,
                                 b,
                                 static_cast<typename Config::Out *>(out),
                                 cluster.blocks[rank].shared}
              .run();
        });
      }
    }
    for (std::thread &thread : threads) thread.join();
  }
}

template <int ROWS, int COLUMNS>
void run(int groups, bool square, bool accumulate, bool half, const Problem &problem, const Scales &scales,
         const Map &a, const Map &b, void *out, int blocks, uint32_t seed) {
  if (groups == 0 && square && half) {
    run<Config<ROWS, COLUMNS, Groups::NONE, true, false, BFloat16>>(problem, scales, a, b, out, blocks, seed);
  } else if (groups == 0 && square) {
    run<Config<ROWS, COLUMNS, Groups::NONE, true, false, float>>(problem, scales, a, b, out, blocks, seed);
  } else if (groups == 0 && accumulate) {
    run<Config<ROWS, COLUMNS, Groups::NONE, false, true, float>>(problem, scales, a, b, out, blocks, seed);
  } else if (groups == 0) {
    run<Config<ROWS, COLUMNS, Groups::NONE, false, false, float>>(problem, scales, a, b, out, blocks, seed);
  } else if (groups == 1 && half) {
    run<Config<ROWS, COLUMNS, Groups::ROWS, true, false, BFloat16>>(problem, scales, a, b, out, blocks, seed);
  } else if (groups == 1) {
    run<Config<ROWS, COLUMNS, Groups::ROWS, true, false, float>>(problem, scales, a, b, out, blocks, seed);
  } else if (accumulate) {
    run<Config<ROWS, COLUMNS, Groups::DEPTH, false, true, float>>(problem, scales, a, b, out, blocks, seed);
  } else {
    run<Config<ROWS, COLUMNS, Groups::DEPTH, false, false, float>>(problem, scales, a, b, out, blocks, seed);
  }
}

}  // namespace

extern "C" {

// 0, or 1 if threads waited for each other forever.
int emulate_gemm(int tile, int groups, int square, int accumulate, int half, int rows, int columns, int depth,
                 int experts, const void *tokens_per_expert, int wide, const uint8_t *a, int64_t a_stride,
                 const uint8_t *b, int64_t b_stride, const float *a_scales, int64_t a_row, int64_t a_block,
                 const float *b_scales, int64_t b_expert, int64_t b_row, int64_t b_block, void *out, int blocks,
                 uint32_t seed) {
  stuck = false;
  const Problem problem{rows, columns, depth, experts, tokens_per_expert, wide != 0};
  const Scales scales{a_scales, b_scales, a_row, a_block, b_expert, b_row, b_block};
  const Map of_a{a, rows, depth, a_stride, 0},
      of_b{b, int64_t{groups == 1 ? experts : 1} * columns, depth, b_stride, 0};
  const auto run_tile = tile == 0   ? &run<TILES[0].rows, TILES[0].columns>
                        : tile == 1 ? &run<TILES[1].rows, TILES[1].columns>
                                    : &run<TILES[2].rows, TILES[2].columns>;
  run_tile(groups, square, accumulate, half, problem, scales, of_a, of_b, out, blocks, seed);
  return stuck;
}

int choose(int rows, int groups, int columns, int multiprocessors) {
  return choose_tile(rows, groups, columns, multiprocessors);
}
}
