"""Triton kernels and their launchers, one file per operation, with the same stem as in `epg_fast.ops`.

Importing this package does not import Triton; importing one of its modules does. bench/launches.py calls the launchers
so that `python -m bench.resources` can compile each kernel in each configuration without a GPU.
"""

import os

# Triton 3.9 warns that from 3.10 on it fuses a * b + c only where asked to. These kernels are to stay as they are.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
