"""A package, or the `tests` that torch-fidelity's wheel puts beside it would be imported instead."""
