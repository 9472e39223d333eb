"""What the bundle for MNN and the package for its engine share: the converter, the layout of weights, models run."""
