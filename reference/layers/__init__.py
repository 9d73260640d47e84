"""The layers of the CoLT5 system, made of the operations of `reference` or of those of `kernels`."""
