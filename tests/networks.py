"""Small networks of random weights, for tests of all that uses one."""

import torch

from epg_fast.models import EPGViT

SIZES = {"image_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
DECODER = {"decoder_depth": 2, "decoder_embed_dim": 48, "decoder_num_heads": 2, "num_classes": 5}
HEAD = {"hidden_dim": 16, "output_dim": 8}


def randomized(model, std=0.1):
    """The model, whose every parameter is noise: zeros of the initialisation would hide what is behind them."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def make_model(kind=EPGViT, std=0.1, **changes):
    """A generator of five classes, or an encoder, of 16 x 16 images."""
    return randomized(kind(**SIZES | (DECODER if issubclass(kind, EPGViT) else HEAD) | changes), std)


def make_inputs(model, batch=2):
    """(x, t), and y if the model has classes."""
    x = torch.randn(batch, 3, model.image_size, model.image_size)
    labels = [torch.arange(batch) % model.num_classes] if getattr(model, "num_classes", 0) else []
    return x, torch.linspace(-1500, 1400, batch), *labels


class Adapter(torch.nn.Module):
    """Changes what a module computes, and shows its parameters, as adapters do."""

    def __init__(self, module, change):
        super().__init__()
        self.module, self.change = module, change

    def forward(self, *args):
        return self.change(self.module(*args))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def change(model, path, how, change):
    """Put an adapter, or a hook, on the module of this path: its output goes through `change`."""
    if how == "hook":
        model.get_submodule(path).register_forward_hook(lambda module, args, out: change(out))
    else:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Adapter(model.get_submodule(path), change))
