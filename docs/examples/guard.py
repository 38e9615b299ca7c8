"""A client looks at its own update before it sends it, and holds back one that gives its batch away."""

import torch

import unbatch

setting = unbatch.Case.parse("digits:batch=2,width=64,activation=gelu").setting()  # two private pictures
model, loss, x, y = setting.model, setting.loss, setting.inputs, setting.labels
told = {"model": model, "loss": loss, "inputs": x, "labels": y}

plain = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
update = dict(zip([name for name, _ in model.named_parameters()], plain, strict=True))
leaks = None
try:
    unbatch.guard(update, **told, seconds=120.0)  # at most: it ends as soon as every example is recovered
except unbatch.Leak as held:
    leaks = held
print(leaks)  # this update must not be sent: Example 0 is recovered exactly. Example 1 is recovered exactly.
assert leaks is not None
assert leaks.examples == [0, 1]

private = "dp-sgd:clip=1,noise_multiplier=2"  # the client's own training loop may do this with Opacus
sent = unbatch.observe(model, loss, x, y, defences=[private])[0].update
record = unbatch.guard(sent, defences=[private], **told, attacks=["label-count", "gradient-matching"], seconds=5.0)
print(record.verdict())  # None of 2 private images recovered ...

# That it went through says that these attacks failed in these seconds. It does not say that none succeeds: that takes a
# bound for any attacker (`unbatch risk`, `unbatch harden`) or an epsilon small enough (docs/how-safe-is-safe-enough.md).
