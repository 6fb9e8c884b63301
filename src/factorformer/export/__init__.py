"""Models as files for other runtimes.

`export.onnx.export` writes a directory that ONNX Runtime runs, `export.openvino.export` one for OpenVINO, and
`export.linear.export` one that transformers loads without this package.
"""
