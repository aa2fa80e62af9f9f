"""Commands beside the benchmarks: README's tables, costs, interference, image sizes, small result files."""
