"""TensorRT: lowering, engines, and the experts as a plugin."""
