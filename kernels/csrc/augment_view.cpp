// The pixel part of augmented views on the CPU: an image is taken apart into the planes of the result, which stay in
// the L2 cache while every stage runs over them; images are split over PyTorch's threads.

#include "common.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace epg_fast {
namespace {

constexpr const char* kOp = "augment_view";
constexpr int64_t kOperations = 4;
constexpr double kMaxSigma = 1024.0;
// Pixels whose hues are shifted together, and pixels of a row whose sums are kept in registers.
constexpr int64_t kBlock = 64, kColumns = 128;

enum Operation : int8_t { kNone, kBrightness, kContrast, kSaturation, kHue };

struct Planes {
  uint8_t* r;
  uint8_t* g;
  uint8_t* b;
  int64_t size;
};

struct View {
  const int8_t* operations;
  const double* values;
  bool grayscale;
  double sigma;
  bool solarize;
  bool flip;
};

// Buffers of a thread for its blurs.
struct BlurBuffers {
  std::vector<float> weights, row, plane;
};

EPG_ALWAYS_INLINE int luma(int r, int g, int b) { return (19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16; }

EPG_ALWAYS_INLINE uint8_t blend(float degenerate, float value, float factor) {
  float mixed = degenerate + factor * (value - degenerate);
  mixed = mixed > 0.0f ? mixed : 0.0f;
  mixed = mixed < 255.0f ? mixed : 255.0f;
  return static_cast<uint8_t>(static_cast<int>(mixed));
}

EPG_CPU_CLONES void separate(const uint8_t* pixels, Planes out) {
#pragma omp simd
  for (int64_t i = 0; i < out.size; ++i) {
    out.r[i] = pixels[3 * i];
    out.g[i] = pixels[3 * i + 1];
    out.b[i] = pixels[3 * i + 2];
  }
}

EPG_CPU_CLONES void reverse(uint8_t* row, uint8_t* copy, int64_t width) {
  std::copy_n(row, width, copy);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    row[i] = copy[width - 1 - i];
  }
}

EPG_CPU_CLONES void blend_with_constant(uint8_t* values, int64_t size, float constant, float factor) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    values[i] = blend(constant, values[i], factor);
  }
}

EPG_CPU_CLONES int64_t sum_of_luma(Planes x) {
  constexpr int64_t pixels = 1 << 20;  // whose sum an int holds
  int64_t sum = 0;
  for (int64_t begin = 0; begin < x.size; begin += pixels) {
    const int64_t end = std::min(x.size, begin + pixels);
    int part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = begin; i < end; ++i) {
      part += luma(x.r[i], x.g[i], x.b[i]);
    }
    sum += part;
  }
  return sum;
}

EPG_CPU_CLONES void saturate(Planes x, float factor) {
#pragma omp simd
  for (int64_t i = 0; i < x.size; ++i) {
    const float gray = luma(x.r[i], x.g[i], x.b[i]);
    x.r[i] = blend(gray, x.r[i], factor);
    x.g[i] = blend(gray, x.g[i], factor);
    x.b[i] = blend(gray, x.b[i], factor);
  }
}

// How far a channel is below the highest one: 0 to `range`, in between for a distance of 0 to 1.
EPG_ALWAYS_INLINE int channel(float highest, float range, float distance) {
  float below = range * (distance > 0.0f ? distance : 0.0f);
  below = below < range ? below : range;
  return static_cast<int>(highest - below + 0.5f);
}

