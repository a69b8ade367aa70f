// Resampling of 8-bit RGB images on the CPU, in the fixed-point arithmetic of Pillow: a pass over columns, a pass over
// rows, each rounded to 8 bits. Both are weighted sums of contiguous lines, which the compiler vectorises.

#include "common.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

namespace epg_fast {
namespace {

constexpr int kChannels = 3;
constexpr int kBits = 22;  // 8 bits of pixel, 2 of headroom for weights beyond 1
// Rows that are turned into lines of one column together.
constexpr int64_t kRows = 32;
constexpr int64_t kPadding = 4;
// Columns of a tile that is copied while its lines stay in the L1 cache.
constexpr int64_t kColumns = 64;

enum class Filter : int64_t { kBox = 0, kBilinear = 1, kBicubic = 2 };

double support_of(Filter filter) { return filter == Filter::kBox ? 0.5 : filter == Filter::kBilinear ? 1.0 : 2.0; }

double weight_at(Filter filter, double x) {
  if (filter == Filter::kBox) {
    return x > -0.5 && x <= 0.5 ? 1.0 : 0.0;
  }
  x = std::abs(x);
  if (filter == Filter::kBilinear) {
    return x < 1.0 ? 1.0 - x : 0.0;
  }
  constexpr double a = -0.5;
  if (x < 1.0) {
    return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  }
  return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * a : 0.0;
}

// For each output position the input positions it is made of, and their weights in units of 2^-kBits.
struct Taps {
  int64_t first = 0;  // of all inputs used
  int64_t last = 0;   // one behind
  std::vector<int64_t> begin;
  std::vector<int64_t> count;
  std::vector<int32_t> weights;
  int64_t stride = 0;

