"""Training on loku_kernels: adapters, data, evaluation."""