// Colours with 32 bits per channel. Conditions are numbers, 0 or 1: the compiler vectorises no branches.
EPG_ALWAYS_INLINE void shift_hue(int* red, int* green, int* blue, int shift) {
#pragma omp simd
  for (int64_t i = 0; i < kBlock; ++i) {
    const int r = red[i], g = green[i], b = blue[i];
    const int highest = std::max(std::max(r, g), b), lowest = std::min(std::min(r, g), b);
    const int chroma = highest - lowest, middle = r + g + b - highest - lowest;
    const int is_red = (r >= g) & (r >= b), is_green = (1 - is_red) & (g >= b), is_blue = 1 - is_red - is_green;
    // The hue is as far from an odd sixth of the circle as the middle channel is from the highest, on this side of it.
    const int before = (is_red & (g < b)) | (is_green & (b < r)) | (is_blue & (r < g));
    const int side = 1 - 2 * before, odd = 2 * is_green + 4 * is_blue + side;
    const float away = static_cast<float>(highest - middle) / static_cast<float>(std::max(chroma, 1));
    const float sixths = static_cast<float>(odd) - static_cast<float>(side) * away;
    const float turns = sixths / 6.0f + static_cast<float>(odd < 0);
    const float saturation = static_cast<int>(chroma * 255.0f / static_cast<float>(std::max(highest, 1)));

    // of a gray pixel the hue is arbitrary: its saturation is 0
    const int hue = (static_cast<int>(turns * 255.0f) + shift) & 255;
    const float position = hue * 6.0f / 255.0f;
    const float value = highest, range = value * (saturation / 255.0f);
    red[i] = channel(value, range, 2.0f - std::abs(position - 3.0f));
    green[i] = channel(value, range, std::abs(position - 2.0f) - 1.0f);
    blue[i] = channel(value, range, std::abs(position - 4.0f) - 1.0f);
  }
}

EPG_CPU_CLONES void shift_hue(Planes x, int shift) {
  for (int64_t begin = 0; begin < x.size; begin += kBlock) {
    const int64_t size = std::min(kBlock, x.size - begin);
    int r[kBlock] = {}, g[kBlock] = {}, b[kBlock] = {};
    std::copy_n(x.r + begin, size, r);
    std::copy_n(x.g + begin, size, g);
    std::copy_n(x.b + begin, size, b);
    shift_hue(r, g, b, shift);
    std::copy_n(r, size, x.r + begin);
    std::copy_n(g, size, x.g + begin);
    std::copy_n(b, size, x.b + begin);
  }
}

EPG_CPU_CLONES void to_gray(Planes x) {
#pragma omp simd
  for (int64_t i = 0; i < x.size; ++i) {
    x.r[i] = x.g[i] = x.b[i] = luma(x.r[i], x.g[i], x.b[i]);
  }
}

EPG_CPU_CLONES void invert_bright(uint8_t* values, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    values[i] = values[i] >= 128 ? 255 - values[i] : values[i];
  }
}

// sums[i] = weights[0] * x[i] + sum over k of weights[k] * (before(k)[i] + after(k)[i]), i < kColumns
template <class Before, class After>
EPG_ALWAYS_INLINE void weighted_sums(float* sums, const float* x, const float* weights, int64_t radius, Before before,
                                     After after) {
  float parts[kColumns];
#pragma omp simd
  for (int64_t i = 0; i < kColumns; ++i) {
    parts[i] = weights[0] * x[i];
  }
  for (int64_t k = 1; k <= radius; ++k) {
    const float weight = weights[k];
    const float *const a = before(k), *const b = after(k);
    const auto add = [&](int64_t begin) {
#pragma omp simd
      for (int64_t i = begin; i < begin + kColumns / 2; ++i) {
        parts[i] += weight * (a[i] + b[i]);
      }
    };
    // Two loops: of a single one GCC would unroll the loop around it, and leave it in scalars.
    add(0);
    add(kColumns / 2);
  }
  std::copy_n(parts, kColumns, sums);
}

