"""Small networks for tests of what looks inside modules."""

from torch import nn


class Net(nn.Module):
    """Layers by name, and a function of the module and its input."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)
