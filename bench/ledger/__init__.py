"""The ledger: which kernels a Hopper GPU would be given, and the least time they take, counted on any machine.

Nothing here is measured. `cost` is arithmetic and needs neither CUDA nor a GPU; `device` shows PyTorch a GPU that is
not there; `count` follows torch.compile and the package's launchers up to the launches, `triton_ir` into what a kernel
of the package touches; `jobs` says what is counted; `products` studies the package's own matrix products.
`python -m bench.ledger` is the command.
"""
