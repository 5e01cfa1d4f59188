// Conv4's memory-bound layers on a CPU, each in one pass over its data: batch normalization + ReLU + max-pooling
// with its backward and double backward, and the first layer on fixed images. Convolutions stay PyTorch's.
//
// Activations are channels-last, [N, H, W, C] in memory. Tasks lie side by side on the channel axis (C = tasks ·
// hidden), so per-channel statistics are per-task ones and nothing here but the first layer knows of tasks.
//
// The kernels work on blocks of channels that fill one of the CPU's vectors, written with the vector extensions of GCC
// and Clang: they compile for any CPU, and for float, bfloat16 (storage only) and double. Sums run in the computing type over at most ROWS
// positions and then in double. Threads divide channels, never a sum: results do not depend on their number.
//
// `winner` holds, per output, which position of its pooling window was the largest (0…3 in reading order, the first
// of equals; always 0 without pooling), or INACTIVE where ReLU gave zero. Positions beyond the last whole window
// belong to no output but count in the statistics, as in PyTorch.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

using at::Tensor;

namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif
constexpr int64_t MULTIPLE = 16;  // the number of a layer's channels is one of it: whole vectors of every kind
constexpr int WIDE = VECTOR_BYTES == 64 ? 4 : 2;  // blocks that are worked on together: AVX-512 has 32 registers
constexpr int64_t ROWS = 512;     // positions whose sum is kept in the computing type
constexpr int64_t TAPS = 9;       // of a 3×3 kernel
constexpr uint8_t INACTIVE = 255;

// ---- vectors of channels ----

template <class Compute> struct Lanes;
template <> struct Lanes<float> {
  static constexpr int64_t COUNT = VECTOR_BYTES / 4;
  typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t Mask __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint8_t Bytes __attribute__((vector_size(COUNT)));
};
template <> struct Lanes<double> {
  static constexpr int64_t COUNT = VECTOR_BYTES / 8;
  typedef double Vector __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t Mask __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint8_t Bytes __attribute__((vector_size(COUNT)));
};
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));

template <class Storage> struct ComputeOf { typedef Storage type; };
template <> struct ComputeOf<at::BFloat16> { typedef float type; };
template <class Storage> using Compute = typename ComputeOf<Storage>::type;
template <class Storage> using Vector = typename Lanes<Compute<Storage>>::Vector;
template <class Storage> using Mask = typename Lanes<Compute<Storage>>::Mask;
template <class Storage> using Bytes = typename Lanes<Compute<Storage>>::Bytes;
template <class Storage> constexpr int64_t BLOCK = Lanes<Compute<Storage>>::COUNT;
template <class Storage> constexpr int64_t GROUP = WIDE * BLOCK<Storage>;

template <class T, class From> inline T copy_bits(const From* from) {
  T to;
  std::memcpy(&to, from, sizeof(T));
  return to;
}

template <class Storage> inline Vector<Storage> load(const Storage* from) { return copy_bits<Vector<Storage>>(from); }
inline Vector<float> load(const at::BFloat16* from) {  // the upper half of a float
  Words words = __builtin_convertvector(copy_bits<Halves>(from), Words) << 16;
  return copy_bits<Vector<float>>(&words);
}

template <class Storage> inline void store(Storage* to, Vector<Storage> value) {
  std::memcpy(to, &value, sizeof(value));
}
inline void store(at::BFloat16* to, Vector<float> value) {  // round to nearest, ties to even
#ifdef __AVX512BF16__
  __m256bh halves = _mm512_cvtneps_pbh(copy_bits<__m512>(&value));
#else
  Words words = copy_bits<Words>(&value);
  Halves halves = __builtin_convertvector((words + 0x7fff + ((words >> 16) & 1)) >> 16, Halves);
#endif
  std::memcpy(to, &halves, sizeof(halves));
}

template <class Storage> inline Mask<Storage> load_winner(const uint8_t* from) {
  // one instruction each, where GCC takes six for the last line
#if defined(__AVX512F__)
  if constexpr (sizeof(Compute<Storage>) == 4) return Mask<Storage>(_mm512_cvtepu8_epi32(copy_bits<__m128i>(from)));
#elif defined(__AVX2__)
  if constexpr (sizeof(Compute<Storage>) == 4)
    return Mask<Storage>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#endif
  return __builtin_convertvector(copy_bits<Bytes<Storage>>(from), Mask<Storage>);
}
template <class Storage> inline void store_winner(uint8_t* to, Mask<Storage> winner) {
  Bytes<Storage> bytes = __builtin_convertvector(winner, Bytes<Storage>);
  std::memcpy(to, &bytes, sizeof(bytes));
}

