"""Operations with a plain PyTorch reference and, where it may pay, a hand-written kernel: one file per operation.

Importing this package needs neither Triton nor the compiled extension; a backend is loaded when it is first asked for.
"""

from epg_fast.ops.euler_step import euler_step, euler_step_ref
from epg_fast.ops.extension import extension_status
from epg_fast.ops.gate_residual_norm_modulate import (
    gate_residual_norm_modulate,
    gate_residual_norm_modulate_fp8,
    gate_residual_norm_modulate_ref,
)
from epg_fast.ops.layer_norm_modulate import (
    layer_norm_modulate,
    layer_norm_modulate_fp8,
    layer_norm_modulate_ref,
)
from epg_fast.ops.timestep_embedding import (
    timestep_condition,
    timestep_condition_ref,
    timestep_embedding,
    timestep_embedding_ref,
)

__all__ = [
    "euler_step",
    "euler_step_ref",
    "extension_status",
    "gate_residual_norm_modulate",
    "gate_residual_norm_modulate_fp8",
    "gate_residual_norm_modulate_ref",
    "layer_norm_modulate",
    "layer_norm_modulate_fp8",
    "layer_norm_modulate_ref",
    "timestep_condition",
    "timestep_condition_ref",
    "timestep_embedding",
    "timestep_embedding_ref",
]
