"""Export GLM-family language models from a PyTorch checkpoint to verified ONNX graphs.

Importing this package loads nothing heavy; the parts that need torch or onnx import them themselves.
"""

__version__ = "0.1.0"