// ---- shapes ----

// Where the positions of an [N, H, W, C] tensor and of its pooled output lie.
template <int POOL> struct Map {
  int64_t images, height, width, channels;
  int64_t out_height() const { return height / POOL; }
  int64_t out_width() const { return width / POOL; }
  int64_t positions() const { return images * height * width; }
  int64_t in(int64_t n, int64_t i, int64_t j) const { return ((n * height + i) * width + j) * channels; }
  int64_t out(int64_t n, int64_t i, int64_t j) const {
    return ((n * out_height() + i) * out_width() + j) * channels;
  }
  // from a window's first position to its position `w`
  int64_t within(int w) const { return ((w >> 1) * width + (w & 1)) * channels; }
  int64_t images_per_tile() const { return std::max<int64_t>(1, ROWS / (height * width)); }
};

// work(tile's first image, the one after its last, first channel, the one after the last)
// A tile's images stay in the cache while one group of channels after the other is worked on.
template <int POOL, class Work> void for_tiles(const Map<POOL>& map, int64_t from, int64_t to, Work work) {
  for (int64_t n = 0; n < map.images; n += map.images_per_tile()) work(n, std::min(map.images, n + map.images_per_tile()), from, to);
}

// work<blocks>(first channel), in groups of WIDE blocks while there are as many, then one by one
#define FOR_CHANNEL_GROUPS(from, to, ...)                                        \
  for (int64_t channel = (from); channel < (to);) {                             \
    if (channel + GROUP<S> <= (to)) {                                       \
      constexpr int NB = WIDE;                                                  \
      __VA_ARGS__;                                                              \
      channel += GROUP<S>;                                                      \
    } else {                                                                    \
      constexpr int NB = 1;                                                     \
      __VA_ARGS__;                                                              \
      channel += BLOCK<S>;                                                         \
    }                                                                           \
  }

// Sums per channel of `COUNT` quantities: in the computing type within a tile, in double over tiles.
template <class S, int NB, int COUNT> struct Sums {
  Vector<S> value[COUNT][NB] = {};
  void add_to(std::vector<double>* totals, int64_t channel) const {
    for (int q = 0; q < COUNT; q++)
      for (int b = 0; b < NB; b++)
        for (int lane = 0; lane < BLOCK<S>; lane++) totals[q][channel + b * BLOCK<S> + lane] += value[q][b][lane];
  }
};

// The value at each channel's winning position of the window that begins at `at`.
template <class S, int POOL> inline Vector<S> at_winner(const S* at, const Map<POOL>& map, Mask<S> winner) {
  Vector<S> value = load(at);
  for (int w = 1; w < POOL * POOL; w++) value = winner == w ? load(at + map.within(w)) : value;
  return value;
}

// ---- batch normalization + ReLU + max-pooling ----
//
// With x̂ = (x − mean) · r, r = 1/√(variance + eps), over M positions: y = pool(relu(gain · x̂ + offset)).

template <class S, int POOL>
void norm_forward(const S* x, const Compute<S>* gain, const Compute<S>* offset, S* y, uint8_t* winner,
                  Compute<S>* mean, Compute<S>* r, const Map<POOL>& map, double eps, int64_t from, int64_t to) {
  using V = Vector<S>;
  const int64_t C = map.channels, M = map.positions();
  std::vector<double> totals[2] = {std::vector<double>(C), std::vector<double>(C)};
  for (int64_t row = 0; row < M; row += ROWS) {
    const int64_t end = std::min(M, row + ROWS);
    FOR_CHANNEL_GROUPS(from, to, {
      Sums<S, NB, 2> sums;
      V pivot[NB];  // the first position's values: differences from them keep the variance of a large mean exact
      for (int b = 0; b < NB; b++) pivot[b] = load(x + channel + b * BLOCK<S>);
      for (int64_t i = row; i < end; i++)
        for (int b = 0; b < NB; b++) {
          V value = load(x + i * C + channel + b * BLOCK<S>) - pivot[b];
          sums.value[0][b] += value;
          sums.value[1][b] += value * value;
        }
      sums.add_to(totals, channel);
    })
  }
  std::vector<Compute<S>> scale(C), shift(C);
  for (int64_t c = from; c < to; c++) {
    const double delta = totals[0][c] / M, variance = totals[1][c] / M - delta * delta;
    const double center = double(Compute<S>(x[c])) + delta, rate = 1 / std::sqrt(std::max(0.0, variance) + eps);
    // what is not finite must reach the output: std::max would hide the NaN that it makes of the variance
    mean[c] = center;
    r[c] = std::isnan(variance) ? variance : rate;
    scale[c] = gain[c] * r[c];
    shift[c] = offset[c] - center * scale[c];
  }
  for_tiles(map, from, to, [&](int64_t n0, int64_t n1, int64_t from, int64_t to) {
    FOR_CHANNEL_GROUPS(from, to, {
      V factor[NB], summand[NB];
      for (int b = 0; b < NB; b++) {
        factor[b] = load(&scale[channel + b * BLOCK<S>]);
        summand[b] = load(&shift[channel + b * BLOCK<S>]);
      }
      for (int64_t n = n0; n < n1; n++)
        for (int64_t i = 0; i < map.out_height(); i++)
          for (int64_t j = 0; j < map.out_width(); j++) {
            const S* window = x + map.in(n, i * POOL, j * POOL) + channel;
            const int64_t out = map.out(n, i, j) + channel;
            for (int b = 0; b < NB; b++) {
              V best = load(window + b * BLOCK<S>) * factor[b] + summand[b];
              Mask<S> which = {};
              for (int w = 1; w < POOL * POOL; w++) {
                V value = load(window + map.within(w) + b * BLOCK<S>) * factor[b] + summand[b];
                Mask<S> larger = value > best;
                best = larger ? value : best;
                which = larger ? Mask<S>{} + w : which;
              }
              Mask<S> zero = best <= 0;  // so that a NaN stays one
              store(y + out + b * BLOCK<S>, zero ? V{} : best);
              store_winner<S>(winner + out + b * BLOCK<S>, zero ? Mask<S>{} + INACTIVE : which);
            }
          }
    })
  });
}

