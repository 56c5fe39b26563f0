"""The networks that read frozen features."""

from torch import nn

PANDA_WIDTHS = (7192, 2048, 512, 128)


def panda_mlp(in_features: int = 4096, classes: int = 5) -> nn.Sequential:
    """The report's tile classifier: in -> 7192 -> 2048 -> 512 -> 128 -> classes, ReLU between.

    It returns logits, shape (N, classes), from features, shape (N, in_features). The report put a softmax
    in front of its cross-entropy, which applies softmax twice and flattens the gradients; here the loss
    takes the logits (REPRODUCTION.md, source A). At 4096 and 5 it has the report's 45,312,285 trainable
    parameters."""
    layers: list[nn.Module] = []
    width = in_features
    for next_width in PANDA_WIDTHS:
        layers += [nn.Linear(width, next_width), nn.ReLU()]
        width = next_width
    return nn.Sequential(*layers, nn.Linear(width, classes))