// row: `padded` + 2 * radius values, to hold those of one row between repeated edges; plane: height * padded values.
EPG_CPU_CLONES void blur_plane(uint8_t* values, int64_t height, int64_t width, int64_t padded, const float* weights,
                               int64_t radius, float* row, float* plane) {
  for (int64_t y = 0; y < height; ++y) {
    const uint8_t* const from = values + y * width;
    float* const middle = row + radius;
    std::fill(row, middle, static_cast<float>(from[0]));
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      middle[i] = from[i];
    }
    std::fill(middle + width, middle + padded + radius, static_cast<float>(from[width - 1]));
    for (int64_t i = 0; i < padded; i += kColumns) {
      const float* const x = middle + i;
      weighted_sums(
          plane + y * padded + i, x, weights, radius, [=](int64_t k) { return x - k; },
          [=](int64_t k) { return x + k; });
    }
  }
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t i = 0; i < padded; i += kColumns) {
      float sums[kColumns];
      const float* const column = plane + i;
      weighted_sums(
          sums, column + y * padded, weights, radius,
          [=](int64_t k) { return column + std::max<int64_t>(y - k, 0) * padded; },
          [=](int64_t k) { return column + std::min(y + k, height - 1) * padded; });
      uint8_t rounded[kColumns];
#pragma omp simd
      for (int64_t j = 0; j < kColumns; ++j) {
        rounded[j] = static_cast<int>(sums[j] + 0.5f);
      }
      std::copy_n(rounded, std::min(kColumns, width - i), values + y * width + i);
    }
  }
}

void blur(Planes x, int64_t height, int64_t width, double sigma, BlurBuffers& buffers) {
  const int64_t radius = static_cast<int64_t>(std::ceil(4.0 * sigma));
  const int64_t padded = (width + kColumns - 1) / kColumns * kColumns;
  std::vector<double> weights(radius + 1);
  double sum = 0.0;
  for (int64_t k = 0; k <= radius; ++k) {
    const double distance = k / sigma;
    weights[k] = std::exp(-0.5 * (distance * distance));
    sum += k == 0 ? weights[k] : 2.0 * weights[k];
  }
  buffers.weights.resize(radius + 1);
  for (int64_t k = 0; k <= radius; ++k) {
    buffers.weights[k] = static_cast<float>(weights[k] / sum);
  }
  buffers.row.resize(padded + 2 * radius);
  buffers.plane.resize(height * padded);
  for (uint8_t* const plane : {x.r, x.g, x.b}) {
    blur_plane(plane, height, width, padded, buffers.weights.data(), radius, buffers.row.data(), buffers.plane.data());
  }
}

void jitter(Planes x, int8_t operation, double value) {
  const float factor = static_cast<float>(value);
  if (operation == kBrightness) {
    blend_with_constant(x.r, 3 * x.size, 0.0f, factor);
  } else if (operation == kContrast) {
    const int64_t mean = (2 * sum_of_luma(x) + x.size) / (2 * x.size);
    blend_with_constant(x.r, 3 * x.size, static_cast<float>(mean), factor);
  } else if (operation == kSaturation) {
    saturate(x, factor);
  } else if (operation == kHue) {
    const int shift = static_cast<int>(std::fmod(std::trunc(value * 255.0), 256.0)) & 255;
    // even a shift by zero would lose precision on the way through HSV
    if (shift != 0) {
      shift_hue(x, shift);
    }
  }
}

void augment(uint8_t* out, const uint8_t* pixels, int64_t height, int64_t width, const View& view,
             BlurBuffers& buffers) {
  const int64_t size = height * width;
  const Planes x{out, out + size, out + 2 * size, size};
  separate(pixels, x);
  for (int64_t i = 0; i < kOperations; ++i) {
    jitter(x, view.operations[i], view.values[i]);
  }
  if (view.grayscale) {
    to_gray(x);
  }
  if (view.sigma > 0.0) {
    blur(x, height, width, view.sigma, buffers);
  }
  if (view.solarize) {
    invert_bright(out, 3 * size);
  }
  if (view.flip) {
    std::vector<uint8_t> copy(width);
    for (int64_t row = 0; row < 3 * height; ++row) {
      reverse(out + row * width, copy.data(), width);
    }
  }
}

void check_parameter(const char* name, const Tensor& parameter, ScalarType dtype, const Tensor& x, int64_t dim) {
  STD_TORCH_CHECK(parameter.scalar_type() == dtype, kOp, ": ", name, " has the wrong dtype");
  check_contiguous(kOp, name, parameter);
  check_same_device(kOp, name, parameter, "x", x);
  STD_TORCH_CHECK(parameter.dim() == dim && parameter.size(0) == x.size(0) &&
                      (dim == 1 || parameter.size(1) == kOperations),
                  kOp, ": ", name, " must have the shape [B", dim == 2 ? ", 4" : "", "] for the B images of x");
}