// out = of_gy · (gy at the winners, 0 elsewhere) + of_x · (x − mean) + constant [+ of_vx · vx], coefficients per channel
template <class S> struct Coefficients {
  std::vector<Compute<S>> of_gy, of_x, of_vx, constant;
  explicit Coefficients(int64_t channels) : of_gy(channels), of_x(channels), of_vx(channels), constant(channels) {}
};

template <class S, int POOL, bool WITH_VX>
void combine(const S* x, const S* vx, const S* gy, const uint8_t* winner, const Compute<S>* mean,
             const Coefficients<S>& coefficients, S* out, const Map<POOL>& map, int64_t from, int64_t to) {
  using V = Vector<S>;
  for_tiles(map, from, to, [&](int64_t n0, int64_t n1, int64_t from, int64_t to) {
    FOR_CHANNEL_GROUPS(from, to, {
      V of_gy[NB], of_x[NB], of_vx[NB], constant[NB], center[NB];
      for (int b = 0; b < NB; b++) {
        const int64_t c = channel + b * BLOCK<S>;
        of_gy[b] = load(&coefficients.of_gy[c]);
        of_x[b] = load(&coefficients.of_x[c]);
        of_vx[b] = load(&coefficients.of_vx[c]);
        constant[b] = load(&coefficients.constant[c]);
        center[b] = load(mean + c);
      }
      for (int64_t n = n0; n < n1; n++)
        for (int64_t i = 0; i < map.height; i++)
          for (int64_t j = 0; j < map.width; j++) {
            const int64_t at = map.in(n, i, j) + channel;
            const bool pooled = i / POOL < map.out_height() && j / POOL < map.out_width();
            const int64_t o = pooled ? map.out(n, i / POOL, j / POOL) + channel : 0;
            const int w = POOL == 2 ? int((i & 1) * 2 + (j & 1)) : 0;
            for (int b = 0; b < NB; b++) {
              V value = (load(x + at + b * BLOCK<S>) - center[b]) * of_x[b] + constant[b];
              if (WITH_VX) value += load(vx + at + b * BLOCK<S>) * of_vx[b];
              if (pooled) {
                V with_gradient = value + load(gy + o + b * BLOCK<S>) * of_gy[b];
                value = load_winner<S>(winner + o + b * BLOCK<S>) == w ? with_gradient : value;
              }
              store(out + at + b * BLOCK<S>, value);
            }
          }
    })
  });
}

