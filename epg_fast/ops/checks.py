"""What operations ask of their arguments, in one wording: what was got, what was wanted."""

import torch


def check_shapes(op: str, sizes: dict[str, int], **wanted: tuple[torch.Tensor | None, str] | tuple) -> None:
    """Raise ValueError for a tensor of another shape than is wanted of it, a letter for a dimension: "BD|B1D".

    wanted: by name the tensor, its shapes and perhaps what the message adds. sizes: of letters that are known; a letter
    that is met first becomes known. None fits.
    """
    for name, (tensor, forms, *hint) in wanted.items():
        if tensor is None or any(_takes_shape(sizes, form, tensor.shape) for form in forms.split("|")):
            continue
        lists = (", ".join(str(sizes.get(letter, letter)) for letter in form) for form in forms.split("|"))
        shapes = " or ".join(f"[{sides}]" for sides in lists)
        raise ValueError(f"{op}: got {name} of shape {tuple(tensor.shape)}, wanted {shapes}{''.join(hint)}")


def _takes_shape(sizes: dict[str, int], form: str, shape: torch.Size) -> bool:
    if len(form) != len(shape):
        return False
    met = {"1": 1} | sizes
    for letter, size in zip(form, shape, strict=True):
        if met.setdefault(letter, size) != size:
            return False
    sizes.update(met)
    return True


def check_floating(op: str, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{op}: got {name} in {tensor.dtype}, wanted a floating dtype; convert it")


def check_dtype(op: str, wanted: torch.dtype, remedy: str, **tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != wanted:
            raise ValueError(f"{op}: got {name} in {tensor.dtype}, wanted {wanted}; {remedy}")


def check_both(op: str, **pair: object) -> None:
    """Raise ValueError if one of two is None and the other is not."""
    missing = [name for name, value in pair.items() if value is None]
    if len(missing) == 1:
        raise ValueError(f"{op}: got no {missing[0]}, wanted both {' and '.join(pair)}, or neither")
