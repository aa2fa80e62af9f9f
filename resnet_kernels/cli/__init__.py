"""Commands of python -m resnet_kernels that have a file of their own: HELP, add_arguments(parser), run(options) -> status."""
