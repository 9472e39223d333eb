"""How far computed numbers may be from each other in the tests, each bound with its reason."""

GOLDEN = 1e-4  # float32 sums in another order, through all blocks; what the project promises, met to about 1e-5
PATCHED_ABSOLUTE = 1e-5  # one module, same weights: only the order of float32 sums differs
PATCHED_RELATIVE = 1e-6  # a few float32 roundings (6e-8 each)
