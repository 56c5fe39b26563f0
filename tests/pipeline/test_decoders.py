import torch
from torch import nn

from pipeline.downstream.decoders import panda_mlp


def test_the_reports_parameter_count() -> None:
    with torch.device("meta"):
        decoder = panda_mlp()
    assert sum(p.numel() for p in decoder.parameters() if p.requires_grad) == 45_312_285


def test_logits_come_out_unsquashed() -> None:
    decoder = panda_mlp(8, 3)
    assert [type(layer) for layer in decoder] == [nn.Linear, nn.ReLU] * 4 + [nn.Linear]
    with torch.no_grad():
        decoder[-1].weight.zero_()
        decoder[-1].bias.copy_(torch.tensor([-2.0, 0.0, 5.0]))
        logits = decoder(torch.zeros(2, 8))
    assert logits.tolist() == [[-2.0, 0.0, 5.0]] * 2