// gx = gain · r · (a − A − x̂ · B) with a = gy at the winners, A = Σa/M, B = Σ a·x̂ / M; the gradients of offset and
// gain are M·A and M·B.
template <class S, int POOL>
void norm_backward(const S* x, const Compute<S>* gain, const S* gy, const uint8_t* winner, const Compute<S>* mean,
                   const Compute<S>* r, S* gx, Compute<S>* g_gain, Compute<S>* g_offset, const Map<POOL>& map,
                   int64_t from, int64_t to) {
  using V = Vector<S>;
  const double M = map.positions();
  std::vector<double> totals[2] = {std::vector<double>(map.channels), std::vector<double>(map.channels)};
  for_tiles(map, from, to, [&](int64_t n0, int64_t n1, int64_t from, int64_t to) {
    FOR_CHANNEL_GROUPS(from, to, {
      Sums<S, NB, 2> sums;
      V center[NB];
      for (int b = 0; b < NB; b++) center[b] = load(mean + channel + b * BLOCK<S>);
      for (int64_t n = n0; n < n1; n++)
        for (int64_t i = 0; i < map.out_height(); i++)
          for (int64_t j = 0; j < map.out_width(); j++) {
            const S* window = x + map.in(n, i * POOL, j * POOL) + channel;
            const int64_t o = map.out(n, i, j) + channel;
            for (int b = 0; b < NB; b++) {
              Mask<S> which = load_winner<S>(winner + o + b * BLOCK<S>);
              V gradient = which == INACTIVE ? V{} : load(gy + o + b * BLOCK<S>);
              V value = at_winner<S>(window + b * BLOCK<S>, map, which) - center[b];
              sums.value[0][b] += gradient;
              sums.value[1][b] += gradient * value;
            }
          }
      sums.add_to(totals, channel);
    })
  });
  Coefficients<S> coefficients(map.channels);
  for (int64_t c = from; c < to; c++) {
    const double rate = r[c], gain_rate = gain[c] * rate, sum = totals[0][c], sum_xhat = totals[1][c] * rate;
    g_offset[c] = sum;
    g_gain[c] = sum_xhat;
    coefficients.of_gy[c] = gain_rate;
    coefficients.of_x[c] = -gain_rate * rate * sum_xhat / M;
    coefficients.constant[c] = -gain_rate * sum / M;
  }
  combine<S, POOL, false>(x, nullptr, gy, winner, mean, coefficients, gx, map, from, to);
}

// The gradient of ⟨vx, gx⟩ + ⟨v_gain, g_gain⟩ + ⟨v_offset, g_offset⟩, with gx, g_gain, g_offset as functions of
// x, gain and gy. With V0 = Σvx/M, V1 = Σ vx·x̂ / M, VA = Σ vx·a / M, k = v_gain − gain·r·V1 and D = VA − A·V0 − B·V1:
//   d_x    = r · (k · (a − A − x̂·B) − gain·r·B · (vx − V0 − x̂·V1) − gain·r·D · x̂)
//   d_gain = r · M · D
//   d_gy   = gain·r · (vx − V0) + k · x̂ + v_offset, at the winners
template <class S, int POOL>
void norm_double_backward(const S* x, const Compute<S>* gain, const S* gy, const uint8_t* winner,
                          const Compute<S>* mean, const Compute<S>* r, const Compute<S>* g_gain,
                          const Compute<S>* g_offset, const S* vx, const Compute<S>* v_gain,
                          const Compute<S>* v_offset, S* d_x, Compute<S>* d_gain, S* d_gy, const Map<POOL>& map,
                          int64_t from, int64_t to) {
  using V = Vector<S>;
  const double M = map.positions();
  std::vector<double> totals[3];
  for (auto& total : totals) total.resize(map.channels);
  for_tiles(map, from, to, [&](int64_t n0, int64_t n1, int64_t from, int64_t to) {
    FOR_CHANNEL_GROUPS(from, to, {
      Sums<S, NB, 3> sums;
      V center[NB];
      for (int b = 0; b < NB; b++) center[b] = load(mean + channel + b * BLOCK<S>);
      for (int64_t at = map.in(n0, 0, 0) + channel; at < map.in(n1, 0, 0); at += map.channels)
        for (int b = 0; b < NB; b++) {
          V value = load(vx + at + b * BLOCK<S>);
          sums.value[0][b] += value;
          sums.value[1][b] += value * (load(x + at + b * BLOCK<S>) - center[b]);
        }
      for (int64_t n = n0; n < n1; n++)
        for (int64_t i = 0; i < map.out_height(); i++)
          for (int64_t j = 0; j < map.out_width(); j++) {
            const S* window = vx + map.in(n, i * POOL, j * POOL) + channel;
            const int64_t o = map.out(n, i, j) + channel;
            for (int b = 0; b < NB; b++) {
              Mask<S> which = load_winner<S>(winner + o + b * BLOCK<S>);
              V gradient = which == INACTIVE ? V{} : load(gy + o + b * BLOCK<S>);
              sums.value[2][b] += gradient * at_winner<S>(window + b * BLOCK<S>, map, which);
            }
          }
      sums.add_to(totals, channel);
    })
  });
  Coefficients<S> for_x(map.channels), for_gy(map.channels);
  for (int64_t c = from; c < to; c++) {
    const double rate = r[c], gain_rate = gain[c] * rate, A = g_offset[c] / M, B = g_gain[c] / M;
    const double V0 = totals[0][c] / M, V1 = totals[1][c] * rate / M, VA = totals[2][c] / M;
    const double k = v_gain[c] - gain_rate * V1, D = VA - A * V0 - B * V1;
    d_gain[c] = rate * M * D;
    for_x.of_gy[c] = rate * k;
    for_x.of_vx[c] = -rate * gain_rate * B;
    for_x.of_x[c] = rate * rate * (-k * B + gain_rate * (B * V1 - D));
    for_x.constant[c] = rate * (-k * A + gain_rate * B * V0);
    for_gy.of_vx[c] = gain_rate;
    for_gy.of_x[c] = k * rate;
    for_gy.constant[c] = v_offset[c] - gain_rate * V0;
  }
  combine<S, POOL, true>(x, vx, gy, winner, mean, for_x, d_x, map, from, to);
  for_tiles(map, from, to, [&](int64_t n0, int64_t n1, int64_t from, int64_t to) {
    FOR_CHANNEL_GROUPS(from, to, {
      for (int64_t n = n0; n < n1; n++)
        for (int64_t i = 0; i < map.out_height(); i++)
          for (int64_t j = 0; j < map.out_width(); j++) {
            const int64_t at = map.in(n, i * POOL, j * POOL) + channel, o = map.out(n, i, j) + channel;
            for (int b = 0; b < NB; b++) {
              const int64_t c = channel + b * BLOCK<S>;
              Mask<S> which = load_winner<S>(winner + o + b * BLOCK<S>);
              V value = at_winner<S>(vx + at + b * BLOCK<S>, map, which) * load(&for_gy.of_vx[c]);
              value += (at_winner<S>(x + at + b * BLOCK<S>, map, which) - load(mean + c)) * load(&for_gy.of_x[c]);
              value += load(&for_gy.constant[c]);
              store(d_gy + o + b * BLOCK<S>, which == INACTIVE ? V{} : value);
            }
          }
    })
  });
}

