"""PyTorch references: plain, faithful to the original code, without export tricks."""
