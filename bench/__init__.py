"""Measurements; nothing in the package imports this folder.

`python -m bench` measures: ladder.py climbs the variants of a job, sample.py and train.py are the jobs, plain/ is what
they are compared with, ops.py and data.py measure operations and loaders. `python -m bench.ledger` counts what a GPU
would be given; roofline.py says what a job takes at least, resources.py what a kernel costs. All write rows of
results.py, which report.py shows and `python -m bench.compare` compares.
"""