// ---- the first layer, on images: y = pool(relu(convolution(images, weight) + offset)) ----
//
// Its batch normalization is folded into weight and offset by the caller. Images are padded, [T, N, channels, H, W];
// weight is [T, 9 · image channels, hidden].

template <int POOL> struct FirstLayer {
  int64_t tasks, images, image_channels, padded_height, padded_width, stride, hidden;
  Map<POOL> map() const {  // of the convolution's output
    return {images, (padded_height - 3) / stride + 1, (padded_width - 3) / stride + 1, tasks * hidden};
  }
  int64_t plane() const { return padded_height * padded_width; }
  int64_t image(int64_t task, int64_t n) const { return (task * images + n) * image_channels * plane(); }
  // a 3×3 patch's first pixel, for the position `w` of an output's window
  int64_t patch(int64_t i, int64_t j, int w) const {
    return (i * POOL + (w >> 1)) * stride * padded_width + (j * POOL + (w & 1)) * stride;
  }
  int64_t tap(int64_t q) const { return q / TAPS * plane() + q % TAPS / 3 * padded_width + q % 3; }
  int64_t taps() const { return TAPS * image_channels; }
};

// CHOOSE: find the winners; else take the values at the winners that are given (and no ReLU).
template <class S, int POOL, bool CHOOSE>
void first_values(const Compute<S>* images, const Compute<S>* weight, const Compute<S>* offset, S* y, uint8_t* winner,
                  const FirstLayer<POOL>& layer, int64_t from, int64_t to) {
  using V = Vector<S>;
  const Map<POOL> map = layer.map();
  std::vector<int64_t> tap(layer.taps());
  for (int64_t q = 0; q < layer.taps(); q++) tap[q] = layer.tap(q);
  for_tiles(map, from, to, [&](int64_t n0, int64_t n1, int64_t from, int64_t to) {
    for (int64_t task = from / layer.hidden; task < to / layer.hidden; task++)
      FOR_CHANNEL_GROUPS(task * layer.hidden, (task + 1) * layer.hidden, {
        const Compute<S>* own = weight + (task * layer.taps() * layer.hidden) + channel - task * layer.hidden;
        for (int64_t n = n0; n < n1; n++)
          for (int64_t i = 0; i < map.out_height(); i++)
            for (int64_t j = 0; j < map.out_width(); j++) {
              V value[POOL * POOL][NB];
              for (int w = 0; w < POOL * POOL; w++)
                for (int b = 0; b < NB; b++) value[w][b] = load(offset + channel + b * BLOCK<S>);
              const Compute<S>* image = images + layer.image(task, n);
              for (int64_t q = 0; q < layer.taps(); q++)
                for (int b = 0; b < NB; b++) {
                  const V factor = load(own + q * layer.hidden + b * BLOCK<S>);
                  for (int w = 0; w < POOL * POOL; w++)
                    value[w][b] += image[layer.patch(i, j, w) + tap[q]] * factor;
                }
              const int64_t out = map.out(n, i, j) + channel;
              for (int b = 0; b < NB; b++) {
                V best = value[0][b];
                Mask<S> which = {};
                if (!CHOOSE) which = load_winner<S>(winner + out + b * BLOCK<S>);
                for (int w = 1; w < POOL * POOL; w++) {
                  Mask<S> take = CHOOSE ? value[w][b] > best : which == w;
                  best = take ? value[w][b] : best;
                  if (CHOOSE) which = take ? Mask<S>{} + w : which;
                }
                Mask<S> zero = CHOOSE ? best <= 0 : which == INACTIVE;
                store(y + out + b * BLOCK<S>, zero ? V{} : best);
                if (CHOOSE) store_winner<S>(winner + out + b * BLOCK<S>, zero ? Mask<S>{} + INACTIVE : which);
              }
            }
      })
  });
}

