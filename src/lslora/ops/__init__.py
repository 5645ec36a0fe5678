"""The spline as an operation on tensors and numbers: no config, no module, no model."""
