"""Small models as other tools leave them: weights in every place where ONNX allows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


def weight(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal values."""
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) / 4).astype(np.float32)


def tensor(values: np.ndarray, name: str) -> onnx.TensorProto:
    """An initialiser."""
    return numpy_helper.from_array(np.asarray(values), name)


def constant(values: np.ndarray, name: str) -> onnx.NodeProto:
    """A ``Constant`` node."""
    return helper.make_node("Constant", [], [name], value=tensor(values, ""), name=f"make_{name}")


def value(name: str, *shape: int | str, kind: int = FLOAT) -> onnx.ValueInfoProto:
    """An input or output."""
    return helper.make_tensor_value_info(name, kind, list(shape))


def model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    initialisers: list[onnx.TensorProto],
    *,
    opset: int = 17,
    functions: tuple[onnx.FunctionProto, ...] = (),
) -> onnx.ModelProto:
    """A model of IR version 8."""
    graph = helper.make_graph(nodes, "g", inputs, outputs, initialisers)
    opsets = [helper.make_opsetid("", opset)]
    opsets += [helper.make_opsetid(f.domain, 1) for f in functions]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=functions)


def plain(opset: int = 17) -> onnx.ModelProto:
    """Two layers; the first kernel is used twice, the reshape's target is a small integer."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["e"]),
        helper.make_node("Reshape", ["e", "target"], ["f"]),
        helper.make_node("MatMul", ["f", "head"], ["y"]),
    ]
    held = [
        tensor(weight(24, 24), "w"),
        tensor(weight(24), "b"),
        tensor(np.array([-1, 24]), "target"),
        tensor(weight(24, 5), "head"),
    ]
    return model(nodes, [value("x", "batch", 24)], [value("y", "batch", 5)], held, opset=opset)


def constants() -> onnx.ModelProto:
    """Every weight in a ``Constant`` node; a scalar and a clip's bounds among them."""
    nodes = [
        constant(weight(24, 16), "w"),
        constant(weight(16), "b"),
        constant(np.float32(0.5), "half"),
        constant(np.float32(-1), "low"),
        constant(np.float32(1), "high"),
        helper.make_node("Constant", [], ["gain"], value_floats=[1.0, 2.0, 3.0, 4.0] * 4),
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Mul", ["c", "half"], ["d"]),
        helper.make_node("Clip", ["d", "low", "high"], ["e"]),
        helper.make_node("Mul", ["e", "gain"], ["y"]),
    ]
    return model(nodes, [value("x", "n", 24)], [value("y", "n", 16)], [])


def branches() -> onnx.ModelProto:
    """An ``If`` whose branches both call their kernel ``w``; one gives a constant out directly."""
    then = helper.make_graph(
        [constant(weight(16, 16, seed=1), "w"), helper.make_node("MatMul", ["h", "w"], ["t"])],
        "then",
        [],
        [
            value("t", "n", 16),
        ],
    )
    other = helper.make_graph(
        [helper.make_node("MatMul", ["h", "w"], ["t2"])],
        "other",
        [],
        [value("t2", "n", 16)],
        [tensor(weight(16, 16, seed=2), "w")],
    )
    given = helper.make_graph([constant(weight(300, seed=3), "o1")], "g1", [], [value("o1", 300)])
    taken = helper.make_graph([constant(weight(300, seed=4), "o2")], "g2", [], [value("o2", 300)])
    nodes = [
        helper.make_node("MatMul", ["x", "outer"], ["h"]),
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["y"], "choose", then_branch=then, else_branch=other),
        helper.make_node("If", ["positive"], ["z"], then_branch=given, else_branch=taken),
    ]
    held = [tensor(weight(24, 16), "outer"), tensor(np.float32(0), "zero")]
    ends = [value("y", "n", 16), value("z", 300)]
    return model(nodes, [value("x", "n", 24)], ends, held)


