"""Functions of tensors: they never see a model or a config object."""
