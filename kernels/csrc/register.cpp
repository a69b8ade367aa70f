// The schemas of every operation in the extension; each <op>.cpp and <op>.cu registers its own implementation.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(epg_fast, m) {
  m.def(
      "euler_step_out(Tensor(a!) out, Tensor x, Tensor denoised, float sigma, float sigma_next, float? lo, float? hi)"
      " -> ()");
}
