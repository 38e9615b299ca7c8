"""FedAvg: four local steps do not hide a single example from the ratio of weight and bias."""

import torch
from torch import nn

import unbatch

rng = torch.Generator().manual_seed(0)
model = nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 2))
row, label = torch.randn(1, 30, generator=rng), torch.tensor([1])
setting = unbatch.Setting(
    model=model,
    loss=nn.functional.cross_entropy,
    inputs=row,
    labels=label,
    protocol=unbatch.Protocol(local_steps=4, learning_rate=0.1),
)
record = unbatch.audit(setting, attacks=["bias-ratio"])
assert len(record.recovered()) == 1
