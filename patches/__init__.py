"""The supported architectures, one file each."""
