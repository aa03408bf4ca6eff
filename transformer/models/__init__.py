"""Layers, the Transformer, LSTM and convolutional baselines, loss and FLOPs."""
