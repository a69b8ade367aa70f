// The schemas of every operation in the extension; each <op>.cpp and <op>.cu registers its own implementation.

#include <torch/csrc/stable/library.h>

#include <string>

namespace {

// What this library was built with, for `epg-fast env` and for the check that it holds code for the GPU at hand.
// interface: another number for every change of what an operator takes, which epg_fast/ops/extension.py expects.
std::string build_info() {
  return "interface=2;compiler=" EPG_COMPILER ";nvcc=" EPG_NVCC ";cuda_architectures=" EPG_CUDA_ARCHITECTURES;
}

}  // namespace

STABLE_TORCH_LIBRARY(epg_fast, m) {
  m.def("build_info() -> str");
  m.def(
      "augment_view_out(Tensor(a!) out, Tensor x, Tensor operations, Tensor values, Tensor grayscale, Tensor sigma,"
      " Tensor solarize, Tensor flip) -> ()");
  m.def(
      "euler_step_out(Tensor(a!) out, Tensor x, Tensor denoised, float sigma, float sigma_next, float? lo, float? hi)"
      " -> ()");
  m.def("euler_step_(Tensor(a!) x, Tensor denoised, float sigma, float sigma_next, float? lo, float? hi) -> ()");
  m.def(
      "heun_step_out(Tensor(a!) out, Tensor x, Tensor denoised, Tensor denoised_next, float sigma, float sigma_next,"
      " float? lo, float? hi) -> ()");
  m.def(
      "heun_step_(Tensor(a!) x, Tensor denoised, Tensor denoised_next, float sigma, float sigma_next, float? lo,"
      " float? hi) -> ()");
  m.def("global_norm_out(Tensor(a!) norm, Tensor(b!) found_inf, Tensor[] tensors) -> ()");
  m.def(
      "fused_adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
      " Tensor(d!)[] emas, Tensor(e!)[] copies, Tensor(f!) steps, Tensor lrs, Tensor weight_decays, Tensor ema_weights,"
      " Tensor norm, Tensor found_inf, Tensor max_norm, Tensor? grad_scale, float beta1, float beta2, float eps) -> ()");
  m.def(
      "resized_crop_out(Tensor(a!) out, Tensor[] images, Tensor halvings, Tensor boxes, Tensor resized, Tensor offsets,"
      " int filter) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(epg_fast, CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&build_info)); }
