"""The service between Label Studio and the learning core: predictions, queue order and retraining by itself."""
