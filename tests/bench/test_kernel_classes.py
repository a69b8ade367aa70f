"""Names of kernels, as the profiler gives them, find their class; times add up to the call's."""

import pytest
import torch

from bench.kernel_classes import (
    ATTENTION,
    CLASSES,
    COPIES,
    ELEMENTWISE,
    GAPS,
    GEMM,
    OPTIMISER,
    OTHER,
    kernel_class,
    of_spans,
    of_times,
    split,
)

NAMES = {
    GEMM: [
        "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x64_64x4_tn_align8>(Params)",
        "void cutlass::device_kernel<epg::linear_gelu_kernel<...>>(Params)",
        "ampere_sgemm_128x64_tn",
        "void gemv2T_kernel_val<int, int, float>(float)",
        "void cublasLt::splitKreduce_kernel<32, 16>(Params)",
        "sm80_xmma_fprop_implicit_gemm_f32f32_f32f32",
        "void cudnn::ops::implicit_convolve_sgemm<float>(int)",
        "triton_tem_fused_addmm_7",
        "triton_mm",
        "_linear_fwd_kernel",
        "_patch_embed_fwd_kernel",
        "_patch_embed_bwd_weight_kernel",
        "linear_fp8_kernel",
        "linear_gate_residual_bf16_wide_saving_kernel",
        "skip_linear_kernel",
        "_linear_dgelu_kernel",
        "aten::addmm",
        "aten::bmm",
        "aten::_scaled_mm",
        "aten::mkldnn_convolution",
        "epg_fast::skip_linear",
    ],
    ATTENTION: [
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<96, 128, 64, 4>>(Flash_fwd_params)",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(AttentionKernel::Params)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x64x80",
        "_attention_bwd_kernel",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float>(float*)",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    ],
    ELEMENTWISE: [
        "triton_poi_fused__scaled_dot_product_flash_attention_clone_5",
        "triton_red_fused__to_copy_add_addmm_native_layer_norm_3",
        "triton_per_fused_mul_sum_12",
        "cpp_fused_addmm_gelu_4",
        "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>(int)",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>(int)",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>(ReduceOp)",
        "void at::native::(anonymous namespace)::distribution_elementwise_grid_stride_kernel<float, 4>(long)",
        "_norm_modulate_fwd_kernel",
        "_column_sums_kernel",
        "_patch_loss_bwd_kernel",
        "_timestep_embedding_fwd_kernel",
        "heun_step_kernel",
        "aten::native_layer_norm",
        "aten::add_",
        "aten::gelu_backward",
    ],
    OPTIMISER: [
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<4>, FusedAdam>",
        "fused_adamw_ema_kernel",
        "adamw_prepare_kernel",
        "global_norm_final_kernel",
        "aten::_fused_adamw_",
        "aten::_foreach_lerp_",
        "epg_fast::fused_adamw_ema_",
    ],
    COPIES: [
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_aligned16_contig<OpaqueType<2>, 3>(char*)",
        "void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda(TensorIteratorBase&)>(int)",
        "aten::copy_",
        "aten::cat",
    ],
    OTHER: ["aten::view", "nchwToNhwcKernel", "something_new"],
}


@pytest.mark.parametrize("wanted, name", [(wanted, name) for wanted, names in NAMES.items() for name in names])
def test_names_find_their_class(wanted, name):
    assert kernel_class(name) == wanted


def test_kernels_that_overlap_count_once_and_the_rest_is_gaps():
    spans = [("nvjet", 0.0, 1000.0), ("Memcpy HtoD", 500.0, 1500.0), ("nvjet", 1600.0, 1700.0), ("x", 550.0, 600.0)]
    found = of_spans(spans, wall=3.0)
    taken = found.milliseconds
    assert (taken[GEMM], taken[COPIES], taken[OTHER]) == (pytest.approx(1.1), pytest.approx(0.5), 0)
    assert taken[GAPS] == pytest.approx(3.0 - 1.6) and list(taken) == list(CLASSES)
    assert found.longest[0] == ("nvjet", GEMM, pytest.approx(1.1))


def test_kernels_that_take_longer_than_the_call_leave_no_negative_gap():
    assert of_times({"nvjet": 5.0}, wall=4.0).milliseconds[GAPS] == 0


def test_a_profile_without_kernels_is_an_error():
    with pytest.raises(RuntimeError, match="saw no kernel"):
        of_spans([], 1.0)


def test_a_call_on_a_cpu_is_split_by_operators():
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    found = split(lambda: [a @ b for _ in range(20)], torch.device("cpu"), typical=1.0)
    assert found.milliseconds[GEMM] > 0.5 * (sum(found.milliseconds.values()) - found.milliseconds[GAPS])
