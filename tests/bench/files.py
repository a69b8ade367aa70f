"""Files of results with made-up numbers."""

import json


def op_row(op="layer_norm_modulate", provider="triton", median=10.0, spread=0.02, copy=4.0, gemm=800.0, **more):
    """A row as `pytest bench/ops` writes it, at half the bandwidth of the copy: TB/s, TFLOP/s, us."""
    intensity = {"layer_norm_modulate": 2.25, "attention": 128.0, "resized_crop": 0.0}[op]
    gbps = 1e3 * copy / 2
    tflops = intensity * gbps / 1e3
    return {
        "op": op,
        "shape": [64, 258, 1584],
        "dtype": "torch.bfloat16",
        "direction": "forward",
        "provider": provider,
        "median_us": median,
        "p20_us": median * (1 - spread),
        "p80_us": median * (1 + spread),
        "gbps": gbps,
        "percent_of_copy": 50.0,
        "tflops": tflops,
        "percent_of_gemm": 100 * tflops / gemm,
    } | more


def ops_file(path, rows=None, device="GPU A", **ceilings):
    """Write pytest-benchmark's JSON and return its path."""
    if rows is None:
        rows = [op_row(provider=provider, **ceilings) for provider in ("triton", "compile", "eager")]
        rows += [op_row("attention", provider, **ceilings) for provider in ("triton", "sdpa-flash")]
        rows += [op_row("resized_crop", **ceilings)]
    benchmarks = [{"name": f"test_{row['op']}[{i}]", "extra_info": row} for i, row in enumerate(rows)]
    path.write_text(json.dumps({"machine_info": {"device": device, "torch": "2"}, "benchmarks": benchmarks}))
    return path
