"""The networks whose tensors are measured, by the names under which finished runs are kept.

They are the product's; `benchmarks.harness.federation` names them by this module, and a cache of
runs is keyed by these names.
"""

from prunecast.simulations.networks.attention import Transformer, small_transformer
from prunecast.simulations.networks.convolutional import cnn
from prunecast.simulations.networks.convolutional import narrow_lenet as lenet
from prunecast.simulations.networks.recurrent import Lstm, small_lstm
from prunecast.simulations.networks.residual import ResNet, small_resnet_batch, small_resnet_group

__all__ = [
    "Lstm",
    "ResNet",
    "Transformer",
    "cnn",
    "lenet",
    "small_lstm",
    "small_resnet_batch",
    "small_resnet_group",
    "small_transformer",
]
