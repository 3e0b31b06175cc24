// csrc/fp8/quantize.h on a CPU, a thread for a thread, for tests/csrc/test_fp8_quantize.py.
#include "../../csrc/fp8/quantize.h"

#include "machine.h"

using namespace r1;
using namespace r1::fp8;

namespace {

// To nearest, ties to even; what is too large becomes 448, NaN stays NaN, as cvt.rn.satfinite does.
uint8_t to_e4m3_byte(float x) {
  const uint8_t sign = to_bits(x) >> 31 << 7;
  if (x != x) return sign | 0x7F;
  const float size = std::fabs(x);
  if (size >= 464.0f) return sign | 0x7E;
  const int exponent = size < 0x1p-6f ? -6 : std::ilogb(size);
  const int eighths =
      static_cast<int>(std::nearbyint(std::ldexp(size, 3 - exponent)));  // 8 ... 16, or fewer if denormal
  const int code = exponent == -6 && eighths < 8 ? eighths : (exponent + 7) * 8 + eighths - 8;
  return sign | static_cast<uint8_t>(code < 0x7E ? code : 0x7E);
}

struct QuantizerBlock {
  QuantizerShared shared;
  Barrier all{QUANTIZER_THREADS};
  std::deque<Barrier> warps;
  float exchanged[QUANTIZER_THREADS];

  QuantizerBlock() {
    std::memset(&shared, 0xFF, sizeof shared);
    for (int warp = 0; warp < QUANTIZER_THREADS / 32; ++warp) warps.emplace_back(32);
  }
};

struct QuantizerCpu {
  QuantizerBlock *own;
  int thread_, tile_row_, tile_column_, batch_;

  int thread() const { return thread_; }
  int tile_row() const { return tile_row_; }
  int tile_column() const { return tile_column_; }
  int batch() const { return batch_; }
  void sync_block() const { own->all.meet(); }
  float shuffle_xor(float x, int other) const {
    own->exchanged[thread_] = x;
    own->warps[thread_ / 32].meet();
    const float theirs = own->exchanged[thread_ ^ other];
    own->warps[thread_ / 32].meet();
    return theirs;
  }
  template <class Source>
  struct Eight {
    Source values[8];
  };
  template <class Source>
  Eight<Source> load_8(const Source *from) const {
    if (reinterpret_cast<uintptr_t>(from) % 16) std::abort();
    Eight<Source> eight;
    std::memcpy(&eight, from, sizeof eight);
    return eight;
  }
  void to_floats(float (&to)[8], const Eight<float> &from) const {
    for (int i = 0; i < 8; ++i) to[i] = from.values[i];
  }
  void to_floats(float (&to)[8], const Eight<BFloat16> &from) const {
    for (int i = 0; i < 8; ++i) to[i] = from_bits(uint32_t{from.values[i].bits} << 16);
  }
  uint32_t to_e4m3(float a, float b, float c, float d) const {
    return to_e4m3_byte(a) | to_e4m3_byte(b) << 8 | to_e4m3_byte(c) << 16 | uint32_t{to_e4m3_byte(d)} << 24;
  }
};

template <class Source, bool SQUARE, bool TRANSPOSED>
void run(const Quantization &job, const void *x, int batches) {
  for (int batch = 0; batch < batches; ++batch) {
    for (int row = 0; row < divide_up(job.rows, BLOCK); ++row) {
      for (int column = 0; column < divide_up(job.columns, BLOCK); ++column) {
        QuantizerBlock block;
        std::vector<std::thread> threads;
        for (int thread = 0; thread < QUANTIZER_THREADS; ++thread) {
          threads.emplace_back([&, thread] {
            Quantizer<QuantizerCpu, Source, SQUARE, TRANSPOSED>{
                {&block, thread, row, column, batch}, job, static_cast<const Source *>(x), block.shared}
                .run();
          });
        }
        for (std::thread &thread : threads) thread.join();
      }
    }
  }
}

template <class Source>
void run(const Quantization &job, const void *x, int batches, bool square) {
  if (square) {
    job.across ? run<Source, true, true>(job, x, batches) : run<Source, true, false>(job, x, batches);
  } else {
    job.across ? run<Source, false, true>(job, x, batches) : run<Source, false, false>(job, x, batches);
  }
}

}  // namespace

extern "C" {

int emulate_quantize(const Quantization *job, const void *x, int half, int batches, int square) {
  stuck = false;
  half ? run<BFloat16>(*job, x, batches, square) : run<float>(*job, x, batches, square);
  return stuck;
}

// How many of the quotients x / scale differ, in bits, from the division's where they are normal numbers or zeros, or
// in what e4m3 makes of them.
int wrong_quotients(const float *x, const float *scales, int count) {
  int wrong = 0;
  for (int i = 0; i < count; ++i) {
    const float want = x[i] / scales[i], got = Divisor(scales[i]).quotient(x[i]);
    const bool exact = std::fabs(want) >= FLT_MIN || x[i] == 0.0f;
    wrong += (exact && to_bits(want) != to_bits(got)) || to_e4m3_byte(want) != to_e4m3_byte(got);
  }
  return wrong;
}
}
