"""The commands of python -m resnet_kernels. Each module has HELP, add_arguments(parser), run(options) -> status."""