def loop() -> onnx.ModelProto:
    """Three turns of a ``Loop`` with a kernel inside, and an ``If`` inside that."""
    inner = [
        helper.make_graph(
            [constant(weight(16, 16, seed=s), "k"), helper.make_node("MatMul", ["s", "k"], [out])],
            out,
            [],
            [value(out, "n", 16)],
        )
        for s, out in ((5, "p"), (6, "q"))
    ]
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "w"], ["s"]),
            helper.make_node("Mod", ["i", "two"], ["odd_number"]),
            helper.make_node("Cast", ["odd_number"], ["odd"], to=TensorProto.BOOL),
            helper.make_node("If", ["odd"], ["u"], then_branch=inner[0], else_branch=inner[1]),
            helper.make_node("Tanh", ["u"], ["next"]),
            helper.make_node("Identity", ["going"], ["go_on"]),
        ],
        "body",
        [
            value("i", kind=TensorProto.INT64),
            value("going", kind=TensorProto.BOOL),
            value("state", "n", 16),
        ],
        [value("go_on", kind=TensorProto.BOOL), value("next", "n", 16)],
        [tensor(weight(16, 16, seed=7), "w"), tensor(np.array(2), "two")],
    )
    nodes = [helper.make_node("Loop", ["turns", "always", "x"], ["y"], "turn", body=body)]
    held = [tensor(np.array(3), "turns"), tensor(np.array(True), "always")]
    return model(nodes, [value("x", "n", 16)], [value("y", "n", 16)], held)