void check_images(const Tensor& out, const Tensor& x) {
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"x", x}, {"out", out}}) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Byte, kOp, ": ", name, " must be uint8");
    check_contiguous(kOp, name, tensor);
    STD_TORCH_CHECK(tensor.dim() == 4, kOp, ": ", name, " has ", tensor.dim(), " dimensions, wanted 4");
  }
  check_same_device(kOp, "out", out, "x", x);
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0 && x.size(3) == 3, kOp,
                  ": x must have the shape [B, H, W, 3] with H, W >= 1");
  STD_TORCH_CHECK(
      out.size(0) == x.size(0) && out.size(1) == 3 && out.size(2) == x.size(1) && out.size(3) == x.size(2), kOp,
      ": out must have the shape [B, 3, H, W] for x of [B, H, W, 3]");
  const uintptr_t a = reinterpret_cast<uintptr_t>(out.const_data_ptr());
  const uintptr_t b = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  STD_TORCH_CHECK(a + out.numel() <= b || b + x.numel() <= a, kOp, ": out is written and must not overlap x");
}

void check_view(const View& view, int64_t image) {
  for (int64_t i = 0; i < kOperations; ++i) {
    const int8_t operation = view.operations[i];
    const double value = view.values[i];
    STD_TORCH_CHECK(operation >= kNone && operation <= kHue, kOp, ": operations[", image, "] must be 0 to 4");
    STD_TORCH_CHECK(operation == kNone || (std::abs(value) <= FLT_MAX && (operation == kHue || value >= 0.0)), kOp,
                    ": values[", image, "] must be finite in float32, and factors not negative");
  }
  STD_TORCH_CHECK(view.sigma >= 0.0 && view.sigma <= kMaxSigma, kOp, ": sigma[", image, "] must be 0 to 1024");
}

void augment_view_out_cpu(Tensor out, Tensor x, Tensor operations, Tensor values, Tensor grayscale, Tensor sigma,
                          Tensor solarize, Tensor flip) {
  check_images(out, x);
  check_parameter("operations", operations, ScalarType::Char, x, 2);
  check_parameter("values", values, ScalarType::Double, x, 2);
  check_parameter("grayscale", grayscale, ScalarType::Bool, x, 1);
  check_parameter("sigma", sigma, ScalarType::Double, x, 1);
  check_parameter("solarize", solarize, ScalarType::Bool, x, 1);
  check_parameter("flip", flip, ScalarType::Bool, x, 1);
  std::vector<View> views;
  for (int64_t i = 0; i < x.size(0); ++i) {
    views.push_back({static_cast<const int8_t*>(operations.const_data_ptr()) + i * kOperations,
                     static_cast<const double*>(values.const_data_ptr()) + i * kOperations,
                     static_cast<const bool*>(grayscale.const_data_ptr())[i],
                     static_cast<const double*>(sigma.const_data_ptr())[i],
                     static_cast<const bool*>(solarize.const_data_ptr())[i],
                     static_cast<const bool*>(flip.const_data_ptr())[i]});
    check_view(views.back(), i);
  }
  uint8_t* const out_data = static_cast<uint8_t*>(out.mutable_data_ptr());
  const uint8_t* const x_data = static_cast<const uint8_t*>(x.const_data_ptr());
  const int64_t height = x.size(1), width = x.size(2), stride = 3 * height * width;
  torch::stable::parallel_for(0, x.size(0), 1, [&](int64_t begin, int64_t end) {
    BlurBuffers buffers;
    for (int64_t i = begin; i < end; ++i) {
      augment(out_data + i * stride, x_data + i * stride, height, width, views[i], buffers);
    }
  });
}

}  // namespace
}  // namespace epg_fast

STABLE_TORCH_LIBRARY_IMPL(epg_fast, CPU, m) { m.impl("augment_view_out", TORCH_BOX(&epg_fast::augment_view_out_cpu)); }
