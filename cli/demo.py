"""`prunecast demo`: everything once, on real digits, in three minutes."""

from __future__ import annotations

from prunecast.cli.simulate import AsJson, Output, Rounds, Seed

__all__ = ["demo"]


def demo(
    seed: Seed = None, rounds: Rounds = None, output: Output = None, as_json: AsJson = False
) -> None:
    """Train on real digits, dense and compressed, and deliver the result to a device.

    Ten simulated clients train a convolutional network on 4,000 MNIST images, once with plain
    Flower and once through Prunecast, with the same seeds. Then two versions are released, signed
    and served, and an edge agent in a process of its own downloads the first, patches itself to
    the second and classifies the held-out images. Takes under three minutes on two cores and
    needs no network.
    """
    from prunecast.cli.simulate import load, run_and_show

    run_and_show(load("demo", seed, rounds, output), as_json=as_json)
