"""A torch module and a published model as an ONNX graph with external weights."""
