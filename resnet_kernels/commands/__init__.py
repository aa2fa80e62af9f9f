"""The larger commands of `python -m resnet_kernels`, a file each, and what they are made of."""
