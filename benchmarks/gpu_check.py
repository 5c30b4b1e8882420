"""Everything that needs CUDA, in one run of under eight minutes: does it hold, and how fast is it?

    python benchmarks/gpu_check.py [--device cuda] [--json FILE]

- `trainer`: training in bfloat16 and float16 with masks held and weights kept in float32
- `compiled`: the same through `torch.compile`
- `throughput`: examples a second of the trainer, with masks, beside a plain torch loop
- `federation`: a short federation of two clients that share the GPU, dense and compressed, and a
  signed release of the model that was trained there, answered by a device as the server does

Where there is no CUDA device it says so, writes that into the JSON and ends with status 0.
``--device cpu`` rehearses the same steps on a small model; its figures say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness.report import machine
from prunecast.client.training import trainer
from prunecast.client.training.trainer import TensorBatches, evaluate, train

RUNS = 5
KEPT = 0.1  # fraction of every masked tensor

SCENARIO = """
schema = 1
name = "gpu-check"
description = "two clients on one device"
seed = 1
rounds = 4
output = "{output}"
[data]
source = "mnist-5k"
held_out = 1000
[partition]
kind = "iid"
[clients]
count = 2
[training]
epochs = 1
device = "{device}"
mixed_precision = "{mixed}"
[engine]
backend = "ray"
concurrent = 2
gpus = {gpus}
[arms.dense]
kind = "dense"
[arms.prunecast]
kind = "prunecast"
preset = "small"
[arms.prunecast.policy]
pruning_begin = 1
pruning_end = 3
[release]
name = "digits"
"""


class Network(nn.Module):
    """A small convolutional network with BatchNorm, for 32 x 32 colour images, of seeded weights.

    A class of its own, because `torch.compile` leaves modules of torch itself as they are.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        layers: list[nn.Module] = []
        for before, after in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * width, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of ten classes."""
        found: Tensor = self.layers(images)
        return found


def data(count: int) -> tuple[Tensor, Tensor]:
    """Images whose class shows in their mean colour, so that a loss can fall."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 10, (count,), generator=generator)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    return images + (labels / 5 - 1)[:, None, None, None], labels


def masks(model: nn.Module) -> dict[str, np.ndarray[Any, np.dtype[np.bool_]]]:
    """Random masks of every weight with two or more dimensions."""
    rng = np.random.default_rng(3)
    return {
        name: rng.random(tuple(parameter.shape)) < KEPT
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1
    }


def check_trainer(device: str, *, compiled: bool) -> dict[str, Any]:
    """Train in both half precisions; weights off the mask stay exactly zero."""
    from torch._dynamo.utils import counters  # seconds to import, for what compiles

    inputs, labels = data(2048 if device == "cuda" else 256)
    found: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float16):
        model = Network(32 if device == "cuda" else 4)
        held = masks(model)
        counters.clear()
        if compiled:
            model.compile()
        batches = TensorBatches(inputs, labels, batch_size=64, shuffle=True)
        before = evaluate(model, batches, device=device).loss
        precision, trainer._precision = trainer._precision, lambda device, wanted, d=dtype: d
        try:
            done = train(
                model, batches, epochs=4, lr=0.02, momentum=0.9, masks=held, device=device, seed=1
            )
        finally:
            trainer._precision = precision
        after = evaluate(model, batches, device=device)
        require(not compiled or counters["frames"]["ok"] > 0, "torch.compile compiled nothing")
        state = {name: value.detach().cpu() for name, value in model.named_parameters()}
        require(done.precision == str(dtype).removeprefix("torch."), f"{dtype} was not used")
        require(all(v.dtype == torch.float32 for v in state.values()), "weights left float32")
        for name, mask in held.items():
            require(not state[name].numpy()[~mask].any(), f"{name}: a pruned weight moved")
        require(after.loss < before, f"{dtype}: the loss did not fall ({before} to {after.loss})")
        found[done.precision] = {"loss": [before, after.loss], "accuracy": after.accuracy}
    return found


