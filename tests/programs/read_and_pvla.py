"""READ's plain forward pass and PVLA; prints the CPU's backend in the end and every warning of ours."""

import warnings

import torch
from peft import get_peft_model
from torch import nn

import peft_read


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, x, attention_mask=None):
        return self.layers[0](x)


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = get_peft_model(Net(), peft_read.READConfig(target_modules=["0"]))
    for _ in range(2):
        model(torch.rand(2, 5, 8)).sum().backward()
        peft_read.PVLALoss()(torch.rand(2, 5, 8, requires_grad=True), torch.rand(2, 4, 8)).backward()
for warning in caught:
    if warning.category is RuntimeWarning:
        print("SAID", warning.message)
print("CPU", peft_read.backends.backend())
