"""Models as files for other runtimes. `export.onnx.export` writes a directory that ONNX Runtime runs."""