def check_throughput(device: str) -> dict[str, Any]:
    """Examples a second with masks held, and of the plain loop that a user would write."""
    inputs, labels = (tensor.to(device) for tensor in data(8192 if device == "cuda" else 512))
    width, batch = (64, 256) if device == "cuda" else (4, 64)
    dtype = torch.bfloat16

    def ours() -> None:
        batches = TensorBatches(inputs, labels, batch_size=batch)
        train(model, batches, epochs=1, lr=0.01, momentum=0.9, masks=held, device=device,
              mixed_precision=True, seed=1)  # fmt: skip

    def plain() -> None:
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        model.train()
        for first in range(0, len(inputs), batch):
            optimiser.zero_grad(set_to_none=True)
            with torch.autocast(device, dtype=dtype):
                outputs = model(inputs[first : first + batch])
                loss = nn.functional.cross_entropy(outputs, labels[first : first + batch])
            loss.backward()
            optimiser.step()

    rates: dict[str, float] = {}
    for name, run in (("prunecast", ours), ("torch", plain)):
        model = Network(width).to(device)
        held = masks(model)
        run()
        rates[name] = len(inputs) / statistics.median(timed(run, device) for _ in range(RUNS))
    return {**rates, "ratio": rates["prunecast"] / rates["torch"], "unit": "examples/s"}


def timed(run: Callable[[], None], device: str) -> float:
    """Seconds that a run takes, its work on the device included."""
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def check_federation(device: str) -> dict[str, Any]:
    """Two clients on one device, then a release of what they trained."""
    with tempfile.TemporaryDirectory() as folder:
        scenario = Path(folder) / "scenario.toml"
        on_gpu = device == "cuda"
        scenario.write_text(
            SCENARIO.format(
                output=folder,
                device=device,
                mixed="on" if on_gpu else "off",
                gpus=0.5 if on_gpu else 0.0,
            ),
            encoding="utf-8",
        )
        ran = subprocess.run(
            [sys.executable, "-m", "prunecast.cli", "simulate", str(scenario), "--json"],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        require(ran.returncode == 0, f"the federation failed: {ran.stderr[-2000:]}")
        result = json.loads(ran.stdout)
    release = result["release"]
    alike = release["identical_examples"]
    require(
        alike == release["examples"],
        f"the device answered {alike} of {release['examples']} as the server",
    )
    arms = {
        name: {key: arm[key] for key in ("accuracy", "bytes_up", "bytes_down", "seconds")}
        for name, arm in result["arms"].items()
    }
    return {"arms": arms, "identical_examples": alike}


def require(holds: bool, message: str) -> None:
    """Fail the step that is running."""
    if not holds:
        raise AssertionError(message)


def main(arguments: list[str] | None = None) -> int:
    """Run the steps; 1 if one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {
        "machine": {**machine(), "torch": torch.__version__},
        "device": options.device,
    }
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "trainer": lambda: check_trainer(options.device, compiled=False),
        "compiled": lambda: check_trainer(options.device, compiled=True),
        "throughput": lambda: check_throughput(options.device),
        "federation": lambda: check_federation(options.device),
    }
    if options.device == "cuda" and not torch.cuda.is_available():
        report["skipped"] = "there is no CUDA device: nothing was checked"
        print(f"gpu-check: skipped, {report['skipped']}")
        steps = {}
    elif options.device == "cuda":
        report["gpu"] = torch.cuda.get_device_name()
    failed = False
    for name, step in steps.items():
        started = time.perf_counter()
        try:
            outcome = {"ok": True, **step()}
        except Exception as error:  # every step is tried, whatever the one before it did
            outcome, failed = {"ok": False, "error": f"{type(error).__name__}: {error}"}, True
        outcome["seconds"] = round(time.perf_counter() - started, 1)
        report[name] = outcome
        print(f"gpu-check: {name}: {json.dumps(outcome)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
