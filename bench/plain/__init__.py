"""EPG in the plainest PyTorch: the baseline of the benchmarks, without a line of what it is compared with.

The operations are those of the released implementation, one call each, in its order: networks.py (LayerNorm in float32,
modulation, gates, concatenated skips and GELU as passes of their own; an adaLN projection per block), sampling.py
(noise levels, denoiser, guidance in two calls, samplers as loops), training.py (losses, and a step that reads the loss
on the host, clips, updates and averages parameter by parameter). Parameter names are the released checkpoints'.

Attention is `F.scaled_dot_product_attention`, what anyone would write today: the explicit softmax is slower, and would
flatter what is compared with it. Precision is autocast's, from outside.
"""