def scan() -> onnx.ModelProto:
    """A ``Scan`` over the rows of a sequence, with a kernel inside."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["row", "w"], ["a"]),
            helper.make_node("Add", ["a", "state"], ["b"]),
            helper.make_node("Tanh", ["b"], ["next"]),
            helper.make_node("Identity", ["next"], ["out"]),
        ],
        "body",
        [value("state", 16), value("row", 16)],
        [value("next", 16), value("out", 16)],
        [tensor(weight(16, 16, seed=8), "w")],
    )
    nodes = [helper.make_node("Scan", ["start", "x"], ["end", "y"], body=body, num_scan_inputs=1)]
    ends = [value("end", 16), value("y", "rows", 16)]
    return model(nodes, [value("x", "rows", 16)], ends, [tensor(weight(16), "start")])


def function() -> onnx.ModelProto:
    """A function that is called twice and holds its kernel as a constant."""
    opsets = [helper.make_opsetid("", 17)]
    made = helper.make_function(
        "own",
        "Layer",
        ["x"],
        ["y"],
        [constant(weight(16, 16, seed=9), "w"), helper.make_node("MatMul", ["x", "w"], ["y"])],
        opsets,
    )
    nodes = [
        helper.make_node("Layer", ["x"], ["h"], domain="own"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Layer", ["r"], ["y"], domain="own"),
    ]
    ends = [value("x", "n", 16)], [value("y", "n", 16)]
    return model(nodes, *ends, [], functions=(made,))


def sparse() -> onnx.ModelProto:
    """A kernel as a sparse initialiser."""
    dense = weight(24, 16) * (np.random.default_rng(1).random((24, 16)) < 0.2)
    places = np.flatnonzero(dense)
    made = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [value("x", "n", 24)],
        [value("y", "n", 16)],
        [],
    )
    values = tensor(dense.ravel()[places], "w")
    made.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, tensor(places, ""), [24, 16])
    )
    return made


KINDS: dict[str, Callable[[], onnx.ModelProto]] = {
    f.__name__: f for f in (plain, constants, branches, loop, scan, function, sparse)
}


def _bomb(
    node: str, *inputs: np.ndarray, functions: list[onnx.FunctionProto] | None = None, **attributes
) -> onnx.ModelProto:
    """A small model, one of whose nodes makes 32 GiB of nothing."""
    names = [f"i{i}" if given.size else "" for i, given in enumerate(inputs)]
    nodes = [
        helper.make_node(node, names, ["c"], **attributes),
        helper.make_node("Cast", ["c"], ["f"], to=FLOAT),
        helper.make_node("ReduceSum", ["f"], ["s"], keepdims=0),
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Add", ["m", "s"], ["y"]),
    ]
    held = [tensor(given, name) for given, name in zip(inputs, names, strict=True) if name]
    held.append(tensor(weight(4, 4), "w"))
    made = model(nodes, [value("x", "n", 4)], [value("y", "n", 4)], held)
    if functions:
        nodes[0].domain = "d"
        made.graph.node[0].domain = "d"
        made.opset_import.append(helper.make_opsetid("d", 1))
        made.functions.extend(functions)
    return made


def _laughs() -> onnx.ModelProto:
    """Functions that call the one before them twice: inlined, they are 2^40 nodes."""
    functions = []
    for i in range(40):
        nodes = [
            helper.make_node(f"f{i - 1}", ["a"], ["t"], domain="d"),
            helper.make_node(f"f{i - 1}", ["t"], ["b"], domain="d"),
        ]
        if not i:
            nodes = [constant(weight(4), "k"), helper.make_node("Mul", ["a", "k"], ["b"])]
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("d", 1)]
        functions.append(helper.make_function("d", f"f{i}", ["a"], ["b"], nodes, opsets))
    return _bomb("f39", weight(4), functions=functions)


_HUGE, _ONE = np.int64(1 << 33), weight(1)
BOMBS: dict[str, Callable[[], onnx.ModelProto]] = {
    "ConstantOfShape": lambda: _bomb("ConstantOfShape", np.array([_HUGE])),
    "Expand": lambda: _bomb("Expand", _ONE, np.array([_HUGE])),
    "Range": lambda: _bomb("Range", np.int64(0), _HUGE, np.int64(1)),
    "Pad": lambda: _bomb("Pad", _ONE, np.array([0, _HUGE])),
    "Resize": lambda: _bomb("Resize", weight(1, 1, 1), np.zeros(0), np.float32([1, 1, 1 << 33])),
    "RandomNormal": lambda: _bomb("RandomNormal", shape=[1 << 33]),
    "OneHot": lambda: _bomb("OneHot", np.array([1]), _HUGE, np.float32([0, 1])),
    "functions": _laughs,
}
"""Models of up to 3 kB that ask for more memory than there is."""


def endless() -> onnx.ModelProto:
    """A loop of 2^62 turns."""
    inputs = [value("i", kind=TensorProto.INT64), value("go", kind=TensorProto.BOOL)]
    body = helper.make_graph(
        [
            helper.make_node("Add", ["acc", "one"], ["sum"]),
            helper.make_node("Identity", ["go"], ["on"]),
        ],
        "body",
        [*inputs, value("acc", 1)],
        [value("on", kind=TensorProto.BOOL), value("sum", 1)],
        [tensor(weight(1), "one")],
    )
    return _bomb("Loop", np.int64(1 << 62), np.zeros(0), _ONE, body=body)


def save(proto: onnx.ModelProto, path: Path, *, external: bool = False) -> Path:
    """Write a model, with its large tensors beside it if `external`."""
    if external:
        (path.parent / "data").mkdir(exist_ok=True)
        onnx.save(
            proto, path, save_as_external_data=True, location="data/w.bin", size_threshold=100,
            convert_attribute=False,
        )  # fmt: skip
    else:
        onnx.save(proto, path)
    return path


def _ml(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
) -> onnx.ModelProto:
    """A model with the operators of ai.onnx.ml, as scikit-learn's converter leaves them."""
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


_TREE = {
    "nodes_treeids": [0, 0, 0], "nodes_nodeids": [0, 1, 2], "nodes_featureids": [1, 0, 0],
    "nodes_modes": ["BRANCH_LEQ", "LEAF", "LEAF"], "nodes_values": [0.25, 0.0, 0.0],
    "nodes_truenodeids": [1, 0, 0], "nodes_falsenodeids": [2, 0, 0],
    "nodes_missing_value_tracks_true": [0, 0, 0],
}  # fmt: skip


def trees() -> onnx.ModelProto:
    """A tree ensemble that says a number: its thresholds are attributes."""
    targets = {
        "target_treeids": [0, 0], "target_nodeids": [1, 2], "target_ids": [0, 0],
        "target_weights": [-1.5, 2.25], "n_targets": 1,
    }  # fmt: skip
    node = helper.make_node(
        "TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml", **_TREE, **targets
    )
    return _ml([node], [value("x", "batch", 3)], [value("y", "batch", 1)])


