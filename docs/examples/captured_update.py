"""A server saves one exchange; an auditor reads it later, without the truth."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import unbatch

rng = torch.Generator().manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.Tanh(), nn.Linear(32, 4))
image, label = torch.rand(1, 3, 8, 8, generator=rng), torch.tensor([2])

# The server's side: what it sent out, what came back.
seen, _ = unbatch.observe(model, nn.functional.cross_entropy, image, label)
path = Path(tempfile.mkdtemp()) / "captured.safetensors"
seen.save(path)

# The auditor's side.
again = unbatch.Observation.load(path, model=model, loss=nn.functional.cross_entropy)
record = unbatch.audit(again, attacks=["bias-ratio", "label-count"])
assert len(record.recovered()) == 1
assert len(record.notes) == 1  # that the label is proven; nothing is off with the capture
