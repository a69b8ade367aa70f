"""What is particular to norms: how their backward pass shares the tokens of an image out."""

import functools

import pytest

from tests.ops.examples import EXAMPLES
from tests.ops.kernel_checks import DEVICE, assert_accurate, needs_triton


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.slow
def test_gradients_do_not_depend_on_how_many_tokens_a_program_takes(monkeypatch):
    from epg_kernels import _norm_modulate as kernels

    config = kernels.config_for(40)
    assert [kernels._tokens_per_program(config, batch, 258) for batch in (64, 768, 5000)] == [40, 136, 264]
    monkeypatch.setattr(kernels, "TOKENS", 8)
    monkeypatch.setattr(kernels, "TWO_WAVES", 6)
    assert kernels._tokens_per_program(config, 3, 37) == 32
    example = EXAMPLES["layer_norm_modulate"]
    inputs = example.inputs((3, 37, 40), "fp32", device=DEVICE)
    assert_accurate(functools.partial(example.call, "triton"), example.reference, inputs)