def labelling_trees() -> onnx.ModelProto:
    """A tree ensemble that says a class by its name, and how sure it is."""
    classes = {
        "class_treeids": [0, 0], "class_nodeids": [1, 2], "class_ids": [0, 1],
        "class_weights": [1.0, 1.0], "classlabels_strings": ["no", "yes, surely"],
    }  # fmt: skip
    node = helper.make_node(
        "TreeEnsembleClassifier", ["x"], ["label", "p"], domain="ai.onnx.ml", **_TREE, **classes
    )
    outputs = [value("label", "batch", kind=TensorProto.STRING), value("p", "batch", 2)]
    return _ml([node], [value("x", "batch", 3)], outputs)


def linear() -> onnx.ModelProto:
    """A linear model whose coefficients are attributes."""
    node = helper.make_node(
        "LinearRegressor",
        ["x"],
        ["y"],
        domain="ai.onnx.ml",
        coefficients=[0.5, -1.0, 2.0],
        intercepts=[0.125],
        targets=1,
    )
    return _ml([node], [value("x", "batch", 3)], [value("y", "batch", 1)])


def texts() -> onnx.ModelProto:
    """Words in; numbers, and words, out."""
    nodes = [
        helper.make_node(
            "LabelEncoder",
            ["word"],
            ["code"],
            domain="ai.onnx.ml",
            keys_strings=["1", "2", "straße"],
            values_int64s=[10, 20, 30],
            default_int64=-1,
        ),
        helper.make_node(
            "LabelEncoder",
            ["word"],
            ["name"],
            domain="ai.onnx.ml",
            keys_strings=["1", "2", "straße"],
            values_strings=["one", "", "road"],
            default_string="none of them",
        ),
    ]
    ends = [value("code", 3, kind=TensorProto.INT64), value("name", 3, kind=TensorProto.STRING)]
    return _ml(nodes, [value("word", 3, kind=TensorProto.STRING)], ends)


def arithmetic() -> onnx.ModelProto:
    """No weight at all."""
    node = helper.make_node("Softmax", ["x"], ["y"])
    return model([node], [value("x", "batch", 3)], [value("y", "batch", 3)], [])


WEIGHTLESS: dict[str, Callable[[], onnx.ModelProto]] = {
    "trees": trees,
    "labelling trees": labelling_trees,
    "linear": linear,
    "texts": texts,
    "arithmetic": arithmetic,
}
"""Models that hold no tensor of weights."""


def shared_zeros() -> onnx.ModelProto:
    """Two quantised layers whose weights share their zero points, as exporters leave them.

    onnxruntime refuses ``session.x64quantprecision`` for it and runs it otherwise.
    """
    rng = np.random.default_rng(0)
    inits = [tensor(np.float32(0.02), "s"), tensor(np.uint8(128), "z")]
    inits += [tensor(np.full(4, 0.01, np.float32), "steps"), tensor(np.zeros(4, np.int8), "zeros")]
    nodes: list[onnx.NodeProto] = []

    def quantised(given: str, name: str) -> None:
        nodes.append(helper.make_node("QuantizeLinear", [given, "s", "z"], [f"{name}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", "s", "z"], [name]))

    quantised("x", "x0")
    for layer in (1, 2):
        inits.append(tensor(rng.integers(-100, 100, (4, 4)).astype(np.int8), f"w{layer}"))
        given = [f"w{layer}", "steps", "zeros"]
        nodes.append(helper.make_node("DequantizeLinear", given, [f"v{layer}"], axis=1))
        nodes.append(helper.make_node("MatMul", [f"x{layer - 1}", f"v{layer}"], [f"m{layer}"]))
        quantised(f"m{layer}", "y" if layer == 2 else f"x{layer}")
    return model(nodes, [value("x", "n", 4)], [value("y", "n", 4)], inits)