// The adjoint of first_values<CHOOSE = false>: gradients of weight and offset.
template <class S, int POOL>
void first_gradients(const Compute<S>* images, const S* gy, const uint8_t* winner, Compute<S>* g_weight,
                     Compute<S>* g_offset, const FirstLayer<POOL>& layer, int64_t from, int64_t to) {
  using V = Vector<S>;
  const Map<POOL> map = layer.map();
  std::vector<double> totals[TAPS + 1];
  for (int64_t plane = 0; plane < layer.image_channels; plane++) {
    for (auto& total : totals) total.assign(map.channels, 0.0);
    for_tiles(map, from, to, [&](int64_t n0, int64_t n1, int64_t from, int64_t to) {
      for (int64_t channel = from; channel < to; channel += BLOCK<S>) {
        Sums<S, 1, TAPS + 1> sums;
        for (int64_t n = n0; n < n1; n++) {
          const Compute<S>* image = images + layer.image(channel / layer.hidden, n) + plane * layer.plane();
          for (int64_t i = 0; i < map.out_height(); i++)
            for (int64_t j = 0; j < map.out_width(); j++) {
              const int64_t o = map.out(n, i, j) + channel;
              const V gradient = load(gy + o);
              const Mask<S> which = load_winner<S>(winner + o);
              for (int w = 0; w < POOL * POOL; w++) {
                const V own = which == w ? gradient : V{};
                const Compute<S>* patch = image + layer.patch(i, j, w);
                for (int q = 0; q < TAPS; q++) sums.value[q][0] += patch[q / 3 * layer.padded_width + q % 3] * own;
                sums.value[TAPS][0] += own;
              }
            }
        }
        sums.add_to(totals, channel);
      }
    });
    for (int64_t c = from; c < to; c++) {
      const int64_t task = c / layer.hidden;
      for (int64_t q = 0; q < TAPS; q++)
        g_weight[(task * layer.taps() + plane * TAPS + q) * layer.hidden + c % layer.hidden] = totals[q][c];
      g_offset[c] = totals[TAPS][c];
    }
  }
}

// ---- the operators ----

template <class T> T* data(const Tensor& tensor) { return reinterpret_cast<T*>(tensor.data_ptr()); }

Tensor channels_last(const Tensor& x) { return x.contiguous(at::MemoryFormat::ChannelsLast); }

Tensor output(const Tensor& like, int64_t images, int64_t channels, int64_t height, int64_t width, at::ScalarType type) {
  return at::empty({images, channels, height, width},
                   like.options().dtype(type).memory_format(at::MemoryFormat::ChannelsLast));
}

// Channels [from, to) of all, whole multiples of `step`, shared among threads.
template <class Work> void over_channels(int64_t channels, int64_t step, Work work) {
  at::parallel_for(0, (channels + step - 1) / step, 1, [&](int64_t from, int64_t to) {
    work(from * step, std::min(channels, to * step));
  });
}