  const int32_t* of(int64_t position) const { return weights.data() + position * stride; }
};

// Outputs `offset` .. `offset + outputs` of resampling [low, high) of a line of `size` pixels to `resized` pixels.
Taps make_taps(int64_t size, float low, float high, int64_t resized, int64_t offset, int64_t outputs, Filter filter) {
  const double scale = static_cast<double>(high - low) / static_cast<double>(resized);
  const double stretch = std::max(scale, 1.0);
  const double support = support_of(filter) * stretch;
  Taps taps;
  taps.stride = static_cast<int64_t>(std::ceil(support)) * 2 + 1;
  taps.begin.resize(outputs);
  taps.count.resize(outputs);
  taps.weights.assign(outputs * taps.stride, 0);
  taps.first = size;
  std::vector<double> line(taps.stride);
  for (int64_t i = 0; i < outputs; ++i) {
    const double center = low + (static_cast<double>(i + offset) + 0.5) * scale;
    const int64_t begin = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
    const int64_t end = std::min(static_cast<int64_t>(center + support + 0.5), size);
    const int64_t count = std::clamp<int64_t>(end - begin, 0, taps.stride);
    double sum = 0.0;
    for (int64_t k = 0; k < count; ++k) {
      line[k] = weight_at(filter, (static_cast<double>(begin + k) - center + 0.5) / stretch);
      sum += line[k];
    }
    for (int64_t k = 0; k < count; ++k) {
      const double weight = (sum != 0.0 ? line[k] / sum : line[k]) * static_cast<double>(1 << kBits);
      taps.weights[i * taps.stride + k] = static_cast<int32_t>(weight < 0.0 ? weight - 0.5 : weight + 0.5);
    }
    taps.begin[i] = begin;
    taps.count[i] = count;
    taps.first = std::min(taps.first, begin);
    taps.last = std::max(taps.last, begin + count);
  }
  taps.first = std::min(taps.first, taps.last);
  return taps;
}

// out[i] = sum over k of weights[k] * lines[k * stride + i], rounded to 8 bits; i runs over `length` bytes.
EPG_CPU_CLONES void weighted_sum(uint8_t* out, const uint8_t* lines, int64_t stride, const int32_t* weights,
                                 int64_t count, int64_t length) {
  constexpr int64_t kBlock = 256;
  int32_t sums[kBlock];
  for (int64_t start = 0; start < length; start += kBlock) {
    const int64_t n = std::min(kBlock, length - start);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      sums[i] = 1 << (kBits - 1);
    }
    for (int64_t k = 0; k < count; ++k) {
      const uint8_t* const line = lines + k * stride + start;
      const int32_t weight = weights[k];
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        sums[i] += weight * line[i];
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const int32_t value = sums[i] >> kBits;
      out[start + i] = static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
    }
  }
}

struct Image {
  const uint8_t* pixels;
  int64_t height;
  int64_t width;
};

// Pixels are so many bytes apart along x and along y.
struct Steps {
  int64_t x;
  int64_t y;
};

// All but the last pixel of a row of a tile are copied with the byte behind them, which is faster: it goes to the place
// of a pixel that is yet to be copied, or to kPadding.
void copy_pixels(uint8_t* to, Steps to_steps, const uint8_t* from, Steps from_steps, int64_t rows, int64_t columns) {
  for (int64_t left = 0; left < columns; left += kColumns) {
    const int64_t last = std::min(left + kColumns, columns) - 1;
    for (int64_t y = 0; y < rows; ++y) {
      uint8_t* const to_row = to + y * to_steps.y;
      const uint8_t* const from_row = from + y * from_steps.y;
      for (int64_t x = left; x < last; ++x) {
        std::memcpy(to_row + x * to_steps.x, from_row + x * from_steps.x, kChannels + 1);
      }
      std::memcpy(to_row + last * to_steps.x, from_row + last * from_steps.x, kChannels);
    }
  }
}

// Memory that a thread keeps: fresh memory would cost more than the resampling.
struct Scratch {
  std::vector<uint8_t> columns;
  std::vector<uint8_t> sums;
  std::vector<uint8_t> rows;
  std::vector<uint8_t> halved[2];
};

// Rows `vertical.first` .. `vertical.last` of `image` resampled along x, as lines of `outputs` pixels in scratch.rows.
void resample_along_x(Scratch& scratch, const Image& image, const Taps& horizontal, const Taps& vertical,
                      int64_t outputs) {
  const int64_t used = horizontal.last - horizontal.first;
  constexpr int64_t kLine = kRows * kChannels + kPadding;
  scratch.columns.resize(used * kLine);
  scratch.sums.resize(outputs * kLine);
  scratch.rows.resize((vertical.last - vertical.first) * outputs * kChannels);
  for (int64_t top = vertical.first; top < vertical.last; top += kRows) {
    const int64_t rows = std::min(kRows, vertical.last - top);
    copy_pixels(scratch.columns.data(), {kLine, kChannels},
                image.pixels + (top * image.width + horizontal.first) * kChannels,
                {kChannels, image.width * kChannels}, rows, used);
    for (int64_t x = 0; x < outputs; ++x) {
      weighted_sum(scratch.sums.data() + x * kLine,
                   scratch.columns.data() + (horizontal.begin[x] - horizontal.first) * kLine, kLine, horizontal.of(x),
                   horizontal.count[x], rows * kChannels);
    }
    copy_pixels(scratch.rows.data() + (top - vertical.first) * outputs * kChannels, {kChannels, outputs * kChannels},
                scratch.sums.data(), {kLine, kChannels}, rows, outputs);
  }
}

void resample(uint8_t* out, Scratch& scratch, const Image& image, const Taps& horizontal, const Taps& vertical) {
  const int64_t width = static_cast<int64_t>(horizontal.begin.size());
  const int64_t line = width * kChannels;
  resample_along_x(scratch, image, horizontal, vertical, width);
  for (size_t y = 0; y < vertical.begin.size(); ++y) {
    weighted_sum(out + y * line, scratch.rows.data() + (vertical.begin[y] - vertical.first) * line, line,
                 vertical.of(y), vertical.count[y], line);
  }
}

void copy_window(uint8_t* out, const Image& image, int64_t left, int64_t top, int64_t height, int64_t width) {
  for (int64_t y = 0; y < height; ++y) {
    std::memcpy(out + y * width * kChannels, image.pixels + ((top + y) * image.width + left) * kChannels,
                width * kChannels);
  }
}

// `halvings` times the mean over about two by two pixels; the last result is in scratch.
Image halve(Scratch& scratch, Image image, int64_t halvings) {
  for (int64_t i = 0; i < halvings; ++i) {
    const int64_t height = image.height / 2;
    const int64_t width = image.width / 2;
    const Taps horizontal =
        make_taps(image.width, 0.0f, static_cast<float>(image.width), width, 0, width, Filter::kBox);
    const Taps vertical =
        make_taps(image.height, 0.0f, static_cast<float>(image.height), height, 0, height, Filter::kBox);
    std::vector<uint8_t>& to = scratch.halved[i % 2];
    to.resize(height * width * kChannels);
    resample(to.data(), scratch, image, horizontal, vertical);
    image = {to.data(), height, width};
  }
  return image;
}

struct Arguments {
  std::vector<Image> images;
  const int64_t* halvings;
  const double* boxes;
  const int64_t* resized;
  const int64_t* offsets;
  Filter filter;
  int64_t height;
  int64_t width;
  uint8_t* out;
};

// Resampling by whole pixels of scale 1 has weights of 1 and 0: the window is copied.
void crop_one(const Arguments& a, int64_t i) {
  static thread_local Scratch scratch;
  const Image image = halve(scratch, a.images[i], a.halvings[i]);
  const auto edge = [&](int k) { return static_cast<float>(a.boxes[4 * i + k]); };
  const int64_t* const resized = a.resized + 2 * i;
  const int64_t* const offset = a.offsets + 2 * i;
  uint8_t* const out = a.out + i * a.height * a.width * kChannels;
  const auto is_copy = [&](int k) {
    return edge(k) == std::floor(edge(k)) && edge(k + 2) - edge(k) == static_cast<float>(resized[k]);
  };
  if (is_copy(0) && is_copy(1)) {
    copy_window(out, image, static_cast<int64_t>(edge(0)) + offset[0], static_cast<int64_t>(edge(1)) + offset[1],
                a.height, a.width);
    return;
  }
  const Taps horizontal = make_taps(image.width, edge(0), edge(2), resized[0], offset[0], a.width, a.filter);
  const Taps vertical = make_taps(image.height, edge(1), edge(3), resized[1], offset[1], a.height, a.filter);
  resample(out, scratch, image, horizontal, vertical);
}

const void* parameter(const char* name, const Tensor& tensor, ScalarType dtype, int64_t batch, int64_t columns) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "resized_crop: ", name, " has a wrong dtype");
  STD_TORCH_CHECK(!tensor.is_cuda() && tensor.is_contiguous(), "resized_crop: ", name,
                  " must be contiguous and on the CPU");
  STD_TORCH_CHECK(tensor.numel() == batch * columns, "resized_crop: ", name, " has ", tensor.numel(),
                  " values, wanted ", batch * columns);
  return tensor.const_data_ptr();
}

