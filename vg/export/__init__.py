"""Export of models: ONNX files, checked against PyTorch, and programs of torch.export."""