// Runs the body with S as the storage type and POOL as the window's side.
#define FOR_TYPE_AND_POOL(type, pool, ...)                                              \
  do {                                                                                  \
    TORCH_CHECK((pool) == 1 || (pool) == 2, "the pooling window is 1 or 2 wide");       \
    auto with_pool = [&](auto storage) {                                                \
      using S = decltype(storage);                                                      \
      if ((pool) == 2) {                                                                \
        constexpr int POOL = 2;                                                         \
        __VA_ARGS__;                                                                    \
      } else {                                                                          \
        constexpr int POOL = 1;                                                         \
        __VA_ARGS__;                                                                    \
      }                                                                                 \
    };                                                                                  \
    if ((type) == at::kFloat) with_pool(float());                                       \
    else if ((type) == at::kDouble) with_pool(double());                                \
    else if ((type) == at::kBFloat16) with_pool(at::BFloat16());                        \
    else TORCH_CHECK(false, "float32, float64 or bfloat16 is needed, not ", (type));    \
  } while (0)

void check_channels(int64_t channels) {
  TORCH_CHECK(channels % MULTIPLE == 0, channels, " channels are not a multiple of ", MULTIPLE);
}

template <int POOL> Map<POOL> map_of(const Tensor& x) { return {x.size(0), x.size(2), x.size(3), x.size(1)}; }

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_forward_op(const Tensor& x_, const Tensor& gain_,
                                                           const Tensor& offset_, int64_t pool, double eps) {
  const Tensor x = channels_last(x_), gain = gain_.contiguous(), offset = offset_.contiguous();
  check_channels(x.size(1));
  const Tensor y = output(x, x.size(0), x.size(1), x.size(2) / pool, x.size(3) / pool, x.scalar_type());
  const Tensor winner = output(y, y.size(0), y.size(1), y.size(2), y.size(3), at::kByte);
  const Tensor mean = at::empty_like(gain), r = at::empty_like(gain);
  FOR_TYPE_AND_POOL(x.scalar_type(), pool, over_channels(x.size(1), GROUP<S>, [&](int64_t from, int64_t to) {
    using C = Compute<S>;
    norm_forward<S, POOL>(data<S>(x), data<C>(gain), data<C>(offset), data<S>(y), data<uint8_t>(winner),
                          data<C>(mean), data<C>(r), map_of<POOL>(x), eps, from, to);
  }));
  return {y, winner, mean, r};
}

std::tuple<Tensor, Tensor, Tensor> norm_backward_op(const Tensor& x_, const Tensor& gain_, const Tensor& gy_,
                                                    const Tensor& winner, const Tensor& mean, const Tensor& r,
                                                    int64_t pool) {
  const Tensor x = channels_last(x_), gy = channels_last(gy_), gain = gain_.contiguous();
  const Tensor gx = at::empty_like(x), g_gain = at::empty_like(gain), g_offset = at::empty_like(gain);
  FOR_TYPE_AND_POOL(x.scalar_type(), pool, over_channels(x.size(1), GROUP<S>, [&](int64_t from, int64_t to) {
    using C = Compute<S>;
    norm_backward<S, POOL>(data<S>(x), data<C>(gain), data<S>(gy), data<uint8_t>(winner), data<C>(mean), data<C>(r),
                           data<S>(gx), data<C>(g_gain), data<C>(g_offset), map_of<POOL>(x), from, to);
  }));
  return {gx, g_gain, g_offset};
}

std::tuple<Tensor, Tensor, Tensor> norm_double_backward_op(const Tensor& x_, const Tensor& gain_, const Tensor& gy_,
                                                           const Tensor& winner, const Tensor& mean, const Tensor& r,
                                                           const Tensor& g_gain, const Tensor& g_offset,
                                                           const Tensor& vx_, const Tensor& v_gain_,
                                                           const Tensor& v_offset_, int64_t pool) {
  const Tensor x = channels_last(x_), gy = channels_last(gy_), vx = channels_last(vx_), gain = gain_.contiguous();
  const Tensor v_gain = v_gain_.contiguous(), v_offset = v_offset_.contiguous();
  const Tensor d_x = at::empty_like(x), d_gain = at::empty_like(gain), d_gy = at::empty_like(gy);
  FOR_TYPE_AND_POOL(x.scalar_type(), pool, over_channels(x.size(1), GROUP<S>, [&](int64_t from, int64_t to) {
    using C = Compute<S>;
    norm_double_backward<S, POOL>(data<S>(x), data<C>(gain), data<S>(gy), data<uint8_t>(winner), data<C>(mean),
                                  data<C>(r), data<C>(g_gain), data<C>(g_offset), data<S>(vx), data<C>(v_gain),
                                  data<C>(v_offset), data<S>(d_x), data<C>(d_gain), data<S>(d_gy), map_of<POOL>(x),
                                  from, to);
  }));
  return {d_x, d_gain, d_gy};
}

