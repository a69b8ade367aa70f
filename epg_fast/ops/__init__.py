"""Operations with a plain PyTorch reference and, where it may pay, a hand-written kernel: one file per operation.

Importing this package needs neither Triton nor the compiled extension; a backend is loaded when it is first asked for.
"""

from epg_fast.ops.attention import attention, attention_ref
from epg_fast.ops.augment_view import JitterOperation, augment_view, augment_view_ref
from epg_fast.ops.euler_step import euler_step, euler_step_, euler_step_ref
from epg_fast.ops.extension import extension_status
from epg_fast.ops.fused_adamw_ema import fused_adamw_ema_, fused_adamw_ema_ref
from epg_fast.ops.gate_residual_norm_modulate import (
    gate_residual_norm_modulate,
    gate_residual_norm_modulate_fp8,
    gate_residual_norm_modulate_ref,
)
from epg_fast.ops.global_norm import global_norm, global_norm_ref
from epg_fast.ops.heun_step import heun_step, heun_step_, heun_step_ref
from epg_fast.ops.layer_norm_modulate import (
    layer_norm_modulate,
    layer_norm_modulate_fp8,
    layer_norm_modulate_ref,
    residual_norm_modulate,
)
from epg_fast.ops.linear_fp8 import linear_fp8, linear_fp8_ref
from epg_fast.ops.linear_fp8_dynamic import linear_fp8_dynamic, linear_fp8_dynamic_ref
from epg_fast.ops.linear_residual_norm import (
    linear,
    linear_residual,
    linear_residual_norm,
    linear_residual_norm_ref,
    linear_residual_ref,
    row_statistics,
)
from epg_fast.ops.mlp_residual import mlp_residual, mlp_residual_ref
from epg_fast.ops.norm_linear import norm_linear, norm_linear_ref
from epg_fast.ops.patch_embed import patch_embed, patch_embed_ref
from epg_fast.ops.patch_loss import patch_loss, patch_loss_ref, patchify
from epg_fast.ops.philox import philox_normal_of
from epg_fast.ops.quantize_rows import quantize_rows, quantize_rows_ref
from epg_fast.ops.resized_crop import resized_crop, resized_crop_ref
from epg_fast.ops.skip_linear import skip_linear, skip_linear_ref, skip_norms_fp8
from epg_fast.ops.timestep_embedding import (
    timestep_condition,
    timestep_condition_ref,
    timestep_embedding,
    timestep_embedding_ref,
)

__all__ = [
    "JitterOperation", "attention", "attention_ref", "augment_view", "augment_view_ref", "euler_step", "euler_step_",
    "euler_step_ref", "extension_status", "fused_adamw_ema_", "fused_adamw_ema_ref", "gate_residual_norm_modulate",
    "gate_residual_norm_modulate_fp8", "gate_residual_norm_modulate_ref", "global_norm", "global_norm_ref", "heun_step",
    "heun_step_", "heun_step_ref", "layer_norm_modulate", "layer_norm_modulate_fp8", "layer_norm_modulate_ref",
    "linear_fp8", "linear_fp8_dynamic", "linear_fp8_dynamic_ref", "linear_fp8_ref", "linear", "linear_residual",
    "linear_residual_ref", "linear_residual_norm", "linear_residual_norm_ref", "mlp_residual", "mlp_residual_ref",
    "norm_linear", "norm_linear_ref", "patch_embed", "patch_embed_ref", "patch_loss", "patch_loss_ref", "patchify",
    "philox_normal_of", "quantize_rows", "quantize_rows_ref", "residual_norm_modulate", "resized_crop",
    "resized_crop_ref", "row_statistics", "skip_linear", "skip_linear_ref", "skip_norms_fp8", "timestep_condition",
    "timestep_condition_ref", "timestep_embedding", "timestep_embedding_ref",
]  # fmt: skip
