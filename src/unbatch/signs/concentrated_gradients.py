"""concentrated-gradients: layers to which one example of a batch sends more than all others together (D-SNR)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, final

from unbatch.inversion.received import Received
from unbatch.sign import Sign, SignReading

FEWEST = 8  # examples


@final
class ConcentratedGradients(Sign):
    """One example sends a layer more than all others of the batch together.

    The disaggregation signal-to-noise ratio of a layer is max_i |g_i| / (sum_i |g_i| - max_i |g_i|) over the examples'
    gradients. Each is taken here over the size of the same example's gradient at the outputs: an honest model that has
    learnt all but one example sends that one's gradient alone too, and this takes it out. |g_i| is taken as the product of
    what reached the layer and what comes back to it.

    >>> import torch
    >>> from unbatch.inversion.received import Received
    >>> from unbatch.signs import ConcentratedGradients
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> seen = Received.of(model, inputs=torch.rand(16, 4), labels=torch.arange(16) % 3)
    >>> ConcentratedGradients()(seen).value < ConcentratedGradients.limit
    True
    """

    paper: ClassVar[str] = "Garov et al., Hiding in Plain Sight (SEER), ICLR 2024; the normalisation is ours"
    honest: ClassVar[float] = 0.0553
    limit: ClassVar[float] = 0.6

    def read(self, received: Received) -> Iterator[SignReading]:
        for layer in received.each_running():
            sizes = layer.given * layer.energy.sum(1).sqrt()
            if len(sizes) < FEWEST or layer.head or not bool(sizes.max() > 0):
                continue
            others = sizes.sum() - sizes.max()
            value = float(sizes.max() / others.clamp_min(1e-12 * sizes.max()))
            words = f"one of {len(sizes)} examples sends it {value:.2f} times what all others do"
            yield SignReading(layer.matrix.layer, value, words)