void check_image(const Arguments& a, int64_t i) {
  const Image& image = a.images[i];
  const std::string where = "resized_crop: image " + std::to_string(i);
  constexpr int64_t kLongestInput = 1 << 24;  // beyond, float32 skips pixels
  STD_TORCH_CHECK(image.height <= kLongestInput && image.width <= kLongestInput, where, " of ", image.height, " x ",
                  image.width, " pixels is longer than ", kLongestInput);
  const int64_t halvings = a.halvings[i];
  STD_TORCH_CHECK(halvings >= 0 && halvings < 32 && (image.height >> halvings) > 0 && (image.width >> halvings) > 0,
                  where, " of ", image.height, " x ", image.width, " pixels cannot be halved ", halvings, " times");
  const auto edge = [&](int k) { return static_cast<float>(a.boxes[4 * i + k]); };
  STD_TORCH_CHECK(0.0f <= edge(0) && edge(0) < edge(2) && edge(2) <= static_cast<float>(image.width >> halvings) &&
                      0.0f <= edge(1) && edge(1) < edge(3) && edge(3) <= static_cast<float>(image.height >> halvings),
                  where, " has a box that is empty or not inside it");
  const int64_t* const resized = a.resized + 2 * i;
  const int64_t* const offset = a.offsets + 2 * i;
  constexpr int64_t kLongest = 1 << 20;
  const auto fits = [&](int k, int64_t size) {
    return 1 <= resized[k] && resized[k] <= kLongest && 0 <= offset[k] && offset[k] <= resized[k] - size;
  };
  STD_TORCH_CHECK(fits(0, a.width) && fits(1, a.height),
                  where, " has a window that is not inside its resized box");
}

void resized_crop_cpu(Tensor out, std::vector<Tensor> images, Tensor halvings, Tensor boxes, Tensor resized,
                      Tensor offsets, int64_t filter) {
  const int64_t batch = static_cast<int64_t>(images.size());
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Byte && out.is_contiguous() && !out.is_cuda() && out.dim() == 4 &&
                      out.size(0) == batch && out.size(1) > 0 && out.size(2) > 0 && out.size(3) == kChannels,
                  "resized_crop: out must be uint8 [batch, height, width, 3], contiguous, on the CPU");
  STD_TORCH_CHECK(filter >= 0 && filter <= 2, "resized_crop: filter must be 0, 1 or 2, got ", filter);
  Arguments a{{},
              static_cast<const int64_t*>(parameter("halvings", halvings, ScalarType::Long, batch, 1)),
              static_cast<const double*>(parameter("boxes", boxes, ScalarType::Double, batch, 4)),
              static_cast<const int64_t*>(parameter("resized", resized, ScalarType::Long, batch, 2)),
              static_cast<const int64_t*>(parameter("offsets", offsets, ScalarType::Long, batch, 2)),
              static_cast<Filter>(filter),
              out.size(1),
              out.size(2),
              static_cast<uint8_t*>(out.mutable_data_ptr())};
  for (int64_t i = 0; i < batch; ++i) {
    const Tensor& image = images[i];
    STD_TORCH_CHECK(image.scalar_type() == ScalarType::Byte && image.is_contiguous() && !image.is_cuda() &&
                        image.dim() == 3 && image.size(2) == kChannels,
                    "resized_crop: images[", i, "] must be uint8 [height, width, 3], contiguous, on the CPU");
    const uintptr_t first = reinterpret_cast<uintptr_t>(image.const_data_ptr());
    const uintptr_t written = reinterpret_cast<uintptr_t>(a.out);
    STD_TORCH_CHECK(written + out.numel() <= first || first + image.numel() <= written,
                    "resized_crop: out is written and must not overlap images[", i, "]");
    a.images.push_back({static_cast<const uint8_t*>(image.const_data_ptr()), image.size(0), image.size(1)});
    check_image(a, i);
  }
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      crop_one(a, i);
    }
  });
}

}  // namespace
}  // namespace epg_fast

STABLE_TORCH_LIBRARY_IMPL(epg_fast, CPU, m) { m.impl("resized_crop_out", TORCH_BOX(&epg_fast::resized_crop_cpu)); }