template <int POOL> FirstLayer<POOL> layer_of(const Tensor& images, int64_t hidden, int64_t stride) {
  return {images.size(0), images.size(1), images.size(2), images.size(3), images.size(4), stride, hidden};
}

Tensor first_output(const Tensor& images, int64_t hidden, int64_t stride, int64_t pool, at::ScalarType type) {
  const int64_t height = (images.size(3) - 3) / stride + 1, width = (images.size(4) - 3) / stride + 1;
  return output(images, images.size(1), images.size(0) * hidden, height / pool, width / pool, type);
}

std::tuple<Tensor, Tensor> first_forward_op(const Tensor& images_, const Tensor& weight_, const Tensor& offset_,
                                            int64_t stride, int64_t pool, at::ScalarType type) {
  const Tensor images = images_.contiguous(), weight = weight_.contiguous(), offset = offset_.contiguous();
  const int64_t hidden = weight.size(2);
  check_channels(hidden);
  const Tensor y = first_output(images, hidden, stride, pool, type);
  const Tensor winner = first_output(images, hidden, stride, pool, at::kByte);
  FOR_TYPE_AND_POOL(type, pool, over_channels(y.size(1), hidden, [&](int64_t from, int64_t to) {
    using C = Compute<S>;
    first_values<S, POOL, true>(data<C>(images), data<C>(weight), data<C>(offset), data<S>(y), data<uint8_t>(winner),
                                layer_of<POOL>(images, hidden, stride), from, to);
  }));
  return {y, winner};
}

Tensor first_gather_op(const Tensor& images_, const Tensor& weight_, const Tensor& offset_, const Tensor& winner,
                       int64_t stride, int64_t pool, at::ScalarType type) {
  const Tensor images = images_.contiguous(), weight = weight_.contiguous(), offset = offset_.contiguous();
  const int64_t hidden = weight.size(2);
  const Tensor y = first_output(images, hidden, stride, pool, type);
  FOR_TYPE_AND_POOL(type, pool, over_channels(y.size(1), hidden, [&](int64_t from, int64_t to) {
    using C = Compute<S>;
    first_values<S, POOL, false>(data<C>(images), data<C>(weight), data<C>(offset), data<S>(y), data<uint8_t>(winner),
                                 layer_of<POOL>(images, hidden, stride), from, to);
  }));
  return y;
}

std::tuple<Tensor, Tensor> first_gradients_op(const Tensor& images_, const Tensor& gy_, const Tensor& winner,
                                              int64_t stride, int64_t pool) {
  const Tensor images = images_.contiguous(), gy = channels_last(gy_);
  const int64_t tasks = images.size(0), hidden = gy.size(1) / tasks;
  const Tensor g_weight = at::empty({tasks, TAPS * images.size(2), hidden}, images.options());
  const Tensor g_offset = at::empty({tasks, hidden}, images.options());
  FOR_TYPE_AND_POOL(gy.scalar_type(), pool, over_channels(gy.size(1), BLOCK<S>, [&](int64_t from, int64_t to) {
    using C = Compute<S>;
    first_gradients<S, POOL>(data<C>(images), data<S>(gy), data<uint8_t>(winner), data<C>(g_weight), data<C>(g_offset),
                             layer_of<POOL>(images, hidden, stride), from, to);
  }));
  return {g_weight, g_offset};
}

}  // namespace

TORCH_LIBRARY(metapipe_native, library) {
  library.def("norm_forward(Tensor x, Tensor gain, Tensor offset, int pool, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def("norm_backward(Tensor x, Tensor gain, Tensor gy, Tensor winner, Tensor mean, Tensor r, int pool) -> (Tensor, Tensor, Tensor)");
  library.def("norm_double_backward(Tensor x, Tensor gain, Tensor gy, Tensor winner, Tensor mean, Tensor r, Tensor g_gain, Tensor g_offset, Tensor vx, Tensor v_gain, Tensor v_offset, int pool) -> (Tensor, Tensor, Tensor)");
  library.def("first_forward(Tensor images, Tensor weight, Tensor offset, int stride, int pool, ScalarType type) -> (Tensor, Tensor)");
  library.def("first_gather(Tensor images, Tensor weight, Tensor offset, Tensor winner, int stride, int pool, ScalarType type) -> Tensor");
  library.def("first_gradients(Tensor images, Tensor gy, Tensor winner, int stride, int pool) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(metapipe_native, CPU, library) {
  library.impl("norm_forward", norm_forward_op);
  library.impl("norm_backward", norm_backward_op);
  library.impl("norm_double_backward", norm_double_backward_op);
  library.impl("first_forward", first_forward_op);
  library.impl("first_gather", first_gather_op);
  library.impl("first_gradients", first_gradients_op);
}
